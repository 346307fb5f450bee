"""One run: from settings and data to a checkpoint, and what a checkpoint is good for.

Names are imported when they are first asked for: the command line reads the settings without torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mmfast.training.embedding import Embeddings, embed

__all__ = ["Embeddings", "embed"]


def __getattr__(name: str):
    if name not in __all__:
        raise AttributeError(f"module 'mmfast.training' has no attribute {name!r}")
    return getattr(import_module("mmfast.training.embedding"), name)
