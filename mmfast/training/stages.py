"""A stage of training: what is minimised, on what parts, and how."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from mmfast.errors import UserError
from mmfast.training.config import Config, StageSettings
from mmfast.training.objectives import OBJECTIVES
from mmfast.wording import guess

PRETRAINING, SUPERVISED = "pretraining", "supervised"


@dataclass(frozen=True)
class Stage:
    """One stage of a method, complete: settings that it does not have of its own are those of a section.

    Attributes:
        name: of the stage. The names of the two sections keep the seeds of their draws; other names have their own.
        objectives: name of each objective in :data:`~mmfast.training.objectives.OBJECTIVES` -> its weight.
        settings: how it goes on; a ``SupervisedConfig`` where labels are needed, a ``PretrainingConfig`` otherwise.
        where: what its settings are called in front of the dot.
        take: parts whose weights come from the stage before.

    Raises:
        UserError: parts that its network does not have, or none that learns.
    """

    name: str
    objectives: Mapping[str, float]
    settings: StageSettings
    where: str
    take: tuple[str, ...] = ("encoder",)

    def __post_init__(self) -> None:
        for setting, names in (("frozen", self.settings.frozen), ("take", self.take)):
            for name in names:
                if name not in self.parts:
                    raise UserError(
                        f"config: {self.where}.{setting} must name parts of its network, {', '.join(self.parts)}, "
                        f"got {name!r}{guess(name, self.parts)}"
                    )
        if all(self.frozen(part, 0) for part in self.parts if part != "loss"):
            raise UserError(
                f"config: {self.where}.frozen must leave a part that learns from the first epoch on, "
                f"got {dict(self.settings.frozen)}"
            )

    @property
    def labels(self) -> bool:
        """Whether it is trained on labelled samples."""
        return any(OBJECTIVES[name].labels for name in self.objectives)

    @property
    def kind(self) -> str:
        """What its checkpoints say that they are of: a stage with or without labels."""
        return SUPERVISED if self.labels else PRETRAINING

    @property
    def least(self) -> int:
        """Samples that a step needs."""
        return max(OBJECTIVES[name].least for name in self.objectives)

    @property
    def parts(self) -> tuple[str, ...]:
        """What its network consists of."""
        return ("encoder", *(part for name in self.objectives for part in OBJECTIVES[name].parts))

    def frozen(self, part: str, epoch: int) -> bool:
        """Whether a part does not learn in an epoch."""
        until = self.settings.frozen.get(part, False)
        return until if isinstance(until, bool) else epoch < until

    def always_frozen(self, part: str) -> bool:
        """Whether a part never learns."""
        return self.frozen(part, self.settings.epochs - 1)

    @property
    def rate(self) -> tuple[str, float]:
        """Name and value of the learning rate's setting."""
        linear = getattr(self.settings, "linear_lr", None) is not None and self.always_frozen("encoder")
        name = "linear_lr" if linear else "lr"
        return f"{self.where}.{name}", getattr(self.settings, name)

    def purpose(self, draw: str) -> str:
        """What the seed of a draw is derived from."""
        return draw if self.name in (PRETRAINING, SUPERVISED) else f"{draw} of {self.name}"

    @property
    def cost(self) -> int:
        """About how many times it encodes each of its samples."""
        if self.labels and self.always_frozen("encoder"):
            return 1
        return self.settings.epochs * (1 if self.labels else 2)

    def describe(self) -> dict[str, Any]:
        """Plain values, for files."""
        return {
            "name": self.name,
            "objectives": dict(self.objectives),
            "take": list(self.take),
            **asdict(self.settings),
        }


def pretraining_stage(config: Config) -> Stage:
    """The stage of ``mmfast pretrain``."""
    return Stage(PRETRAINING, {"two_views": 1.0}, config.pretraining, PRETRAINING)


def supervised_stage(config: Config, freeze: bool = False) -> Stage:
    """The stage of ``mmfast finetune``; with ``freeze`` only the head learns."""
    settings = config.supervised
    if freeze:
        settings = replace(settings, frozen={**settings.frozen, "encoder": True})
    return Stage(SUPERVISED, {"supervised": 1.0}, settings, SUPERVISED)
