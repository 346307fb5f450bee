"""The passes of the similarity losses in Triton: those of ``mmfast/ops/similarity/kernels.py``."""

from __future__ import annotations

import torch
from torch import Tensor

from mmfast.triton import launch
from mmfast.triton.similarity_backward import similarity_backward_kernel
from mmfast.triton.similarity_forward import similarity_forward_kernel
from mmfast.triton.similarity_rows import row_gradients, units
from mmfast.triton.similarity_rule import row_shape

__all__ = ["Passes", "row_gradients", "units"]


class Passes:
    """The passes over strips of scores, bound to the rule of a call."""

    def __init__(self, rule, kind: str, scale: Tensor, bias: Tensor | None):
        labels, ids, valid = (
            None if pair is None else [x.contiguous() for x in pair]
            for pair in (rule.labels, rule.ids, rule.valid)
        )
        # What is not there is not read: any address will do.
        self.rule = *labels, *(ids or labels), *(valid or labels), scale, scale if bias is None else bias
        self.flags = rule.itself, ids is not None, valid is not None, bias is not None
        self.kind = kind

    def forward(self, scores, start, values, counts, rows):
        n, candidates = scores.shape
        warps, block, vector = row_shape(candidates, scores)
        launch(
            similarity_forward_kernel, n, scores.device,
            scores, *self.rule, values, counts, rows, start, candidates, rows.stride(0),
            *self.flags, self.kind, vector, block, warps=warps,
        )  # fmt: skip

    def backward(self, scores, start, rows, weights, own, columns=None):
        n, candidates = scores.shape
        h, sums = scores if own else torch.empty_like(scores), scores.new_empty(n)
        warps, block, vector = row_shape(candidates, scores)
        # The derivatives of both are the same.
        kind = "in" if self.kind == "sum" else self.kind
        launch(
            similarity_backward_kernel, n, scores.device,
            scores, *self.rule, rows, weights, *(columns or (rows, weights)), h, sums, start, candidates,
            rows.stride(0), *self.flags, columns is not None, kind, vector, block, warps=warps,
        )  # fmt: skip
        return h, sums
