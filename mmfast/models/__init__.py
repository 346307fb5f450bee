"""The network: encoders, projector and heads."""

from torch import nn

from mmfast.models.encoders import Encoder, M3Encoder, Steps
from mmfast.models.head import LinearHead, RegressionHead
from mmfast.models.projector import Projector

__all__ = ["Encoder", "LinearHead", "M3Encoder", "Projector", "RegressionHead", "Steps", "parameter_count"]


def parameter_count(module: nn.Module) -> int:
    """Elements of all parameters: frozen ones count, shared ones once, buffers not at all."""
    return sum(p.numel() for p in module.parameters())
