"""`model.weights=SOURCE`: a whole network's weights into another, of which only the class layers may differ.

A run's checkpoint, torchvision's detectors and segmenters, or a file of their names. The body must fit, and
every part of the network that the source has; a part that it lacks altogether (the mask head, where the
source finds boxes) stays as built. What is a part, and which layers have rows of their own for each class,
the network declares (`tasks/models/parts.py`); rows of classes with equal names come along (`class_rows.py`).
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from resnext_backbones import Clash, Receipt, UsageError
from resnext_backbones.receipt import few
from resnext_backbones.weight_files import reads_bgr
from resnext_backbones.weights import (
    LEARNED,
    Opened,
    best_prefix,
    check_strides,
    converted,
    fit_eps,
    fits_by_prefix,
    in_words,
    is_counter,
    open_source,
    out_of_place,
    to_fill,
)
from tasks.class_rows import Rows, count, match, misfit, taken
from tasks.models.parts import ClassLayer, Part

UNSEEN = ("backbone.output_stride",)  # of a body: what its weights were trained with and do not show


@dataclass(frozen=True)
class NetworkReceipt(Receipt):
    """What `load_network` did: a receipt whose stages are the network's parts, and which classes were kept.

    Attributes:
        rows: of the classes and, where there are any, of the keypoints.
        as_built: parts that the source has not, which are no stages.
        otherwise: settings that no shape shows, with which the source was trained in another way.
    """

    rows: tuple[Rows, ...]
    as_built: tuple[str, ...]
    otherwise: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        rows = [rows.as_dict() for rows in self.rows]
        return super().as_dict() | {
            "rows": rows,
            "as_built": list(self.as_built),
            "otherwise": list(self.otherwise),
        }

    def summary(self) -> dict[str, Any]:
        plain = self.as_dict()
        return super().summary() | {name: plain[name] for name in ("rows", "as_built", "otherwise")}

    def __str__(self) -> str:
        lines = [super().__str__()]
        lines += [f"  {'warning: ' * rows.guessed}{rows.of}: {rows}" for rows in self.rows]
        lines += [f"  as built, the source has none: {', '.join(self.as_built)}"] if self.as_built else []
        lines += [f"  warning: trained with {line}: results will be worse" for line in self.otherwise]
        return "\n".join(lines)


@dataclass(frozen=True)
class Anatomy:
    """A network's tensors, by part and by class layer.

    Attributes:
        state: all of them but counters.
        body: the part of those that are its body's.
        modules: which part each declared module is.
        parts: the names of each part's tensors, in the network's order; none is empty.
        layers: of each tensor with rows for classes, what its layer is.
    """

    state: dict[str, Tensor]
    body: Part
    modules: dict[str, Part]
    parts: dict[Part, list[str]]
    layers: dict[str, ClassLayer]

    def part_of(self, name: str) -> Part:
        """The part with the longest name that a tensor stands under; else the network's child it is of."""
        under = [module for module in self.modules if name.startswith(f"{module}.")]
        child = name.partition(".")[0]
        return self.modules[max(under, key=len)] if under else Part(child, (child,), ("model",))


