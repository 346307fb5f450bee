"""The loss and the augmentation as parts of a whole pre-training step: where they matter, and where not.

Two forward passes, backward, Adam, on synthetic data, as :mod:`mmfast.training` does it.
The same step with lightly's loss takes turns with ours.
"""

from __future__ import annotations

import itertools
import statistics

import pytest
import torch
from peers import eager_peers, step
from races import time_of

from mmfast.functional import barlow_twins
from mmfast.models import Projector

pytest.importorskip("lightning", reason="steps of training need mmfast[train]")

from mmfast.data import make_loader
from mmfast.training.components import make_module
from mmfast.training.config import Config, ModelConfig
from mmfast.training.splits import load_data, make_splits
from mmfast.training.stages import pretraining_stage

# Rounds, and seconds that they may take beyond the fewest.
ROUNDS, BUDGET = (3, 9), 10.0
BATCH = 170
WIDE = [1000, 1000, 8192]
MODELS = {
    "default model": ModelConfig(),
    "default encoder, wide projector": ModelConfig(projector=WIDE),
    "small encoder": ModelConfig(hidden=16, attention=False),
    "small encoder, wide projector": ModelConfig(hidden=16, attention=False, projector=WIDE),
}
# Width of the precomputed vectors; only the projector is trained.
FUSED = 400
PROJECTORS = {
    "precomputed vectors": [1000, 1000, 1000],
    "precomputed vectors, wide projector": WIDE,
}
TINY = {"tiny": ModelConfig(hidden=8, attention=False, projector=[32, 32])}


class Step:
    """A step of one configuration: ``views(batch)``, then ``embed(view, batch)`` of both, on one batch at a time."""

    def __init__(self, batches, views, embed, parameters):
        self.views, self.embed = views, embed
        self.batches = itertools.cycle(batches)
        self.optimizer = torch.optim.Adam(parameters, lr=1e-3)
        self.advance()

    def advance(self) -> None:
        """To the next batch, which is of other lengths."""
        self.batch = next(self.batches)

    def augment(self):
        return self.views(self.batch)

    def embeddings(self):
        return [self.embed(view, self.batch) for view in self.augment()]

    def __call__(self, loss):
        self.optimizer.zero_grad()
        loss(*self.embeddings()).backward()
        self.optimizer.step()


def of_model(model: ModelConfig, batch_size: int = BATCH, samples: int = 2000) -> Step:
    config = Config(model=model)
    config.data.synthetic.samples = samples
    splits = make_splits(load_data(config.data), config.data, config.run.seed)
    module = make_module(config, splits.features, pretraining_stage(config)).train()
    augment = module.objectives["two_views"].augment
    return Step(
        list(make_loader(splits.inputs, batch_size, shuffle=True, drop_last=True, seed=0)),
        lambda batch: augment(batch.values, batch.lengths, ids=batch.ids, padding=batch.padding),
        lambda view, batch: module.projector(module.encoder(view, batch.lengths, batch.padding)),
        module.parameters(),
    )


def of_projector(widths: list[int]) -> Step:
    vectors = torch.randn(2, BATCH, FUSED)
    projector = Projector(FUSED, widths)
    return Step([vectors], torch.unbind, lambda view, _: projector(view), projector.parameters())


def measure(whole: Step) -> dict:
    """Medians of seconds, all in the same rounds; the losses alone are timed on this step's embeddings."""
    losses = {"mmfast": barlow_twins, "lightly": eager_peers()["lightly"].loss}
    z = [x.detach().requires_grad_() for x in whole.embeddings()]
    calls = {"views": whole.augment}
    for name, loss in losses.items():
        calls[f"step, {name}"] = lambda loss=loss: whole(loss)
        calls[f"loss, {name}"] = step(loss, *z)
    # The first round warms up, and says how long one takes.
    seconds = sum(time_of(call) for call in calls.values())
    rounds = min(max(int(BUDGET / seconds), ROUNDS[0]), ROUNDS[1])
    times = {name: [] for name in calls}
    for _ in range(rounds):
        whole.advance()
        for name, call in calls.items():
            times[name].append(time_of(call))
    medians = {name: statistics.median(values) for name, values in times.items()}
    return {
        "medians": medians,
        "quartiles": {name: statistics.quantiles(values) for name, values in times.items()},
        "rounds": rounds,
        "rows": len(z[0]),
        "columns": z[0].shape[1],
        "share_of_loss": {name: medians[f"loss, {name}"] / medians[f"step, {name}"] for name in losses},
        "share_of_views": medians["views"] / medians["step, mmfast"],
        # The median of ratios: both steps of a round meet the same moment of the machine.
        "ratio": statistics.median(
            b / a for a, b in zip(times["step, mmfast"], times["step, lightly"], strict=True)
        ),
    }


@pytest.mark.parametrize("name", [*MODELS, *PROJECTORS, *TINY])
def test_share_of_step(name, benchmark, smoke):
    if smoke != (name in TINY):
        pytest.skip("tiny is the smoke run's")
    torch.manual_seed(0)
    if name in PROJECTORS:
        whole = of_projector(PROJECTORS[name])
    else:
        whole = of_model(MODELS[name]) if name in MODELS else of_model(TINY[name], batch_size=8, samples=40)
    benchmark.extra_info.update(kind="step", configuration=name, **measure(whole))
    benchmark.pedantic(whole, (barlow_twins,), rounds=1, iterations=1)
