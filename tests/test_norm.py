"""Frozen batch norm against the live one in evaluation, and against torchvision's."""

import copy

import pytest
import torch
import torchvision
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from resnext_backbones import FrozenBatchNorm2d, UsageError, conv_norm, freeze_norms, resnext26_32x4d

CONVS = {
    "3x3": lambda: nn.Conv2d(8, 12, 3, padding=1, bias=False),
    "1x1": lambda: nn.Conv2d(8, 12, 1, bias=False),
    "grouped": lambda: nn.Conv2d(8, 12, 3, padding=1, groups=4, bias=False),
    "strided": lambda: nn.Conv2d(8, 12, 3, stride=2, padding=1, groups=2, bias=False),
    "strided 1x1": lambda: nn.Conv2d(8, 12, 1, stride=2, bias=False),
    "stem": lambda: nn.Conv2d(8, 12, 7, stride=2, padding=3, bias=False),
    "biased": lambda: nn.Conv2d(8, 12, 3, bias=True),
    "dilated": lambda: nn.Conv2d(8, 12, 3, dilation=2, bias=False),
    "reflecting": lambda: nn.Conv2d(8, 12, 3, padding=1, padding_mode="reflect", bias=False),
}


def batch_norm(channels: int = 12, eps: float = 1e-5) -> nn.BatchNorm2d:
    """In evaluation, with statistics and affine parameters that are none of the defaults."""
    norm = nn.BatchNorm2d(channels, eps=eps).eval()
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    nn.init.normal_(norm.running_mean)
    nn.init.uniform_(norm.running_var, 0.1, 3.0)
    return norm


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("kind", CONVS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-5)])
def test_folded_equals_live(kind: str, dtype: torch.dtype, tolerance: float) -> None:
    conv, live = CONVS[kind]().to(dtype), batch_norm(eps=1e-3).to(dtype)
    folded, frozen = copy.deepcopy(conv), freeze_norms(live)
    x = torch.randn(2, 8, 11, 9, dtype=dtype)
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()

    expected, got = live(conv(a)), conv_norm(folded, frozen, b)
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)
    expected.square().mean().backward()
    got.square().mean().backward()
    torch.testing.assert_close(b.grad, a.grad, rtol=tolerance, atol=tolerance)
    for p, q in zip(folded.parameters(), conv.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=tolerance, atol=tolerance)


def test_folded_is_one_pass_over_the_activations() -> None:
    passes: list[str] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.shape == (2, 12, 11, 9):
                passes.append(str(func))
            return out

    conv, x = CONVS["3x3"](), torch.randn(2, 8, 11, 9)
    with Watch():
        conv_norm(conv, freeze_norms(batch_norm()), x)
    assert passes == ["aten.convolution.default"]


def test_under_autocast() -> None:
    conv, live = CONVS["grouped"](), batch_norm()
    frozen, x = freeze_norms(live), torch.randn(2, 8, 11, 9)
    exact = live(conv(x))
    with torch.autocast("cpu", torch.bfloat16):
        got, alone = conv_norm(conv, frozen, x), frozen(conv(x))
    assert got.dtype == alone.dtype == torch.bfloat16
    # Eight bits of mantissa; no worse, beyond a rounding, than the norm as a pass of its own.
    scale = exact.abs().max()
    assert (got.float() - exact).abs().max() < scale * 2**-7
    assert (got.float() - exact).abs().max() < (alone.float() - exact).abs().max() + scale * 2**-9


def test_in_half_precision_a_small_variance_keeps_its_eps() -> None:
    norm = batch_norm()
    nn.init.constant_(norm.running_var, 0.0)
    scale, _ = freeze_norms(norm).half().affine()
    torch.testing.assert_close(scale, norm.weight.detach().half().float() / 1e-5**0.5)


def test_alone_it_is_torchvisions() -> None:
    ours, theirs = freeze_norms(batch_norm()), torchvision.ops.FrozenBatchNorm2d(12)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 12, 5, 7)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-6, atol=1e-6)


def test_channels_last_stays() -> None:
    conv = CONVS["grouped"]().to(memory_format=torch.channels_last)
    x = torch.randn(2, 8, 11, 9).to(memory_format=torch.channels_last)
    out = conv_norm(conv, freeze_norms(batch_norm()), x)
    assert out.is_contiguous(memory_format=torch.channels_last)


def test_freezing_a_network() -> None:
    net = resnext26_32x4d().train()
    for _ in range(2):
        net(torch.randn(2, 3, 64, 64))
    before = {k: v.clone() for k, v in net.state_dict().items()}
    images = torch.randn(1, 3, 65, 64)
    with torch.no_grad():
        expected = net.eval()(images)
    assert freeze_norms(net) is net
    net.train()
    with torch.no_grad():
        got = net(images)
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], rtol=1e-4, atol=1e-4)
    after = net.state_dict()
    assert list(after) == [key for key in before if not key.endswith("num_batches_tracked")]
    assert all(torch.equal(after[key], before[key]) for key in after)
    convs = [module for module in net.modules() if isinstance(module, nn.Conv2d)]
    assert len(list(net.parameters())) == len(convs)  # what was a norm's is no parameter any more
    net.load_state_dict(before)  # strict; the counters of a live norm are accepted


def test_what_cannot_be_frozen_is_refused() -> None:
    class WithActivation(nn.BatchNorm2d):
        pass

    for norm in (
        nn.BatchNorm2d(4, track_running_stats=False),
        nn.BatchNorm2d(4, affine=False),
        WithActivation(4),
        nn.BatchNorm1d(4),
    ):
        with pytest.raises(UsageError, match="cannot freeze"):
            freeze_norms(nn.Sequential(norm))


def test_frozen_stays_frozen() -> None:
    norm = freeze_norms(batch_norm())
    assert isinstance(norm, FrozenBatchNorm2d)
    assert freeze_norms(norm) is norm
