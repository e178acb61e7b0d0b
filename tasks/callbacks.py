"""What people look at while a network learns: pictures of what it finds, and of how it has come along."""

from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from PIL import Image
from torch import Tensor

from tasks.drawing.history import history
from tasks.drawing.pictures import contact_sheet, save_png
from tasks.wandb_run import log_boxes, log_pictures


class Pictures(Callback):
    """Ground truth beside predictions for the same few images, spread over the split, after each judgement.

    They go to `folder` as PNG and to W&B, of detectors with interactive boxes.

    Args:
        folder: where the pictures are written.
        images: how many.
        min_score: predictions below it are not drawn.
    """

    def __init__(self, folder: str | Path, images: int = 8, min_score: float = 0.5) -> None:
        self.folder, self.images, self.min_score = Path(folder), images, min_score
        self._seen = 0
        self._pictures: list[Image.Image] = []
        self._layers: list[tuple[Tensor, dict[str, Any], dict[str, Any]]] = []

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if not trainer.is_global_zero:
            return
        task: Any = pl_module
        apart = self._apart(trainer, len(batch.image_ids))
        for i in range(len(batch.image_ids)):
            self._seen += 1
            if (self._seen - 1) % apart or len(self._pictures) == self.images:
                continue
            self._pictures.append(task.picture(batch, i, outputs[i], self.min_score))
            if hasattr(task, "layers"):
                self._layers.append(task.layers(batch, i, outputs[i], self.min_score))

    on_test_batch_end = on_validation_batch_end

    def _apart(self, trainer: Trainer, batch_size: int) -> int:
        """Every how many images of this process's share one is shown; class folders have a class in a row."""
        loader: Any = trainer.test_dataloaders if trainer.testing else trainer.val_dataloaders
        batches = int(sum(trainer.num_test_batches if trainer.testing else trainer.num_val_batches))
        return max(1, min(len(loader.sampler), batches * batch_size) // max(1, self.images))

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._show(trainer, "val")

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._show(trainer, "test")

    def _show(self, trainer: Trainer, split: str) -> None:
        pictures, layers = self._pictures, self._layers
        self._pictures, self._layers, self._seen = [], [], 0
        if not pictures or trainer.sanity_checking:
            return
        fitting = trainer.state.fn == "fit"
        name = f"{split}_epoch{trainer.current_epoch + 1:03d}.png" if fitting else f"{split}.png"
        save_png(contact_sheet(pictures, columns=2), self.folder / name)
        names = dict(enumerate(trainer.datamodule.names, start=1))  # type: ignore[attr-defined]
        for logger in trainer.loggers:
            log_pictures(logger, trainer.global_step, f"{split}/pictures", pictures)
            if layers:
                log_boxes(logger, trainer.global_step, f"{split}/boxes", layers, names)


class History(Callback):
    """Draws losses, learning rate and metrics over the epochs anew after each of them.

    Args:
        metrics: the run's `metrics.jsonl`.
        path: the PNG file.
    """

    def __init__(self, metrics: str | Path, path: str | Path) -> None:
        self.metrics, self.path = Path(metrics), Path(path)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "fit":
            self._draw(trainer)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._draw(trainer)

    def _draw(self, trainer: Trainer) -> None:
        if trainer.is_global_zero and self.metrics.is_file():
            history(self.metrics, self.path)
