"""Losses of two kinds of rows that belong together in pairs: queries and keys, images and texts."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mmfast.checks import check_bool, check_number
from mmfast.errors import UserError
from mmfast.losses.queue import NO_QUEUE, EmbeddingQueue, Memory, check_queue, memory
from mmfast.losses.similarity import Call, SimilarityLoss
from mmfast.ops.similarity.checks import check_integers, check_rows
from mmfast.ops.similarity.op import similarity
from mmfast.ops.similarity.shared import Sharing
from mmfast.ops.similarity.total import similarity_total


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
            raise UserError(
                f"{self.call.op}: key must have at least 2 rows (a contrast needs two), got {tuple(key.shape)}"
            )
        kept = kept and kept._replace(mask=mask)
        return Pairs(self.call, query, key, negatives, targets, ids, weights, self.cosine, kept)

    def turned(self) -> Pairs:
        """Keys for queries."""
        return self._replace(query=self.key, key=self.query)

    def loss(
        self, scale: Tensor, bias: Tensor | None = None, kind: str = "out", added: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """With components, of the gathered ones; to the losses of rows (B,) something may be ``added``."""
        key, ids = self.key, self.ids
        candidates = key if self.negatives is None else torch.cat((key, self.negatives))
        place = torch.arange(len(candidates), device=key.device)
        labels = (place[: len(self.query)] if self.targets is None else self.targets, place)
        if ids is not None:
            # Negatives of nobody's id.
            ids = ids, torch.cat((ids, place[len(key) :] * 0 + torch.iinfo(torch.int64).min))
        query, valid, kept = self.query, None, self.memory
        if kept is not None:
            query, candidates, labels, ids, valid = kept.beside(query, candidates, labels, ids)
        rest = labels, ids, valid, scale, bias, kind, self.cosine
        if self.call.reduction == "none":
            values, counts = similarity(query, candidates, *rest)
            found = self.call.reduced(values if added is None else values + added, counts, None, self.weights)
        else:
            weights = self._row_weights(scale)
            loss, counts = similarity_total(query, candidates, weights, *rest)
            found = self.call.with_components(
                loss if added is None else loss + (added * weights).sum(), counts
            )
        if kept is not None:
            kept.feed(key, None, None if ids is None else ids[0], None, self.cosine)
        return found

    def _row_weights(self, like: Tensor) -> Tensor:
        """(B,) what the losses of rows are multiplied by in their sum or mean."""
        if self.weights is None:
            size = len(self.query) if self.call.reduction == "mean" else 1
            return like.detach().new_full((len(self.query),), 1 / max(1, size))
        if self.call.reduction == "sum":
            return self.weights
        total = self.weights.sum()
        return self.weights / torch.where(total > 0, total, 1)


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
) -> tuple[Tensor, Tensor]:
    """The loss and its components. scale: its name and value, in the place of 1 / temperature. op: who asks."""
    sharing = Sharing(op, *sharing)

    def checked():
        call = Call(op, reduction, "all", sharing)
        pairs = Pairs.checked(call, query, key, negatives, targets, ids, weights, normalise)
        pairs = pairs._replace(memory=memory(op, feeding, ("key", key)))
        rows = "query", query
        factor = call.scale(temperature, rows) if scale is None else call.scalar(*scale, rows)
        return pairs, factor, None if bias is None else call.scalar("bias", bias, rows)

    pairs, factor, added = sharing.checked(checked)
    pairs = pairs.gathered()
    found = pairs.loss(factor, added, kind)
    if not both_sides:
        return found
    other = pairs.turned().loss(factor, added, kind)
    return (found[0] + other[0]) / 2, (found[1] + other[1]) / 2


def info_nce(
    query: Tensor,
    key: Tensor,
    negatives: Tensor | None = None,
    temperature: float | Tensor = 0.07,
    *,
    targets: Tensor | None = None,
    ids: Tensor | None = None,
    weights: Tensor | None = None,
    normalise: bool = True,
    reduction: str = "mean",
    stats: str | None = "global",
    grad_convention: str = "true",
    group: Any = None,
) -> Tensor:
    r"""InfoNCE (van den Oord et al. 2018, eq. 4): which key belongs to a query, among all keys and negatives.

    .. math::
        \ell_i = \log \sum_j e^{s_{ij} / \tau} - s_{i t(i)} / \tau

    With scale 1 / tau = 20 it is sentence-transformers' multiple negatives ranking loss.

    Args:
        query: (B, D). key: (B, D), row i that of query i; or (C, D) with ``targets``.
        negatives: (M, D), negatives of all queries.
        targets: (B,) rows of ``key`` that belong to the queries.
        ids: (B,) integers: keys of a query's id, other than its own key, are left out.
        temperature, weights, normalise, reduction, stats, grad_convention, group: see :func:`nt_xent`. With several
            processes and "global" the keys and negatives of all are candidates; ``targets`` are rows of this
            process's keys.

    Returns, Raises:
        As :func:`nt_xent`.
    """
    sharing = stats, grad_convention, group
    return evaluate_pairs(
        "info_nce",
        query,
        key,
        negatives,
        temperature=temperature,
        targets=targets,
        ids=ids,
        weights=weights,
        normalise=normalise,
        reduction=reduction,
        sharing=sharing,
    )[0]


def _clip(query, key, temperature, scale, **options):
    scale = None if scale is None else ("logit_scale", scale)
    return evaluate_pairs(
        "clip", query, key, temperature=temperature, scale=scale, both_sides=True, **options
    )


def clip(
    query: Tensor,
    key: Tensor,
    temperature: float | Tensor = 0.07,
    *,
    logit_scale: Tensor | float | None = None,
    ids: Tensor | None = None,
    weights: Tensor | None = None,
    normalise: bool = True,
    reduction: str = "mean",
    stats: str | None = "global",
    grad_convention: str = "true",
    group: Any = None,
) -> Tensor:
    """CLIP's loss (Radford et al., ICML 2021, fig. 3): the mean of :func:`info_nce` from both sides.

    Args:
        query, key: (B, D), row i of one belongs to row i of the other.
        logit_scale: what cosines are multiplied by, in the place of 1 / ``temperature``; a number, or a scalar tensor
            that gets its gradient.
        temperature, ids, weights, normalise, reduction, stats, grad_convention, group: see :func:`info_nce`.

    Returns, Raises:
        As :func:`nt_xent`.
    """
    sharing = stats, grad_convention, group
    return _clip(
        query,
        key,
        temperature,
        logit_scale,
        ids=ids,
        weights=weights,
        normalise=normalise,
        reduction=reduction,
        sharing=sharing,
    )[0]


def _siglip(query, key, scale, bias, **options):
    return evaluate_pairs("siglip", query, key, scale=("scale", scale), bias=bias, kind="sigmoid", **options)


def siglip(
    query: Tensor,
    key: Tensor,
    scale: float | Tensor = 10.0,
    *,
    bias: float | Tensor = -10.0,
    ids: Tensor | None = None,
    weights: Tensor | None = None,
    normalise: bool = True,
    reduction: str = "mean",
    stats: str | None = "global",
    grad_convention: str = "true",
    group: Any = None,
) -> Tensor:
    r"""Sigmoid loss of pairs (Zhai et al., ICCV 2023, eq. 1): each pair is a binary decision.

    .. math::
        L = \frac{1}{B} \sum_i \sum_j \log(1 + e^{-y_{ij} (\mathrm{scale} \, s_{ij} + \mathrm{bias})}),
        \qquad y_{ij} = 1 \text{ if } i = j \text{, else } -1

    Args:
        query, key: (B, D), row i of one belongs to row i of the other.
        scale, bias: of the cosines; numbers, or scalar tensors that get their gradients. Where a model learns the
            logarithm of the scale, give ``log_scale.exp()``.
        ids, weights, normalise, reduction, stats, grad_convention, group: see :func:`info_nce`.

    Returns, Raises:
        As :func:`nt_xent`.
    """
    sharing = stats, grad_convention, group
    return _siglip(
        query,
        key,
        scale,
        bias,
        ids=ids,
        weights=weights,
        normalise=normalise,
        reduction=reduction,
        sharing=sharing,
    )[0]


class _PairedLoss(SimilarityLoss):
    def _options(self, ids: Tensor | None, weights: Tensor | None) -> dict[str, Any]:
        return {
            "ids": ids,
            "weights": weights,
            "normalise": self.normalise,
            "reduction": self.reduction,
            "sharing": self._sharing(),
        }


class InfoNCELoss(_PairedLoss):
    """InfoNCE of queries and keys, defined in :func:`mmfast.functional.info_nce`.

    >>> loss = InfoNCELoss()
    >>> loss(query, key).backward()

    With a ``queue`` its rows are negatives, too; of the keys it takes those of ``enqueue_mask`` (B,), or all.
    """

    def __init__(
        self,
        temperature: float | Tensor = 0.07,
        *,
        normalise: bool = True,
        reduction: str = "mean",
        queue: EmbeddingQueue | None = None,
        stats: str | None = "global",
        grad_convention: str = "true",
        group: Any = None,
    ):
        super().__init__()
        self._take(temperature=temperature, normalise=normalise, reduction=reduction)
        self._take_sharing("info_nce", reduction, "all", stats, grad_convention, group)
        self.queue = check_queue("info_nce", queue)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        negatives: Tensor | None = None,
        *,
        targets: Tensor | None = None,
        ids: Tensor | None = None,
        weights: Tensor | None = None,
        enqueue_mask: Tensor | None = None,
    ) -> Tensor:
        return self._kept(
            evaluate_pairs(
                "info_nce",
                query,
                key,
                negatives,
                temperature=self.temperature,
                targets=targets,
                feeding=(self.queue, enqueue_mask, self.training),
                **self._options(ids, weights),
            )
        )


class ClipLoss(_PairedLoss):
    """CLIP's loss, defined in :func:`mmfast.functional.clip`.

    >>> loss = ClipLoss(learnable=True)
    >>> loss(images, texts).backward()

    ``learnable``: the logarithm of the scale 1 / temperature is the parameter ``log_scale``.
    """

    def __init__(
        self,
        temperature: float = 0.07,
        *,
        learnable: bool = False,
        normalise: bool = True,
        reduction: str = "mean",
        stats: str | None = "global",
        grad_convention: str = "true",
        group: Any = None,
    ):
        super().__init__()
        temperature = check_number("clip", "temperature", temperature, 0, ends="(]")
        self._take(temperature=temperature, normalise=normalise, reduction=reduction)
        self._take_sharing("clip", reduction, "all", stats, grad_convention, group)
        learnt = check_bool("clip", "learnable", learnable)
        self.log_scale = _parameter(-math.log(temperature)) if learnt else None

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        logit_scale: Tensor | float | None = None,
        *,
        ids: Tensor | None = None,
        weights: Tensor | None = None,
    ) -> Tensor:
        if logit_scale is None and self.log_scale is not None:
            logit_scale = self.log_scale.exp()
        return self._kept(_clip(query, key, self.temperature, logit_scale, **self._options(ids, weights)))


class SigLipLoss(_PairedLoss):
    """SigLIP's loss, defined in :func:`mmfast.functional.siglip`.

    >>> loss = SigLipLoss()
    >>> loss(images, texts).backward()

    ``learnable``: the logarithm of the scale and the bias are the parameters ``log_scale`` and ``bias``.
    """

    def __init__(
        self,
        scale: float = 10.0,
        *,
        bias: float = -10.0,
        learnable: bool = True,
        normalise: bool = True,
        reduction: str = "mean",
        stats: str | None = "global",
        grad_convention: str = "true",
        group: Any = None,
    ):
        super().__init__()
        scale = check_number("siglip", "scale", scale, 0, ends="(]")
        bias = check_number("siglip", "bias", bias)
        self._take(scale=scale, normalise=normalise, reduction=reduction)
        self._take_sharing("siglip", reduction, "all", stats, grad_convention, group)
        learnt = check_bool("siglip", "learnable", learnable)
        self.log_scale = _parameter(math.log(scale)) if learnt else None
        self.bias = _parameter(bias) if learnt else bias

    def forward(
        self, query: Tensor, key: Tensor, *, ids: Tensor | None = None, weights: Tensor | None = None
    ) -> Tensor:
        scale = self.scale if self.log_scale is None else self.log_scale.exp()
        return self._kept(_siglip(query, key, scale, self.bias, **self._options(ids, weights)))


def _parameter(value: float) -> nn.Parameter:
    return nn.Parameter(torch.tensor(value, device=torch.get_default_device()))
