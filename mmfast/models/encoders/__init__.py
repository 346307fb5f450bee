"""One file for each published encoder."""

from mmfast.models.encoders.m3 import M3Encoder

__all__ = ["M3Encoder"]
