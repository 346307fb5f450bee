"""Rows of all processes for losses that contrast each row with all others."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

from mmfast.errors import UserError
from mmfast.ops.barlow_twins.checks import Unusable, not_finite, too_large
from mmfast.ops.collectives import Ranks, agree, check_group, raise_together, world

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

    def named(
        self, views: Mapping[str, Tensor], valid: Tensor | None, call: Callable[[], T], what: str = "lengths"
    ) -> T:
        """What ``call`` gives, which computes with the embeddings of all processes.

        Embeddings that it cannot use are refused by all, with the names and rows that who asked knows: ``views`` are
        this process's, (n, D) or (n, V, D), ``valid`` (n,) says which rows are there. ``what``: of finite embeddings
        is not finite.
        """
        if torch.compiler.is_compiling():
            return call()
        try:
            return call()
        except Unusable:
            parts = dict(by_view(views, valid))
        for problem in (not_finite(parts, self.op), too_large(parts, self.op, what)):
            raise_together(self.group, problem)

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


def by_view(views: Mapping[str, Tensor], valid: Tensor | None = None) -> Iterator[tuple[str, Tensor]]:
    """Names and (n, D) of embeddings (n, D) or (n, V, D), with zeros for rows that are not valid."""
    for name, z in views.items():
        parts = {name: z} if z.dim() == 2 else {f"{name}[:, {v}]": part for v, part in enumerate(z.unbind(1))}
        for part, x in parts.items():
            yield part, x if valid is None else torch.where(valid[:, None], x, 0)


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
