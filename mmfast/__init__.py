"""mmfast: fast kernels, losses and training for self-supervised multimodal learning."""

from mmfast.backends import backend, info
from mmfast.errors import UserError

__version__ = "0.1.0"
__all__ = ["UserError", "backend", "info"]
