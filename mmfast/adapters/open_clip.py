"""``from open_clip.loss import ClipLoss, SigLipLoss`` becomes ``from mmfast.adapters.open_clip import ...``."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import logsigmoid

from mmfast.checks import check_bool, check_integer
from mmfast.errors import UserError
from mmfast.losses.pairs import evaluate_pairs
from mmfast.losses.similarity import Found, SimilarityLoss, nothing
from mmfast.ops.similarity.checks import check_rows, check_scalar, refuse_not_finite
from mmfast.ops.similarity.statistics import Compared

CLIP, SIGLIP = "open_clip.ClipLoss", "open_clip.SigLipLoss"
EXCHANGES = ("bidir", "shift", "reduce", "gather")


class _Paired(SimilarityLoss):
    """What both have: processes and features, which open_clip's models normalise."""

    _op: str

    def _take_processes(self, cache_labels: bool, rank: int, world_size: int) -> None:
        check_bool(self._op, "cache_labels", cache_labels)
        world_size = check_integer(self._op, "world_size", world_size, 1)
        rank = check_integer(self._op, "rank", rank, 0, world_size - 1)
        self._take(rank=rank, world_size=world_size)

    def _check(self, image: Any, text: Any) -> None:
        rows = "image_features", check_rows(self._op, "image_features", image)
        text = check_rows(self._op, "text_features", text, rows)
        if len(text) != len(image):
            raise UserError(
                f"{self._op}: text_features must have the {len(image)} rows of image_features, "
                f"got {tuple(text.shape)}"
            )
        if self.world_size > 1:
            running = dist.is_available() and dist.is_initialized()
            size = dist.get_world_size() if running else 1
            if size != self.world_size:
                raise UserError(
                    f"{self._op}: world_size must be the number of processes ({size}), got {self.world_size}"
                )

    def _scalar(self, name: str, x: Any, image: Tensor) -> Tensor:
        return check_scalar(self._op, name, x, ("image_features", image))

    def _alone(self, loss: Tensor, image: Tensor, text: Tensor) -> Found:
        """Of one row, which counts and has a positive."""
        refuse_not_finite(self._op, {"image_features": image, "text_features": text})
        place = torch.zeros(1, dtype=torch.int64, device=image.device)
        one = torch.ones_like(loss.detach())
        compared = Compared(image, text, (place, place), None, None, "dot", both=self._op == CLIP)
        return loss, torch.stack((loss.detach(), one, one)), compared

    def _found(self, loss: Tensor, output_dict: bool) -> Tensor | dict[str, Tensor]:
        return {"contrastive_loss": loss} if check_bool(self._op, "output_dict", output_dict) else loss


class ClipLoss(_Paired):
    """open_clip's CLIP loss: features are taken as they are, ``logit_scale`` as what they are multiplied by.

    With several processes the loss is that of all rows, on each process. ``local_loss`` and ``gather_with_grad`` say
    what DistributedDataParallel makes of the gradient of the features: (False, False), the default, gives it divided
    by the number of processes; with ``gather_with_grad`` it is the true one. ``cache_labels`` changes nothing.

    Raises:
        UserError: ``local_loss`` without ``gather_with_grad``, whose gradient lacks the candidates' part;
            ``use_horovod``; a ``world_size`` that is not the number of processes.
    """

    _op = CLIP

    def __init__(
        self,
        local_loss: bool = False,
        gather_with_grad: bool = False,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        use_horovod: bool = False,
    ):
        super().__init__()
        local_loss = check_bool(CLIP, "local_loss", local_loss)
        gather_with_grad = check_bool(CLIP, "gather_with_grad", gather_with_grad)
        if check_bool(CLIP, "use_horovod", use_horovod):
            raise UserError(f"{CLIP}: use_horovod must be False, got True")
        if local_loss and not gather_with_grad:
            raise UserError(
                f"{CLIP}: gather_with_grad must be True with local_loss "
                "(the gradient of the candidates would be missing), got False"
            )
        self._take(local_loss=local_loss, gather_with_grad=gather_with_grad)
        self._take_processes(cache_labels, rank, world_size)

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | float | None = None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """The loss of features (B, D), row i of one belongs to row i of the other."""
        self._check(image_features, text_features)
        scale = self._scalar("logit_scale", logit_scale, image_features)
        bias = None if logit_bias is None else self._scalar("logit_bias", logit_bias, image_features)
        if self.world_size == 1 and len(image_features) == 1:
            scalars = [scale] if bias is None else [scale, bias]
            found = self._alone(
                nothing(image_features, text_features, *scalars), image_features, text_features
            )
            return self._found(self._kept(found), output_dict)
        sharing = None, "true", None
        if self.world_size > 1:
            sharing = "global", "true" if self.gather_with_grad else "legacy", None
            if not self.gather_with_grad:
                # Only the features' gradient is divided.
                scale = _times(scale, self.world_size)
                bias = None if bias is None else _times(bias, self.world_size)
        options = {"scale": ("logit_scale", scale), "bias": bias, "normalise": False, "both_sides": True}
        options["views"] = {"image_features": image_features, "text_features": text_features}
        found = evaluate_pairs(CLIP, image_features, text_features, sharing=sharing, **options)
        return self._found(self._kept(found), output_dict)


def _times(x: Tensor, factor: int) -> Tensor:
    """x, whose gradient is multiplied."""
    return x.detach() + (x - x.detach()) * factor


class SigLipLoss(_Paired):
    """open_clip's SigLIP loss: the sum over all pairs, divided by the number of rows; features as they are.

    With several processes the loss is that of all rows, on each process, however ``dist_impl`` would exchange them.
    ``cache_labels`` and ``chunk_size`` change nothing: no scores of all pairs are kept.

    Raises:
        UserError: a ``world_size`` that is not the number of processes; a ``dist_impl`` that is none.
    """

    _op = SIGLIP

    def __init__(
        self,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        dist_impl: str | None = None,
        chunk_size: int = 0,
    ):
        super().__init__()
        dist_impl = dist_impl or "bidir"
        if dist_impl not in EXCHANGES:
            raise UserError(f"{SIGLIP}: dist_impl must be one of {', '.join(EXCHANGES)}, got {dist_impl!r}")
        check_integer(SIGLIP, "chunk_size", chunk_size, 0)
        self._take(dist_impl=dist_impl)
        self._take_processes(cache_labels, rank, world_size)

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | float | None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """The loss of features (B, D), row i of one belongs to row i of the other."""
        self._check(image_features, text_features)
        scale = self._scalar("logit_scale", logit_scale, image_features)
        bias = self._scalar("logit_bias", 0.0 if logit_bias is None else logit_bias, image_features)
        if self.world_size == 1 and len(image_features) == 1:
            products = image_features.to(scale.dtype) * text_features.to(scale.dtype)
            found = self._alone(-logsigmoid(products.sum() * scale + bias), image_features, text_features)
        else:
            sharing = "global" if self.world_size > 1 else None, "true", None
            options = {"scale": ("logit_scale", scale), "bias": bias, "normalise": False, "kind": "sigmoid"}
            options["views"] = {"image_features": image_features, "text_features": text_features}
            found = evaluate_pairs(SIGLIP, image_features, text_features, sharing=sharing, **options)
        return self._found(self._kept(found), output_dict)
