"""The stages of the body inside a network: where they are, and a learning rate for each."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn
from torch.nn import Parameter

from resnext_backbones.errors import UsageError

ABOVE = "heads"  # the name of what stands in no stage: pyramid and heads
UNDECAYED = "_undecayed"  # ends the name of a group without weight decay


def parameters_by_stage(model: nn.Module, wanted_for: str) -> dict[str, list[Parameter]]:
    """Of each stage of the body inside a network, in order from the stem, all its parameters.

    The body, or a network around it, is the outermost module with `stages`, as `freeze` wants them.

    Raises UsageError, which names the option it is `wanted_for`, where there is none.
    """
    staged = next((m for m in model.modules() if isinstance(getattr(m, "stages", None), Mapping)), None)
    if staged is None:
        raise UsageError(f"{wanted_for}: {type(model).__name__} has no body that says what its `stages` are")
    stages: Mapping[str, Iterable[str]] = staged.stages  # type: ignore[assignment]
    return {
        stage: [p for name in names for p in staged.get_submodule(name).parameters()]
        for stage, names in stages.items()
    }


def with_body_decay(
    groups: Sequence[Mapping[str, Any]], model: nn.Module, learning_rate: float, decay: float
) -> list[dict[str, Any]]:
    """Parameter groups taken apart by stage, each with its `lr` and a `name`.

    What stands above the body has the full rate; the body's last stage has `decay` times it, the one below
    that `decay`² times, down to the stem (layer-wise decay: ELECTRA, arXiv 2003.10555, and BEiT, arXiv
    2106.08254, which count the head as layer 0 from above, too).

    Args:
        groups: two, with and without weight decay (`tasks.base.parameter_groups`).
        decay: above 0, up to 1.

    Raises UsageError for another decay, and where no body says what its stages are.
    """
    option = f"task.body_lr_decay={decay}"
    if not isinstance(decay, int | float) or isinstance(decay, bool) or not 0 < decay <= 1:
        raise UsageError(f"{option}: a number above 0 and up to 1 is wanted")
    by_stage = parameters_by_stage(model, option)
    stage_of = {id(p): stage for stage, parameters in by_stage.items() for p in parameters}
    depth = {ABOVE: 0} | {stage: k for k, stage in enumerate(reversed(by_stage), start=1)}
    return [
        {
            **group,
            "params": chosen,
            "lr": learning_rate * decay ** depth[stage],
            "name": f"{stage}{suffix}",
        }
        for group, suffix in zip(groups, ("", UNDECAYED), strict=True)
        for stage in depth
        if (chosen := [p for p in group["params"] if stage_of.get(id(p), ABOVE) == stage])
    ]
