"""Barlow Twins of any number of views: the weighted sum over pairs, as function and module."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from mmfast import backends
from mmfast.checks import check_number, told
from mmfast.errors import UserError
from mmfast.losses.barlow_twins import BarlowTwinsComponents, Options, WithOptions, takes_options
from mmfast.ops.barlow_twins.checks import check_views, stacked_present, unusable
from mmfast.ops.barlow_twins.definition import Request
from mmfast.ops.barlow_twins.multi_view import barlow_twins_of_pairs
from mmfast.ops.barlow_twins.op import barlow_twins as _two_views
from mmfast.ops.barlow_twins.op import gram_is_cheaper

Views = Mapping[str, Tensor] | Sequence[Tensor]
Pair = tuple[str, str] | tuple[int, int]


@takes_options
def multi_view_barlow_twins(
    views: Views,
    present: Tensor | Mapping[str, Tensor] | None = None,
    *,
    weights: Mapping[Pair, float] | None = None,
    **options: Any,
) -> Tensor:
    r"""Sum over pairs of any number of views or modalities of the weighted :func:`barlow_twins` losses.

    .. math:: L = \sum_{(m, n)} w_{mn} L(z_m, z_n)

    Each view is standardised once and, where B is small against D, has one B x B Gram matrix for all its pairs:
    O(M B^2 D + M^2 B^2) for M views against O(M^2 B D^2) (the duality of Garrido et al., ICLR 2023).
    On CPUs pairs go one by one where that is faster: complete samples, and few views or small batches.

    Args:
        views: M >= 2 matrices (B, D_m), by name (any mapping) or in order, of one dtype and device. Where D_m differs
            from D_n no feature corresponds to another: the pair's loss is ``lambd`` times the sum of all squares of
            C, which only keeps the views from repeating each other.
        present: None if all samples have all views; or bool (B, M), or (B,) by name: whether a sample has a view.
            What it does not have is not looked at (it may be NaN) and gets a zero gradient. Means and variances of
            a view are those of the samples that have it, C_mn is the mean over the samples that have both; pairs
            that fewer than two samples have count nothing.
        weights: by pairs of names or positions, finite and >= 0; pairs that are not there are left out. None: 1 for
            all.
        options: see :func:`barlow_twins`; ``debias`` is for samples that have all views, and ``variant="vissl"``,
            which pools the statistics of two views, is not offered.

    Returns and raises what :func:`barlow_twins` does.
    """
    request = Options.of("multi_view_barlow_twins", options).request()
    return evaluate_multi_view(views, present, weights, request)[0]


def evaluate_multi_view(views, present, weights, request: Request) -> tuple[Tensor, dict[Pair, Tensor]]:
    """The loss, and its components (5,) by pair."""
    sharing = request.sharing
    try:
        views, named, pairs, present = _prepared(views, present, weights, request)
    except (TypeError, ValueError) as error:
        sharing.refuse(error)
    alone = present is None and not request.debias and sharing.across() is None
    if alone and _pair_by_pair(views, len(pairs)):
        sharing.check()
        check_views(named, 2)
        # A backend that cannot serve says so here: below, what is refused is a value.
        backends.choose("barlow_twins", next(iter(views.values())).device)
        try:
            terms = {(m, n): _two_views(views[m], views[n], *request.definition) for m, n in pairs}
        except UserError:
            raise unusable(named) from None
        loss = sum(weight * terms[pair][0] for pair, weight in pairs.items())
        return loss, {pair: components for pair, (_, components) in terms.items()}
    names = list(views)
    positions = [(names.index(m), names.index(n), weight) for (m, n), weight in pairs.items()]
    loss, components = barlow_twins_of_pairs(named, positions, present, request)
    return loss, dict(zip(pairs, components.unbind(), strict=True))


def _prepared(views, present, weights, request: Request):
    """Views by name, the same by their names in errors, weights by pair, and present as one tensor or None."""
    if not isinstance(views, Mapping):
        if not isinstance(views, Iterable) or isinstance(views, (str, bytes)):
            rule = "must be a mapping or a sequence of tensors"
            raise TypeError(f"multi_view_barlow_twins: views {rule}, got {told(views)}")
        views = enumerate(views)
    views = dict(views)
    names = list(views)
    if len(names) < 2:
        raise UserError(f"multi_view_barlow_twins: there must be at least 2 views, got {len(names)}")
    if request.pooled:
        raise UserError(
            'multi_view_barlow_twins: variant must not be "vissl", whose statistics are those of two views'
        )
    if request.debias and present is not None:
        raise UserError("multi_view_barlow_twins: debias must be False where present is given, got True")
    named = {f"views[{name!r}]": z for name, z in views.items()}
    if isinstance(present, Mapping):
        present = _present(present, names, named)
    return views, named, _pairs(names, weights), present


# Up to so many rows in Gram form, or columns in direct form, times the pairs that a view is in, kernels of two
# views are faster than what computes once what pairs share (measured on 2 CPU cores: docs/losses.md).
_PAIR_BY_PAIR = {"gram": 512, "direct": 2048}


def _pair_by_pair(views: Mapping[Any, Tensor], pairs: int) -> bool:
    tensors = list(views.values())
    z = tensors[0]
    alike = all(isinstance(x, Tensor) and x.is_cpu and x.dim() == 2 and x.shape == z.shape for x in tensors)
    if not alike:
        return False
    shared = 2 * pairs / len(tensors)
    form = "gram" if gram_is_cheaper(*z.shape) else "direct"
    return shared <= 1 or shared * min(z.shape) <= _PAIR_BY_PAIR[form]


def checked_weights(weights: Mapping[Pair, float]) -> dict[Pair, float]:
    """Weights that are finite and at least 0, of whatever pairs."""
    if not isinstance(weights, Mapping):
        raise TypeError(
            f"multi_view_barlow_twins: weights must be a mapping pair -> number, got {told(weights)}"
        )
    return {
        pair: check_number("multi_view_barlow_twins", f"weights[{pair!r}]", weight, 0)
        for pair, weight in weights.items()
    }


def _pairs(names: list, weights: Mapping[Pair, float] | None) -> dict[Pair, float]:
    if weights is None:
        return dict.fromkeys(itertools.combinations(names, 2), 1.0)
    pairs = {}
    for pair, weight in checked_weights(weights).items():
        known = isinstance(pair, tuple) and len(pair) == 2 and pair[0] != pair[1] and set(pair) <= set(names)
        if not known or pair[::-1] in pairs:
            rule = "must name each pair of different views once"
            raise UserError(
                f"multi_view_barlow_twins: weights {rule} ({', '.join(map(repr, names))}), got {pair!r}"
            )
        pairs[pair] = weight
    if not pairs:
        raise UserError("multi_view_barlow_twins: weights must name at least one pair, got none")
    return pairs


def _present(present: Mapping[str, Tensor], names: list, views: Mapping[str, Tensor]) -> Tensor:
    if set(present) != set(names):
        raise UserError(
            f"multi_view_barlow_twins: present must name the views ({', '.join(map(repr, names))}), "
            f"got {', '.join(map(repr, present))}"
        )
    return stacked_present({name: present[name] for name in names}, views)


class MultiViewBarlowTwinsLoss(WithOptions):
    """Weighted Barlow Twins losses of all pairs of any number of views:
    :func:`mmfast.functional.multi_view_barlow_twins`.

    >>> loss = MultiViewBarlowTwinsLoss({("text", "audio"): 1.0, ("text", "visual"): 0.5})
    >>> loss({"text": z_t, "audio": z_a, "visual": z_v}, present={"text": t, "audio": a, "visual": v}).backward()
    >>> loss.last["text", "audio"].mean_diagonal

    Without ``weights`` every pair counts once. Other options are those of :class:`BarlowTwinsLoss`, by keyword.
    """

    _last: dict[Pair, Tensor] | None = None

    @takes_options
    def __init__(self, weights: Mapping[Pair, float] | None = None, **options: Any):
        super().__init__()
        self._take(Options.of("MultiViewBarlowTwinsLoss", options))
        self.weights = None if weights is None else checked_weights(weights)

    def forward(self, views: Views, present: Tensor | Mapping[str, Tensor] | None = None) -> Tensor:
        loss, self._last = evaluate_multi_view(views, present, self.weights, self._request())
        return loss

    @property
    def last(self) -> dict[Pair, BarlowTwinsComponents] | None:
        """Components of the latest call by pair (None before the first), already computed, without its graph."""
        if self._last is None:
            return None
        return {pair: BarlowTwinsComponents(*components.unbind()) for pair, components in self._last.items()}

    def extra_repr(self) -> str:
        return f"weights={self.weights}, {super().extra_repr()}"
