"""Recurrent layers over sequences of true lengths: LSTM and GRU, several streams in one call."""

from mmfast.ops.recurrent.op import Stream, recurrent, served

__all__ = ["Stream", "recurrent", "served"]
