"""The pictures of a split that `CocoAP` has judged."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from tasks.metrics import plots
from tasks.metrics.coco_engines import CONFUSION_SCORE, Judged

KIND = {"bbox": "boxes", "segm": "masks", "keypoints": "keypoints"}


def draw(
    judged: Judged,
    per_class: Mapping[str, float],
    names: Sequence[str],
    iou_type: str,
    folder: Path,
    split: str,
) -> list[Path]:
    """Writes what there is to draw of one iou type, `<picture>_<split>_<iou type>.png`; returns the paths."""
    overlap = "OKS" if iou_type == "keypoints" else "IoU"
    title = f"{KIND[iou_type]}, {split}"
    path = {
        picture: folder / f"{picture}_{split}_{iou_type}.png"
        for picture in ("pr_curve", "per_class", "tide", "confusion")
    }
    plots.pr_curves(judged.precision[..., 0, -1], names, path["pr_curve"], title, overlap)
    plots.per_class(per_class, "AP", path["per_class"], title)
    if judged.tide is None or judged.confusion is None:
        return [path["pr_curve"], path["per_class"]]
    plots.tide(judged.tide.delta_ap, judged.tide.counts, path["tide"], title)
    note = f"{title}: score ≥ {CONFUSION_SCORE}, IoU ≥ 0.5"
    plots.confusion(judged.confusion, names, path["confusion"], note)
    return list(path.values())
