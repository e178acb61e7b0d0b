"""A classifier of whole images on any body."""

import torch.nn.functional as F
from torch import Tensor, nn

from resnext_backbones import UsageError
from resnext_backbones.features import declared_features
from tasks.models.normalise import Normalised
from tasks.models.parts import ClassLayer, Part


class Classifier(Normalised):
    """The mean of a body's coarsest map, and one linear layer (arXiv 1512.03385, §3.3).

    Normalising is a step of its own, since mixup and CutMix go between it and the network.

    `stages` and `weights_prefix` let `load_weights` fill body and `fc` from a published ResNet or ResNeXt;
    `allow_partial=("fc",)` takes those of another number of classes without theirs.

    Args:
        body: a `Backbone`.
        num_classes: K; labels are 0…K-1.
        dropout: the probability with which a feature is left out before the linear layer.

    Raises `UsageError` for a body that has a classifier already.
    """

    parts = (Part("fc", ("fc",), ("backbone",)),)
    class_layers = (ClassLayer("fc", background=False),)

    def __init__(self, body: nn.Module, num_classes: int, dropout: float = 0.0) -> None:
        super().__init__()
        if isinstance(getattr(body, "fc", None), nn.Module):
            raise UsageError(
                f"Classifier: {type(body).__name__} has a classifier of its own, which would not be trained: "
                "leave out backbone.num_classes"
            )
        coarsest = list(declared_features(body).values())[-1]
        self.body = body
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(coarsest.channels, num_classes)
        self.weights_prefix = f"body.{getattr(body, 'weights_prefix', '')}"
        self.stages = {
            stage: tuple(f"body.{module}" for module in modules)
            for stage, modules in getattr(body, "stages", {}).items()
        }

    def forward(self, normalised: Tensor) -> Tensor:
        """Images as `normalise` gives them, float [B, 3, H, W], to logits, float32 [B, K]."""
        *_, coarsest = self.body(normalised).values()
        pooled = F.adaptive_avg_pool2d(coarsest, 1).flatten(1)
        return self.fc(self.dropout(pooled)).float()
