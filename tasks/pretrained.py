"""The weights a run begins with: the receipt it keeps, and what would make them worth little."""

import json
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor, nn

from resnext_backbones import FrozenBatchNorm2d, Receipt, UsageError
from tasks.checkpoint import replacing
from tasks.provenance import plain, without_secrets


def keep_receipt(receipt: Receipt, folder: Path) -> dict[str, Any]:
    """Writes all of it to `weights.json` in the run's folder; returns its summary for loggers."""
    _write(folder / "weights.json", without_secrets(receipt.as_dict()))
    return without_secrets(receipt.summary())


@rank_zero_only
def _write(path: Path, values: dict[str, Any]) -> None:
    with replacing(path) as file:
        file.write(json.dumps(plain(values), allow_nan=False, indent=2, ensure_ascii=False).encode() + b"\n")


def normalisation(model: nn.Module) -> dict[str, list[float]] | None:
    """What the network takes from RGB in 0…1 and divides it by, {"mean": […], "std": […]}.

    Read from its buffers `mean` and `std`, which are of 0…255; None where it has none.
    """
    mean, std = getattr(model, "mean", None), getattr(model, "std", None)
    if not (isinstance(mean, Tensor) and isinstance(std, Tensor)):
        return None
    return {
        name: [round(value / 255, 6) for value in numbers.flatten().tolist()]
        for name, numbers in (("mean", mean), ("std", std))
    }


def other_normalisation(receipt: Receipt, model: nn.Module, body: nn.Module) -> str | None:
    """A warning where the weights were trained on images normalised otherwise than those they will see.

    A body that converts what `model` normalised says to what by its `normalisation`, of the same form.
    """
    converted = getattr(body, "normalisation", None)
    theirs, ours = receipt.normalisation, converted or normalisation(model)
    if theirs is None or ours is None or len(theirs["mean"]) != len(ours["mean"]):
        return None
    if all(abs(a - b) < 1e-3 for key in theirs for a, b in zip(theirs[key], ours[key], strict=True)):
        return None
    shown = [
        ", ".join(f"{key} ({', '.join(f'{x:.4g}' for x in known[key])})" for key in ("mean", "std"))
        for known in (theirs, ours)
    ]
    return (
        f"warning: {without_secrets(receipt.source)} was trained on RGB in 0…1 with {shown[0]}, but "
        f"{type(body if converted else model).__name__} normalises with {shown[1]}: expect worse "
        "results, above all of frozen stages"
    )


def refuse_idle_norms(body: nn.Module) -> None:
    """Raises UsageError for a frozen norm as it was built: an identity that never learns."""
    for name, norm in body.named_modules():
        if (
            isinstance(norm, FrozenBatchNorm2d)
            and not norm.running_mean.any()
            and norm.running_var.eq(1).all()
        ):
            raise UsageError(
                f"backbone: {name} and its like are frozen norms without statistics, identities that never "
                "learn: give backbone.weights=SOURCE, or build them with another norm"
            )


def refuse_other_channels(body: nn.Module) -> None:
    """Raises UsageError for a body whose first convolution reads something else than RGB."""
    convolutions = (module for module in body.modules() if isinstance(module, nn.Conv2d))
    first = next(convolutions, None)
    if first is not None and first.in_channels != 3:
        raise UsageError(
            f"backbone: {type(body).__name__} reads images of {first.in_channels} channels, those of a run "
            "have 3 (RGB); leave in_channels or in_chans out"
        )