def load_network(
    model: nn.Module,
    body: nn.Module,
    source: str,
    classes: Sequence[str],
    keypoints: Sequence[str] = (),
    settings: Mapping[str, Any] | None = None,
) -> NetworkReceipt:
    """Copy a whole network's weights into `model`.

    Args:
        model: with `parts` and `class_layers` (`tasks/models/parts.py`). Without them each of its children is
            a part, and all of it must fit.
        body: the module in it that is its body.
        source: as of `load_weights`; a run's checkpoint names its classes, and so do torchvision's names.
        classes: in the order of their labels here, without a detector's background.
        keypoints: of an object here, in their order.
        settings: of model and body here by key, such as {"model.anchor_scales": [8]}, and under "model" and
            "backbone" which were chosen, to be compared with those that a run's checkpoint was trained with.

    Raises `UsageError`, and leaves the model as it is, where the source cannot be read, has a body alone, or
    has a part that is of another shape or not complete.
    """
    opened = open_source(source)
    if reads_bgr(opened.metadata, source):
        raise UsageError(f"{source} reads BGR: give backbone.weights={source}, which turns a body to RGB")
    check_strides(body, opened.stride_in_1x1, source)
    anatomy = _anatomy(model, body)
    state, layers = anatomy.state, anatomy.layers
    prefix, tensors = _under_own_names(model, body, state, opened, source)
    found = {name: tensors[name] for name in state if name in tensors}
    there = {part for part, names in anatomy.parts.items() if any(name in found for name in names)}
    if not there - {anatomy.body}:
        raise _body_alone(model, source)
    named = {"classes": (classes, opened.classes), "keypoints": (keypoints, opened.keypoints)}
    rows = {
        kind: match(kind, here, theirs or count(layers[names[0]], found[names[0]]))
        for kind, (here, theirs) in named.items()
        if (names := [name for name, layer in layers.items() if layer.of == kind and name in found])
    }
    faults = list(_differing(model, anatomy, there, found, tensors, rows))
    _refuse_what_differs(faults, anatomy.body, source, opened.settings, settings or {})

    adapted = fit_eps(model, found, opened.norm_eps)
    new = {name: converted(tensor, state[name], name, source) for name, tensor in found.items()}
    for name in [name for name in layers if name in new]:
        layer, here, theirs = layers[name], state[name], new.pop(name)
        if rows[layer.of].pairs or layer.background:  # the background's row is known whoever has the others
            new[name] = taken(layer, here, theirs, rows[layer.of])
    model.load_state_dict(new, strict=False)
    return NetworkReceipt(
        source=opened.name,
        sha256=opened.sha256,
        prefix=prefix,
        normalisation=opened.normalisation,
        licence=opened.licence,
        metadata=opened.metadata,
        stages={
            part.name: {
                "loaded": tuple(name for name in names if name in new),
                "missing": (),  # or it was refused, as what clashes was
                "clashing": (),
            }
            for part, names in anatomy.parts.items()
            if part in there
        },
        clashing=(),
        adapted=adapted,
        unexpected=tuple(name for name in tensors if name not in state and not is_counter(name)),
        rows=tuple(rows.values()),
        as_built=tuple(part.name for part in anatomy.parts if part not in there),
        otherwise=tuple(_otherwise(there, opened.settings, settings or {})),
        warning=opened.warning,
    )


def _anatomy(model: nn.Module, body: nn.Module) -> Anatomy:
    state = to_fill(model)
    inside = next((name for name, module in model.named_modules() if module is body), "")
    whole = Part("body", (inside,), ("backbone",))
    modules = {module: part for part in (whole, *getattr(model, "parts", ())) for module in part.modules}
    layers = {
        f"{layer.name}.{leaf}": layer for layer in getattr(model, "class_layers", ()) for leaf in LEARNED
    }
    anatomy = Anatomy(state, whole, modules, {}, {n: layers[n] for n in state if n in layers})
    for name in state:
        anatomy.parts.setdefault(anatomy.part_of(name), []).append(name)
    return anatomy


