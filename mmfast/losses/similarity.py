"""What losses of similarities share: their arguments, their reduction, what they leave in ``last``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mmfast.checks import told
from mmfast.errors import UserError
from mmfast.ops.barlow_twins.checks import compute_dtype, too_large
from mmfast.ops.similarity.checks import (
    check_integers,
    check_labels,
    check_scalar,
    check_valid,
    check_weights,
)
from mmfast.ops.similarity.op import similarity
from mmfast.ops.similarity.shared import Sharing
from mmfast.ops.similarity.statistics import Compared, Statistics
from mmfast.ops.similarity.total import similarity_total
from mmfast.wording import one_of


class ReadsScores:
    """Components of a call that also tell of its scores: these are computed when they are read, from the embeddings
    of the call, by as many products as a forward pass has, once. Weights play no part in them."""

    compared: Compared | None = None

    def _statistics(self) -> Statistics:
        if self.compared is None:
            raise AttributeError("scores can not be read of losses of tuples of indices or masks")
        return self.compared.statistics()

    @property
    def mean_positive(self) -> Tensor:
        """mean score (cosine, inner product or negative distance) of a row and a positive; NaN without any"""
        return self._statistics().mean_positive

    @property
    def mean_negative(self) -> Tensor:
        """mean score of a row and a negative; NaN without any"""
        return self._statistics().mean_negative

    @property
    def accuracy(self) -> Tensor:
        """share of the rows with positives that have one nearer than all negatives, of both sides"""
        return self._statistics().accuracy

    @property
    def zero_rows(self) -> Tensor:
        """rows and candidates without direction, shorter than 1e-12"""
        return self._statistics().zero_rows


class _Components(NamedTuple):
    loss: Tensor
    anchors: Tensor
    """rows that count: those with a positive"""
    positive_pairs: Tensor
    """pairs of an anchor and one of its positives"""


class ContrastiveComponents(_Components, ReadsScores):
    """Of the latest call of a contrastive loss: detached scalars, already computed; and those of its scores.

    loss; anchors: rows that count, those with a positive; positive_pairs: of an anchor and one of its positives.
    """


# The loss, its components (), and what can be read of its scores.
Found = tuple[Tensor, Tensor, Compared | None]


def nothing(*given: Tensor) -> Tensor:
    """0 in the compute type, whose gradient by each of them is 0, also of half types that a sum overflows."""
    return torch.stack([(x.to(compute_dtype(x)) * 0).sum() for x in given]).sum()


class Variant(NamedTuple):
    """A published definition: its kind (mmfast/ops/similarity/passes.py), what a mean is over, and a factor."""

    kind: str
    over: str = "anchors"
    base_temperature: float | None = None
    """The loss is multiplied by temperature / this."""


REDUCTIONS = ("mean", "sum", "none")
OVER = ("anchors", "all", "pairs")


def choice(op: str, name: str, value: Any, choices) -> Any:
    if not isinstance(value, str) or value not in choices:
        raise UserError(f"{op}: {name} must be {one_of(choices)}, got {told(value)}")
    return choices[value] if isinstance(choices, dict) else value


class Call:
    """One call of a loss: arguments that are checked as they come, what they make, and its reduction."""

    def __init__(self, op: str, reduction: str, over: str, sharing: Sharing):
        self.op, self.sharing = op, sharing
        self.views: Mapping[str, Tensor] = {}
        """this process's embeddings, by the names that who asks knows"""
        self.valid: Tensor | None = None
        """(B,) of the rows of the views"""
        self.reduction = choice(op, "reduction", reduction, REDUCTIONS)
        self.over = choice(op, "over", over, OVER)

    def of(self, views: Mapping[str, Tensor], valid: Tensor | None = None) -> Call:
        """The same, which knows whose call it is."""
        self.views, self.valid = views, valid
        return self

    def refuse_one_row(self, rows: Tensor, name: str | None = None) -> None:
        if len(rows) < 2:
            name = next(iter(self.views)) if name is None else name
            raise UserError(
                f"{self.op}: {name} must have at least 2 rows (a contrast needs two), got {tuple(rows.shape)}"
            )

    def vectors(self, rows: tuple[str, Tensor], labels, ids, valid, weights) -> list[Tensor | None]:
        given = (
            ("labels", labels, check_labels),
            ("ids", ids, check_integers),
            ("valid", valid, check_valid),
            ("weights", weights, check_weights),
        )
        return [None if x is None else check(self.op, name, x, rows) for name, x, check in given]

    def reduced(self, values, counts, valid, weights) -> tuple[Tensor, Tensor]:
        """The loss, and detached (3,) the :class:`ContrastiveComponents`."""
        with torch.no_grad():
            anchors = (counts > 0).sum(dtype=values.dtype)
            pairs = counts.sum()
        weighted = values if weights is None else values * weights
        if self.over == "pairs" and self.reduction == "mean":
            weighted = weighted * counts
        if self.reduction == "none":
            loss = weighted
        elif self.reduction == "sum":
            loss = weighted.sum()
        else:
            divisor = {"anchors": anchors, "pairs": pairs}.get(self.over)
            if weights is not None or divisor is None:
                divisor = self._divisor(values, counts, valid, weights)
            loss = weighted.sum() / torch.where(divisor > 0, divisor, 1)
        with torch.no_grad():
            return loss, torch.stack((loss.sum(), anchors, pairs))

    def evaluated(
        self,
        q,
        k,
        labels,
        ids,
        valid,
        weights,
        scale,
        bias,
        kind,
        cosine,
        itself=False,
        added=None,
        sides=False,
    ) -> Found:
        """The loss of rows, see :func:`similarity`, and its components; ``added`` (B,): to the losses of the rows.

        sides: the mean of those of the rows and of the candidates as rows, see :func:`similarity_total`.
        """

        def found():
            loss, components = self._evaluated(
                q, k, labels, ids, valid, weights, scale, bias, kind, cosine, itself, added, sides
            )
            # Lengths are 1 but for inner products, which may overflow.
            watched = not cosine and loss.device.type == "cpu" and not torch.compiler.is_compiling()
            if watched and not bool(loss.detach().isfinite().all()):
                raise too_large({"z": q}, self.op)
            return loss, components

        score = "cosine" if cosine else "dot"
        compared = Compared(q, k, labels, ids, valid, score, itself)
        compared.both = sides
        return *self.named(found), compared

    def named(self, call) -> Any:
        """What ``call`` gives of the views; see :meth:`Sharing.named`."""
        return self.sharing.named(self.views, self.valid, call)

    def _evaluated(
        self, q, k, labels, ids, valid, weights, scale, bias, kind, cosine, itself, added, sides
    ) -> tuple[Tensor, Tensor]:
        rest = labels, ids, valid, scale, bias, kind, cosine, itself
        valid = None if valid is None else valid[0]
        if self.reduction == "none" or (self.reduction == "mean" and self.over == "pairs"):
            # The weights of the rows are not known beforehand, or there are none.
            values, counts = similarity(q, k, *rest)
            if sides:
                turned = (None if pair is None else pair[::-1] for pair in rest[:3])
                values = (values + similarity(k, q, *turned, *rest[3:])[0]) / 2
            return self.reduced(values if added is None else values + added, counts, valid, weights)
        like = scale.detach()
        plain = weights is None and self.reduction == "mean"
        # What the mean is over is known beforehand, or of what the rows have to say.
        size = max(1, len(q)) if plain and self.over == "all" and valid is None else 1
        each = like.new_full((len(q),), 1 / size) if weights is None else weights
        loss, counts = similarity_total(q, k, each, *rest, sides)
        loss = loss / 2 if sides else loss
        loss = loss if added is None else loss + (added * each).sum()
        with torch.no_grad():
            anchors, pairs = (counts > 0).sum(dtype=like.dtype), counts.sum()
        if self.reduction == "mean" and not (plain and self.over == "all" and valid is None):
            with torch.no_grad():
                of_rows = plain and self.over == "anchors"
                divisor = anchors if of_rows else self._divisor(counts, counts, valid, weights)
                divisor = divisor.clamp(min=1) if of_rows else torch.where(divisor > 0, divisor, 1)
            loss = loss / divisor
        return loss, torch.stack((loss.detach(), anchors, pairs))

    def _divisor(self, values, counts, valid, weights) -> Tensor:
        if self.over == "all":
            total = torch.ones_like(values) if valid is None else valid.to(values.dtype)
        else:
            total = counts if self.over == "pairs" else (counts > 0).to(values.dtype)
        return (total if weights is None else total * weights).sum()

    def scalar(self, name: str, x: Any, rows: tuple[str, Tensor]) -> Tensor:
        """A number or scalar tensor, of which each process has its share."""
        return self.sharing.scalar(check_scalar(self.op, name, x, rows))

    def scale(self, temperature: Any, rows: tuple[str, Tensor]) -> Tensor:
        """1 / temperature, of which each process has its share."""
        temperature = check_scalar(self.op, "temperature", temperature, rows, positive=True)
        scale = self.sharing.scalar(temperature).reciprocal()
        if scale.device.type == "cpu" and not torch.compiler.is_compiling() and not scale.detach().isfinite():
            raise UserError(
                f"{self.op}: temperature must have a reciprocal within the range of {scale.dtype}, "
                f"got {float(temperature.detach())}"
            )
        return scale


