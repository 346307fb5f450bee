"""Standardised features, fitted on the training split."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from copy import copy
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mmfast.data.batch import MultimodalBatch
from mmfast.data.corpus import MultimodalData
from mmfast.data.dataset import MultimodalDataset
from mmfast.data.flat import BLOCK
from mmfast.errors import UserError


@dataclass(frozen=True)
class NonFinite:
    """Cells of real steps that are no numbers: `nan`, and `inf` of either sign."""

    nan: int
    inf: int

    def __str__(self) -> str:
        return f"{self.nan} NaN, {self.inf} inf"


def count_nonfinite(dataset: MultimodalDataset) -> dict[str, NonFinite]:
    """Modality -> number of NaN and inf cells, which is what `Standardiser` repairs in this data set."""
    return {m: _count(steps for _, steps in dataset.blocks(m)) for m in dataset.modalities}


class Standardiser:
    """z = (x - mean) / std per modality and feature, with every value finite.

    Mean and (biased) standard deviation are those of the finite cells of the real steps of the data set given
    to `fit`, accumulated in float64: fit it on the training split only, so that nothing of the others leaks.
    NaN and +-inf become 0, the training mean. So do features that are constant in training (a spread below
    float32's resolution) or never finite. Results beyond float32 are clipped to its range. Padding stays 0.
    """

    def __init__(self) -> None:
        self._forget()

    def _forget(self) -> None:
        self._mean: dict[str, Tensor] = {}
        self._scale: dict[str, Tensor] = {}
        self._steps: dict[str, int] = {}
        self._nonfinite: dict[str, NonFinite] = {}

    def fit(self, dataset: MultimodalDataset) -> Standardiser:
        """Learn from the training split; a second call forgets the first.

        Raises:
            UserError: no samples.
        """
        if len(dataset) == 0:
            raise UserError("Standardiser.fit: the training split must hold samples, got none")
        self._forget()
        for modality in dataset.modalities:
            self._steps[modality] = int(dataset.lengths(modality).sum())
            self._mean[modality], self._scale[modality], self._nonfinite[modality] = _moments(
                dataset, modality
            )
        return self

    @property
    def mean(self) -> dict[str, Tensor]:
        """Modality -> (F,) float64, 0 where nothing finite was seen."""
        return self._mean

    @property
    def scale(self) -> dict[str, Tensor]:
        """Modality -> (F,) float64, 1 / std, 0 for constant features."""
        return self._scale

    @property
    def nonfinite(self) -> dict[str, NonFinite]:
        """Modality -> NaN and inf cells met in `fit`."""
        return self._nonfinite

    def transform(self, data):
        """A standardised copy of a `MultimodalBatch`, `MultimodalDataset` or all of `MultimodalData`.

        Data in a file stay there: each batch is standardised when it is read.

        Raises:
            UserError: before `fit`, for unknown modalities or other feature sizes, or for a modality of which
                the training split had no step (its statistics are unknown).
        """
        if isinstance(data, MultimodalBatch):
            return self._batch(data)
        if isinstance(data, MultimodalDataset):
            # A later fit of this one must not change what is read from now on.
            return data.map(copy(self)._apply, by_step=True)
        if isinstance(data, MultimodalData):
            return data.each(self.transform)
        raise TypeError(
            "Standardiser.transform: data must be a MultimodalBatch, MultimodalDataset or MultimodalData, "
            f"got {type(data).__name__}"
        )

    def _batch(self, batch: MultimodalBatch) -> MultimodalBatch:
        values = {}
        for modality, value in batch.values.items():
            steps = torch.arange(value.shape[1], device=value.device)
            length = batch.lengths[modality][:, None]
            real = steps < length if batch.padding == "back" else steps >= value.shape[1] - length
            values[modality] = out = torch.zeros_like(value)
            out[real] = self._apply(modality, value[real])
        return replace(batch, values=values)

    def _apply(self, modality: str, steps: Tensor) -> Tensor:
        if not self._mean:
            raise UserError("Standardiser.transform: fit (or load_state_dict) must come first")
        if modality not in self._mean:
            raise UserError(
                f"Standardiser.transform: modality must be one of fit's {list(self._mean)}, got {modality!r}"
            )
        if steps.shape[1] != len(self._mean[modality]):
            raise UserError(
                f"Standardiser.transform: {modality} must have {len(self._mean[modality])} features as in "
                f"fit, got {steps.shape[1]}"
            )
        if len(steps) and not self._steps[modality]:
            raise UserError(
                f"Standardiser.transform: {modality} cannot be standardised, fit saw no step of it"
            )
        mean, scale = (d[modality].to(steps.device) for d in (self._mean, self._scale))
        limit = torch.finfo(torch.float32).max
        out = torch.empty_like(steps)
        for source, target in zip(steps.split(BLOCK), out.split(BLOCK), strict=True):
            z = (source.double() - mean) * scale
            target.copy_(torch.where(torch.isfinite(source), z.clamp(-limit, limit), 0.0))
        return out

    def state_dict(self) -> dict:
        """Everything `transform` needs, as tensors and plain numbers."""
        return {
            m: {
                "mean": self._mean[m].clone(),
                "scale": self._scale[m].clone(),
                "steps": self._steps[m],
                "nan": self._nonfinite[m].nan,
                "inf": self._nonfinite[m].inf,
            }
            for m in self._mean
        }

    def load_state_dict(self, state: Mapping) -> Standardiser:
        """The inverse of `state_dict`.

        Raises:
            UserError: anything else than the result of `state_dict`.
        """
        try:
            mean = {m: s["mean"].double().cpu() for m, s in state.items()}
            scale = {m: s["scale"].double().cpu() for m, s in state.items()}
            steps = {m: int(s["steps"]) for m, s in state.items()}
            nonfinite = {m: NonFinite(int(s["nan"]), int(s["inf"])) for m, s in state.items()}
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise UserError(
                f"Standardiser.load_state_dict: state must be a result of state_dict, reading gave {error!r}"
            ) from None
        for m in mean:
            if mean[m].ndim != 1 or mean[m].shape != scale[m].shape:
                raise UserError(
                    f"Standardiser.load_state_dict: mean and scale of {m} must be (F,), "
                    f"got {tuple(mean[m].shape)} and {tuple(scale[m].shape)}"
                )
        self._mean, self._scale, self._steps, self._nonfinite = mean, scale, steps, nonfinite
        return self


def _count(blocks: Iterable[Tensor]) -> NonFinite:
    nan = inf = 0
    for block in blocks:
        nan += int(torch.isnan(block).sum())
        inf += int(torch.isinf(block).sum())
    return NonFinite(nan, inf)


def _moments(dataset: MultimodalDataset, modality: str) -> tuple[Tensor, Tensor, NonFinite]:
    """Mean and 1 / std of the finite cells of each column, in two passes, and what the others are."""
    count, total, square = (
        torch.zeros(dataset.features[modality], dtype=torch.float64, device="cpu") for _ in range(3)
    )
    nan = inf = 0
    for _, block in dataset.blocks(modality):
        finite = torch.isfinite(block)
        here = finite.sum(0)
        if (broken := block.numel() - int(here.sum())) > 0:
            nan += (found := int(torch.isnan(block).sum()))
            inf += broken - found
        count += here
        total += torch.where(finite, block, 0.0).double().sum(0)
    mean = total / count.clamp_min(1)
    for _, block in dataset.blocks(modality):
        square += torch.where(torch.isfinite(block), block.double() - mean, 0.0).square().sum(0)
    std = (square / count.clamp_min(1)).sqrt()
    constant = std <= torch.finfo(torch.float32).eps * mean.abs()
    return mean, torch.where(constant, 0.0, 1 / std), NonFinite(nan, inf)
