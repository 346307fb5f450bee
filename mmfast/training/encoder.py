"""The encoder of a configuration: built, tried on two samples, and asked whether it takes the data."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import count
from typing import Any

import torch
from torch import Tensor

from mmfast.data import MultimodalDataset
from mmfast.models import Encoder
from mmfast.training.memory import check_weights, untouched, zeros
from mmfast.training.model_section import blamed, encoder_class, own_settings, refusal
from mmfast.training.splits import check_aligned

# Lengths of the two samples that an encoder is tried on: longer than the kernels of convolutions over time, or else
# shorter than tables of positions. What the data's own lengths do is tried with the memory that they take.
TRIED = ((64, 40), (8, 5))


def make_encoder(config: Any, features: dict[str, int]) -> Encoder:
    """The encoder of a ``model`` section for these modalities.

    Raises:
        UserError: a class that :func:`~mmfast.training.model_section.encoder_class` refuses; one that cannot be
            built by these arguments, exceeds the memory, or does not give ``out_features`` numbers a sample.
    """
    kind, own = encoder_class(config.encoder), own_settings(config)
    # What the size is told by: the width of M3, all that is said of another class.
    size = "hidden" if "hidden" in own else "encoder"
    check_weights(f"model.{size}", getattr(config, size), lambda: kind(features=features, **own))
    with blamed(config.encoder, kind.__module__, "that can be built by its arguments"):
        encoder = kind(features=features, **own)
    _try(encoder, config.encoder)
    return encoder


def check_takes(encoder: Encoder | type[Encoder], *datasets: MultimodalDataset) -> None:
    """Refuse samples whose modalities differ in length, if the encoder needs them aligned."""
    if encoder.aligned:
        for dataset in datasets:
            check_aligned(dataset)


def vector_sizes(encoder: Encoder) -> dict[str, int]:
    """Modality -> H of the vectors (B, H) that ``encoder.vectors`` makes of it.

    Raises:
        UserError: it makes none, or others.
    """
    kind = type(encoder)
    rule = "with vectors for each modality"
    with untouched(encoder), torch.no_grad(), blamed(kind.__qualname__, kind.__module__, rule):
        vectors = encoder.vectors(_encoded(encoder))
    for name in encoder.features:
        x = vectors.get(name) if isinstance(vectors, Mapping) else vectors
        if not isinstance(x, Tensor) or x.dim() != 2 or len(x) != 2:
            raise refusal(
                "a class whose vectors returns (B, H) for each modality, here (2, H)",
                kind.__qualname__,
                f": {_told(x)} for {name}",
            )
    return {name: vectors[name].shape[1] for name in encoder.features}


def _encoded(encoder: Encoder) -> Any:
    """Two samples of zeros, of modalities that differ in length where they may: a class may say more than is true.

    What the first of ``TRIED`` raises is raised if all of them do.
    """
    first = None
    for tried in TRIED:
        apart = count(step=0 if encoder.aligned else 1)
        lengths = {
            m: [max(n - shorter, 1) for n in tried]
            for m, shorter in zip(encoder.features, apart, strict=False)
        }
        try:
            return encoder.encode(*zeros(encoder, lengths))
        except Exception as error:  # a user's class may raise anything
            first = first or error
    raise first


def _try(encoder: Encoder, name: str) -> None:
    out = getattr(encoder, "out_features", None)
    if type(out) is not int or out < 1:
        raise refusal("a class that sets out_features to a positive integer", name, f": {out}")
    apart = "" if encoder.aligned else " whose modalities differ in length"
    rule = f"that encodes two samples in training{apart}"
    with untouched(encoder), torch.no_grad(), blamed(name, type(encoder).__module__, rule):
        representations = _encoded(encoder.train())
        fused = encoder.fuse(representations)
    if not isinstance(representations, Mapping) or set(representations) != set(encoder.features):
        raise refusal(
            "a class whose encode returns a dict of its modalities", name, f": {_told(representations)}"
        )
    if not isinstance(fused, Tensor) or fused.shape != (2, out) or not fused.is_floating_point():
        raise refusal(
            f"a class whose fuse returns (B, out_features), here (2, {out})", name, f": {_told(fused)}"
        )


def _told(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} of the shape {tuple(value.shape)}"
    return f"{', '.join(map(str, value)) or 'none'}" if isinstance(value, Mapping) else type(value).__name__
