"""Triplet losses: a row must be nearer to rows of its label than to others, by a margin."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmfast.checks import check_bool, check_integer, check_number
from mmfast.errors import UserError
from mmfast.losses.similarity import REDUCTIONS, Call, Found, ReadsScores, SimilarityLoss, choice
from mmfast.ops.similarity import triplet_passes as passes
from mmfast.ops.similarity.checks import check_rows
from mmfast.ops.similarity.shared import Sharing
from mmfast.ops.similarity.statistics import Compared
from mmfast.ops.similarity.triplet import triplets
from mmfast.ops.similarity.triplet_scores import OF_ITSELF, SCORES


class _Components(NamedTuple):
    loss: Tensor
    anchors: Tensor
    """rows that count: those with a positive and a negative"""
    easy: Tensor
    """triplets whose negative is farther than the positive by the margin or more"""
    semihard: Tensor
    """triplets whose negative is farther than the positive, but not by the margin"""
    hard: Tensor
    """triplets whose negative is nearer than the positive"""


class TripletComponents(_Components, ReadsScores):
    """Of the latest call of a triplet loss: detached scalars, already computed; and those of its scores.

    loss; anchors: rows that count, those with a positive and a negative; easy, semihard, hard: triplets whose
    negative is farther than the positive by the margin or more, farther but not by the margin, and nearer. A
    batch-hard anchor has one triplet.
    """


MININGS = ("all", "semihard", "hard", "batch_hard", "semihard_nearest")
SCHEDULED = "semihard_then_hard"
# Of the epochs, those in which scheduled mining is semi-hard.
SEMIHARD_SHARE = 0.8
TIES = ("none", "hard")
ANCHORS = ("valid", "st")
OVER = ("nonzero", "triplets", "positives", "anchors", "all")


class _Call:
    """One call: its options, looked at, and its reduction."""

    def __init__(
        self, op: str, options: passes.Options, score: str, over: str, reduction: str, sharing, name="z"
    ):
        self.name = name
        self.op, self.options, self.score = op, options, choice(op, "score", score, SCORES)
        if options.lone and score not in OF_ITSELF:
            raise UserError(f"{op}: score must be a cosine or a distance for anchors 'st', got {score!r}")
        self.over = choice(op, "over", over, OVER)
        # What it says about ``over`` is for other losses.
        self.call = Call(op, choice(op, "reduction", reduction, REDUCTIONS), "all", sharing)

    def __call__(self, z, labels, ids, valid, weights) -> Found:
        op, call, options, name = self.op, self.call, self.options, self.name

        def checked():
            check_rows(op, name, z)
            if labels is None:
                raise UserError(f"{op}: labels must be given, got None")
            return call.of({name: z}, valid).vectors((name, z), labels, ids, valid, weights)

        vectors = call.sharing.checked(checked)
        facts = options._asdict() | {"score": self.score, "reduction": call.reduction, "over": self.over}
        (rows,), (labels, ids, valid, weights) = call.sharing.gather([z], vectors, facts)
        call.refuse_one_row(rows)
        values, counts = call.named(lambda: triplets(rows, labels, ids, valid, self.score, options))
        pairs = (None if x is None else (x, x) for x in (labels, ids, valid))
        return *self._reduced(values, counts, valid, weights), Compared(rows, None, *pairs, self.score)

    def _reduced(self, values, counts, valid, weights) -> tuple[Tensor, Tensor]:
        terms, easy, semihard, hard, positives, negatives = counts
        anchors = negatives > 0
        if not self.options.lone:
            anchors = anchors & (positives > 0)
        elif valid is not None:
            anchors = anchors & valid
        values = values if weights is None else values * weights
        if self.call.reduction == "none":
            loss = values
        elif self.call.reduction == "sum":
            loss = values.sum()
        else:
            number = {
                "nonzero": terms,
                "triplets": anchors if self.options.kind == "batch_hard" else positives * negatives,
                "positives": positives,
                "anchors": anchors,
                "all": torch.ones_like(terms) if valid is None else valid,
            }[self.over].to(torch.float64)
            divisor = (number if weights is None else number * weights).sum()
            loss = values.sum() / torch.where(divisor > 0, divisor, 1).to(values.dtype)
        with torch.no_grad():
            numbers = [x.sum().to(values.dtype) for x in (anchors, easy, semihard, hard)]
            return loss, torch.stack((loss.sum(), *numbers))


def _margin_call(margin, score, mining, ties, over, soft, anchors, reduction, sharing) -> _Call:
    op = "triplet_margin"
    kind = choice(op, "mining", mining, MININGS)
    soft, anchors = check_bool(op, "soft", soft), choice(op, "anchors", anchors, ANCHORS)
    for name, other in (("soft", soft), ("anchors", anchors == "st")):
        if other and kind != "batch_hard":
            plain = "False" if name == "soft" else "'valid'"
            raise UserError(
                f"{op}: {name} must be {plain} unless mining is 'batch_hard', got mining {kind!r}"
            )
    margin = check_number(op, "margin", margin, 0)
    ties = choice(op, "ties", ties, TIES) == "hard"
    return _Call(
        op, passes.Options(kind, margin, ties, soft, anchors == "st"), score, over, reduction, sharing
    )


def triplet_margin(
    z: Tensor,
    labels: Tensor,
    margin: float = 0.2,
    *,
    ids: Tensor | None = None,
    valid: Tensor | None = None,
    weights: Tensor | None = None,
    score: str = "cosine",
    mining: str = "all",
    ties: str = "none",
    over: str = "nonzero",
    soft: bool = False,
    anchors: str = "valid",
    reduction: str = "mean",
    stats: str | None = "global",
    grad_convention: str = "true",
    group: Any = None,
) -> Tensor:
    r"""Triplet margin loss of all triplets of a batch, or of those that mining picks (Schroff et al., CVPR 2015).

    .. math::
        L = \frac{1}{|T|} \sum_{(i, p, n) \in T} \max(s_{in} - s_{ip} + m, 0)

    for rows i, p of one label and n of another, similarities s and the margin m. T are triplets with a term above 0:

    ==================  ==========================================================================================
    mining              T, where x = s_in - s_ip
    ==================  ==========================================================================================
    all                 x + m > 0
    semihard            x + m > 0 and x < 0: the negative is farther than the positive, but not by the margin
    hard                x > 0: the negative is the nearer one
    semihard_nearest    for each pair (i, p) one negative: the nearest that is farther than p, or, if none is, the
                        farthest (TensorFlow Addons, sentence-transformers)
    batch_hard          for each i the farthest p and the nearest n (Hermans et al., 2017), the first of equals
    ==================  ==========================================================================================

    "all" is exactly "semihard" and "hard", and x = 0. Mining looks at scores without gradients. No triplet is ever
    stored: memory is that of the embeddings and a strip of scores, time that of sorting them.

    ===================  =======================================================================================
    score                similarity s
    ===================  =======================================================================================
    cosine               of the rows; a row shorter than 1e-12 has the score 0 with all, and no gradient
    dot                  inner product
    euclidean            -\|x - y\|; equal rows have the derivative 0
    sqeuclidean          -\|x - y\|^2
    unit_euclidean       -\|x - y\| of the rows divided by their lengths (pytorch-metric-learning's default)
    ===================  =======================================================================================

    pytorch-metric-learning's loss with its miner is ``score="unit_euclidean", margin=0.05, ties="hard"``. In
    sentence-transformers' terms, with ``score="euclidean", margin=5.0``: "BatchAll" is the default, "BatchHard"
    ``mining="batch_hard", anchors="st", over="all"``, its soft margin ``soft=True`` besides, "BatchSemiHard"
    ``mining="semihard_nearest", over="positives"``.

    Args:
        z: (B, D) float32, float64, bfloat16 or float16 (computed in float32).
        labels: (B,) integers.
        margin: m, finite and >= 0.
        ids: (B,) integers: different rows of equal ones are neither positives nor negatives of each other.
        valid: (B,) bool: rows of False are not read, and nobody's candidates.
        weights: (B,) of the anchors' terms, in their sum and in their number, >= 0, not differentiated.
        score, mining: see above.
        ties: whether x = 0 is of no region ("none") or "hard" (pytorch-metric-learning).
        over: what the mean is over: "nonzero" (terms above 0), "triplets" (all there are; of batch-hard, anchors),
            "positives" (pairs of an anchor and a positive), "anchors" (rows with a positive and a negative) or
            "all" (valid rows).
        soft: log(1 + e^x), without a margin, for batch-hard mining.
        anchors: "st": of batch-hard mining, rows without a positive have the term of a positive at their own place
            (sentence-transformers); "valid": none.
        reduction: "mean", "sum", or "none": (B,) sums of the anchors' terms.
        stats, grad_convention, group: see :func:`mmfast.functional.nt_xent`.

    Returns:
        A scalar (or, for "none", sums of the rows), float64 for float64 embeddings, else float32; exactly 0, with
        the gradient 0, if there are no terms. The gradient is not differentiable again.

    Raises:
        ValueError: shapes or devices that do not match, fewer than 2 rows, options that are none; on the CPU also
            rows with NaN or infinity (elsewhere they make the loss NaN), negative weights.
        TypeError: other dtypes, options of another type.
    """
    sharing = Sharing("triplet_margin", stats, grad_convention, group)
    options = margin, score, mining, ties, over, soft, anchors, reduction
    call = sharing.checked(lambda: _margin_call(*options, sharing))
    return call(z, labels, ids, valid, weights)[0]


def _smooth_call(temperature, score, over, reduction, sharing) -> _Call:
    op = "smooth_triplet"
    temperature = check_number(op, "temperature", temperature, 0, ends="(]")
    return _Call(op, passes.Options("smooth", temperature), score, over, reduction, sharing)


def smooth_triplet(
    z: Tensor,
    labels: Tensor,
    temperature: float = 0.5,
    *,
    ids: Tensor | None = None,
    valid: Tensor | None = None,
    weights: Tensor | None = None,
    score: str = "cosine",
    over: str = "triplets",
    reduction: str = "mean",
    stats: str | None = "global",
    grad_convention: str = "true",
    group: Any = None,
) -> Tensor:
    r"""Triplet loss without a margin or mining: the logistic loss of all differences of similarities.

    .. math::
        L = \frac{1}{|T|} \sum_{(i, p, n)} \log(1 + e^{(s_{in} - s_{ip}) / \tau})

    over all rows i, p of one label and n of another. Of rows that are all equal it is log 2. Time is that of an
    exponential for each triplet, memory that of a strip of scores.

    Args:
        temperature: tau, finite and above 0.
        z, labels, ids, valid, weights, score, over, reduction, stats, grad_convention, group: see
            :func:`triplet_margin`.

    Returns:
        As :func:`triplet_margin`.

    Raises:
        As :func:`triplet_margin`.
    """
    sharing = Sharing("smooth_triplet", stats, grad_convention, group)
    call = sharing.checked(lambda: _smooth_call(temperature, score, over, reduction, sharing))
    return call(z, labels, ids, valid, weights)[0]


class _TripletLoss(SimilarityLoss):
    op: str
    _components = TripletComponents

    def _options(self, sharing: Sharing) -> _Call:
        raise NotImplementedError

    def _checked(self) -> None:
        self._options(Sharing(self.op, *self._sharing()))

    def forward(
        self,
        z: Tensor,
        labels: Tensor,
        *,
        ids: Tensor | None = None,
        valid: Tensor | None = None,
        weights: Tensor | None = None,
    ) -> Tensor:
        sharing = Sharing(self.op, *self._sharing())
        call = sharing.checked(lambda: self._options(sharing))
        return self._kept(call(z, labels, ids, valid, weights))


class TripletMarginLoss(_TripletLoss):
    """Triplet margin loss of labelled rows, defined in :func:`mmfast.functional.triplet_margin`.

    >>> loss = TripletMarginLoss(mining="semihard_then_hard")
    >>> loss.set_progress(epoch, epochs)  # before each epoch, from 1 on
    >>> loss(z, labels).backward()
    >>> loss.last.semihard

    ``mining`` may also be "semihard_then_hard": semi-hard for the first 80 % of the epochs, and until
    :meth:`set_progress` is called, then hard.
    """

    op = "triplet_margin"

    def __init__(
        self,
        margin: float = 0.2,
        *,
        score: str = "cosine",
        mining: str = "all",
        ties: str = "none",
        over: str = "nonzero",
        soft: bool = False,
        anchors: str = "valid",
        reduction: str = "mean",
        stats: str | None = "global",
        grad_convention: str = "true",
        group: Any = None,
    ):
        super().__init__()
        self._take(margin=margin, score=score, mining=mining, ties=ties, over=over, soft=soft)
        self._take(anchors=anchors, reduction=reduction, stats=stats, grad_convention=grad_convention)
        self._take(group=group)
        self._late = False
        self._checked()

    def set_progress(self, epoch: int, epochs: int) -> None:
        """Tells scheduled mining that ``epoch``, from 1 to ``epochs``, begins; other mining stays as it is."""
        epochs = check_integer("TripletMarginLoss", "epochs", epochs, 1)
        epoch = check_integer("TripletMarginLoss", "epoch", epoch, 1, epochs)
        self._late = epoch > SEMIHARD_SHARE * epochs

    def _options(self, sharing: Sharing) -> _Call:
        choice("TripletMarginLoss", "mining", self.mining, (*MININGS, SCHEDULED))
        mining = ("hard" if self._late else "semihard") if self.mining == SCHEDULED else self.mining
        options = self.score, mining, self.ties, self.over, self.soft, self.anchors, self.reduction
        return _margin_call(self.margin, *options, sharing)


class SmoothTripletLoss(_TripletLoss):
    """Smooth triplet loss of labelled rows, defined in :func:`mmfast.functional.smooth_triplet`.

    >>> loss = SmoothTripletLoss(temperature=0.5)
    >>> loss(z, labels).backward()
    """

    op = "smooth_triplet"

    def __init__(
        self,
        temperature: float = 0.5,
        *,
        score: str = "cosine",
        over: str = "triplets",
        reduction: str = "mean",
        stats: str | None = "global",
        grad_convention: str = "true",
        group: Any = None,
    ):
        super().__init__()
        self._take(temperature=temperature, score=score, over=over, reduction=reduction)
        self._take(stats=stats, grad_convention=grad_convention, group=group)
        self._checked()

    def _options(self, sharing: Sharing) -> _Call:
        return _smooth_call(self.temperature, self.score, self.over, self.reduction, sharing)
