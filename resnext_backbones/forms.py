"""The three equivalent forms of the block (arXiv 1611.05431, figure 3), and exact conversion between them.

(a) C branches of 1×1, 3×3, 1×1, summed; (b) C branches of 1×1, 3×3, concatenated before one 1×1; (c) one 1×1,
one 3×3 in C groups, one 1×1. The numbers are the same, so is what is learned; (c) is much the fastest.
"""

import copy
import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .blocks import Block, Bottleneck, PreActBottleneck
from .errors import UsageError
from .norm import FrozenBatchNorm2d, conv_norm

Form = Literal["a", "b", "c"]


class Branch(nn.Module):
    """One of the C transformations: Tᵢ itself in form (a), without its last 1×1 (`conv3`) in form (b)."""

    def __init__(
        self, conv1: nn.Module, norm1: nn.Module, conv2: nn.Module, norm2: nn.Module, conv3: nn.Module | None
    ) -> None:
        super().__init__()
        self.conv1, self.norm1, self.conv2, self.norm2, self.conv3 = conv1, norm1, conv2, norm2, conv3

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(conv_norm(self.conv1, self.norm1, x), inplace=True)
        y = F.relu(conv_norm(self.conv2, self.norm2, y), inplace=True)
        return y if self.conv3 is None else self.conv3(y)


class Split:
    """A bottleneck whose branches are modules of their own, in form (a) or (b).

    In (a) the last norm comes after the sum, as the paper says in section 4, so that all three forms agree.
    """

    form: Literal["a", "b"]
    branches: nn.ModuleList

    def transform(self, x: Tensor) -> Tensor:
        outputs = [branch(x) for branch in self.branches]
        return torch.cat(outputs, dim=1) if self.form == "b" else functools.reduce(torch.add, outputs)


class SplitBottleneck(Split, Bottleneck):
    """`Bottleneck` in form (a) or (b); made by `convert`."""


class SplitPreActBottleneck(Split, PreActBottleneck):
    """`PreActBottleneck` in form (a) or (b); made by `convert`."""


# In the order in which a block registers them, so that a state dict comes back in its old order.
LAYERS = ("conv1", "bn1", "branches", "conv2", "bn2", "conv3", "bn3", "se", "downsample")
NORMS_BY_CHANNEL = (nn.BatchNorm2d, nn.SyncBatchNorm, nn.GroupNorm, FrozenBatchNorm2d)
SPLIT: dict[type[Block], type[Split]] = {
    Bottleneck: SplitBottleneck,
    PreActBottleneck: SplitPreActBottleneck,
}
WHOLE = {split: whole for whole, split in SPLIT.items()}


def convert(module: nn.Module, form: Form) -> nn.Module:
    """A copy of a bottleneck, or of any module that holds some (a body, a detector), in form "a", "b" or "c".

    Outputs and gradients are the original's but for rounding, and a conversion there and back gives the same
    bits. What is trained or frozen, and the mode, stay as they are. Parameters of a split block are
    named `branches.0.conv1.weight`, …; an optimizer is to be built anew.

    Raises:
        UsageError: another form; no bottleneck in `module`; or one that cannot be split: a group norm whose
            groups reach over branches, convolutions with a bias or of another kind.
    """
    if form not in ("a", "b", "c"):
        raise UsageError(f"convert: form={form!r} must be a, b or c (figure 3 of arXiv 1611.05431)")
    if isinstance(module, Bottleneck):
        return _converted(copy.deepcopy(module), form)
    module = copy.deepcopy(module)
    blocks = {
        name: block
        for name, block in module.named_modules(remove_duplicate=False)
        if isinstance(block, Bottleneck)
    }
    if not blocks:
        raise UsageError(
            f"convert: {type(module).__name__} holds no bottleneck; blocks of depth 2 have no other forms "
            "(arXiv 1611.05431, section 3)"
        )
    # A block that stands in two places stays one block.
    converted = {block: _converted(block, form) for block in set(blocks.values())}
    for name, block in blocks.items():
        module.set_submodule(name, converted[block])
    return module


def _converted(block: Any, form: Form) -> nn.Module:
    if type(block) not in (*SPLIT, *WHOLE):
        raise UsageError(
            f"convert: {type(block).__name__} may compute something else than the bottleneck it derives from"
        )
    whole: Any = _whole(block) if isinstance(block, Split) else block
    return whole if form == "c" else _split(whole, form)


def _split(block: Bottleneck, form: Literal["a", "b"]) -> nn.Module:
    """From form (c): the i-th slice of every layer goes into branch i."""
    first, second = block.inner_norms
    parts = block.cardinality
    columns = [
        _slices(block.conv1, parts, dim=0),
        _norm_slices(getattr(block, first), parts),
        _slices(block.conv2, parts, dim=0),
        _norm_slices(getattr(block, second), parts),
        _slices(block.conv3, parts, dim=1) if form == "a" else [None] * parts,
    ]
    layers = {name: getattr(block, name) for name in LAYERS if hasattr(block, name)}
    for name in ("conv1", first, "conv2", second):
        del layers[name]
    branches = [_in_mode_of(block, Branch(*row)) for row in zip(*columns, strict=True)]
    layers["branches"] = _in_mode_of(block, nn.ModuleList(branches))
    if form == "a":
        layers["conv3"] = _in_mode_of(block, nn.Identity())
    split = _block(SPLIT[type(block)], block, layers)
    split.form = form
    return split


