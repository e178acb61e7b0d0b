"""The weights a run begins with: the receipt it keeps, and what would make them worth little."""

import json
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor, nn

from resnext_backbones import FrozenBatchNorm2d, Receipt, UsageError
from resnext_backbones.receipt import Normalisation
from resnext_backbones.weight_files import checked_normalisation
from tasks.checkpoint import replacing
from tasks.provenance import plain, without_secrets

DIGITS = 6  # of a normalisation in a record


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
        name: [round(value / 255, DIGITS) for value in numbers.flatten().tolist()]
        for name, numbers in (("mean", mean), ("std", std))
    }


def take_normalisation(receipt: Receipt, model: nn.Module, body: nn.Module) -> str | None:
    """Lets `model` normalise its images as those were that the weights learned from; says so in a line.

    A body that converts what `model` normalised says to what by its `normalisation`, of the same form, and
    goes on doing so; then the line is a warning. None where nothing is known, or nothing differs.

    Raises `UsageError` where the source's images had another number of channels.
    """
    converted = getattr(body, "normalisation", None)
    theirs, ours = receipt.normalisation, converted or normalisation(model)
    source = without_secrets(receipt.source)
    if theirs is None or ours is None:
        return None
    if len(theirs["mean"]) != len(ours["mean"]):
        raise UsageError(
            f"{source} was trained on images of {len(theirs['mean'])} channels, those of a run have "
            f"{len(ours['mean'])} (RGB); take other weights"
        )
    if all(abs(a - b) < 1e-3 for key in theirs for a, b in zip(theirs[key], ours[key], strict=True)):
        return None
    if converted:
        return (
            f"warning: {source} was trained on RGB in 0…1 with {_shown(theirs)}, but {type(body).__name__} "
            f"normalises with {_shown(ours)}: expect worse results, above all of frozen stages"
        )
    set_normalisation(model, theirs)
    return f"normalisation: {_shown(theirs)} of RGB in 0…1, the source's, in place of {_shown(ours)}"


def restore_normalisation(model: nn.Module, body: nn.Module, recorded: Any, name: str | Path) -> None:
    """Lets `model` normalise as the run did whose checkpoint's record says `recorded`.

    Raises `UsageError` that names the checkpoint where that is no mean and standard deviation of RGB.
    """
    if recorded is None or getattr(body, "normalisation", None) or normalisation(model) in (None, recorded):
        return
    try:
        known = checked_normalisation(recorded)
    except (ValueError, LookupError, TypeError) as fault:
        raise UsageError(f"{name}: its record has no readable normalisation ({fault!r:.80})") from fault
    if len(known["mean"]) != 3:
        raise UsageError(f"{name}: its record has a normalisation of {len(known['mean'])} channels, not 3")
    set_normalisation(model, known)


def set_normalisation(model: Any, known: Normalisation) -> None:
    """Fills the buffers of a model that has them; rounded as a record has them, so that both agree."""
    for key in ("mean", "std"):
        numbers = torch.tensor([round(value, DIGITS) * 255 for value in known[key]])
        getattr(model, key).copy_(numbers.view(3, 1, 1))


def _shown(known: Normalisation) -> str:
    return ", ".join(f"{key} ({', '.join(f'{x:.4g}' for x in known[key])})" for key in ("mean", "std"))


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
                "learn: give backbone.weights=SOURCE or model.weights=SOURCE, or build them with another norm"
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
