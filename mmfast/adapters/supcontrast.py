"""The loss of HobbitLong/SupContrast, there ``from losses import SupConLoss``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mmfast.checks import check_number
from mmfast.errors import UserError
from mmfast.losses.similarity import Call, Found, SimilarityLoss, Variant, among_themselves, choice, nothing
from mmfast.ops.barlow_twins.checks import check_dense, compute_dtype
from mmfast.ops.similarity.checks import check_labels, check_rows, refuse_not_finite
from mmfast.ops.similarity.shared import Sharing, by_view
from mmfast.ops.similarity.statistics import Compared

OP = "supcontrast.SupConLoss"
MODES = ("all", "one")


class SupConLoss(SimilarityLoss):
    """SupContrast's loss: features are taken as they are, the result is multiplied by temperature / base_temperature.

    Rows without a positive have the loss 0 and count in the mean. ``contrast_mode`` "one" takes the first views alone
    as anchors: the rows of the others get the weight 0. A ``mask`` that says who has whose label (symmetric and
    transitive) is turned into labels; any other, weights and asymmetric ones among them, is computed in plain PyTorch
    with all scores in memory. On a GPU a mask is waited for.

    Raises:
        UserError: features that are not (B, V, ...); both labels and mask, or others than B.
    """

    def __init__(self, temperature: float = 0.07, contrast_mode: str = "all", base_temperature: float = 0.07):
        super().__init__()
        temperature = check_number(OP, "temperature", temperature, 0, ends="(]")
        base_temperature = check_number(OP, "base_temperature", base_temperature, 0, ends="(]")
        choice(OP, "contrast_mode", contrast_mode, MODES)
        self._take(temperature=temperature, contrast_mode=contrast_mode, base_temperature=base_temperature)

    def forward(self, features: Tensor, labels: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """The loss of features (B, V, ...), V views of each sample, whose labels are (B,), or mask (B, B).

        Without both, views of one sample alone are positives of each other.
        """
        check_dense(OP, "features", features)
        if features.dim() < 3:
            raise UserError(f"{OP}: features must have shape (B, V, ...), got {tuple(features.shape)}")
        features = features.flatten(2)
        if labels is not None and mask is not None:
            raise UserError(f"{OP}: mask must be None with labels, got both")
        samples, views = features.shape[:2]
        z = check_rows(OP, "features", features.flatten(0, 1))
        if mask is not None:
            mask = _check_mask(mask, features)
            labels = _labels(mask, views)
            if labels is None:
                return self._kept(self._with_mask(features, mask))
        elif labels is None:
            labels = torch.arange(samples, device=z.device)
        else:
            labels = _check_labels(labels, features)
        if len(z) < 2:
            refuse_not_finite(OP, {"features": z})
            facts = torch.zeros(3, dtype=compute_dtype(z), device=z.device)
            return self._kept((nothing(z), facts, Compared(z, None, (labels, labels), None, None, "dot")))
        weights = None
        if self.contrast_mode == "one":
            weights = torch.zeros(samples, views, dtype=compute_dtype(z), device=z.device)
            weights[:, 0] = 1
            weights = weights.flatten()
        call = Call(OP, "mean", "all", Sharing(OP, None)).of({"features": features})
        vectors = [labels.repeat_interleave(views), None, None, weights]
        variant = Variant("out", "all", self.base_temperature)
        scale = call.scale(self.temperature, ("features", z))
        return self._kept(among_themselves(call, z, vectors, scale, variant, False))

    def _with_mask(self, features: Tensor, mask: Tensor) -> Found:
        refuse_not_finite(OP, dict(by_view({"features": features})))
        samples, views = features.shape[:2]
        z = features.transpose(0, 1).flatten(0, 1).to(compute_dtype(features))
        anchors = z if self.contrast_mode == "all" else z[:samples]
        itself = torch.zeros(len(anchors), len(z), dtype=torch.bool, device=z.device)
        itself.fill_diagonal_(True)
        positives = mask.to(z.dtype).repeat(len(anchors) // samples, views).masked_fill(itself, 0)
        with torch.autocast(z.device.type, enabled=False):
            logits = anchors @ z.T / self.temperature
        of_all = logits.masked_fill(itself, -torch.inf).logsumexp(1, keepdim=True)
        count = positives.sum(1)
        has = count.abs() >= 1e-6
        means = (positives * (of_all - logits)).sum(1) / torch.where(has, count, 1)
        loss = means.mean() * (self.temperature / self.base_temperature)
        facts = loss.detach(), has.sum().to(z.dtype), (positives != 0).sum().to(z.dtype)
        return loss, torch.stack(facts), None


def _check_labels(labels: Any, features: Tensor) -> Tensor:
    check_dense(OP, "labels", labels)
    return check_labels(OP, "labels", labels.flatten(), ("features", features))


def _check_mask(mask: Any, features: Tensor) -> Tensor:
    check_dense(OP, "mask", mask)
    samples = len(features)
    if mask.shape != (samples, samples):
        raise UserError(f"{OP}: mask must have shape ({samples}, {samples}), got {tuple(mask.shape)}")
    if not mask.isfinite().all():
        raise UserError(f"{OP}: mask must be finite, got NaN or infinity")
    return mask.to(features.device)


def _labels(mask: Tensor, views: int) -> Tensor | None:
    """(B,) labels that are equal where the mask is 1, if there are such."""
    related = mask != 0
    if views == 1:
        # Of itself no row is a positive.
        related = related.clone().fill_diagonal_(True)
    labels = related.to(torch.uint8).argmax(1)
    same = labels[:, None] == labels
    whole = (mask == same) if views > 1 else (mask == same).fill_diagonal_(True)
    return labels if bool(whole.all()) else None
