"""Losses of two kinds of rows that belong together in pairs: queries and keys, images and texts."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from mmfast.checks import check_bool, check_number
from mmfast.errors import UserError
from mmfast.losses.queue import EmbeddingQueue, check_queue, memory
from mmfast.losses.similarity import Call, SimilarityLoss
from mmfast.ops.barlow_twins.checks import compute_dtype
from mmfast.ops.similarity.checks import check_integers, check_rows, check_scalar
from mmfast.ops.similarity.op import similarity


def _check_targets(op: str, targets: Tensor, keys: int) -> None:
    if targets.device.type != "cpu" or torch.compiler.is_compiling() or not len(targets):
        return
    least, most = int(targets.min()), int(targets.max())
    if least < 0 or most >= keys:
        worst = least if least < 0 else most
        raise UserError(f"{op}: targets must be rows of key, in [0, {keys - 1}], got {worst}")


def _info_nce(
    op,
    query,
    key,
    negatives,
    temperature,
    scale,
    bias,
    targets,
    ids,
    weights,
    normalise,
    reduction,
    sharing,
    kind="out",
    feeding=(None, None, False),
):
    call = Call(op, reduction, "all", sharing)
    cosine = check_bool(op, "normalise", normalise)
    query = check_rows(op, "query", query)
    rows = "query", query
    key = check_rows(op, "key", key, rows)
    if targets is None and len(key) != len(query):
        raise UserError(
            f"{op}: key must have the {len(query)} rows of query (or give targets), got {tuple(key.shape)}"
        )
    if negatives is not None:
        check_rows(op, "negatives", negatives, rows)
    _, own_ids, _, weights = call.vectors(rows, None, ids, None, weights)
    if targets is not None:
        if ids is not None:
            raise UserError(f"{op}: ids must be None with targets, got both")
        targets = check_integers(op, "targets", targets, rows)
        _check_targets(op, targets, len(key))
    scale = call.sharing.scalar(scale) if scale is not None else call.scale(temperature, rows)
    bias = None if bias is None else call.sharing.scalar(bias)
    kept = memory(op, feeding[0], feeding[1], ("key", key), feeding[2])
    mask = None if kept is None else kept.mask
    if call.sharing.group is not None:
        if targets is not None or negatives is not None:
            raise UserError(
                f"{op}: stats must be None with targets or negatives, got 'global' with several processes"
            )
        facts = {"reduction": reduction, "queue": 0 if kept is None else kept.queue.size}
        (query, key), (own_ids, weights, mask) = call.sharing.gather(
            [query, key], [own_ids, weights, mask], facts
        )
    candidates = key if negatives is None else torch.cat((key, negatives))
    if len(candidates) < 2 and kept is None:
        raise UserError(f"{op}: key must have at least 2 rows (a contrast needs two), got {tuple(key.shape)}")
    place = torch.arange(len(candidates), device=key.device)
    labels = (place[: len(query)] if targets is None else targets, place)
    pair_ids = None
    if own_ids is not None:
        # Negatives of nobody's id.
        extra = place[len(key) :] * 0 + torch.iinfo(torch.int64).min
        pair_ids = own_ids, torch.cat((own_ids, extra))
    valid = None
    if kept is not None:
        query, candidates = (x.to(compute_dtype(query)) for x in (query, candidates))
        labels, pair_ids, valid, candidates = _with_queue(kept.queue, query, candidates, labels, pair_ids)
    values, counts = similarity(query, candidates, labels, pair_ids, valid, scale, bias, kind, cosine)
    if kept is not None:
        kept.feed(key, None, own_ids, None, mask, cosine)
    return call.reduced(values, counts, None, weights)


def _with_queue(queue: EmbeddingQueue, query, candidates, labels, ids) -> tuple:
    there = [torch.ones(len(x), dtype=torch.bool, device=query.device) for x in (query, candidates)]
    labels, ids, valid = (
        None if x is None else (x[0], torch.cat((x[1], other)))
        for x, other in ((labels, queue.labels), (ids, queue.ids), (there, queue.valid))
    )
    return labels, ids, valid, torch.cat((candidates, queue.rows.to(candidates.dtype)))


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
        temperature, weights, normalise, reduction, stats, grad_convention, group: see :func:`nt_xent`; with several
            processes and "global", ``targets`` and ``negatives`` must be None.

    Returns, Raises:
        As :func:`nt_xent`.
    """
    sharing = stats, grad_convention, group
    return _info_nce(
        "info_nce",
        query,
        key,
        negatives,
        temperature,
        None,
        None,
        targets,
        ids,
        weights,
        normalise,
        reduction,
        sharing,
    )[0]


