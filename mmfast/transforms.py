"""Augmentations of feature sequences as modules: SeqAug, masks, noise, chains of them, and two views at once.

All of them take one tensor (B, L, F) or a mapping of them (modality -> tensor), with the numbers of real time
steps in ``lengths``; they change nothing in ``eval()``. Padding is returned as it came and takes no part in
anything. Every decision is a pure function of the seed, the sample id, the view, the modality (its position in
the dict) and the place in the chain: not of the batch, the number of threads or the device.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Union

import torch
from torch import Tensor, nn

from mmfast.checks import check_bool, check_number, check_seed, told
from mmfast.errors import UserError
from mmfast.ops.augment.op import LengthsError, augment_apply, augment_draw
from mmfast.ops.augment.plan import (
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

PerModality = float | Mapping[str, float]
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def _number(op: str, name: str, value: PerModality, low: float, high: float) -> float | dict[str, float]:
    if isinstance(value, Mapping):
        return {key: check_number(op, f"{name}[{key!r}]", item, low, high) for key, item in value.items()}
    return check_number(op, name, value, low, high)


def _of(op: str, name: str, value: float | dict[str, float], modality: str | None) -> float:
    if not isinstance(value, dict):
        return value
    given = ", ".join(map(str, value)) or "none"
    if modality is None:
        raise UserError(f"{op}: {name} is given per modality ({given}), so x must be a dict of tensors")
    if modality not in value:
        raise UserError(f"{op}: {name} must have a value for modality {modality!r}, got values for {given}")
    return value[modality]


def _moved(op: str, name: str, tensor: Tensor, device: torch.device) -> Tensor:
    """int64 on the device of the values."""
    if tensor.device.type == "meta" != device.type:
        raise UserError(
            f"{op}: {name} must be on {device} like values, or hold data that can be copied there, got meta"
        )
    return tensor.to(device, torch.int64)


def _integers(op: str, name: str, tensor: Tensor, batch: int, dtypes, words: str) -> Tensor:
    """``tensor`` (B,) on its own device, if it is one of integers."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor of {words}, got {told(tensor)}")
    if tensor.dtype not in dtypes or tensor.layout != torch.strided or tensor.shape != (batch,):
        layout = "" if tensor.layout == torch.strided else f" {str(tensor.layout).removeprefix('torch.')}"
        raise ValueError(
            f"{op}: {name} must be {words} of shape ({batch},), "
            f"got{layout} {str(tensor.dtype).removeprefix('torch.')} of shape {tuple(tensor.shape)}"
        )
    return tensor


