"""Training with the Barlow Twins loss goes as with its definition."""

import pytest
import torch
from torch import nn

import mmfast
from mmfast.data import collate, synthetic
from mmfast.models import M3Encoder, Projector
from mmfast.ops.barlow_twins import op as ops


def pretrain(loss, steps=30):
    """Losses of a short multimodal pre-training with everything that is random fixed."""
    torch.manual_seed(5)
    features = {"text": 12, "audio": 8, "visual": 6}
    data = synthetic(64, max_length=8, missing=0.1, corrupt=0.0, features=features).train
    encoder = M3Encoder(features, hidden=8, dropout=0.1)
    model = nn.ModuleList([encoder, Projector(encoder.out_features, [32, 48])])
    augment = mmfast.TwoViews(
        [mmfast.GaussianNoise(0.1, p=0.9), mmfast.SeqAug(0.2)], [mmfast.TimeMask(0.3, p=0.6)]
    )
    optimiser = torch.optim.Adam(model.parameters(), 3e-3)
    curve = []
    for step in range(steps):
        batch = collate([data[(step * 24 + i) % len(data)] for i in range(24)])
        both = augment(batch.values, batch.lengths, ids=batch.ids, seed=step, padding=batch.padding)
        value = loss(*(model[1](model[0](view, batch.lengths, batch.padding)) for view in both))
        optimiser.zero_grad()
        value.backward()
        optimiser.step()
        curve.append(float(value.detach()))
    return curve


def test_multimodal_pretraining_follows_the_reference():
    ours, reference = (
        pretrain(mmfast.BarlowTwinsLoss(lambd=0.02)),
        pretrain(lambda a, b: ops.reference(a, b, lambd=0.02)),
    )
    assert ours[-1] < 0.8 * ours[0]
    assert ours[:3] == pytest.approx(reference[:3], rel=1e-5)
    # Adam magnifies rounding differences from step to step.
    assert ours == pytest.approx(reference, rel=1e-2)
