"""The passes over strips of scores, bound to the rule of a call, by every backend."""

from __future__ import annotations

import torch
from torch import Tensor

from mmfast import backends
from mmfast.ops.native import call_cuda
from mmfast.ops.similarity import passes
from mmfast.ops.similarity.passes import KINDS, Rule

# Of the others, none of which is expensive, the passes on the CPU are PyTorch's.
CPU_KINDS = KINDS[:5]


class Plain:
    """The passes in PyTorch, for any device."""

    def __init__(self, rule: Rule, kind: str, scale: Tensor, bias: Tensor | None):
        self.rule, self.kind, self.scale, self.bias = rule, kind, scale, bias

    def _logits(self, scores: Tensor) -> Tensor:
        logits = scores * self.scale
        return logits if self.bias is None else logits.add_(self.bias)

    def forward(self, scores, start, values, counts, rows):
        """Fills values (B,), counts (B,) and rows (4, B) of all rows from ``start`` on, of their scores (n, C)."""
        at = slice(start, start + len(scores))
        found = passes.forward_rows(self._logits(scores), self.rule, start, self.kind)
        values[at], counts[at], rows[:, at] = found

    def backward(self, scores, start, rows, weights, own, columns=None):
        """H (n, C), see :func:`passes.backward_rows`, and its sums by row (n,); of rows (4, B) and weights (B,) of
        all rows, plus that of the candidates as rows, of ``columns``: their rows (4, C) and weights (C,).
        ``own``: the scores are the caller's, and may be overwritten."""
        at = slice(start, start + len(scores))
        h = passes.backward_rows(
            self._logits(scores),
            self.rule,
            start,
            self.kind,
            rows[:, at],
            weights[at],
            *(columns or (None, None)),
        )
        return h, h.sum(1)


def _codes(pair: tuple[Tensor, Tensor], wide: bool) -> tuple[Tensor, Tensor]:
    """Integers that are equal where those of ``pair`` are, int64 if ``wide``, else int32."""
    own, other = pair
    alone = own is other
    own = own.contiguous()
    other = own if alone else other.contiguous()
    if wide:
        return own, other
    narrow = [x.new_empty(x.shape, dtype=torch.int32) for x in ((own,) if alone else (own, other))]
    if all(
        [
            backends._C.similarity_codes(x.data_ptr(), x.numel(), y.data_ptr())
            for x, y in zip((own, other), narrow, strict=False)
        ]
    ):
        return narrow[0], narrow[-1]
    names = torch.cat((own,) if alone else (own, other)).unique(return_inverse=True)[1].to(torch.int32)
    return (names, names) if alone else (names[: own.numel()], names[own.numel() :])


class _Kernels:
    """The passes by kernels of ``mmfast._C``, which take the same arguments."""

    def _call(self, kernel: str, scores: Tensor, *arguments) -> None:
        raise NotImplementedError(f"similarity: {type(self).__name__} must call {kernel}")

    def forward(self, scores, start, values, counts, rows):
        self._call(
            "forward_rows",
            scores,
            start,
            scores.shape[0],
            scores.data_ptr(),
            *(x.data_ptr() + start * x.element_size() for x in (values, counts, rows)),
            rows.stride(0),
        )

    def backward(self, scores, start, rows, weights, own, columns=None):
        h, sums = scores if own else torch.empty_like(scores), scores.new_empty(scores.shape[0])
        offset = start * rows.element_size()
        self._call(
            "backward_rows",
            scores,
            start,
            scores.shape[0],
            scores.data_ptr(),
            rows.data_ptr() + offset,
            rows.stride(0),
            weights.data_ptr() + offset,
            *map(_address, columns or (None, None)),
            h.data_ptr(),
            sums.data_ptr(),
        )
        return h, sums


class Cpu(_Kernels):
    """The passes in C++, for CPU tensors: csrc/cpu/similarity.cpp."""

    def __init__(self, rule: Rule, kind: str, scale: Tensor, bias: Tensor | None):
        wide = scale.dtype == torch.float64
        pairs = [_codes(rule.labels, wide), (None, None), (None, None)]
        if rule.ids is not None:
            pairs[1] = _codes(rule.ids, wide)
        if rule.valid is not None:
            codes = torch.int64 if wide else torch.int32
            own, other = (x.to(codes).neg_().contiguous() for x in rule.valid)
            pairs[2] = own, other
        # Tensors whose addresses the native rule holds live as long as it.
        self.kept = scale, bias, pairs
        addresses = [_address(x) for pair in pairs for x in pair]
        self.native = backends._C.SimilarityRule(
            wide,
            KINDS.index(kind),
            rule.itself,
            rule.labels[1].numel(),
            *addresses,
            _address(scale),
            _address(bias),
        )

    def _call(self, kernel: str, scores: Tensor, *arguments) -> None:
        getattr(backends._C, f"similarity_{kernel}")(self.native, *arguments, torch.get_num_threads())


class Cuda(_Kernels):
    """The passes in CUDA: csrc/cuda/similarity.cu."""

    def __init__(self, rule: Rule, kind: str, scale: Tensor, bias: Tensor | None):
        pairs = [
            (None, None) if pair is None else tuple(x.contiguous() for x in pair)
            for pair in (rule.labels, rule.ids, rule.valid)
        ]
        # Tensors whose addresses the native rule holds live as long as it.
        self.kept = scale, bias, pairs
        self.native = backends._C.SimilarityRule(
            scale.dtype == torch.float64,
            KINDS.index(kind),
            rule.itself,
            rule.labels[1].numel(),
            *(_address(x) for pair in pairs for x in pair),
            _address(scale),
            _address(bias),
        )

    def _call(self, kernel: str, scores: Tensor, *arguments) -> None:
        native = getattr(backends._C, f"cuda_similarity_{kernel}")
        call_cuda("similarity", native, scores.device, self.native, *arguments)


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def backend_of(device: torch.device) -> str:
    """Which backend serves tensors on ``device``."""
    return backends.choose("similarity", device)


def passes_for(kind: str, backend: str):
    """The class of the passes of a kind."""
    if backend == "cuda":
        return Cuda
    if backend == "triton":
        from mmfast.triton.similarity import Passes

        return Passes
    return Cpu if backend == "cpu" and kind in CPU_KINDS else Plain
