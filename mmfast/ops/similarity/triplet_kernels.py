"""The passes of triplet_passes.py in C++: csrc/cpu/triplets.cpp."""

from __future__ import annotations

import torch
from torch import Tensor

from mmfast import backends
from mmfast.ops.similarity.passes import Rule
from mmfast.ops.similarity.triplet_passes import KINDS, Extremes, Options, Plain


class Cpu(Plain):
    def __init__(self, rule: Rule):
        super().__init__(rule)
        order, start, stop, _ = self.classes
        self.whose = [x.int() for x in (order, start, stop)]
        self.whose += [None if x is None else x[0].contiguous() for x in (rule.ids, rule.valid)]

    def _call(self, kernel: str, scores: Tensor, start: int, *arguments) -> None:
        rows, columns = scores.shape
        most = max(self.classes.most, 1)
        padded = 2 << most.bit_length()
        size = scores.dtype.itemsize
        # Of a thread, see Scratch.
        step = -(-(size * (columns + 3 * padded) + 4 * (2 * columns + 4 * padded)) // 64) * 64
        threads = torch.get_num_threads()
        scratch = torch.empty(threads * step, dtype=torch.uint8, device=scores.device)
        where = (0 if x is None else x.data_ptr() for x in self.whose)
        strip = backends._C.TripletStrip(rows, columns, start, *where)
        arguments = (x.data_ptr() if isinstance(x, Tensor) else x for x in arguments)
        most = (most,) if kernel == "triplet_strip" else ()
        native = getattr(backends._C, kernel)
        native(size == 8, strip, scores.data_ptr(), *arguments, *most, scratch.data_ptr(), step, threads)

    def strip(self, scores: Tensor, start: int, options: Options) -> tuple[Tensor, Tensor]:
        values = scores.new_empty(len(scores))
        counts = torch.empty((6, len(scores)), dtype=torch.long, device=scores.device)
        self._strip(scores.contiguous(), start, options, values, counts, len(scores), 0, 0)
        return values, counts

    def slopes(self, scores: Tensor, start: int, options: Options, weights: Tensor) -> Tensor:
        g = scores.new_empty(scores.shape)
        self._strip(scores.contiguous(), start, options, 0, 0, 0, g, weights.contiguous())
        return g

    def _strip(self, scores: Tensor, start: int, options: Options, *results) -> None:
        wanted = KINDS.index(options.kind), options.margin, options.ties
        self._call("triplet_strip", scores, start, *wanted, *results)

    def extremes(self, scores: Tensor, start: int) -> Extremes:
        near, far = scores.new_empty((2, len(scores)))
        places, numbers = (
            torch.empty((2, len(scores)), dtype=dtype, device=scores.device)
            for dtype in (torch.int32, torch.int64)
        )
        self._call("triplet_hardest", scores.contiguous(), start, near, far, places, numbers, len(scores))
        return Extremes(near, far, places, numbers)
