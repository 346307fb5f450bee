"""The losses between two views that settings can name: a row each. Nothing here needs torch before one is made."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields
from importlib import import_module
from math import inf
from typing import TYPE_CHECKING, Any, NamedTuple

from mmfast.errors import UserError
from mmfast.training.settings import accepted, must_be
from mmfast.wording import guess, one_of

if TYPE_CHECKING:
    from mmfast.training.config import LossConfig


class Option(NamedTuple):
    """What an argument of a loss may be; ``Any`` where the loss says so itself when it is made."""

    kind: Any = Any
    rule: str = ""
    holds: Callable[[Any], bool] = lambda value: True


class Loss(NamedTuple):
    """What is known of a loss without its code.

    Attributes:
        where: module in :mod:`mmfast.losses`, and class.
        options: argument -> what it may be.
        own: those of them that are settings of their own beside ``loss.options``.
        labels: whether it takes labels; the first is what it does unless told.
        joined: it takes labels alone, and the rows of both views as one tensor.
        reads: quantities that are logged beside the loss: fields of its ``last``, or of
            :data:`~mmfast.training.objectives.two_views.READINGS`.
    """

    where: str
    options: Mapping[str, Option] = {}
    own: tuple[str, ...] = ()
    labels: tuple[bool, ...] = (False,)
    joined: bool = False
    reads: tuple[str, ...] = ()

    def make(self, **options: Any) -> Any:
        """The loss, a module."""
        module, _, name = self.where.rpartition(".")
        return getattr(import_module(f"mmfast.losses.{module}"), name)(**options)


_POSITIVE = Option(float, "positive", lambda value: 0 < value < inf)
_FINITE = Option(float, "finite", lambda value: -inf < value < inf)
_FLAG = Option(bool)
_AT_LEAST_0 = Option(float, "finite and at least 0", lambda value: 0 <= value < inf)
_ROWS = {"temperature": _POSITIVE, "normalise": _FLAG}
_TRIPLETS = ("mean_cosine", "easy", "semihard", "hard")
_BARLOW_TWINS = ("lambd", "center", "eps", "variant", "scale", "debias", "stats", "grad_convention", "group")

LOSSES = {
    "barlow_twins": Loss(
        "barlow_twins.BarlowTwinsLoss",
        dict.fromkeys(_BARLOW_TWINS, Option()),
        own=("lambd", "center"),
        reads=("on_diagonal", "off_diagonal", "mean_diagonal", "off_diagonal_rms"),
    ),
    "vicreg": Loss(
        "vicreg.VICRegLoss",
        {**dict.fromkeys(("invariance", "variance", "covariance", "eps"), _AT_LEAST_0), "variant": Option()},
        reads=("invariance", "variance", "covariance"),
    ),
    "nt_xent": Loss(
        "contrastive.NTXentLoss",
        {**_ROWS, "variant": Option(), "over": Option()},
        labels=(False, True),
        reads=("mean_cosine", "positives"),
    ),
    "info_nce": Loss("paired.InfoNCELoss", _ROWS, reads=("mean_cosine",)),
    "clip": Loss("paired.ClipLoss", {**_ROWS, "learnable": _FLAG}, reads=("mean_cosine",)),
    "siglip": Loss(
        "paired.SigLipLoss",
        {"scale": _POSITIVE, "bias": _FINITE, "learnable": _FLAG, "normalise": _FLAG},
        reads=("mean_cosine",),
    ),
    "pairwise_hinge": Loss(
        "ranking.PairwiseHingeLoss",
        {"margin": _AT_LEAST_0, "normalise": _FLAG, "hardest": _FLAG},
        reads=("mean_cosine",),
    ),
    "n_pair": Loss("ranking.NPairLoss", {"l2": _AT_LEAST_0, "normalise": _FLAG}, reads=("mean_cosine",)),
    "sup_con": Loss(
        "contrastive.SupConLoss",
        {**_ROWS, "variant": Option(), "over": Option()},
        labels=(True,),
        joined=True,
        reads=("mean_cosine", "positives"),
    ),
    "soft_nearest_neighbour": Loss(
        "neighbours.SoftNearestNeighbourLoss",
        {**_ROWS, "over": Option()},
        labels=(True,),
        joined=True,
        reads=("mean_cosine", "positives"),
    ),
    "triplet_margin": Loss(
        "triplet.TripletMarginLoss",
        {
            "margin": _AT_LEAST_0,
            **dict.fromkeys(("score", "mining", "ties", "over", "soft", "anchors"), Option()),
        },
        labels=(True,),
        joined=True,
        reads=_TRIPLETS,
    ),
    "smooth_triplet": Loss(
        "triplet.SmoothTripletLoss",
        {"temperature": _POSITIVE, "score": Option(), "over": Option()},
        labels=(True,),
        joined=True,
        reads=_TRIPLETS,
    ),
}


def row_of(config: LossConfig) -> Loss:
    """The row of ``loss.name``.

    Raises:
        UserError: there is none.
    """
    if config.name not in LOSSES:
        raise UserError(
            f"config: loss.name must be {one_of(LOSSES)}, got {config.name!r}{guess(config.name, LOSSES)}"
        )
    return LOSSES[config.name]


def takes_labels(config: LossConfig) -> bool:
    """Whether the loss is to tell samples apart by their labels."""
    return row_of(config).labels[0] if config.labels is None else config.labels


def check_loss(config: LossConfig) -> None:
    """Refuse a loss that is not there, an option that it does not have or take, labels that it does or must not have.

    Raises:
        UserError: names the setting.
    """
    row = row_of(config)
    for name, value in config.options.items():
        if name not in row.options:
            raise UserError(
                f"config: loss.options must fit the loss {config.name}: there is no {name} among "
                f"{', '.join(row.options)}, got {value!r}{guess(name, row.options)}"
            )
        kind, rule, holds = row.options[name]
        if not accepted(value, kind):
            raise UserError(f"config: {must_be(f'loss.options.{name}', kind, value)}")
        if not holds(_typed(value, kind)):
            raise UserError(f"config: loss.options.{name} must be {rule}, got {value}")
    if takes_labels(config) not in row.labels:
        wanted = "true" if row.labels[0] else "false"
        raise UserError(
            f"config: loss.labels must be {wanted} for the loss {config.name}, or left out, got {config.labels}"
        )


def make_loss(config: LossConfig, others: bool = False) -> Any:
    """The loss between two views, a module.

    Args:
        others: something else of the stage reads the settings beside ``loss.options``.

    Raises:
        UserError: as :func:`check_loss`; a setting of another loss.
    """
    check_loss(config)
    row = LOSSES[config.name]
    for setting in fields(config):
        value = getattr(config, setting.name)
        foreign = setting.name in _OWN and setting.name not in row.own
        if foreign and not others and value != setting.default:
            raise UserError(
                f"config: loss.{setting.name} must be left at {_told(setting.default)}, for the loss {config.name} "
                f"has none, got {_told(value)}"
            )
    options = {name: _typed(value, row.options[name].kind) for name, value in config.options.items()}
    try:
        return row.make(**{**{name: getattr(config, name) for name in row.own}, **options})
    except (TypeError, UserError) as error:
        raise UserError(f"config: loss.options must fit the loss {config.name}: {error}") from error


_OWN = {name for row in LOSSES.values() for name in row.own}


def _typed(value: Any, kind: Any) -> Any:
    # YAML takes 1e-3 for text.
    return float(value) if kind is float else value


def _told(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