def among_themselves(call: Call, z, vectors, scale, variant: Variant, cosine: bool, memory=None) -> Found:
    """The loss, and its components, of rows that are each other's candidates, beside those of a memory.

    vectors: labels, ids, valid, weights.
    """
    facts = {"variant": variant, "cosine": cosine, "reduction": call.reduction, "over": call.over}
    facts["queue"] = 0 if memory is None else memory.queue.size
    mask = None if memory is None else memory.mask
    (z,), (labels, ids, valid, weights, mask) = call.sharing.gather([z], [*vectors, mask], facts)
    if memory is None:
        call.refuse_one_row(z)
    own, others = (ids, None) if labels is None else (labels, ids)
    pairs = (None if x is None else (x, x) for x in (own, others, valid))
    rows = (z, None, *pairs) if memory is None else memory.beside(z, z, *pairs)
    loss, components, compared = call.evaluated(
        *rows, weights, scale, None, variant.kind, cosine, itself=True
    )
    if memory is not None:
        memory._replace(mask=mask).feed(z, own, others, valid, cosine)
    if variant.base_temperature is not None:
        factor = 1 / scale / variant.base_temperature
        loss = loss * factor
        components = torch.stack((components[0] * factor.detach(), *components[1:]))
    return loss, components, compared


class SimilarityLoss(nn.Module):
    """A loss that keeps the components of its latest call; options are attributes, which may be set at any time.

    A scalar Parameter among them is learnt. Until the next call the embeddings are held, for what is read of scores.
    """

    _last: Tensor | None = None
    _compared: Compared | None = None
    _components: type = ContrastiveComponents

    def _take(self, **options: Any) -> None:
        for name, value in options.items():
            setattr(self, name, value)
        self._names = (*getattr(self, "_names", ()), *options)

    def _take_sharing(self, op: str, reduction, over, stats, grad_convention, group) -> None:
        Call(op, reduction, over, Sharing(op, stats, grad_convention, group))
        self._take(stats=stats, grad_convention=grad_convention, group=group)

    def _sharing(self) -> tuple:
        return self.stats, self.grad_convention, self.group

    @property
    def last(self) -> Any:
        """Components of the latest call (None before the first), without its graph."""
        if self._last is None:
            return None
        components = self._components(*self._last.unbind())
        components.compared = self._compared
        return components

    def _kept(self, found: tuple) -> Tensor:
        loss, self._last, self._compared = found
        return loss

    def extra_repr(self) -> str:
        shown = ((name, getattr(self, name)) for name in self._names if name != "group")
        return ", ".join(f"{n}={v.item() if isinstance(v, Tensor) else v!r}" for n, v in shown)
