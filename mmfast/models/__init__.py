"""The network: M3 encoder, projector and regression head."""

from torch import nn

from mmfast.models.encoders.m3 import M3Encoder
from mmfast.models.head import RegressionHead
from mmfast.models.projector import Projector

__all__ = ["M3Encoder", "Projector", "RegressionHead", "parameter_count"]


def parameter_count(module: nn.Module) -> int:
    """Elements of all parameters: frozen ones count, shared ones once, buffers not at all."""
    return sum(p.numel() for p in module.parameters())
