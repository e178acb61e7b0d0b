"""What is wrong with a dataset though it can be used: each fault is counted and named."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

NAMED = 20  # offenders named in one message; all are counted

SMALLEST_SIDE = 1e-3  # pixels; below it a side is zero but for rounding
SMALLEST_VISIBLE = 1.0  # pixels of a side within the image, below which there is nothing to learn from


@dataclass(frozen=True)
class Fault:
    """One kind of fault in one annotation file.

    kind: what is wrong. action: what was done about it (`dropped`, `clipped`, `kept`, …). of: what it
    happened to, `annotation` or `image`. count: how many there are. ids: those of the first `NAMED`.
    """

    kind: str
    action: str
    of: str
    count: int
    ids: tuple[int | str, ...]

    def __str__(self) -> str:
        more = ", …" if self.count > len(self.ids) else ""
        named = f" (id {', '.join(map(str, self.ids))}{more})" if self.ids else ""
        return f"{self.action} {counted(self.count, self.of)}: {self.kind}{named}"


def fault(kind: str, action: str, of: str, ids: Sequence[int | str] | Tensor) -> list[Fault]:
    """The fault of all `ids`, or nothing where there are none, ready to be added to a list."""
    named = ids[:NAMED].tolist() if isinstance(ids, Tensor) else list(ids[:NAMED])
    return [Fault(kind, action, of, len(ids), tuple(named))] if len(ids) else []


def describe(faults: Iterable[Fault], source: Any) -> str:
    """One warning that counts and names all `faults` of `source`; empty where there are none."""
    lines = [f"  {fault}" for fault in faults]
    return "\n".join([f"warning: {source}:", *lines]) if lines else ""


def counted(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def listed(offenders: Sequence[str], count: int | None = None) -> str:
    """The first `NAMED` offenders on one line; `count` says how many there are where not all are given."""
    count = len(offenders) if count is None else count
    more = f"; … and {count - NAMED} more" if count > NAMED else ""
    return "; ".join(offenders[:NAMED]) + more


def clip(xywh: Tensor, sizes: Tensor) -> Tensor:
    """The part of each box that lies within its image.

    xywh: float64 [N, 4]. sizes: [N, 2], height and width of each box's image. Returns float64 [N, 4], xywh,
    with zero or negative sides where nothing is left.
    """
    height, width = sizes.to(xywh.dtype).unbind(dim=1)
    x, y, w, h = xywh.unbind(dim=1)
    left, top = x.clamp(min=0), y.clamp(min=0)
    right, bottom = torch.minimum(x + w, width), torch.minimum(y + h, height)
    return torch.stack([left, top, right - left, bottom - top], dim=1)


def unusable(xywh: Tensor, sizes: Tensor) -> dict[str, Tensor]:
    """Which boxes cannot be learned from, by reason; bool [N] each, no box under two reasons.

    As MMDetection, which leaves out boxes narrower than a pixel and boxes without overlap with their image;
    Detectron2 only leaves out empty ones.
    """
    sides = xywh[:, 2:].amin(dim=1)
    visible = clip(xywh, sizes)[:, 2:].amin(dim=1)
    inverted = sides < 0
    empty = ~inverted & (sides < SMALLEST_SIDE)
    outside = ~inverted & ~empty & (visible <= 0)
    thin = ~inverted & ~empty & ~outside & (visible < SMALLEST_VISIBLE)
    return {
        "box with a negative side": inverted,
        "box without area": empty,
        "box outside its image": outside,
        "box of less than a pixel within its image": thin,
    }


def overlapping_edge(xywh: Tensor, sizes: Tensor) -> Tensor:
    """Which boxes reach over the edge of their image by more than rounding; bool [N]."""
    x, y, w, h = xywh.unbind(dim=1)
    height, width = sizes.to(xywh.dtype).unbind(dim=1)
    over = torch.stack([-x, -y, x + w - width, y + h - height], dim=1).amax(dim=1)
    return over > SMALLEST_SIDE
