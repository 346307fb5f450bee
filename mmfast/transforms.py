"""Augmentations of feature sequences as modules: SeqAug, masks, noise, chains of them, and two views at once.

All of them take one tensor (B, L, F) or a dict of them (modality -> tensor), with the numbers of real time
steps in ``lengths``; they do nothing in ``eval()``. Padding is returned as it came and takes no part in
anything. Every decision is a pure function of the seed, the sample id, the view, the modality (its position in
the dict) and the place in the chain: not of the batch, the number of threads or the device.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mmfast.errors import UserError
from mmfast.ops.augment import augment_apply, augment_draw
from mmfast.ops.plan import (
    APPLY_NAMES,
    EXACT_COUNT,
    MASK_FEATURES,
    MASK_STEPS,
    NOISE,
    RESAMPLE,
    SHARED_ORDER,
    Chains,
    Step,
    chains,
)
from mmfast.plan import Plan, restore, structure

PerModality = float | dict[str, float]


def _check_number(op: str, name: str, value: PerModality, low: float, high: float) -> PerModality:
    for item in value.values() if isinstance(value, dict) else [value]:
        if not isinstance(item, (int, float)) or not low <= item <= high:
            rule = f"in [{low:g}, {high:g}]" if high < float("inf") else f"at least {low:g}"
            raise UserError(f"{op}: {name} must be {rule}, got {item!r}")
    return value


def _of(op: str, name: str, value: PerModality, modality: str | None) -> float:
    if not isinstance(value, dict):
        return value
    if modality is None:
        raise UserError(
            f"{op}: {name} is given per modality ({', '.join(value)}), so x must be a dict of tensors"
        )
    if modality not in value:
        raise UserError(
            f"{op}: {name} must have a value for modality {modality!r}, got values for {', '.join(value)}"
        )
    return value[modality]


def _lengths(op: str, lengths, names, xs) -> list[Tensor | None]:
    """One entry per tensor; a single tensor of lengths serves all modalities (aligned data)."""
    if lengths is None or isinstance(lengths, Tensor):
        found = [lengths] * len(xs)
    elif isinstance(lengths, dict) and names is not None:
        unknown = [name for name in lengths if name not in names]
        if unknown:
            raise UserError(
                f"{op}: lengths must name modalities of values ({', '.join(names)}), got {unknown[0]!r}"
            )
        found = [lengths.get(name) for name in names]
    else:
        raise TypeError(
            f"{op}: lengths must be a tensor, or a dict beside a dict of values, got {type(lengths).__name__}"
        )
    for length, x in zip(found, xs, strict=True):
        if length is not None and (length.shape != x.shape[:1] or length.is_floating_point()):
            dtype = str(length.dtype).removeprefix("torch.")
            raise ValueError(
                f"{op}: lengths must be integers of shape ({x.shape[0]},), got {dtype} of shape {tuple(length.shape)}"
            )
    return [None if n is None else n.to(x.device, torch.int64) for n, x in zip(found, xs, strict=True)]


def _seed(
    op: str, seed: int | Tensor | None, generator: torch.Generator | None, device: torch.device
) -> Tensor:
    """int64 (1,) on ``device``: given, or drawn there, so that no host synchronisation is needed."""
    if seed is None:
        where = device if generator is None else generator.device
        return torch.randint(2**63 - 1, (1,), generator=generator, device=where).to(device)
    if isinstance(seed, Tensor):
        if seed.numel() != 1 or seed.dtype != torch.int64:
            dtype = str(seed.dtype).removeprefix("torch.")
            raise ValueError(f"{op}: seed must be one int64, got {dtype} of shape {tuple(seed.shape)}")
        return seed.reshape(1).to(device)
    return torch.full((1,), seed, dtype=torch.int64, device=device)


class _Augmentation(nn.Module):
    """What all have in common: views of steps, drawn and applied together."""

    def _views(self) -> list[list[Transform]]:
        raise NotImplementedError

    def _chains(self, names: tuple[str, ...] | None) -> Chains:
        modalities = (None,) if names is None else names
        return chains([[[t.step(m) for m in modalities] for t in view] for view in self._views()])

    def _prepare(self, values, lengths, ids, seed, generator, padding):
        op = type(self).__name__
        names, xs = structure(op, values)
        if padding not in ("back", "front"):
            raise UserError(f"{op}: padding must be 'back' or 'front', got {padding!r}")
        batch, device = xs[0].shape[0], xs[0].device
        if ids is not None and (ids.shape != (batch,) or ids.dtype != torch.int64):
            dtype = str(ids.dtype).removeprefix("torch.")
            raise ValueError(
                f"{op}: ids must be int64 of shape ({batch},), got {dtype} of shape {tuple(ids.shape)}"
            )
        lengths = _lengths(op, lengths, names, xs)
        table = self._chains(names)
        seed = _seed(op, seed, generator, device)
        ids = None if ids is None else ids.to(device)
        shapes = tuple((x.shape[1], x.shape[2]) for x in xs)
        words = augment_draw(seed, ids, lengths, table, batch, shapes)
        return names, xs, shapes, lengths, table, seed, ids, words

    def draw(self, values, lengths=None, *, ids=None, seed=None, generator=None, padding="back") -> Plan:
        """The decisions alone, in training and in eval mode alike; ``plan.apply(values)`` carries them out.

        Arguments as for calling the module.
        """
        names, xs, shapes, lengths, table, seed, ids, words = self._prepare(
            values, lengths, ids, seed, generator, padding
        )
        if ids is None:
            ids = torch.arange(xs[0].shape[0], device=xs[0].device)
        return Plan(words, table, names, shapes, tuple(lengths), padding, seed, ids)

    def forward(
        self,
        values: Tensor | dict[str, Tensor],
        lengths: Tensor | dict[str, Tensor] | None = None,
        *,
        ids: Tensor | None = None,
        seed: int | Tensor | None = None,
        generator: torch.Generator | None = None,
        padding: str = "back",
    ):
        """Augment.

        Args:
            values: (B, L, F) in fp32, fp64, bf16 or fp16, or a dict of them with its own L and F per modality.
            lengths: integers (B,), real time steps, 0 to L; per modality, or one tensor for all; None: all L.
            ids: int64 (B,) sample ids; with them a sample's view does not depend on its place in the batch.
            seed: fixes every decision; None: drawn from ``generator`` or from PyTorch's default generator.
            padding: "back" or "front", where the padding of shorter sequences stands.

        Returns:
            The structure, shapes and dtypes of ``values``; of :class:`TwoViews` a pair of them.
        """
        if not self.training:
            return values if len(self._views()) == 1 else (values,) * len(self._views())
        names, xs, _, lengths, table, seed, ids, words = self._prepare(
            values, lengths, ids, seed, generator, padding
        )
        return restore(augment_apply(xs, lengths, seed, ids, words, table, padding == "front"), names)


class Transform(_Augmentation):
    """One step of a chain. Numbers may be given per modality as a dict (name -> number)."""

    def __init__(self, p: PerModality, apply: str):
        super().__init__()
        op = type(self).__name__
        self.p = _check_number(op, "p", p, 0, 1)
        if apply not in APPLY_NAMES:
            raise UserError(f"{op}: apply must be one of {', '.join(APPLY_NAMES)}, got {apply!r}")
        self.apply_to = apply

    def _views(self):
        return [[self]]

    def _number(self, name: str, modality: str | None) -> float:
        return _of(type(self).__name__, name, getattr(self, name), modality)

    def step(self, modality: str | None) -> Step:
        """The numbers of this transform for one modality (None: the input is a single tensor)."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        return ", ".join(
            f"{k}={v}" for k, v in vars(self).items() if not k.startswith("_") and k != "training"
        )


