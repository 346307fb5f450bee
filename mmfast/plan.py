"""Plans: every decision of an augmentation, to be printed, saved and replayed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mmfast.errors import UserError
from mmfast.ops.augment import augment_apply
from mmfast.ops.augment.plan import KIND_NAMES, RESAMPLE, Chains, layout, plan_width, unpack_bits
from mmfast.ops.native import dtype_code


def structure(op: str, values) -> tuple[tuple[str, ...] | None, list[Tensor]]:
    """(modality names or None, tensors) of one tensor (B, L, F) or a mapping of them, checked for ``op``."""
    if isinstance(values, Tensor):
        names, xs, called = None, [values], ["x"]
    elif isinstance(values, Mapping) and values:
        names, xs = tuple(values), list(values.values())
        called = [f"values[{name!r}]" for name in names]
    else:
        got = f"an empty {type(values).__name__}" if isinstance(values, Mapping) else type(values).__name__
        raise TypeError(f"{op}: values must be a tensor (B, L, F) or a dict of them, got {got}")
    for x, name in zip(xs, called, strict=True):
        if not isinstance(x, Tensor):
            raise TypeError(f"{op}: {name} must be a tensor, got {type(x).__name__}")
        if x.layout != torch.strided or x.is_nested:
            got = "a nested one" if x.is_nested else f"layout {x.layout}"
            raise TypeError(f"{op}: {name} must be a dense tensor, got {got}")
        if x.dim() != 3:
            raise ValueError(f"{op}: {name} must be (B, L, F), got shape {tuple(x.shape)}")
        dtype_code(op, name, x)
        for what, this, first in [
            ("batch size", x.shape[0], xs[0].shape[0]),
            ("dtype", x.dtype, xs[0].dtype),
            ("device", x.device, xs[0].device),
        ]:
            if this != first:
                raise ValueError(f"{op}: {name} must have the {what} of {called[0]}, {first}, got {this}")
    return names, xs


def restore(views: list[list[Tensor]], names: tuple[str, ...] | None):
    """The inverse of :func:`structure` for every view; a single view is not wrapped in a tuple."""
    results = [view[0] if names is None else dict(zip(names, view, strict=True)) for view in views]
    return results[0] if len(results) == 1 else tuple(results)


@dataclass(frozen=True)
class Plan:
    """Every decision of one call, to be printed, saved and replayed.

    Time steps are counted from the first real one, so the same plan serves front and back padding.

    Attributes:
        words: int32 (B, width), see csrc/augment.h.
        chains: the chains it was drawn for.
        names: modality names, or None for a single tensor.
        shapes: (L, F) per modality.
        lengths: int64 (B,) per modality, or None: all steps are real.
        padding: "back" or "front".
        seed: int64 (1,); the noise is computed from it when the plan is applied.
        ids: int64 (B,) sample ids.
    """

    words: Tensor
    chains: Chains
    names: tuple[str, ...] | None
    shapes: tuple[tuple[int, int], ...]
    lengths: tuple[Tensor | None, ...]
    padding: str
    seed: Tensor
    ids: Tensor

    def steps(self) -> Iterator[dict]:
        """One dict per view, step and modality: ``view``, ``step``, ``modality``, ``kind`` and its decisions.

        ``fired`` bool (B,); ``features``, ``masked_features`` bool (B, F); ``gate``, ``masked_steps`` bool
        (B, L); ``order`` int64 (B, L), the real time step that each real time step takes its values from.
        """
        for field in layout(self.chains.steps_per_view, self.chains.rows, self.shapes):
            length, features = self.shapes[field.modality]
            name = field.modality if self.names is None else self.names[field.modality]
            entry = {"view": field.view, "step": field.step, "modality": name, "kind": KIND_NAMES[field.kind]}
            for key, columns in field.columns.items():
                value = self.words[:, columns]
                if key == "fired":
                    entry[key] = value[:, 0].bool()
                elif key == "order":
                    entry[key] = value.long()
                else:
                    entry[key] = unpack_bits(value, features if "features" in key else length)
            yield entry

    def __str__(self) -> str:
        lines = [f"Plan of {self.words.shape[0]} samples, seed {int(self.seed)}, padding {self.padding}"]
        for entry in self.steps():
            counts = [
                f"{int(value[entry['fired']].sum())} of {value[entry['fired']].numel()} {key}"
                for key, value in entry.items()
                if isinstance(value, Tensor) and value.dtype == torch.bool and key != "fired"
            ]
            fired = f"fired in {int(entry['fired'].sum())}"
            where = f"view {entry['view']} step {entry['step']} {entry['modality']}"
            lines.append(f"  {where}: {entry['kind']}, " + ", ".join([fired, *counts]))
        return "\n".join(lines)

    def apply(self, values):
        """Replay on ``values``: a tensor (B, L, F) or a mapping of them, of the shapes the plan was drawn for.

        They must be on the device of the plan, see :meth:`to`. Returns one result of the same structure per view; the
        result itself if there is one view. A plan of saved files is checked when it is loaded, not here.
        """
        names, xs = structure("Plan.apply", values)
        shapes = tuple(tuple(x.shape[1:]) for x in xs)
        if (names, shapes, xs[0].shape[0]) != (self.names, self.shapes, self.words.shape[0]):
            drawn = dict(zip(self.names, self.shapes, strict=True)) if self.names else self.shapes[0]
            given = dict(zip(names, shapes, strict=True)) if names else shapes[0]
            raise ValueError(
                f"Plan.apply: values must have the batch size and (L, F) the plan was drawn for, "
                f"{self.words.shape[0]} and {drawn}, got {xs[0].shape[0]} and {given}"
            )
        if xs[0].device != self.words.device:
            raise UserError(
                f"Plan.apply: values must be on the device of the plan, {self.words.device}, got {xs[0].device} "
                "(Plan.to moves a plan)"
            )
        front = self.padding == "front"
        views = augment_apply(xs, self.lengths, self.seed, self.ids, self.words, self.chains, front)
        return restore(views, names)

    def to(self, device: torch.device | str | int) -> Plan:
        """The plan with all its tensors on ``device``."""
        words, seed, ids, *lengths = (
            None if tensor is None else tensor.to(device)
            for tensor in (self.words, self.seed, self.ids, *self.lengths)
        )
        return replace(self, words=words, seed=seed, ids=ids, lengths=tuple(lengths))

    def state_dict(self) -> dict:
        """Tensors and plain values only, for ``torch.save`` and ``torch.load(weights_only=True)``."""
        return {
            "words": self.words,
            "chains": [list(part) for part in self.chains],
            "names": None if self.names is None else list(self.names),
            "shapes": [list(shape) for shape in self.shapes],
            "lengths": list(self.lengths),
            "padding": self.padding,
            "seed": self.seed,
            "ids": self.ids,
        }

    @classmethod
    def from_state_dict(cls, state: dict) -> Plan:
        """The plan that :meth:`state_dict` was taken of.

        Raises:
            ValueError: the words are not a plan of these chains and shapes (a damaged or edited file).
        """
        plan = cls(
            words=state["words"],
            chains=Chains(*state["chains"]),
            names=None if state["names"] is None else tuple(state["names"]),
            shapes=tuple(tuple(shape) for shape in state["shapes"]),
            lengths=tuple(state["lengths"]),
            padding=state["padding"],
            seed=state["seed"],
            ids=state["ids"],
        )
        plan._check()
        return plan

    def _check(self):
        """Orders point into memory, so a plan from outside is not trusted."""
        batch, device = self.words.shape[0], self.words.device
        places = range(len(self.shapes)) if self.names is None else self.names
        called = ["lengths" if self.names is None else f"lengths of {name!r}" for name in places]
        sizes = {"seed": 1, "ids": batch} | dict.fromkeys(called, batch)
        for (name, size), tensor in zip(sizes.items(), (self.seed, self.ids, *self.lengths), strict=True):
            if tensor is None and name in called:
                continue
            if tensor.device != device:
                raise UserError(f"Plan: {name} must be on {device} like words, got {tensor.device}")
            if tensor.dtype != torch.int64 or tensor.shape != (size,):
                dtype = str(tensor.dtype).removeprefix("torch.")
                raise ValueError(
                    f"Plan: {name} must be int64 of shape ({size},), got {dtype} of shape {tuple(tensor.shape)}"
                )
        for name, length, (steps, _) in zip(called, self.lengths, self.shapes, strict=True):
            if length is not None and (wrong := (length < 0) | (length > steps)).any():
                raise UserError(f"Plan: {name} must be in [0, {steps}], got {int(length[wrong][0])}")
        width = plan_width(self.chains.steps_per_view, self.chains.rows, self.shapes)
        if self.words.dtype != torch.int32 or self.words.shape != (batch, width):
            raise ValueError(
                f"Plan: words must be int32 of shape ({batch}, {width}) for its chains, "
                f"got {str(self.words.dtype).removeprefix('torch.')} of shape {tuple(self.words.shape)}"
            )
        for field in layout(self.chains.steps_per_view, self.chains.rows, self.shapes):
            if field.kind != RESAMPLE:
                continue
            order = self.words[:, field.columns["order"]]
            length = self.lengths[field.modality]
            steps = self.shapes[field.modality][0]
            n = torch.full((batch,), steps, device=device) if length is None else length
            real = torch.arange(steps, device=device) < n[:, None]
            wrong = real & ((order < 0) | (order >= n[:, None]))
            if wrong.any():
                raise ValueError(
                    f"Plan: order of view {field.view} step {field.step} must stay within the real time steps, "
                    f"got {int(order[wrong][0])}"
                )
