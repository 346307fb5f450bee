"""One file for each published encoder, and the base class of them all."""

from mmfast.models.encoders.base import Encoder, Steps
from mmfast.models.encoders.m3 import M3Encoder

__all__ = ["Encoder", "M3Encoder", "Steps"]
