"""Augmentation: draw a plan, apply it."""

from mmfast.ops.augment.op import augment_apply, augment_draw

__all__ = ["augment_apply", "augment_draw"]
