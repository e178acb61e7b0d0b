"""Frozen batch norm, folded into the convolution before it."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .errors import UsageError


class FrozenBatchNorm2d(nn.Module):
    """y = x · scale + shift, with the statistics and the affine parameters of a batch norm fixed.

    They are buffers under `nn.BatchNorm2d`'s names, so that state dicts go both ways and nothing here is a
    parameter; `num_batches_tracked` is accepted and dropped.
    """

    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor

    def __init__(self, num_features: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.register_buffer("weight", torch.ones(num_features))
        self.register_buffer("bias", torch.zeros(num_features))
        self.register_buffer("running_mean", torch.zeros(num_features))
        self.register_buffer("running_var", torch.ones(num_features))

    def affine(self) -> tuple[Tensor, Tensor]:
        """Scale and shift, each (C,), at least in float32: a variance in half precision loses its eps."""
        precise = torch.promote_types(self.running_var.dtype, torch.float32)
        scale = self.weight.to(precise) * (self.running_var.to(precise) + self.eps).rsqrt()
        return scale, self.bias.to(precise) - self.running_mean.to(precise) * scale

    def forward(self, x: Tensor) -> Tensor:
        scale, shift = self.affine()
        return (x * scale[:, None, None] + shift[:, None, None]).to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.weight.numel()}, eps={self.eps}"

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: object) -> None:
        state_dict.pop(f"{prefix}num_batches_tracked", None)
        super()._load_from_state_dict(state_dict, prefix, *args)


def conv_norm(conv: nn.Module, norm: nn.Module, x: Tensor) -> Tensor:
    """norm(conv(x)), in one convolution where the norm is frozen.

    With y = (W ∗ x) · scale + shift the scale goes into W, exactly, and the gradient to W with it; a whole
    pass over the activations is saved, and one copy of them that backward would keep. The product is taken
    in float32 and only then cast by autocast. Forward hooks of a folded pair's two modules do not fire.
    """
    # A convolution of another kind (quantised, adapted, padding otherwise) keeps its own forward.
    plain = type(conv) is nn.Conv2d and conv.padding_mode == "zeros"
    if not (isinstance(conv, nn.Conv2d) and isinstance(norm, FrozenBatchNorm2d) and plain):
        return norm(conv(x))
    scale, shift = norm.affine()
    weight = conv.weight * scale[:, None, None, None]
    if conv.bias is not None:
        shift = shift + conv.bias * scale
    dtype = conv.weight.dtype
    return F.conv2d(
        x, weight.to(dtype), shift.to(dtype), conv.stride, conv.padding, conv.dilation, conv.groups
    )


def freeze_norms(module: nn.Module) -> nn.Module:
    """Turn every batch norm inside `module`, in place, into a frozen one with the same statistics.

    Returns `module`, or its replacement where it is a batch norm itself. Optimizers are to be built
    afterwards. Raises `UsageError`, and leaves `module` as it is, for a batch norm that cannot be frozen
    without changing what it computes.
    """
    check_freezable(module)
    return _with_frozen_norms(module)


def check_freezable(module: nn.Module) -> None:
    """`UsageError` for the first batch norm that `freeze_norms` would refuse."""
    for name, norm in module.named_modules():
        if not isinstance(norm, _BatchNorm) or _kind(norm) in TIMM_NORMS:
            continue
        # A subclass may do more than normalise, which a frozen norm would drop.
        plain = type(norm) in (nn.BatchNorm2d, nn.SyncBatchNorm)
        if not plain or norm.weight is None or norm.running_var is None:
            raise UsageError(
                f"cannot freeze {name or 'it'}, a {_kind(norm)}: only BatchNorm2d with weights and running "
                "statistics can be; leave the norms as they are"
            )


# With an activation inside, which timm's own frozen norm has, too.
TIMM_NORMS = ("timm.layers.norm_act.BatchNormAct2d", "timm.layers.norm_act.SyncBatchNormAct")


def _kind(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__name__}"


def _with_frozen_norms(module: nn.Module) -> nn.Module:
    if isinstance(module, _BatchNorm):
        return _frozen(module)
    for name, child in module.named_children():
        setattr(module, name, _with_frozen_norms(child))
    return module


def _frozen(norm: _BatchNorm) -> nn.Module:
    if _kind(norm) in TIMM_NORMS:
        from timm.layers.norm_act import freeze_batch_norm_2d

        return freeze_batch_norm_2d(norm).train(norm.training)
    frozen = FrozenBatchNorm2d(norm.num_features, norm.eps)
    for name in dict(frozen.named_buffers()):
        setattr(frozen, name, getattr(norm, name).detach().clone())
    return frozen.train(norm.training)
