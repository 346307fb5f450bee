"""Draw, apply and its adjoint in Triton: one launch per modality each, for all its samples, steps and views."""

from mmfast.triton.augment_adjoint import adjoint
from mmfast.triton.augment_apply import apply
from mmfast.triton.augment_draw import draw

__all__ = ["adjoint", "apply", "draw"]
