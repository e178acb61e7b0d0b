"""Tasks that break one promise each, for test_check_task.py: in a module of its own, for Hydra to find."""

import random
from typing import Any

import torch
from torch import Tensor, nn

from resnext_backbones import FeatureSpec
from tasks.classification import ClassificationTask
from tasks.detection import DetectionTask
from tasks.metrics.accuracy import Accuracy
from tasks.metrics.between import Between


class Tiny(nn.Module):
    """A body with norms that learn statistics, quick enough for a dozen of tests."""

    def __init__(self) -> None:
        super().__init__()
        self.features, self.stages = {}, {"stem": ("stem",)}
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1), nn.BatchNorm2d(16))
        for name, stride in (("c2", 4), ("c3", 8), ("c4", 16), ("c5", 32)):
            self.add_module(name, nn.Sequential(nn.Conv2d(16, 16, 3, 2, 1), nn.ReLU()))
            self.features[name], self.stages[name] = FeatureSpec(16, stride), (name,)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        x, maps = self.stem(images), {}
        for name in self.features:
            x = maps[name] = self.get_submodule(name)(x)
        return maps


class LeaksStatistics(ClassificationTask):
    def update(self, metric: Any, batch: Any) -> Any:
        self.train()
        found = super().update(metric, batch)
        self.eval()
        return found


class DrawsInEvaluation(ClassificationTask):
    def update(self, metric: Any, batch: Any) -> Any:
        torch.rand(1)
        return super().update(metric, batch)


class AnswersInTurn(ClassificationTask):
    """Every other prediction is another one."""

    calls = 0

    def predict(self, batch: Any) -> Any:
        self.calls += 1
        return super().predict(batch).flip(1) if self.calls % 2 else super().predict(batch)


class KeepsElsewhere(ClassificationTask):
    """What it learns beside its weights is in no buffer."""

    seen = 0.0

    def losses(self, batch: Any) -> Any:
        self.seen += 1.0
        return super().losses(batch)

    def predict(self, batch: Any) -> Any:
        return (super().predict(batch).log() * (1.0 + self.seen)).softmax(dim=1)


class DrawsFromPython(ClassificationTask):
    def losses(self, batch: Any) -> Any:
        return {name: loss * (0.8 + 0.2 * random.random()) for name, loss in super().losses(batch).items()}


class CallsItLoss(ClassificationTask):
    def losses(self, batch: Any) -> Any:
        return {"loss": super().losses(batch)["loss_cross_entropy"]}


class NoScalar(ClassificationTask):
    def losses(self, batch: Any) -> Any:
        return {"loss_each": torch.stack(list(super().losses(batch).values()))}


class NotANumber(ClassificationTask):
    def losses(self, batch: Any) -> Any:
        return {"loss_log": super().losses(batch)["loss_cross_entropy"] * torch.nan}


class ChangesTheBatch(ClassificationTask):
    def losses(self, batch: Any) -> Any:
        losses = super().losses(batch)
        batch.labels.zero_()
        return losses


class HasASpareLayer(ClassificationTask):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.model.spare = nn.Linear(2, 2)


class DoesNotLearn(ClassificationTask):
    def losses(self, batch: Any) -> Any:
        idle = torch.stack([p.sum() for p in self.model.parameters()]).sum() * 0.0
        return {name: loss.detach() + idle for name, loss in super().losses(batch).items()}


class ForgetsAnImage(ClassificationTask):
    def predict(self, batch: Any) -> Any:
        return super().predict(batch)[1:]


class KeepsAnObject(ClassificationTask):
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["names"] = self.Names()

    class Names:
        pass


class OfOneProcess(ClassificationTask):
    """Its metric judges what the one process found."""

    def metric(self, split: str) -> Accuracy:
        metric = super().metric(split)
        metric._between = type("Alone", (Between,), {"on_first": lambda self, work, mine: work([mine])})()
        metric._image_ids = None
        return metric


class NetworkPixels(DetectionTask):
    @staticmethod
    def _in_original_pixels(batch: Any, detections: Any) -> Any:
        return [dict(found) for found in detections]


class NeedsAnObject(DetectionTask):
    def losses(self, batch: Any) -> Any:
        sizes = torch.stack([(t["boxes"][:, 2:] - t["boxes"][:, :2]).mean() for t in batch.targets])
        return super().losses(batch) | {"loss_size": 0.0 * sizes.sum() + self.model_weight() * 0.0}

    def model_weight(self) -> Tensor:
        return next(self.model.parameters()).sum()