def _whole(split: Any) -> nn.Module:
    """Back to form (c): the slices side by side."""
    first, second = split.inner_norms
    rows = list(split.branches)
    if split.form == "b" and len(rows) != split.cardinality:
        raise UsageError(
            f"convert: {len(rows)} branches before a 1×1 convolution of {split.cardinality}; take them out "
            "of form (a), where each has its own"
        )
    layers = {name: getattr(split, name) for name in LAYERS if hasattr(split, name)}
    del layers["branches"]
    layers["conv1"] = _joined([row.conv1 for row in rows], dim=0)
    layers[first] = _joined_norms([row.norm1 for row in rows])
    layers["conv2"] = _joined([row.conv2 for row in rows], dim=0, groups=len(rows))
    layers[second] = _joined_norms([row.norm2 for row in rows])
    if split.form == "a":
        layers["conv3"] = _joined([row.conv3 for row in rows], dim=1)
    whole = _block(WHOLE[type(split)], split, layers)
    whole.cardinality = len(rows)  # in form (a), branches may have been taken out
    return whole


def _block(kind: type, like: Any, layers: dict[str, nn.Module | None]) -> Any:
    """A block of this kind from these layers, with the other's settings."""
    block: Any = object.__new__(kind)
    nn.Module.__init__(block)
    block.cardinality, block.drop_rate, block.training = like.cardinality, like.drop_rate, like.training
    for name in LAYERS:
        if name in layers:
            setattr(block, name, layers[name])
    return block


def _in_mode_of(like: nn.Module, module: nn.Module) -> nn.Module:
    module.training = like.training  # not `.train()`: a norm inside may have been put to another mode
    return module


def _slices(conv: nn.Module, parts: int, dim: int) -> list[nn.Conv2d]:
    """A convolution cut into `parts` by its output channels (dim 0) or by its input channels (dim 1)."""
    if type(conv) is not nn.Conv2d or conv.bias is not None:
        raise UsageError(f"convert: cannot split {conv}; only a plain Conv2d without a bias can be")
    return [_conv_with(weight.clone(), conv) for weight in conv.weight.detach().chunk(parts, dim)]


def _joined(convs: Sequence[nn.Conv2d], dim: int, groups: int = 1) -> nn.Conv2d:
    _alike(convs)
    return _conv_with(torch.cat([conv.weight.detach() for conv in convs], dim), convs[0], groups)


def _conv_with(weight: Tensor, like: nn.Conv2d, groups: int = 1) -> nn.Conv2d:
    conv = nn.Conv2d(
        weight.shape[1] * groups,
        weight.shape[0],
        kernel_size=like.kernel_size,  # type: ignore[arg-type]
        stride=like.stride,  # type: ignore[arg-type]
        padding=like.padding,  # type: ignore[arg-type]
        dilation=like.dilation,  # type: ignore[arg-type]
        groups=groups,
        bias=False,
        device="meta",
    ).train(like.training)
    conv.weight = nn.Parameter(weight, requires_grad=like.weight.requires_grad)
    return conv


def _norm_slices(norm: nn.Module, parts: int) -> list[nn.Module]:
    if type(norm) not in NORMS_BY_CHANNEL:
        raise UsageError(f"convert: cannot split {norm}; batch, sync, group and frozen norms can be")
    if isinstance(norm, nn.GroupNorm) and norm.num_groups % parts:
        raise UsageError(
            f"convert: {norm} has groups that reach over the {parts} branches, so that no branch can be "
            "computed alone; only form (c) exists"
        )
    cut = {name: tensor.chunk(parts) for name, tensor in _by_channel(norm).items()}
    return [
        _norm_with({name: chunks[i].clone() for name, chunks in cut.items()}, norm, lambda n: n // parts)
        for i in range(parts)
    ]


def _joined_norms(norms: Sequence[nn.Module]) -> nn.Module:
    _alike(norms)
    tensors = [_by_channel(norm) for norm in norms]
    joined = {name: torch.cat([each[name] for each in tensors]) for name in tensors[0]}
    return _norm_with(joined, norms[0], lambda n: n * len(norms))


def _by_channel(norm: nn.Module) -> dict[str, Tensor]:
    names = ("weight", "bias", "running_mean", "running_var")
    tensors = {name: getattr(norm, name, None) for name in names}
    return {name: tensor.detach() for name, tensor in tensors.items() if tensor is not None}


def _norm_with(tensors: dict[str, Tensor], like: nn.Module, resize: Callable[[int], int]) -> nn.Module:
    norm = copy.deepcopy(like)
    for name, tensor in tensors.items():
        old = getattr(like, name)
        is_parameter = isinstance(old, nn.Parameter)
        setattr(norm, name, nn.Parameter(tensor, old.requires_grad) if is_parameter else tensor)
    for name in ("num_features", "num_channels", "num_groups"):
        if hasattr(norm, name):
            setattr(norm, name, resize(getattr(norm, name)))
    return norm


def _alike(layers: Sequence[nn.Module]) -> None:
    if len({tuple(p.requires_grad for p in layer.parameters()) for layer in layers}) > 1:
        raise UsageError("convert: some branches of a block are frozen and others are not; make them alike")
    settings = {f"{layer}, training={layer.training}" for layer in layers}
    if len(settings) > 1:
        raise UsageError(
            f"convert: layers of a block's branches differ: {' and '.join(sorted(settings)[:2])}"
        )