def _lengths(op: str, lengths, names, xs) -> list[Tensor | None]:
    """One entry per tensor; a single tensor of lengths serves all modalities (aligned data)."""
    if lengths is None or isinstance(lengths, Tensor):
        found = {"lengths": lengths}
    elif isinstance(lengths, Mapping) and names is not None:
        unknown = [name for name in lengths if name not in names]
        if unknown:
            known = ", ".join(map(str, names))
            raise UserError(f"{op}: lengths must name modalities of values ({known}), got {unknown[0]!r}")
        found = {f"lengths[{name!r}]": lengths.get(name) for name in names}
    else:
        raise TypeError(
            f"{op}: lengths must be a tensor, or a dict beside a dict of values, got {type(lengths).__name__}"
        )
    batch, device = xs[0].shape[0], xs[0].device
    for name, length in found.items():
        if length is not None:
            length = _integers(op, name, length, batch, _INTEGERS, "integers")
            found[name] = _moved(op, name, length, device)
    return list(found.values()) * (len(xs) // len(found))


def _seed(
    op: str, seed: int | Tensor | None, generator: torch.Generator | None, device: torch.device
) -> Tensor:
    """int64 (1,) on ``device``: given, or drawn there, so that no host synchronisation is needed."""
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"{op}: generator must be a torch.Generator, got {told(generator)}")
    if seed is None:
        where = device if generator is None else generator.device
        return torch.randint(2**63 - 1, (1,), generator=generator, device=where).to(device)
    if generator is not None:
        raise UserError(f"{op}: seed must be None beside a generator, got {told(seed)}")
    if isinstance(seed, Tensor):
        if seed.numel() != 1 or seed.dtype != torch.int64:
            dtype = str(seed.dtype).removeprefix("torch.")
            raise ValueError(f"{op}: seed must be one int64, got {dtype} of shape {tuple(seed.shape)}")
        return _moved(op, "seed", seed.reshape(1), device)
    return torch.full((1,), check_seed(op, "seed", seed), dtype=torch.int64, device=device)


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
        if ids is not None:
            ids = _moved(op, "ids", _integers(op, "ids", ids, batch, (torch.int64,), "int64"), device)
        lengths = _lengths(op, lengths, names, xs)
        table = self._chains(names)
        seed = _seed(op, seed, generator, device)
        shapes = tuple((x.shape[1], x.shape[2]) for x in xs)
        try:
            words = augment_draw(seed, ids, lengths, table, batch, shapes)
        except LengthsError as error:
            where = "lengths" if names is None else f"lengths of {names[error.modality]!r}"
            raise LengthsError(op, error.modality, error.steps, error.got, where) from None
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
        values: Tensor | Mapping[str, Tensor],
        lengths: Tensor | Mapping[str, Tensor] | None = None,
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
            seed: fixes every decision: any integer of 64 bits, wrapped as by ``torch.manual_seed``, or an int64
                tensor of one element. None: drawn from ``generator`` or from PyTorch's default generator.
            generator: in place of a seed. Not under ``torch.utils.checkpoint``: its second run finds the default
                generators as the first did, but no others, and would take gradients of another view, unnoticed.
                Pass a seed there, or neither.
            padding: "back" or "front", where the padding of shorter sequences stands.

        ``lengths``, ``ids`` and ``seed`` are copied to the device of ``values`` if they are on another one.

        Returns:
            The structure, shapes and dtypes of ``values``, dense; a dict for any mapping; of :class:`TwoViews` a pair
            of them. In training mode nothing returned shares memory with ``values`` or with another view, whatever
            fired. In ``eval()`` two views are two copies; a single one is ``values`` itself, as of ``nn.Dropout``.
        """
        if not self.training:
            if (views := len(self._views())) == 1:
                return values
            names, xs = structure(type(self).__name__, values)
            copies = [[x.clone(memory_format=torch.contiguous_format) for x in xs] for _ in range(views)]
            return restore(copies, names)
        names, xs, _, lengths, table, seed, ids, words = self._prepare(
            values, lengths, ids, seed, generator, padding
        )
        return restore(augment_apply(xs, lengths, seed, ids, words, table, padding == "front"), names)


class Transform(_Augmentation):
    """One step of a chain. Numbers may be given per modality as a dict (name -> number)."""

    def __init__(self, p: PerModality, apply: str):
        super().__init__()
        op = type(self).__name__
        self.p = _number(op, "p", p, 0, 1)
        if apply not in APPLY_NAMES:
            raise UserError(f"{op}: apply must be one of {', '.join(APPLY_NAMES)}, got {apply!r}")
        self.apply_to = apply

    def _views(self):
        return [[self]]

    def _value(self, name: str, modality: str | None) -> float:
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
        *,
        p: PerModality = 0.5,
        spread: float = 0.01,
        p_t: float = 1.0,
        apply: str = "modality",
        count: str = "bernoulli",
        shared_permutation: bool = False,
    ):
        super().__init__(p, apply)
        self.alpha = _number("SeqAug", "alpha", alpha, 0, 1)
        self.spread = check_number("SeqAug", "spread", spread, 0)
        self.p_t = check_number("SeqAug", "p_t", p_t, 0, 1)
        if count not in ("bernoulli", "exact"):
            raise UserError(f"SeqAug: count must be 'bernoulli' or 'exact', got {count!r}")
        self.count = count
        self.shared_permutation = check_bool("SeqAug", "shared_permutation", shared_permutation)

    def step(self, modality):
        alpha = self._value("alpha", modality)
        flags = EXACT_COUNT * (self.count == "exact") | SHARED_ORDER * self.shared_permutation
        spread = self.spread if alpha > 0 else 0.0
        return Step(RESAMPLE, self._value("p", modality), self.apply_to, alpha, spread, self.p_t, flags)


class _Mask(Transform):
    kind: int

    def __init__(
        self, q: PerModality = 0.7, *, p: PerModality = 0.6, bernoulli: bool = False, apply: str = "modality"
    ):
        super().__init__(p, apply)
        self.q = _number(type(self).__name__, "q", q, 0, 1)
        self.bernoulli = check_bool(type(self).__name__, "bernoulli", bernoulli)

    def step(self, modality):
        flags = 0 if self.bernoulli else EXACT_COUNT
        return Step(
            self.kind, self._value("p", modality), self.apply_to, self._value("q", modality), flags=flags
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

    The unit of standardised features is their standard deviation: sigma = 0.1 adds a hundredth to their variance
    then, a signal-to-noise ratio of 20 dB. Raw features have units of their own, and one sigma may drown a modality
    and miss another: give it per modality.

    Args:
        sigma: standard deviation, at least 0, in units of the features.
        p: probability that the transform fires.
        mu: mean.
        apply: one coin p per "modality" of the batch, per "batch", or per "sample" and modality.
    """

    def __init__(
        self,
        sigma: PerModality = 0.1,
        *,
        p: PerModality = 0.9,
        mu: PerModality = 0.0,
        apply: str = "modality",
    ):
        super().__init__(p, apply)
        big = torch.finfo(torch.float32).max
        self.sigma = _number("GaussianNoise", "sigma", sigma, 0, big)
        self.mu = _number("GaussianNoise", "mu", mu, -big, big)

    def step(self, modality):
        p, mu, sigma = (self._value(name, modality) for name in ("p", "mu", "sigma"))
        return Step(NOISE, p, self.apply_to, mu, sigma)


