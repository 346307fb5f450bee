"""One call of a loss of queries and keys: its arguments, which all processes share, and what they give."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmfast.checks import check_bool
from mmfast.errors import UserError
from mmfast.losses.queue import NO_QUEUE, Memory, memory
from mmfast.losses.similarity import Call, Found
from mmfast.ops.similarity.checks import check_integers, check_rows
from mmfast.ops.similarity.rows import joined
from mmfast.ops.similarity.shared import Sharing


class Pairs(NamedTuple):
    """Checked arguments, which are of this process and then of all."""

    call: Call
    query: Tensor
    key: Tensor
    negatives: Tensor | None
    targets: Tensor | None
    ids: Tensor | None
    weights: Tensor | None
    cosine: bool
    memory: Memory | None = None

    @classmethod
    def checked(cls, call, query, key, negatives, targets, ids, weights, normalise, memory=None) -> Pairs:
        op = call.op
        cosine = check_bool(op, "normalise", normalise)
        rows = "query", check_rows(op, "query", query)
        check_rows(op, "key", key, rows)
        if targets is None and len(key) != len(query):
            raise UserError(
                f"{op}: key must have the {len(query)} rows of query (or give targets), got {tuple(key.shape)}"
            )
        if negatives is not None:
            check_rows(op, "negatives", negatives, rows)
        views = {"query": query, "key": key} | ({} if negatives is None else {"negatives": negatives})
        call.views = call.views or views
        _, ids, _, weights = call.vectors(rows, None, ids, None, weights)
        if targets is not None:
            if ids is not None:
                raise UserError(f"{op}: ids must be None with targets, got both")
            targets = check_integers(op, "targets", targets, rows)
            _check_targets(op, targets, len(key))
        return cls(call, query, key, negatives, targets, ids, weights, cosine, memory)

    def gathered(self) -> Pairs:
        sharing = self.call.sharing
        facts = {
            "normalise": self.cosine,
            "reduction": self.call.reduction,
            "keys": "others" if self.targets is not None else "those of the queries",
            "negatives": self.negatives is not None,
            "queue": 0 if self.memory is None else self.memory.queue.size,
        }
        kept = self.memory
        mask = None if kept is None else kept.mask
        if self.targets is None:
            (query, key), (ids, weights, mask) = sharing.gather(
                [self.query, self.key], [self.ids, self.weights, mask], facts
            )
            targets = None
        else:
            ((key,), (mask,)), ids = sharing.gather([self.key], [mask], facts), None
            (query,), (targets, weights) = sharing.gather(
                [self.query], [self.targets + sharing.first, self.weights], {}
            )
        negatives = self.negatives
        if negatives is not None:
            ((negatives,), _) = sharing.gather([negatives], [], {})
        if kept is None and len(key) + (0 if negatives is None else len(negatives)) < 2:
            self.call.refuse_one_row(key, list(self.call.views)[1])
        kept = kept and kept._replace(mask=mask)
        return Pairs(self.call, query, key, negatives, targets, ids, weights, self.cosine, kept)

    def loss(
        self,
        scale: Tensor,
        bias: Tensor | None = None,
        kind: str = "out",
        added: Tensor | None = None,
        sides: bool = False,
    ) -> Found:
        """With components, of the gathered ones; to the losses of rows (B,) something may be ``added``.

        sides: the mean of that and of the same with keys for queries.
        """
        key, ids = self.key, self.ids
        candidates = key if self.negatives is None else joined(key, self.negatives)
        place = torch.arange(len(candidates), device=key.device)
        labels = (place[: len(self.query)] if self.targets is None else self.targets, place)
        if ids is not None:
            # Negatives of nobody's id.
            ids = ids, torch.cat((ids, place[len(key) :] * 0 + torch.iinfo(torch.int64).min))
        query, valid, kept = self.query, None, self.memory
        if kept is not None:
            query, candidates, labels, ids, valid = kept.beside(query, candidates, labels, ids)
        found = self.call.evaluated(
            query,
            candidates,
            labels,
            ids,
            valid,
            self.weights,
            scale,
            bias,
            kind,
            self.cosine,
            added=added,
            sides=sides,
        )
        if kept is not None:
            kept.feed(key, None, None if ids is None else ids[0], None, self.cosine)
        return found


def _check_targets(op: str, targets: Tensor, keys: int) -> None:
    if targets.device.type != "cpu" or torch.compiler.is_compiling() or not len(targets):
        return
    least, most = int(targets.min()), int(targets.max())
    if least < 0 or most >= keys:
        worst = least if least < 0 else most
        raise UserError(f"{op}: targets must be rows of key, in [0, {keys - 1}], got {worst}")


def evaluate_pairs(
    op: str,
    query: Tensor,
    key: Tensor,
    negatives: Tensor | None = None,
    *,
    temperature: Any = None,
    scale: tuple[str, Any] | None = None,
    bias: Any = None,
    targets: Tensor | None = None,
    ids: Tensor | None = None,
    weights: Tensor | None = None,
    normalise: bool = True,
    reduction: str = "mean",
    sharing: tuple = (None, "true", None),
    kind: str = "out",
    both_sides: bool = False,
    feeding: tuple = NO_QUEUE,
    views: Mapping[str, Tensor] | None = None,
) -> Found:
    """The loss and its components. scale: its name and value, in the place of 1 / temperature.

    op, views: who asks, and query, key, negatives as they are called there, in errors.
    """
    sharing = Sharing(op, *sharing)

    def checked():
        call = Call(op, reduction, "all", sharing).of(views or {})
        pairs = Pairs.checked(call, query, key, negatives, targets, ids, weights, normalise)
        pairs = pairs._replace(memory=memory(op, feeding, ("key", key)))
        rows = "query", query
        factor = call.scale(temperature, rows) if scale is None else call.scalar(*scale, rows)
        return pairs, factor, None if bias is None else call.scalar("bias", bias, rows)

    pairs, factor, added = sharing.checked(checked)
    return pairs.gathered().loss(factor, added, kind, sides=both_sides)
