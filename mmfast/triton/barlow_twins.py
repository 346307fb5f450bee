"""The passes of the Barlow Twins loss in Triton: those of ``mmfast/ops/barlow_twins/kernels.py``."""

from mmfast.triton.barlow_twins_gradient import gradient
from mmfast.triton.barlow_twins_loss import correlation_loss, gram_loss, narrowed
from mmfast.triton.barlow_twins_standardise import standardise

__all__ = ["correlation_loss", "gradient", "gram_loss", "narrowed", "standardise"]
