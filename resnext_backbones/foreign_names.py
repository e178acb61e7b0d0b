"""Detectron2's ResNe[X]t and FPN, and Caffe2's ResNe[X]t before them, under torchvision's names."""

import re
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from .errors import UsageError

# detectron2/modeling/backbone/resnet.py and fpn.py
STEM = re.compile(r"(?P<prefix>(.*\.)?)stem\.conv1\.(?P<norm>norm\.)?(?P<leaf>\w+)")
BLOCK = re.compile(
    r"(?P<prefix>(.*\.)?)res(?P<stage>[2-5])\.(?P<block>\d+)\."
    r"(?P<layer>conv[123]|shortcut)\.(?P<norm>norm\.)?(?P<leaf>\w+)"
)
PYRAMID = re.compile(r"(?P<prefix>(.*\.)?)fpn_(?P<kind>lateral|output)(?P<level>\d)\.(?P<leaf>weight|bias)")
# The names in the pickles of ImageNet weights that Detectron2's configurations begin with, as
# detectron2/checkpoint/c2_model_loading.py reads them.
CAFFE2_BLOCK = re.compile(r"res([2-5])_(\d+)_branch(1|2[abc])_(w|bn_\w+)")
CAFFE2_LAYERS = {"1": "shortcut", "2a": "conv1", "2b": "conv2", "2c": "conv3"}
CAFFE2_LEAVES = {
    "w": "weight",
    "bn_gamma": "norm.weight",
    "bn_beta": "norm.bias",
    "bn_running_mean": "norm.running_mean",
    "bn_running_var": "norm.running_var",
}
CAFFE2_ENDS = {"conv1_w": "stem.conv1.weight", "pred_w": "linear.weight", "pred_b": "linear.bias"} | {
    f"res_conv1_{leaf}": f"stem.conv1.{ours}" for leaf, ours in CAFFE2_LEAVES.items() if leaf != "w"
}


def torchvision_names(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, str], path: Path
) -> dict[str, Tensor]:
    """The same tensors, those of a Detectron2 or Caffe2 network under torchvision's names.

    Raises `UsageError` where the metadata of such a network does not say whether it reads RGB or BGR, which
    its tensors do not show, and for Caffe2's batch norms without statistics.
    """
    names = {name: _from_caffe2(name) for name in tensors}
    if folded := next((name for name in tensors if re.fullmatch(r"res\d_\d+_branch\w+_bn_s", name)), None):
        raise UsageError(
            f"{path} is a network of Caffe2 whose batch norms have no statistics ({folded}); "
            "load it into Detectron2 and save that model's state_dict as .safetensors"
        )
    if not any(match["norm"] for match in map(BLOCK.fullmatch, names.values()) if match):
        return dict(tensors)
    if "channel_order" not in metadata:
        raise UsageError(
            f"{path} has the names of Detectron2, whose networks read RGB or BGR: save it as .safetensors "
            "with channel_order in its metadata, as docs/backbones.md shows under Weights"
        )
    levels = [int(match["level"]) for match in map(PYRAMID.fullmatch, names.values()) if match]
    finest = min(levels, default=0)
    return {_from_detectron2(ours, finest): tensors[name] for name, ours in names.items()}


def _from_caffe2(name: str) -> str:
    """Detectron2's name for Caffe2's."""
    if match := CAFFE2_BLOCK.fullmatch(name):
        stage, block, branch, leaf = match.groups()
        return f"res{stage}.{block}.{CAFFE2_LAYERS[branch]}.{CAFFE2_LEAVES.get(leaf, leaf)}"
    return CAFFE2_ENDS.get(name, name)


def _from_detectron2(name: str, finest: int) -> str:
    """torchvision's name for Detectron2's; its pyramid counts levels from the `finest` one."""
    if match := STEM.fullmatch(name):
        ours = f"{'bn1' if match['norm'] else 'conv1'}.{match['leaf']}"
    elif match := BLOCK.fullmatch(name):
        layer, norm = match["layer"], bool(match["norm"])
        ours = f"downsample.{int(norm)}" if layer == "shortcut" else f"{'bn' if norm else 'conv'}{layer[-1]}"
        ours = f"layer{int(match['stage']) - 1}.{match['block']}.{ours}.{match['leaf']}"
    elif match := PYRAMID.fullmatch(name):
        blocks = "inner_blocks" if match["kind"] == "lateral" else "layer_blocks"
        ours = f"fpn.{blocks}.{int(match['level']) - finest}.0.{match['leaf']}"
    elif match := re.fullmatch(r"(?P<prefix>(.*\.)?)top_block\.(p[67]\.\w+)", name):
        ours = f"fpn.extra_blocks.{match[3]}"
    elif match := re.fullmatch(r"(?P<prefix>(.*\.bottom_up\.)?)linear\.(\w+)", name):
        ours = f"fc.{match[3]}"
    else:
        return name
    return match["prefix"].replace("bottom_up.", "body.") + ours
