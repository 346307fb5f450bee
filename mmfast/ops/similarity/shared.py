"""Rows of all processes for losses that contrast each row with all others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from mmfast.errors import UserError
from mmfast.ops.collectives import Ranks, agree, check_group, world

T = TypeVar("T")


class Sharing:
    """How processes that work on one batch share it: ``stats``, ``grad_convention``, ``group``."""

    def __init__(self, op: str, stats: str | None, grad_convention: str = "true", group: Any = None):
        for name, value, choices in (
            ("stats", stats, ("global", None)),
            ("grad_convention", grad_convention, ("true", "legacy")),
        ):
            if value not in choices:
                raise UserError(f"{op}: {name} must be one of {', '.join(map(repr, choices))}, got {value!r}")
        check_group(op, group)
        self.op, self.convention = op, grad_convention
        self.group = None if stats is None else world(group)
        self.first = 0
        """rows of processes before this one, at the latest :meth:`gather`"""

    def checked(self, checks: Callable[[], T]) -> T:
        """What ``checks`` return, which look at arguments; what they refuse, all processes refuse.

        Every process calls :meth:`gather` after it.
        """
        if self.group is None:
            return checks()
        try:
            return checks()
        except (TypeError, ValueError) as problem:
            agree(self.op, self.group, 0, {}, problem)
            raise

    def gather(self, rows: list[Tensor], vectors: list[Tensor | None], facts: dict) -> tuple[list, list]:
        """Rows (n, D) and vectors (n,) of all processes in the order of ranks; None stays None."""
        if self.group is None:
            return rows, vectors
        facts = facts | {
            "columns": ", ".join(str(x.shape[1]) for x in rows),
            "dtype": rows[0].dtype,
            "arguments": [x is not None for x in vectors],
        }
        ranks = agree(self.op, self.group, len(rows[0]), facts, None)
        self.first = ranks.first
        size = len(ranks.rows)
        factor = size if self.convention == "true" else 1
        rows = [_Gather.apply(x, ranks, factor) for x in rows]
        return rows, [None if x is None else _gathered(x, ranks) for x in vectors]

    def scalar(self, x: Tensor) -> Tensor:
        """A scalar whose gradient every process computes whole."""
        if self.group is None or self.convention == "true" or not x.requires_grad:
            return x
        size = torch.distributed.get_world_size(self.group)
        return x / size + (x - x / size).detach()


def _gathered(x: Tensor, ranks: Ranks) -> Tensor:
    whole = x.to(torch.int8) if x.dtype == torch.bool else x
    return ranks.start_gather(whole[:, None])()[:, 0].to(x.dtype)


class _Gather(torch.autograd.Function):
    """All rows; back comes what the loss of all, which every process has, gives its own, times ``factor``."""

    @staticmethod
    def forward(ctx, x, ranks, factor):
        ctx.own = ranks.first, ranks.rows[ranks.rank], factor
        return ranks.start_gather(x)()

    @staticmethod
    def backward(ctx, grad):
        first, count, factor = ctx.own
        return grad[first : first + count] * factor, None, None
