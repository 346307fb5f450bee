"""Modality masking of M3: a regulariser that hides one modality at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from mmfast.checks import check_number
from mmfast.errors import UserError

MODES = ("step", "sequence")


class ModalityMasking(nn.Module):
    """Hard masking of M3 (Georgiou et al. 2021): zeroes one modality per step or per sample, no rescaling.

    Training mode only. One coin per forward pass decides, with probability ``p``, whether the batch is
    masked. If it is, every sample draws one of **its** modalities from the categorical distribution
    ``weights``, renormalised over those of non-zero length: for each step anew (``mode="step"``, M3's
    "sequential" masking: each step loses exactly one modality) or once for the whole sequence
    (``mode="sequence"``). A missing modality is never drawn, and a sample with fewer than two modalities is
    left alone, as it would lose everything. With all modalities present this is M3's own rule. Draws come
    from torch's default generator.

    Args:
        modalities: their names, in the order of the values.
        p: probability that a batch is masked, in [0, 1]; M3 used 0.2 and 0.25.
        mode: ``"step"`` or ``"sequence"``.
        weights: modality -> weight (non-negative, not all zero; they need not sum to 1); ``None`` is uniform.
            A sample all of whose modalities weigh 0 is left alone.

    Call: a list of (B, L, H), one per modality, and a list of lengths (B,) -> a list of the same shapes.
    """

    def __init__(
        self,
        modalities: Sequence[str],
        p: float = 0.0,
        *,
        mode: str = "step",
        weights: Mapping[str, float] | None = None,
    ):
        super().__init__()
        p = check_number("ModalityMasking", "p", p, 0, 1)
        if p > 0 and len(modalities) < 2:
            raise UserError(f"ModalityMasking: p must be 0 with fewer than two modalities, got {p}")
        if mode not in MODES:
            raise UserError(f"ModalityMasking: mode must be one of {[*MODES]}, got {mode!r}")
        if weights is None:
            weights = dict.fromkeys(modalities, 1.0)
        if set(weights) != set(modalities):
            wanted, got = ", ".join(modalities), ", ".join(weights)
            raise UserError(f"ModalityMasking: weights must have the modalities {wanted}, got {got}")
        values = [
            check_number("ModalityMasking", f"weights[{name!r}]", weights[name], 0) for name in modalities
        ]
        if sum(values) == 0:
            raise UserError(f"ModalityMasking: weights must not be all zero, got {values}")
        self.p, self.mode = p, mode
        self.register_buffer(
            "weights", torch.tensor(values, device=torch.get_default_device()), persistent=False
        )

    def forward(self, values: list[Tensor], lengths: list[Tensor]) -> list[Tensor]:
        if not self.training or self.p == 0:
            return values
        batch, steps = values[0].shape[:2]
        present = torch.stack(lengths, dim=1) > 0
        chances = self.weights * present
        maskable = (present.sum(dim=1) >= 2) & (chances.sum(dim=1) > 0)
        fires = maskable & (torch.rand((), device=present.device) < self.p)
        draws = steps if self.mode == "step" else 1
        # multinomial wants a positive weight in every row, also in those that will not be masked.
        chances = torch.where(maskable[:, None], chances, 1.0)
        drawn = torch.multinomial(chances, draws, replacement=True)
        hidden = torch.where(fires[:, None], drawn, -1).expand(batch, steps)
        return [x.masked_fill((hidden == m)[..., None], 0) for m, x in enumerate(values)]

    def extra_repr(self) -> str:
        return f"p={self.p}, mode={self.mode!r}, weights={[round(w, 4) for w in self.weights.tolist()]}"
