"""Layers that take true lengths, for any model: torch's names, shapes and state dicts."""

from mmfast.nn.recurrent import GRU, LSTM

__all__ = ["GRU", "LSTM"]
