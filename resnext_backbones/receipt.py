"""The receipt of a load: which of a body's tensors came from where, and what their source says of itself."""

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

Normalisation = dict[str, list[float]]  # "mean" and "std" of each channel, RGB in 0…1


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

    Batch norm's `num_batches_tracked`, with which nothing here computes, is neither loaded nor counted.

    Attributes:
        source: what was loaded: of a name without a tag, the tag that it stood for; of a run's folder, which
            checkpoint, and how far it had got.
        sha256: of the file, hexadecimal.
        prefix: what stood before the body's names in the source.
        normalisation: {"mean": […], "std": […]} of RGB in 0…1 that the source was trained with, None if it
            does not say.
        licence: of the source, as it is named there; None if it does not say.
        metadata: what a `.safetensors` file says of itself.
        stages: for each stage of the body the names `loaded`, `missing` in the source, and `clashing`.
        clashing: the shapes of those that clash.
        adapted: the first convolution, where it was fitted to another number of input channels; it counts as
            loaded.
        unexpected: what the body has no use for.
        warning: what makes the source doubtful; empty where nothing does.
    """

    source: str
    sha256: str
    prefix: str
    normalisation: Normalisation | None
    licence: str | None
    metadata: dict[str, str]
    stages: dict[str, dict[str, tuple[str, ...]]]
    clashing: tuple[Clash, ...]
    adapted: tuple[str, ...]
    unexpected: tuple[str, ...]
    warning: str = field(default="", kw_only=True)

    @property
    def loaded(self) -> tuple[str, ...]:
        return self._names("loaded")

    @property
    def missing(self) -> tuple[str, ...]:
        return self._names("missing")

    @property
    def counts(self) -> dict[str, dict[str, int]]:
        """How many names each stage has of each kind."""
        return {
            stage: {fate: len(names) for fate, names in fates.items()} for stage, fates in self.stages.items()
        }

    def as_dict(self) -> dict[str, Any]:
        """All of it in plain containers, for JSON or a checkpoint; some hundred names."""
        plain = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        plain["counts"] = self.counts
        plain["stages"] = {
            stage: {fate: list(names) for fate, names in fates.items()}
            for stage, fates in self.stages.items()
        }
        plain["clashing"] = [
            {"name": clash.name, "here": list(clash.here), "there": list(clash.there)}
            for clash in self.clashing
        ]
        return plain | {"adapted": list(self.adapted), "unexpected": list(self.unexpected)}

    def summary(self) -> dict[str, Any]:
        """Counts instead of names, in plain containers, for a logger."""
        kept = ("source", "sha256", "prefix", "normalisation", "licence", "counts", "adapted")
        plain = self.as_dict()
        return {name: plain[name] for name in kept} | {"unexpected": len(self.unexpected)}

    def __str__(self) -> str:
        prefix = f", prefix {self.prefix!r}" if self.prefix else ""
        lines = [f"weights: {self.source} (SHA-256 {self.sha256[:12]}…{prefix})"]
        if self.normalisation:
            mean, std = (", ".join(f"{x:.4g}" for x in self.normalisation[key]) for key in ("mean", "std"))
            lines.append(f"  trained on RGB in 0…1 less ({mean}), over ({std})")
        lines += [f"  warning: {self.warning}"] if self.warning else []
        lines += [f"  licence: {few([self.licence])}"] if self.licence else []
        columns = ("loaded", "missing", "clashing")
        width = max([8, *map(len, self.counts)])
        lines.append("  " + "stage".ljust(width) + "".join(column.rjust(10) for column in columns))
        for stage, counts in self.counts.items():
            numbers = "".join(str(counts[column]).rjust(10) for column in columns)
            lines.append("  " + stage.ljust(width) + numbers)
        lines += [f"  adapted: {few(self.adapted)}"] if self.adapted else []
        lines += [f"  missing: {few(self.missing)}"] if self.missing else []
        lines += [f"  clashing: {few(map(str, self.clashing))}"] if self.clashing else []
        lines += [f"  not used: {few(self.unexpected)}"] if self.unexpected else []
        return "\n".join(lines)

    def _names(self, fate: str) -> tuple[str, ...]:
        return tuple(name for fates in self.stages.values() for name in fates[fate])


def few(names: Iterable[str], limit: int = 4) -> str:
    """The first names, fit for one line of a terminal whatever a file calls its tensors."""
    names = list(names)
    shown = [name if name.isprintable() else ascii(name) for name in (n[:120] for n in names[:limit])]
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(shown) + more
