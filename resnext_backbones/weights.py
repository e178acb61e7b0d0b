"""Weights from elsewhere into a body, with a receipt; and the freezing of what need not be learned again."""

import dataclasses
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from . import sources
from .errors import UsageError
from .norm import freeze_norms


@dataclass(frozen=True)
class Clash:
    """A tensor whose shape in the body (`here`) is not that in the source (`there`)."""

    name: str
    here: tuple[int, ...]
    there: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.name} is {list(self.here)} here, {list(self.there)} there"


@dataclass(frozen=True)
class Receipt:
    """What `load_weights` did. Names are the body's, but for `unexpected`, which are the source's.

    `prefix` stood before the body's names in the source. `sha256` is that of the file. `stages` counts by
    stage. Batch norm's `num_batches_tracked`, with which nothing here computes, is neither loaded nor
    counted.
    """

    source: str
    sha256: str
    prefix: str
    loaded: tuple[str, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    clashing: tuple[Clash, ...]
    stages: dict[str, dict[str, int]]

    def as_dict(self) -> dict[str, Any]:
        """Plain containers, for a checkpoint, JSON or a logger."""
        plain = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        for name in ("loaded", "missing", "unexpected"):
            plain[name] = list(plain[name])
        plain["clashing"] = [
            {"name": clash.name, "here": list(clash.here), "there": list(clash.there)}
            for clash in self.clashing
        ]
        plain["stages"] = {stage: dict(counts) for stage, counts in self.stages.items()}
        return plain

    def __str__(self) -> str:
        prefix = f", prefix {self.prefix!r}" if self.prefix else ""
        lines = [f"weights: {self.source} (SHA-256 {self.sha256[:12]}…{prefix})"]
        columns = ("loaded", "missing", "clashing")
        lines.append("  " + "stage".ljust(8) + "".join(column.rjust(10) for column in columns))
        for stage, counts in self.stages.items():
            lines.append("  " + stage.ljust(8) + "".join(str(counts[column]).rjust(10) for column in columns))
        lines += [f"  missing: {_few(self.missing)}"] if self.missing else []
        lines += [f"  clashing: {_few(map(str, self.clashing))}"] if self.clashing else []
        lines += [f"  not used: {_few(self.unexpected)}"] if self.unexpected else []
        return "\n".join(lines)


def load_weights(
    body: nn.Module,
    source: str | Path,
    allow_partial: bool | Collection[str] = False,
    prefix: str | None = None,
) -> Receipt:
    """Copy into `body` the tensors of `source` that bear its names.

    Args:
        body: any module; names are matched below the prefix under which most of them fit.
        source: a torchvision name (`ResNeXt50_32X4D_Weights.IMAGENET1K_V2`, downloaded once and checked
            against its hash); a `.safetensors` file; a file of `torch.save` (`.pth`, `.pt`, `.ckpt`), this
            project's checkpoints among them; or a run's folder (`checkpoints/best.ckpt`, else `last.ckpt`).
            Nothing is unpickled but tensors and plain containers.
        allow_partial: True accepts a load that leaves tensors of the body as they are, since they are missing
            in the source or have another shape there; the names of stages (`("fc",)`) accept it only there.
        prefix: said explicitly, where a source holds the body twice.

    Raises `UsageError`, and leaves the body untouched, where the source cannot be read or does not cover the
    body.
    """
    path = sources.find(source)
    tensors = sources.read(path)
    needed = {name: tensor for name, tensor in body.state_dict().items() if not _is_counter(name)}
    prefix = _prefix(tensors, needed, source) if prefix is None else prefix and prefix.rstrip(".") + "."

    found = {name: tensors[prefix + name] for name in needed if prefix + name in tensors}
    clashing = [
        Clash(name, tuple(needed[name].shape), tuple(tensor.shape))
        for name, tensor in found.items()
        if tensor.shape != needed[name].shape
    ]
    clashing_names = {clash.name for clash in clashing}
    missing = [name for name in needed if name not in found]
    loaded = [name for name in found if name not in clashing_names]
    if not loaded:
        raise UsageError(
            f"{source} holds nothing that fits {type(body).__name__} under the prefix {prefix!r}: it has "
            f"{_few(tensors)}, wanted are {_few(needed)}; take weights of the same network"
        )

    excused = _excused(body, allow_partial)
    faults = [f"{name} is missing" for name in missing if _stage(body, name) not in excused]
    faults += [str(clash) for clash in clashing if _stage(body, clash.name) not in excused]
    if faults:
        raise UsageError(
            f"{source} does not cover {type(body).__name__}: {len(loaded)} of {len(needed)} tensors fit "
            f"(prefix {prefix!r}), but {_few(faults)}; build the network they are of, or set allow_partial"
        )
    broken = [name for name in loaded if not found[name].isfinite().all()]
    if broken:
        raise UsageError(f"{source} holds NaN or infinite values in {_few(broken)}; take another file")

    body.load_state_dict({name: found[name] for name in loaded}, strict=False)
    used = {prefix + name for name in found}
    return Receipt(
        source=str(source),
        sha256=sources.sha256(path),
        prefix=prefix,
        loaded=tuple(loaded),
        missing=tuple(missing),
        unexpected=tuple(name for name in tensors if name not in used and not _is_counter(name)),
        clashing=tuple(clashing),
        stages=_count(body, loaded=loaded, missing=missing, clashing=sorted(clashing_names)),
    )


def freeze(body: nn.Module, at: int) -> None:
    """Freeze the first `at` stages, as Detectron2 counts: 0 none, 1 the stem, 2 stem and c2, … 5 all of them.

    Their parameters stop learning and their batch norms become frozen ones, so that statistics do not move
    either, whatever `.train()` is called. `fc` is no stage: a classifier frozen at 5 is a linear probe.

    `body` must say what its stages are: `stages`, a dict of each stage's name to the names of its modules, in
    order. Raises `UsageError` where it does not, or has fewer than `at`. Optimizers are to be built after.
    """
    stages = getattr(body, "stages", None)
    kind = type(body).__name__
    if not isinstance(stages, Mapping):
        raise UsageError(f"{kind} cannot be frozen by stage: it has no `stages` (of an FPN, freeze fpn.body)")
    if isinstance(at, bool) or not isinstance(at, int) or not 0 <= at <= len(stages):
        raise UsageError(f"freeze at {at!r}: {kind} has {len(stages)} stages, so take 0 … {len(stages)}")
    for stage in list(stages)[:at]:
        for name in stages[stage]:
            module = body.get_submodule(name)
            module.requires_grad_(False)
            body.set_submodule(name, freeze_norms(module))


def _prefix(tensors: dict[str, Tensor], needed: dict[str, Tensor], source: str | Path) -> str:
    """The prefix under which most of the body's tensors are in the source, those of the same shape first."""
    names: Counter[str] = Counter()
    shapes: Counter[str] = Counter()
    for key, tensor in tensors.items():
        parts = key.split(".")
        for i in range(len(parts)):
            name = ".".join(parts[i:])
            if name in needed:
                prefix = key.removesuffix(name)
                names[prefix] += 1
                shapes[prefix] += tensor.shape == needed[name].shape
    if not names:
        raise UsageError(
            f"{source} has none of the names wanted under any prefix: it has {_few(tensors)}, wanted are "
            f"{_few(needed)}; take weights of the same network"
        )
    score = {prefix: (shapes[prefix], names[prefix]) for prefix in names}
    best = [prefix for prefix in score if score[prefix] == max(score.values())]
    if len(best) > 1:
        raise UsageError(
            f"{source} fits equally well under the prefixes {_few(map(repr, best))}; give prefix=…"
        )
    return best[0]


def _excused(body: nn.Module, allow_partial: bool | Collection[str]) -> set[str]:
    if isinstance(allow_partial, bool):
        return {_stage(body, name) for name in body.state_dict()} if allow_partial else set()
    return {allow_partial} if isinstance(allow_partial, str) else set(allow_partial)


def _stage(body: nn.Module, name: str) -> str:
    for stage, modules in getattr(body, "stages", {}).items():
        if any(name.startswith(f"{module}.") for module in modules):
            return stage
    return name.split(".")[0]


def _count(body: nn.Module, **fates: list[str]) -> dict[str, dict[str, int]]:
    order = dict.fromkeys(_stage(body, name) for name in body.state_dict())
    counts = {stage: dict.fromkeys(fates, 0) for stage in order}
    for fate, names in fates.items():
        for name in names:
            counts[_stage(body, name)][fate] += 1
    return counts


def _is_counter(name: str) -> bool:
    return name.endswith("num_batches_tracked")


def _few(names: Iterable[str], limit: int = 4) -> str:
    names = list(names)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
