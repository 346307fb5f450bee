"""mmfast: fast kernels, losses and training for self-supervised multimodal learning."""

__version__ = "0.1.0"
