"""Barlow Twins of two views and of many."""

from mmfast.ops.barlow_twins.op import barlow_twins, reference

__all__ = ["barlow_twins", "reference"]
