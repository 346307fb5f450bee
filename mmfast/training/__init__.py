"""One run: from settings and data to a checkpoint, and what a checkpoint is good for.

Names are imported when they are first asked for: the command line reads the settings without torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mmfast.training.embedding import Embeddings, embed
    from mmfast.training.exported import TrainedEncoder, export, load_encoder

# Name -> the module that it is from.
_FROM = {
    "Embeddings": "embedding",
    "TrainedEncoder": "exported",
    "embed": "embedding",
    "export": "exported",
    "load_encoder": "exported",
}
__all__ = ["Embeddings", "TrainedEncoder", "embed", "export", "load_encoder"]


def __getattr__(name: str):
    if name not in _FROM:
        raise AttributeError(f"module 'mmfast.training' has no attribute {name!r}")
    return getattr(import_module(f"mmfast.training.{_FROM[name]}"), name)
