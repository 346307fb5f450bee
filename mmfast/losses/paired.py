"""Losses of two kinds of rows that belong together in pairs: queries and keys, images and texts."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from mmfast.checks import check_bool, check_number
from mmfast.losses.pairs import evaluate_pairs
from mmfast.losses.queue import EmbeddingQueue, check_queue
from mmfast.losses.similarity import SimilarityLoss


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