class SeqAug(Transform):
    """Resamples a random subset of the features along time.

    For each sample and modality: alpha_b = alpha + \\|N(0, spread²)\\|, clipped to 1; each feature is selected with
    probability alpha_b; one uniform permutation π of the real time steps; then x'[t, f] = x[π(t), f] for the
    selected features f, and x elsewhere. All selected features share π. Gradients flow to where values came from.

    Source: Georgiou et al., "SeqAug" (feature resampling for sequences); semantics of the thesis' section 7.2.
    Permutations are orders of 32-bit random words: uniform up to the chance n² / 2³³ of two equal words.

    Args:
        alpha: share of the features, in [0, 1]; 0 leaves a modality alone, spread or not.
        p: probability that the transform fires.
        spread: scale of the half-normal added to alpha (mean 0.8 spread).
        p_t: probability that a time step takes the resampled values; below 1 values can repeat or vanish.
        apply: one coin p per "modality" of the batch, per "batch", or per "sample" and modality.
        count: "bernoulli", or "exact" for round(alpha_b F) features, halves rounded up.
        shared_permutation: one π for all modalities of a sample, for aligned data.
    """

    def __init__(
        self,
        alpha: PerModality = 0.15,
        p: PerModality = 0.5,
        *,
        spread: float = 0.01,
        p_t: float = 1.0,
        apply: str = "modality",
        count: str = "bernoulli",
        shared_permutation: bool = False,
    ):
        super().__init__(p, apply)
        self.alpha = _check_number("SeqAug", "alpha", alpha, 0, 1)
        self.spread = _check_number("SeqAug", "spread", spread, 0, float("inf"))
        self.p_t = _check_number("SeqAug", "p_t", p_t, 0, 1)
        if count not in ("bernoulli", "exact"):
            raise UserError(f"SeqAug: count must be 'bernoulli' or 'exact', got {count!r}")
        self.count = count
        self.shared_permutation = shared_permutation

    def step(self, modality):
        alpha = self._number("alpha", modality)
        flags = EXACT_COUNT * (self.count == "exact") | SHARED_ORDER * self.shared_permutation
        spread = self.spread if alpha > 0 else 0.0
        return Step(RESAMPLE, self._number("p", modality), self.apply_to, alpha, spread, self.p_t, flags)