def _under_own_names(
    model: nn.Module, body: nn.Module, state: Mapping[str, Tensor], opened: Opened, source: str
) -> tuple[str, dict[str, Tensor]]:
    """The source's prefix, and its tensors under the names that they have in the model.

    A published classifier has no name for its body, which is what `Classifier.weights_prefix` is for.
    """
    fits = {
        inner: fits_by_prefix(opened.tensors, {name.removeprefix(inner): state[name] for name in state})
        for inner in ("", getattr(model, "weights_prefix", ""))
    }
    inner = max(fits, key=lambda inner: max(fits[inner].values(), default=(0, 0)))
    if not fits[inner] and fits_by_prefix(opened.tensors, dict(body.state_dict())):
        raise _body_alone(model, source)
    prefix = best_prefix(fits[inner], opened.tensors, state, source)
    own = {name.removeprefix(inner): name for name in state}
    tensors = {
        own.get(there, inner + there): tensor
        for name, tensor in opened.tensors.items()
        if name.startswith(prefix)
        for there in [name.removeprefix(prefix)]
    }
    for name, module in model.named_modules():
        # torchvision's modules know what older releases called their children's tensors, as those of 2019
        # that it publishes are called. Modules without tensors of their own do nothing but rename here.
        if not (module._parameters or module._buffers):
            module._load_from_state_dict(tensors, f"{name}." if name else "", {}, False, [], [], [])
    return prefix, tensors


def _body_alone(model: nn.Module, source: str) -> UsageError:
    return UsageError(
        f"{source} has of this {type(model).__name__} a body alone: give backbone.weights={source}"
    )


def _differing(
    model: nn.Module,
    anatomy: Anatomy,
    there: set[Part],
    found: Mapping[str, Tensor],
    tensors: Mapping[str, Tensor],
    rows: Mapping[str, Rows],
) -> Iterator[tuple[Part, str]]:
    """What is missing in a part that is there, of another shape, or has no place in it, part by part."""
    state = anatomy.state
    strange = {name: out_of_place(name, state) for name in tensors if name not in state}
    for part, names in anatomy.parts.items():
        if part not in there and part is not anatomy.body:
            continue
        for name in names:
            layer = anatomy.layers.get(name)
            if name not in found:
                yield part, f"{name} is missing"
            elif layer is not None:
                if (fault := misfit(name, layer, state[name], found[name], rows[layer.of])) is not None:
                    yield part, fault
            elif found[name].shape != state[name].shape:
                yield part, in_words(model, Clash(name, tuple(state[name].shape), tuple(found[name].shape)))
        for name, fault in strange.items():
            if fault is not None and anatomy.part_of(name) == part:
                yield part, fault


def _refuse_what_differs(
    faults: Sequence[tuple[Part, str]],
    body: Part,
    source: str,
    theirs: Mapping[str, Any],
    ours: Mapping[str, Any],
) -> None:
    """Raises UsageError that names the first fault: a pyramid's width, say, is the cause of those behind.

    Named with it are the settings of that part which are known to differ, the kind of network before them;
    where nothing is known to, all that decide on the part.
    """
    if not faults:
        return
    part, fault = faults[0]
    more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
    # A part that several kinds of network have may declare a key that this kind has not.
    own = [key for key in part.keys if key in ours or not ours or key == "backbone"]
    keys = [key for key in (*(["model"] if part is not body else []), *own) if _differs(key, theirs, ours)]
    known = [f"{key}={few([str(theirs[key])])}" if key in theirs else key for key in keys or own or ["model"]]
    otherwise = "" if part is body else f", or give backbone.weights={source} for its body alone"
    raise UsageError(
        f"{source} is of another network: in the {part.name} {fault}{more}; set {', '.join(known)} as it was "
        f"trained with{otherwise}"
    )


def _otherwise(parts: Iterable[Part], theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> Iterator[str]:
    """Settings of these parts that no shape shows, with which the source was trained in another way."""
    for key in (key for key in ours if key.startswith("model.") and any(key in part.keys for part in parts)):
        if _differs(key, theirs, ours):
            yield f"{key}={few([str(theirs[key])])}, here {few([str(ours[key])])}"
    for key in UNSEEN:  # which few configurations spell out
        if "backbone._target_" in theirs and ours and theirs.get(key) != ours.get(key):
            yield f"{key}={few([str(theirs.get(key))])}, here {few([str(ours.get(key))])}"


def _differs(key: str, theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> bool:
    return key in theirs and key in ours and theirs[key] != ours[key]
