"""Encoders such as users write, right and wrong, for the tests of ``model.encoder``."""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from mmfast.models import Encoder, Steps


class Level(Enum):
    LOW = 1


class Pooled(Encoder):
    """Means over time of one layer a modality.

    Args:
        width: Size of each
            modality's vector.
        kernel: Two numbers: neither is used, not to 50 %.
    """

    def __init__(
        self,
        features: dict[str, int],
        width: int = 8,
        kernel: tuple[int, int] = (1, 2),
        scale: float = None,  # noqa: RUF013 - as users write
        activation=nn.Tanh,
        *,
        extra=None,
    ):
        super().__init__(features)
        assert isinstance(kernel, tuple)
        self.scale, self.kernel, self.extra, self.activation = scale, kernel, extra, activation()
        self.layers = nn.ModuleDict({name: nn.Linear(size, width) for name, size in features.items()})
        self.out_features = width * len(features)

    def encode(self, values, lengths, padding="back"):
        steps = self.steps(values, lengths, padding)
        return {name: Steps(self.activation(self.layers[name](x)), n) for name, (x, n) in steps.items()}

    def fuse(self, representations, without=()):
        return torch.cat([*self.vectors(self.leave_out(representations, without)).values()], dim=1)


class Deep(Pooled):
    """Its own argument has no default, the others are those of its base.

    Args:
        depth: How deep it is.
    """

    def __init__(self, depth: int, **others):
        super().__init__(**others)
        self.more = nn.Sequential(*(nn.Linear(self.out_features, self.out_features) for _ in range(depth)))

    def fuse(self, representations, without=()):
        return self.more(super().fuse(representations, without))


class Pair(Pooled):
    modalities = (2, 2)


class Loose(Pooled):
    """Annotations that settings cannot have, or that cannot be resolved."""

    def __init__(
        self,
        features,
        sizes: Sequence[int] = (),
        path: Path | None = None,
        table: dict[str, list[int]] | None = None,
        mode: Literal["a", "b"] = "a",
        later: "Unknown" = 3,  # noqa: F821, UP037
        level: Level = Level.LOW,
    ):
        super().__init__(features)


class Aligned(Pooled):
    aligned = True


class Normed(Pooled):
    """Has statistics, reads an element of a tensor in its constructor, and draws when it is called."""

    def __init__(self, features: dict[str, int], width: int = 8):
        super().__init__(features, width)
        self.norm = nn.BatchNorm1d(self.out_features)
        self.rate = torch.linspace(0, 0.1, 3)[1].item()

    def fuse(self, representations, without=()):
        fused = self.norm(super().fuse(representations, without))
        return nn.functional.dropout(fused, self.rate, self.training)


class Plain(Encoder):
    """No parameters at all: the means themselves."""

    def __init__(self, features: dict[str, int]):
        super().__init__(features)
        self.out_features = sum(features.values())

    encode = Encoder.steps

    def fuse(self, representations, without=()):
        return torch.cat([*self.vectors(self.leave_out(representations, without)).values()], dim=1)


class NoFuse(Encoder):
    encode = Encoder.steps


class Sizeless(Pooled):
    def __init__(self, features: dict[str, int]):
        super().__init__(features)
        self.out_features = 2.5


class Wide(Pooled):
    def fuse(self, representations, without=()):
        return super().fuse(representations, without)[:, None]


class Listed(Pooled):
    def encode(self, values, lengths, padding="back"):
        return [*super().encode(values, lengths, padding).values()]

    def fuse(self, representations, without=()):
        return representations[0].values.new_zeros(2, self.out_features)


class Joined(Pooled):
    """Says that it needs no aligned modalities, and does."""

    def fuse(self, representations, without=()):
        return torch.cat([x for x, _ in representations.values()], dim=2).mean(dim=1)


class Convolved(Pooled):
    """Needs five steps, has vectors of its own, and a term of its own."""

    def __init__(self, features: dict[str, int], width: int = 8):
        super().__init__(features, width)
        self.convolution = nn.Conv1d(width, 3, 5)

    def encode(self, values, lengths, padding="back"):
        steps = super().encode(values, lengths, padding)
        return {
            name: (self.convolution(nn.functional.pad(x.mT, (0, 4))), x, n) for name, (x, n) in steps.items()
        }

    def vectors(self, representations):
        return {name: x.mean(2) * (n > 0)[:, None] for name, (x, _, n) in representations.items()}

    def auxiliary(self, representations):
        return {"size": sum(x.square().mean() for _, x, _ in representations.values())}

    def fuse(self, representations, without=()):
        kept = self.leave_out(representations, without)
        steps = {name: Steps(x, n) for name, (_, x, n) in kept.items()}
        return torch.cat([*Encoder.vectors(self, steps).values()], dim=1)


class Vectorless(Convolved):
    def vectors(self, representations):
        return {name: x for name, (_, x, _) in representations.items()}

    def fuse(self, representations, without=()):
        return torch.cat([x.mean(1) for _, x, _ in representations.values()], dim=1)


class Broken(Pooled):
    def __init__(self, features: dict[str, int], rate: float = 0.0):
        super().__init__(features)
        self.rate = 1 / rate


class Short(Pooled):
    """Has places for so many steps."""

    def __init__(self, features: dict[str, int], places: int = 64):
        super().__init__(features)
        self.places = places

    def encode(self, values, lengths, padding="back"):
        if max(x.shape[1] for x in values.values()) > self.places:
            raise IndexError(f"place {self.places} of {self.places}")
        return super().encode(values, lengths, padding)


class Reserved(Pooled):
    def __init__(self, features: dict[str, int], projector: int = 3):
        super().__init__(features)


class Featureless(Pooled):
    def __init__(self, sizes: dict[str, int], width: int = 3):
        super().__init__(sizes)


class Other(nn.Module):
    pass


def function(features):
    return Pooled(features)