Steps = Union[Transform, "Chain", Iterable["Steps"]]


def _flat(transforms: Steps) -> Iterator[Transform]:
    if isinstance(transforms, Transform):
        yield transforms
    elif isinstance(transforms, Chain):
        yield from transforms.transforms
    elif isinstance(transforms, Iterable) and not isinstance(transforms, (str, Mapping, Tensor)):
        for each in transforms:
            yield from _flat(each)
    else:
        raise TypeError(
            f"Chain: transforms must be SeqAug, masks, noise or chains of them, got {told(transforms)}"
        )


class Chain(_Augmentation):
    """Transforms one after the other, in one pass over the data. An empty chain is the identity.

    Args:
        transforms: transforms and chains in their order, which may be nested, or a single one. They become one flat
            chain, of which only this module's own ``train()`` and ``eval()`` count.
    """

    def __init__(self, transforms: Steps):
        super().__init__()
        self.transforms = nn.ModuleList(_flat(transforms))
        if len(self.transforms) > 255:
            raise UserError(f"Chain: transforms must be at most 255, got {len(self.transforms)}")

    def _views(self):
        return [list(self.transforms)]


class TwoViews(_Augmentation):
    """Two augmented views of the same data, read once: ``(view_a, view_b) = TwoViews(chain_a, chain_b)(values)``.

    Args:
        chain_a, chain_b: :class:`Chain`, or what makes one. Without ``chain_b`` both views follow ``chain_a``, with
            decisions of their own.
    """

    def __init__(self, chain_a: Steps, chain_b: Steps | None = None):
        super().__init__()
        self.chain_a = chain_a if isinstance(chain_a, Chain) else Chain(chain_a)
        self.chain_b = (
            self.chain_a if chain_b is None else chain_b if isinstance(chain_b, Chain) else Chain(chain_b)
        )

    def _views(self):
        return [list(self.chain_a.transforms), list(self.chain_b.transforms)]
