"""What every encoder promises, over a table of them: published ones, and one such as a user would write."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mmfast.errors import UserError
from mmfast.models import Encoder, M3Encoder, Steps

FEATURES = {"text": 5, "audio": 4, "visual": 3}


class Means(Encoder):
    """Means over time of one layer a modality, concatenated; modalities need not be aligned."""

    def __init__(self, features: dict[str, int], width: int = 4):
        super().__init__(features)
        self.layers = nn.ModuleDict({name: nn.Linear(size, width) for name, size in features.items()})
        self.out_features = width * len(features)

    def encode(self, values, lengths, padding="back"):
        steps = self.steps(values, lengths, padding)
        return {name: Steps(self.layers[name](x).tanh(), n) for name, (x, n) in steps.items()}

    def fuse(self, representations, without=()):
        return torch.cat([*self.vectors(self.leave_out(representations, without)).values()], dim=1)


ENCODERS = {
    "M3": (M3Encoder, {"hidden": 6, "dropout": 0.0}),
    "M3 of two directions": (M3Encoder, {"hidden": 6, "dropout": 0.0, "bidirectional": True}),
    "M3 of last steps": (M3Encoder, {"hidden": 6, "dropout": 0.0, "pooling": "last", "attention": False}),
    "user's": (Means, {}),
}
CLOSE = {"rtol": 1e-10, "atol": 1e-12}


def make(name: str, features=FEATURES) -> Encoder:
    torch.manual_seed(0)
    kind, options = ENCODERS[name]
    return kind(features, **options).double()


def batch(encoder: Encoder, without: tuple[str, ...] = ()):
    """Four samples, the last of which lacks text, and whole modalities ``without``."""
    generator = torch.Generator().manual_seed(1)
    lengths = {m: torch.tensor([6, 1, 4, 0 if m == "text" else 3]) for m in FEATURES}
    if not encoder.aligned:
        lengths["audio"] = torch.tensor([2, 7, 1, 5])
    values = {m: torch.randn(4, 7, f, generator=generator, dtype=torch.float64) for m, f in FEATURES.items()}
    return values, {m: n * 0 if m in without else n for m, n in lengths.items()}


@pytest.mark.parametrize("name", ENCODERS)
@pytest.mark.parametrize("without", [(), ("text",), ("audio", "visual")])
def test_a_modality_left_out_is_a_missing_one(name, without):
    encoder = make(name)
    representations = encoder.encode(*batch(encoder))
    left_out = encoder.fuse(representations, without)
    torch.testing.assert_close(left_out, encoder(*batch(encoder, without)), **CLOSE)
    assert torch.equal(left_out, encoder(*batch(encoder))) == (not without)
    left_out.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in encoder.parameters())
    for wrong, error in (("text", TypeError), (("video",), UserError)):
        with pytest.raises(error, match="without must be"):
            encoder.fuse(representations, wrong)


@pytest.mark.parametrize("name", ENCODERS)
def test_vectors_are_means_over_real_steps_and_zero_where_there_are_none(name):
    encoder = make(name)
    values, lengths = batch(encoder)
    representations = encoder.encode(values, lengths)
    for modality, vectors in encoder.vectors(representations).items():
        for b, n in enumerate(lengths[modality].tolist()):
            x = representations[modality].values[b, :n]
            torch.testing.assert_close(vectors[b], x.mean(0) if n else x.new_zeros(x.shape[1]), **CLOSE)
    assert encoder.auxiliary(representations) == {}


def test_only_encoders_that_need_aligned_modalities_refuse_others():
    values, lengths = batch(make("user's"))
    assert make("user's")(values, lengths).shape == (4, 12)
    with pytest.raises(UserError, match=r"one length for all its modalities .* for sample 0; align"):
        make("M3")(values, lengths)


def test_a_number_of_modalities_that_does_not_fit_is_refused():
    class Pair(Means):
        modalities = (2, 2)

    assert Pair({"text": 5, "audio": 4}).out_features == 8
    for features in (FEATURES, {"text": 5}):
        with pytest.raises(UserError, match="Pair: features must name 2 modalities, got text"):
            Pair(features)
