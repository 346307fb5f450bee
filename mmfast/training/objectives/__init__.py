"""What a stage may minimise: one file and one row each. Nothing here needs torch before an objective is loaded."""

from __future__ import annotations

from importlib import import_module
from typing import NamedTuple


class Kind(NamedTuple):
    """What is known of an objective without its code.

    Attributes:
        where: module and class.
        parts: names of the network's parts that it owns beside the encoder; the first names the seed of its weights.
        labels: it needs labelled samples.
        least: samples that a step needs.
    """

    where: str
    parts: tuple[str, ...] = ()
    labels: bool = False
    least: int = 1

    def load(self) -> type:
        """The class, an :class:`~mmfast.training.objectives.base.Objective`."""
        module, _, name = self.where.rpartition(".")
        return getattr(import_module(f"{__name__}.{module}"), name)


OBJECTIVES = {
    "supervised": Kind("supervised.Supervised", ("head",), labels=True),
    "two_views": Kind("two_views.TwoViews", ("projector", "loss"), least=2),
    "many_views": Kind("many_views.ManyViews", ("view_projectors",), least=2),
    "auxiliary": Kind("auxiliary.Auxiliary"),
}

# All that a network may consist of.
PARTS = tuple(dict.fromkeys(["encoder", *(part for kind in OBJECTIVES.values() for part in kind.parts)]))
