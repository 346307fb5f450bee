"""Two augmented views of three modalities, draw and apply, against a plain copy and eager noise.

The least that has to be moved is one read and two writes of the batch. ``copy`` is PyTorch cloning every tensor
twice. Noise is also compared with ``x + sigma * torch.randn_like(x)`` for both views; to be fair per element, all
time steps are real there and the transform always fires.
"""

from __future__ import annotations

import pytest
import torch

from mmfast import GaussianNoise, SeqAug, TimeMask, TwoViews

BATCH, STEPS = 170, 50
FEATURES = {"text": 300, "audio": 74, "visual": 35}
ALPHA = {"text": 0.15, "audio": 0.10, "visual": 0.20}

# Chains of the thesis (tables 8.2.1 and 8.3.2) with its probabilities; the same for both views.
CHAINS = {
    "nothing": [],
    "seqaug": [SeqAug(ALPHA)],
    "masking": [TimeMask()],
    "seqaug+masking": [SeqAug(ALPHA), TimeMask()],
    "masking+seqaug": [TimeMask(), SeqAug(ALPHA)],
    "seqaug always": [SeqAug(ALPHA, p=1)],
    "masking always": [TimeMask(p=1)],
}
NOISE_CHAINS = {
    "noise": [GaussianNoise(p=1)],
    "noise+masking": [GaussianNoise(p=1), TimeMask()],
    "noise+seqaug": [GaussianNoise(p=1), SeqAug(ALPHA)],
    "noise+seqaug+masking": [GaussianNoise(p=1), SeqAug(ALPHA), TimeMask()],
}


@pytest.fixture
def batch():
    torch.manual_seed(0)
    return {name: torch.randn(BATCH, STEPS, f) for name, f in FEATURES.items()}


def nbytes(batch):
    """One read and two writes."""
    return 3 * sum(x.numel() * x.element_size() for x in batch.values())


def copies(batch):
    return [(x.clone(), x.clone()) for x in batch.values()]


def eager_noise(batch):
    return [(x + 0.1 * torch.randn_like(x), x + 0.1 * torch.randn_like(x)) for x in batch.values()]


@pytest.mark.parametrize("name", CHAINS)
def test_views(name, batch, race):
    # Word-aligned utterances: skewed lengths, mean about half of the longest.
    lengths = (torch.rand(BATCH) ** 1.2 * STEPS).long().clamp(min=1)
    views = TwoViews(CHAINS[name])
    race(lambda: views(batch, lengths), {"copy": lambda: copies(batch)}, nbytes(batch))


@pytest.mark.parametrize("name", NOISE_CHAINS)
def test_noisy_views(name, batch, race):
    views = TwoViews(NOISE_CHAINS[name])
    race(
        lambda: views(batch),
        {"eager noise": lambda: eager_noise(batch), "copy": lambda: copies(batch)},
        nbytes(batch),
    )


def test_draw_alone(batch, race):
    """What the decisions of SeqAug and masking cost without applying them."""
    views = TwoViews(CHAINS["seqaug+masking"])
    race(lambda: views.draw(batch), {"copy": lambda: copies(batch)}, nbytes(batch))
