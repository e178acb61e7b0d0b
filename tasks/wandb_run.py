"""One Weights & Biases run for one job: never asks, never hangs, tells no secrets."""

import netrc
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

import torch
from lightning.pytorch.loggers.logger import Logger, rank_zero_experiment
from lightning.pytorch.utilities import rank_zero_only
from PIL import Image

from resnext_backbones.errors import UsageError
from tasks.provenance import plain, without_secrets

INIT_TIMEOUT = 12  # seconds; with the import and the second start offline a run waits less than 20
WANDB_SETTINGS: dict[str, Any] = {
    "silent": True,  # one line of ours instead of its dozen
    "init_timeout": INIT_TIMEOUT,
    "finish_timeout": 60,  # by default a lost network blocks the end of a run for ever
    "login_timeout": 5,  # nothing should prompt, and if it does nevertheless, not for long
    # Command lines, paths, host names, remotes with passwords and the terminal's text stay here.
    "console": "off",
    "disable_code": True,
    "disable_git": True,
    "save_code": False,
    "host": "",
    "program": "",
    "x_disable_meta": True,
    "x_disable_machine_info": True,
    "x_save_requirements": False,
}


class WandbLogger(Logger):
    """Writes to one W&B run; made by `wandb_logger`.

    A run outlives the stages of a job (fit, then test), so `finalize`, which the trainer calls after each,
    does not end it: whoever made the logger calls `close`.

    Args:
        run: what `wandb.init` returned; None on the processes that do not log.
    """

    def __init__(self, run: Any, folder: Path) -> None:
        super().__init__()
        self._run, self._folder, self._failed = run, folder, False

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The `wandb.Run`; on other processes an object that swallows every call."""
        return self._run

    @property
    def name(self) -> str | None:
        return self._run and self._run.name

    @property
    def version(self) -> str | None:
        return self._run and self._run.id

    @property
    def save_dir(self) -> str:
        return str(self._folder)

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Add to the run's configuration, without secrets."""
        if self._run:
            params = params if isinstance(params, Mapping) else vars(params)
            self._run.config.update(plain(without_secrets(params)), allow_val_change=True)

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Log against `trainer/global_step`; W&B's own step would drop what a resumed run repeats."""
        if self._run:
            self._run.log(dict(metrics) | ({} if step is None else {"trainer/global_step": step}))

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Remember a failure for `close`."""
        self._failed = self._failed or status != "success"

    @rank_zero_only
    def close(self, failed: bool = False) -> None:
        """End the run; waits at most a minute for what is still to be sent."""
        if self._run:
            self._run.finish(exit_code=int(failed or self._failed))
            self._run = None


def wandb_logger(
    project: str,
    run_id: str,
    name: str | None = None,
    folder: str | os.PathLike[str] = ".",
    group: str | None = None,
    job_type: str | None = None,
    config: Any = None,
    required: bool = False,
    mode: Literal["auto", "online", "offline", "disabled"] = "auto",
) -> WandbLogger | None:
    """One W&B run for one job; never asks a question, and starts offline where it cannot start online.

    Args:
        project, name, group, job_type: W&B's own terms.
        run_id: becomes W&B's id, so that a resumed job goes on in its run; its files lie in `folder`/wandb.
        config: logged without secrets.
        required: raise instead of going on offline.
        mode: "auto" follows WANDB_MODE where that is set and is "online" otherwise; "online" goes offline by
            itself, in one line, where there is no key or no server within some seconds.

    Returns:
        None where wandb is not installed or the mode is "disabled".

    Raises:
        UsageError: an unknown mode; `required`, and W&B is not installed or not reached.
    """
    if mode not in ("auto", "online", "offline", "disabled"):
        raise UsageError(f"logger mode {mode!r}: give auto, online, offline or disabled")
    wish = os.environ.get("WANDB_MODE", "").lower() if mode == "auto" else mode
    if wish == "disabled":
        return None
    folder = Path(folder)
    # Lightning takes LOCAL_RANK for the rank until it has connected the hosts; it is 0 once on every host.
    if getattr(rank_zero_only, "rank", 0) != 0 or os.environ.get("NODE_RANK", "0") != "0":
        return WandbLogger(None, folder)
    try:
        import wandb
    except ImportError:
        if required:
            raise UsageError("W&B is required and not installed: `pip install wandb`") from None
        print("W&B: not installed, metrics go to metrics.jsonl only", flush=True)
        return None

    def start(mode: Literal["online", "offline"]) -> WandbLogger:
        run = wandb.init(
            mode=mode,
            id=re.sub(r"[^\w.-]", "-", run_id),
            resume="allow" if mode == "online" else None,
            reinit="finish_previous",
            settings=wandb.Settings(**settings),
            dir=str(folder), project=project, name=name, group=group, job_type=job_type,
            config=plain(without_secrets(config or {})),
        )  # fmt: skip
        if run.disabled:  # what it makes of a question nobody answered
            raise UsageError("not logged in, `wandb login` does it")
        run.define_metric("trainer/global_step")
        run.define_metric("*", step_metric="trainer/global_step", step_sync=True)
        return WandbLogger(run, folder)

    # Versions differ in what they know: an unknown setting is an error.
    settings = {key: value for key, value in WANDB_SETTINGS.items() if key in wandb.Settings.model_fields}
    folder.mkdir(parents=True, exist_ok=True)
    before = set(folder.glob("wandb/run-*"))
    reason = ""
    if wish not in ("offline", "dryrun"):
        try:
            known = wandb.setup(wandb.Settings(silent=True)).settings
            if not has_key(known.base_url, known.api_key):
                raise UsageError("no API key, `wandb login` sets one")
            logger = start("online")
            print(f"W&B: {logger.experiment.url}", flush=True)
            return logger
        except Exception as fault:  # whatever W&B stumbles over, training is worth more
            reason = " ".join(str(fault).split("Consider")[0].split())[:200]
            if required:
                raise UsageError(f"W&B is required and cannot be reached: {reason}") from fault
            wandb.teardown()  # its service would go on holding the run's id
            for leftover in set(folder.glob("wandb/run-*")) - before:
                shutil.rmtree(leftover, ignore_errors=True)
    try:
        logger = start("offline")
    except Exception as fault:
        if required:
            raise UsageError(f"W&B is required and cannot write in {folder}: {fault}") from fault
        print(f"W&B: off ({fault}); metrics go to metrics.jsonl only", flush=True)
        return None
    because = f" ({reason})" if reason else ""
    print(
        f"W&B: offline{because}; send it later with `wandb sync {Path(logger.experiment.dir).parent}`",
        flush=True,
    )
    return logger


def has_key(base_url: str, api_key: str | None) -> bool:
    """Whether `wandb.init` will find credentials for the server; without any it asks at the terminal."""
    if api_key or os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlsplit(base_url).netloc
    hosts = {host, "api.wandb.ai"} if host.endswith("forge.coreweave.com") else {host}
    named = os.environ.get("NETRC")
    for path in [Path(named)] if named else [Path("~/.netrc"), Path("~/_netrc")]:
        try:
            known = netrc.netrc(path.expanduser()).hosts
            return any(known[host][2] for host in hosts & known.keys())
        except (OSError, netrc.NetrcParseError):
            continue
    return False


@rank_zero_only
def log_boxes(
    logger: Logger | None,
    step: int,
    key: str,
    pictures: Sequence[tuple[torch.Tensor, Mapping[str, Any], Mapping[str, Any]]],
    names: Mapping[int, str],
) -> None:
    """Send pictures with switchable boxes to W&B; does nothing for another logger.

    Args:
        key: the panel's name, like "val/pictures".
        pictures: (image uint8 [3, H, W] RGB, ground truth, predictions); the last two hold `boxes` [N, 4]
            (xyxy, pixels) and `labels` [N], predictions `scores` [N] too.
        names: of the labels.
    """
    if not (isinstance(logger, WandbLogger) and logger.version):
        return
    import wandb

    def layer(found: Mapping[str, Any]) -> dict[str, Any]:
        boxes, labels = plain(found["boxes"]), plain(found["labels"])
        scores = plain(found["scores"]) if "scores" in found else [None] * len(boxes)
        return {
            "class_labels": dict(names),
            "box_data": [
                {
                    "position": dict(zip(("minX", "minY", "maxX", "maxY"), box, strict=True)),
                    "domain": "pixel",
                    "class_id": label,
                    "box_caption": names.get(label, str(label)) + ("" if score is None else f" {score:.2f}"),
                }
                | ({} if score is None else {"scores": {"score": score}})
                for box, label, score in zip(boxes, labels, scores, strict=True)
            ],
        }

    images = [
        wandb.Image(
            image.permute(1, 2, 0).cpu().numpy(),
            boxes={"ground_truth": layer(truth), "predictions": layer(predictions)},
        )
        for image, truth, predictions in pictures
    ]
    logger.log_metrics({key: images}, step)


@rank_zero_only
def log_pictures(logger: Logger | None, step: int, key: str, pictures: Sequence[Image.Image]) -> None:
    """Send pictures to W&B under `key`; does nothing for another logger."""
    if not (isinstance(logger, WandbLogger) and logger.version):
        return
    import wandb

    logger.log_metrics({key: [wandb.Image(picture) for picture in pictures]}, step)