def _clip(query, key, temperature, scale, ids, weights, normalise, reduction, sharing):
    if scale is not None:
        scale = check_scalar("clip", "logit_scale", scale, ("query", check_rows("clip", "query", query)))
    one = [
        _info_nce(
            "clip", a, b, None, temperature, scale, None, None, ids, weights, normalise, reduction, sharing
        )
        for a, b in ((query, key), (key, query))
    ]
    return (one[0][0] + one[1][0]) / 2, (one[0][1] + one[1][1]) / 2


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
    return _clip(query, key, temperature, logit_scale, ids, weights, normalise, reduction, sharing)[0]


def _siglip(query, key, scale, bias, ids, weights, normalise, reduction, sharing):
    op = "siglip"
    rows = "query", check_rows(op, "query", query)
    scale, bias = (check_scalar(op, name, x, rows) for name, x in (("scale", scale), ("bias", bias)))
    return _info_nce(
        op, query, key, None, None, scale, bias, None, ids, weights, normalise, reduction, sharing, "sigmoid"
    )


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
    return _siglip(query, key, scale, bias, ids, weights, normalise, reduction, sharing)[0]


class InfoNCELoss(SimilarityLoss):
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
        Call("info_nce", reduction, "all", (stats, grad_convention, group))
        self._take(temperature=temperature, normalise=normalise, reduction=reduction)
        self._take_sharing(stats, grad_convention, group)
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
        options = ids, weights, self.normalise, self.reduction, self._sharing()
        feeding = self.queue, enqueue_mask, self.training
        rows = query, key, negatives
        found = _info_nce("info_nce", *rows, self.temperature, None, None, targets, *options, "out", feeding)
        return self._kept(found)


class ClipLoss(SimilarityLoss):
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
        Call("clip", reduction, "all", (stats, grad_convention, group))
        temperature = check_number("clip", "temperature", temperature, 0, ends="(]")
        self._take(temperature=temperature, normalise=normalise, reduction=reduction)
        self._take_sharing(stats, grad_convention, group)
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
        options = ids, weights, self.normalise, self.reduction, self._sharing()
        return self._kept(_clip(query, key, self.temperature, logit_scale, *options))


class SigLipLoss(SimilarityLoss):
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
        Call("siglip", reduction, "all", (stats, grad_convention, group))
        scale = check_number("siglip", "scale", scale, 0, ends="(]")
        bias = check_number("siglip", "bias", bias)
        self._take(scale=scale, normalise=normalise, reduction=reduction)
        self._take_sharing(stats, grad_convention, group)
        learnt = check_bool("siglip", "learnable", learnable)
        self.log_scale = _parameter(math.log(scale)) if learnt else None
        self.bias = _parameter(bias) if learnt else bias

    def forward(
        self, query: Tensor, key: Tensor, *, ids: Tensor | None = None, weights: Tensor | None = None
    ) -> Tensor:
        scale = self.scale if self.log_scale is None else self.log_scale.exp()
        options = ids, weights, self.normalise, self.reduction, self._sharing()
        return self._kept(_siglip(query, key, scale, self.bias, *options))


def _parameter(value: float) -> nn.Parameter:
    return nn.Parameter(torch.tensor(value, device=torch.get_default_device()))
