"""What keypoints are called, how they are joined and mirrored, and how precisely they are annotated."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import msgspec
import torch
from pycocotools.cocoeval import Params
from torch import Tensor

from resnext_backbones.errors import UsageError
from tasks.data.annotations import CocoAnnotations
from tasks.data.faults import NAMED, listed

FARTHEST = 1e9  # pixels, as for boxes
TO_CENTRE = (0.5, 0.5, 0.0)
"""Added to x, y and visibility of COCO's files, which count pixels 0…W - 1, it gives continuous coordinates,
0…W; of results it is taken off (Detectron2's `data/datasets/coco.py` and `evaluation/coco_evaluation.py`)."""

# https://cocodataset.org/#keypoints-eval
COCO_NAMES = (
    *("nose", "left_eye", "right_eye", "left_ear", "right_ear", "left_shoulder", "right_shoulder"),
    *("left_elbow", "right_elbow", "left_wrist", "right_wrist", "left_hip", "right_hip"),
    *("left_knee", "right_knee", "left_ankle", "right_ankle"),
)


@dataclass(frozen=True)
class Skeleton:
    """The K keypoints of every object.

    names: K. edges: pairs of indices from 0, drawn as lines. mirror: what stands at each place after the
    image is flipped left to right, a permutation of 0…K - 1. sigmas: the spread of each, as a share of the
    object's size, by which object keypoint similarity (OKS) judges a distance. mirrored_by: where `mirror`
    comes from: pairs that were given, names with left and right, or nothing at all, so that it is 0…K - 1.
    """

    names: tuple[str, ...]
    edges: tuple[tuple[int, int], ...]
    mirror: tuple[int, ...]
    sigmas: tuple[float, ...]
    mirrored_by: Literal["given", "names", "nothing"]


def skeleton_of(annotations: CocoAnnotations, given: Mapping[str, Any] | None = None) -> Skeleton:
    """The skeleton that the categories describe, with what the configuration says of it on top.

    Args:
        annotations: its categories may carry `keypoints`, `skeleton`, `flip_pairs` and `sigmas`; those that
            have keypoints must agree. Pairs count from 1, as in COCO.
        given: the same under the names `names`, `skeleton`, `flip_pairs`, `sigmas` (`data.keypoints`).
            Without flip pairs, names that differ only by left and right are mirrored (`mirrored_name`); an
            empty list, here or there, says that there are none.

    Raises:
        UsageError: no category has keypoints; categories disagree; an index or a number is wrong; there are
            no sigmas, and the keypoints are not COCO's 17. (With the wrong number pycocotools fails and
            hotcoco silently takes COCO's.)
    """
    said = {key: value for key, value in (given or {}).items() if value is not None}
    unknown = sorted(set(said) - {"names", "skeleton", "flip_pairs", "sigmas"})
    if unknown:
        raise UsageError(f"data.keypoints.{unknown[0]}: it takes names, skeleton, flip_pairs and sigmas")
    posed = [category for category in annotations.categories if category.keypoints]
    if len({(c.keypoints, c.skeleton, c.flip_pairs, c.sigmas) for c in posed}) > 1:
        raise UsageError(
            f"{annotations.path}: categories {listed([c.name for c in posed])} have different keypoints; one "
            "network learns one skeleton: train on one category, or describe them alike"
        )
    first = posed[0] if posed else None
    names = tuple(said.get("names") or (first.keypoints if first else ()))
    if not names:
        raise UsageError(
            f"{annotations.path}: no category has `keypoints`, a list of their names; add it, or give "
            "data.keypoints.names=[…]"
        )
    edges = said.get("skeleton", first.skeleton if first else ())
    given_flips = said.get("flip_pairs", first.flip_pairs if first else None)
    flips = _sides(names) if given_flips is None else given_flips
    sigmas = said.get("sigmas", (first.sigmas if first else None) or _coco_sigmas(names))
    where = f"{annotations.path}: keypoints {listed(names)}"
    if sigmas is None:
        raise UsageError(
            f"{where}: not COCO's 17, so OKS needs to know how precisely each is annotated: give "
            f"data.keypoints.sigmas=[…], {len(names)} numbers such as 0.05 (cocodataset.org/#keypoints-eval)"
        )
    if not _are_sigmas(sigmas, len(names)):
        raise UsageError(f"{where}: data.keypoints.sigmas={sigmas}: {len(names)} numbers above 0 are wanted")
    for key, pairs in (("skeleton", edges), ("flip_pairs", flips)):
        if wrong := [pair for pair in pairs if not _is_pair(pair, len(names))]:
            raise UsageError(f"{where}: {key} {wrong[0]}: pairs of numbers 1…{len(names)} are wanted")
    return Skeleton(
        names,
        tuple((a - 1, b - 1) for a, b in edges),
        _mirror(flips, len(names), where),
        tuple(float(sigma) for sigma in sigmas),
        "given" if given_flips is not None else "names" if flips else "nothing",
    )


def _are_sigmas(values: Any, number: int) -> bool:
    return (
        isinstance(values, Sequence)
        and len(values) == number
        and all(isinstance(sigma, int | float) and 0 < sigma < 10 for sigma in values)
    )


def _is_pair(value: Any, number: int) -> bool:
    return (
        isinstance(value, Sequence)
        and len(value) == 2
        and all(isinstance(i, int) and 1 <= i <= number for i in value)
    )


def _sides(names: Sequence[str]) -> list[tuple[int, int]]:
    """Pairs of names that differ only by left and right; from 1."""
    lower = [name.lower() for name in names]
    twins = [(name.lower(), mirrored_name(name)) for name in names]
    return [(lower.index(a) + 1, lower.index(b) + 1) for a, b in twins if a != b and b in lower]


def mirrored_name(name: str) -> str:
    """A keypoint's name in lower case with right for left: left_eye, leftEye, l_eye, eye.L, LEye, …

    A single l counts where it stands alone, between other characters than letters or before or after a
    capital.
    """
    parts = re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|[^A-Za-z]+", name)
    return "".join("r" if part in "lL" else part.lower().replace("left", "right") for part in parts)


def _coco_sigmas(names: Sequence[str]) -> list[float] | None:
    return Params(iouType="keypoints").kpt_oks_sigmas.tolist() if tuple(names) == COCO_NAMES else None


def _mirror(pairs: Sequence[Sequence[int]], number: int, where: str) -> tuple[int, ...]:
    mirror = list(range(number))
    for a, b in pairs:
        mirror[a - 1], mirror[b - 1] = b - 1, a - 1
    if any(mirror[a - 1] != b - 1 or mirror[b - 1] != a - 1 for a, b in pairs):
        raise UsageError(f"{where}: flip_pairs {[list(p) for p in pairs]} name a keypoint twice")
    return tuple(mirror)


def poses(annotations: CocoAnnotations, number: int) -> Tensor:
    """The keypoints of all annotations, float32 [N, K, 3]: x, y, visibility (0 no label, 1 hidden, 2 seen).

    x and y are continuous as those of boxes are: the centre of the pixel that the file names (`TO_CENTRE`).
    Zeros where there is no label, and where an annotation has no keypoints.

    Raises:
        UsageError: annotations with another number of keypoints than `number`, or with none that can be read.
    """
    rows = torch.zeros(len(annotations.ids), number, 3)
    wrong = []
    for row, annotation in enumerate(annotations.ids.tolist()):
        if not (raw := annotations.keypoints[row]) or raw == b"null":
            continue
        try:
            values = msgspec.json.decode(raw, type=list[float])
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            wrong.append(f"annotation {annotation}: {error}")
            continue
        if not values:
            continue
        if len(values) != 3 * number:
            wrong.append(f"annotation {annotation} has {len(values)} numbers")
        elif max(map(abs, values)) > FARTHEST or not set(values[2::3]) <= {0, 1, 2}:
            wrong.append(f"annotation {annotation}: a visibility is not 0, 1 or 2, or a place absurdly far")
        else:
            rows[row] = torch.tensor(values).view(number, 3)
    if wrong:
        raise UsageError(
            f"{annotations.path}: keypoints that are not {number} times x, y, visibility: "
            f"{listed(wrong[:NAMED], len(wrong))}; correct them or give data.keypoints.names=[…]"
        )
    return (rows + rows.new_tensor(TO_CENTRE)).where(rows[..., 2:] > 0, 0)