class _Mask(Transform):
    kind: int

    def __init__(
        self, q: PerModality = 0.7, p: PerModality = 0.6, *, bernoulli: bool = False, apply: str = "modality"
    ):
        super().__init__(p, apply)
        self.q = _check_number(type(self).__name__, "q", q, 0, 1)
        self.bernoulli = bernoulli

    def step(self, modality):
        flags = 0 if self.bernoulli else EXACT_COUNT
        return Step(
            self.kind, self._number("p", modality), self.apply_to, self._number("q", modality), flags=flags
        )


class TimeMask(_Mask):
    """Zeroes whole time steps: exactly round(q n) of the n real ones of each sample, chosen uniformly.

    Halves are rounded up, but one step is left over unless q = 1: a sample of one step keeps it under q = 0.99.

    Args:
        q: share of the real time steps, in [0, 1].
        p: probability that the transform fires.
        bernoulli: each step independently with probability q instead (thesis, eq. 6.5.1). No rescaling either way.
        apply: one coin p per "modality" of the batch, per "batch", or per "sample" and modality.
    """

    kind = MASK_STEPS


class FeatureMask(_Mask):
    """Zeroes whole features: exactly round(q F) of them per sample, the same at all real time steps.

    Rounding and arguments as for :class:`TimeMask`.
    """

    kind = MASK_FEATURES


class GaussianNoise(Transform):
    """Adds N(mu, sigma²) to every real element.

    Args:
        sigma: standard deviation, at least 0, in units of the features.
        p: probability that the transform fires.
        mu: mean.
        apply: one coin p per "modality" of the batch, per "batch", or per "sample" and modality.
    """

    def __init__(
        self,
        sigma: PerModality = 0.1,
        p: PerModality = 0.9,
        *,
        mu: PerModality = 0.0,
        apply: str = "modality",
    ):
        super().__init__(p, apply)
        big = torch.finfo(torch.float32).max
        self.sigma = _check_number("GaussianNoise", "sigma", sigma, 0, big)
        self.mu = _check_number("GaussianNoise", "mu", mu, -big, big)

    def step(self, modality):
        p, mu, sigma = (self._number(name, modality) for name in ("p", "mu", "sigma"))
        return Step(NOISE, p, self.apply_to, mu, sigma)


class Chain(_Augmentation):
    """Transforms one after the other, in one pass over the data. An empty chain is the identity."""

    def __init__(self, transforms: Sequence[Transform]):
        super().__init__()
        for transform in transforms:
            if not isinstance(transform, Transform):
                raise TypeError(
                    f"Chain: transforms must be SeqAug, masks or noise, got {type(transform).__name__}"
                )
        if len(transforms) > 255:
            raise UserError(f"Chain: transforms must be at most 255, got {len(transforms)}")
        self.transforms = nn.ModuleList(transforms)

    def _views(self):
        return [list(self.transforms)]


class TwoViews(_Augmentation):
    """Two augmented views of the same data, read once: ``(view_a, view_b) = TwoViews(chain_a, chain_b)(values)``.

    Args:
        chain_a, chain_b: :class:`Chain`, one transform, or a list of transforms. Without ``chain_b`` both views
            follow ``chain_a``, with decisions of their own.
    """

    def __init__(self, chain_a, chain_b=None):
        super().__init__()

        def as_chain(chain):
            if isinstance(chain, Chain):
                return chain
            return Chain([chain] if isinstance(chain, Transform) else chain)

        self.chain_a = as_chain(chain_a)
        self.chain_b = self.chain_a if chain_b is None else as_chain(chain_b)

    def _views(self):
        return [list(self.chain_a.transforms), list(self.chain_b.transforms)]
