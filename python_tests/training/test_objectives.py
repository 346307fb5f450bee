"""Each objective, and each option of a stage, comes to what a plain loop in PyTorch comes to."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmfast.data import synthetic
from mmfast.errors import UserError
from mmfast.losses import contrastive
from mmfast.training import runs
from mmfast.training.augmentation import make_views
from mmfast.training.components import make_module
from mmfast.training.config import Config, LossConfig, StageSettings
from mmfast.training.fitting import LAST, fit
from mmfast.training.module import RAW
from mmfast.training.objectives import OBJECTIVES, auxiliary, losses
from mmfast.training.objectives.losses import make_loss
from mmfast.training.optimisers import Average, Schedule
from mmfast.training.seeds import derive
from mmfast.training.splits import make_splits
from mmfast.training.stages import Stage

FEATURES = {"text": 5, "audio": 4, "visual": 3}


def settings(**own) -> Config:
    config = Config()
    config.model.hidden, config.model.dropout, config.model.projector = 6, 0.0, [7, 5]
    config.run.accelerator, config.run.tensorboard = "cpu", False
    for section in (config.pretraining, config.supervised):
        section.epochs, section.batch_size = 1, 12
        for name, value in own.items():
            setattr(section, name, value)
    return config


def stage_of(config: Config, objectives: dict[str, float]) -> Stage:
    labels = any(OBJECTIVES[name].labels for name in objectives)
    section = config.supervised if labels else config.pretraining
    return Stage("a", objectives, section, "a")


def prepared(config: Config, objectives: dict[str, float], task: str = "regression"):
    """The module, and batches of three steps."""
    data = synthetic(54, max_length=5, features=FEATURES, missing=0.2, corrupt=0.0, task=task)
    splits = make_splits(data, config.data, 0)
    made = runs.prepare(config, stage_of(config, objectives), splits)
    assert len(made.train) >= 3
    return made


def barlow_twins(a: Tensor, b: Tensor, lambd: float = 5e-3) -> Tensor:
    a, b = ((z - z.mean(0)) / (z.var(0, unbiased=False) + 1e-5).sqrt() for z in (a, b))
    c = a.T @ b / len(a)
    on = (c.diagonal() - 1).square().sum()
    return on + lambd * (c.square().sum() - c.diagonal().square().sum())


def supervised(net, batch, step):
    out = net.head(net.encoder(batch.values, batch.lengths, batch.padding)).reshape(-1)
    return (out - batch.labels).abs().mean()


def views(net, batch, step, loss=barlow_twins):
    seed = derive(0, "views of a", step)
    both = make_views(Config().augmentation, tuple(FEATURES)).train()(
        batch.values, batch.lengths, ids=batch.ids, seed=seed, padding=batch.padding
    )
    return loss(*(net.projector(net.encoder(view, batch.lengths, batch.padding)) for view in both))


def modalities(net, batch, step):
    steps = net.encoder.encode(batch.values, batch.lengths, batch.padding)
    present, z = {}, {}
    for name, (values, lengths) in steps.items():
        real = torch.arange(values.shape[1]) < lengths[:, None]
        mean = (values * real[..., None]).sum(1) / lengths.clamp(min=1)[:, None]
        present[name] = lengths > 0
        z[name] = mean.new_zeros(len(mean), 5)
        z[name][present[name]] = net.view_projectors["6"](mean[present[name]])
    loss, names = 0.0, list(z)
    for i, a in enumerate(names):
        for b in names[i + 1 :]:
            # Statistics of a view are those of the samples that have it, C is the mean over those that have both.
            both = present[a] & present[b]
            scaled = []
            for name in (a, b):
                own = z[name][present[name]]
                spread = (own.var(0, unbiased=False) + 1e-5).sqrt()
                scaled.append(((z[name] - own.mean(0)) / spread)[both])
            c = scaled[0].T @ scaled[1] / both.sum()
            off = c.square().sum() - c.diagonal().square().sum()
            loss = loss + (c.diagonal() - 1).square().sum() + 5e-3 * off
    return loss


LOOPS = {
    "supervised": ({"supervised": 1.0}, supervised),
    "two views": ({"two_views": 1.0}, views),
    "many views": ({"many_views": 1.0}, modalities),
    "weighted sum": (
        {"supervised": 1.0, "two_views": 0.3, "many_views": 0.1},
        lambda *a: supervised(*a) + 0.3 * views(*a) + 0.1 * modalities(*a),
    ),
}


def trained(config: Config, objectives: dict[str, float], folder, task: str = "regression"):
    """The network before and after an epoch, and its batches in order."""
    made = prepared(config, objectives, task)
    before = copy.deepcopy(made.module)
    batches = [batch for batch in made.train]
    fit(made.module, made.train, made.valid, folder, config.run, 1)
    return before, made.module, batches


def assert_near(ours: nn.Module, theirs: nn.Module, atol: float = 4e-4) -> None:
    # Adam divides by gradients, also by small ones that are rounding: in a few places that makes a part of a step of
    # 1e-3.
    state = theirs.state_dict()
    for name, tensor in ours.state_dict().items():
        torch.testing.assert_close(
            tensor, state[name], rtol=1e-4, atol=atol, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("case", LOOPS)
def test_an_objective_is_a_plain_loop(case, tmp_path):
    objectives, loss = LOOPS[case]
    plain, module, batches = trained(settings(lr=1e-3), objectives, tmp_path)
    optimiser = torch.optim.Adam(plain.train().parameters(), lr=1e-3)
    for step, batch in enumerate(batches):
        optimiser.zero_grad()
        loss(plain, batch, step).backward()
        optimiser.step()
    assert_near(module, plain)


def nt_xent(a: Tensor, b: Tensor) -> Tensor:
    z = F.normalize(torch.cat((a, b)))
    similarity = (z @ z.T / 0.5).fill_diagonal_(-math.inf)
    return F.cross_entropy(similarity, torch.arange(2 * len(a)).roll(len(a)))


class NTXent(nn.Module):
    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return nt_xent(a, b)


def test_a_loss_of_two_views_is_one_row_of_the_table(tmp_path, monkeypatch):
    monkeypatch.setattr(contrastive, "Plain", NTXent, raising=False)
    monkeypatch.setitem(losses.LOSSES, "plain", losses.Loss("contrastive.Plain"))
    config = settings(lr=1e-3)
    config.loss.name = "plain"
    plain, module, batches = trained(config, {"two_views": 1.0}, tmp_path)
    optimiser = torch.optim.Adam(plain.train().parameters(), lr=1e-3)
    for step, batch in enumerate(batches):
        optimiser.zero_grad()
        views(plain, batch, step, nt_xent).backward()
        optimiser.step()
    assert_near(module, plain)
    assert module.logs == ("train_loss", "valid_effective_rank")


def one_way(a: Tensor, b: Tensor, scale: Tensor | float) -> Tensor:
    return F.cross_entropy(F.normalize(a) @ F.normalize(b).T * scale, torch.arange(len(a)))


def siglip(net, a: Tensor, b: Tensor, labels: Tensor) -> Tensor:
    scores = F.normalize(a) @ F.normalize(b).T * net.loss.log_scale.exp() + net.loss.bias
    return -F.logsigmoid(scores * (2 * torch.eye(len(a)) - 1)).sum() / len(a)


def clip(net, a: Tensor, b: Tensor, labels: Tensor) -> Tensor:
    scale = net.loss.log_scale.exp()
    return (one_way(a, b, scale) + one_way(b, a, scale)) / 2


def of_classes(a: Tensor, b: Tensor, labels: Tensor, rows) -> Tensor:
    z = F.normalize(torch.cat((a, b)))
    labels = torch.cat((labels, labels))
    own = torch.eye(len(z), dtype=torch.bool)
    same = (labels == labels[:, None]) & ~own
    scores = z @ z.T / 0.1
    return rows(scores, same, own)


def sup_con(net, a: Tensor, b: Tensor, labels: Tensor) -> Tensor:
    def rows(scores, same, own):
        log = scores - scores.masked_fill(own, -math.inf).logsumexp(1, keepdim=True)
        return -((log * same).sum(1) / same.sum(1)).mean()

    return of_classes(a, b, labels, rows)


def ser(net, a: Tensor, b: Tensor, labels: Tensor) -> Tensor:
    def rows(scores, same, own):
        negatives = scores.masked_fill(same | own, -math.inf).logsumexp(1, keepdim=True)
        log = scores - torch.logaddexp(scores, negatives.expand_as(scores))
        return -((log * same).sum(1) / same.sum(1)).mean()

    return of_classes(a, b, labels, rows)


def smooth_triplet(net, a: Tensor, b: Tensor, labels: Tensor) -> Tensor:
    def rows(scores, same, own):
        x = (scores[:, None, :] - scores[:, :, None]) / 5  # (i, p, n): of cosines over 0.5
        return F.softplus(x[same[:, :, None] & ~(same | own)[:, None, :]]).mean()

    return of_classes(a, b, labels, rows)


def vicreg(net, a: Tensor, b: Tensor, labels: Tensor) -> Tensor:
    loss = 25 * F.mse_loss(a, b)
    for z in (a, b):
        loss = loss + 25 * (1 - (z.var(0) + 1e-4).sqrt()).relu().mean() / 2
        c = z.T.cov()
        loss = loss + (c.square().sum() - c.diagonal().square().sum()) / z.shape[1]
    return loss


# The settings of a loss, and the same as formulas of the network, embeddings and labels.
NAMED = {
    "vicreg": (LossConfig("vicreg"), vicreg),
    "nt_xent": (LossConfig("nt_xent"), lambda net, a, b, labels: nt_xent(a, b)),
    "info_nce": (
        LossConfig("info_nce", options={"temperature": "2e-1"}),
        lambda net, a, b, labels: one_way(a, b, 5.0),
    ),
    "clip": (LossConfig("clip", options={"learnable": True}), clip),
    "siglip": (LossConfig("siglip"), siglip),
    "sup_con": (LossConfig("sup_con"), sup_con),
    "smooth_triplet": (LossConfig("smooth_triplet"), smooth_triplet),
    "ser": (LossConfig("nt_xent", options={"variant": "ser", "temperature": 0.1}, labels=True), ser),
}


@pytest.mark.parametrize("name", NAMED)
def test_a_named_loss_is_a_plain_loop(name, tmp_path):
    config = settings(lr=1e-3)
    config.loss, loss = NAMED[name]
    plain, module, batches = trained(config, {"two_views": 1.0}, tmp_path, "classification")
    optimiser = torch.optim.Adam(plain.train().parameters(), lr=1e-3)
    for step, batch in enumerate(batches):
        optimiser.zero_grad()
        views(plain, batch, step, lambda a, b, of=batch: loss(plain, a, b, of.labels)).backward()
        optimiser.step()
    # Gradients up to 20 leave rounding of 6e-6 in those that are 0 but for it.
    assert_near(module, plain, 1e-3 if name == "vicreg" else 4e-4)
    learnt = dict(module.loss.named_parameters())
    assert set(learnt) == {"clip": {"log_scale"}, "siglip": {"log_scale", "bias"}}.get(name, set())
    assert all(not torch.equal(p, make_loss(config.loss).get_parameter(n)) for n, p in learnt.items())
    if name == "vicreg":
        assert module.logs[1:-1] == ("train_invariance", "train_variance", "train_covariance")
        return
    several = {
        "smooth_triplet": ("train_easy", "train_semihard", "train_hard"),
        **dict.fromkeys(("nt_xent", "sup_con", "ser"), ("train_positives",)),
    }.get(name, ())
    assert module.logs == ("train_loss", "train_mean_cosine", *several, "valid_effective_rank")


@pytest.mark.parametrize("name", NAMED)
def test_gradients_of_a_named_loss_are_those_of_its_formula(name):
    config = settings()
    config.loss, loss = NAMED[name]
    made = prepared(config, {"two_views": 1.0}, "classification")
    module = made.module.double().train()
    batch = next(iter(made.train))
    batch = replace(batch, values={modality: x.double() for modality, x in batch.values.items()})
    found = []
    for function in (loss, lambda net, a, b, labels: net.objectives["two_views"]._loss(a, b, labels)):
        module.zero_grad()
        views(module, batch, 0, lambda a, b, of=function: of(module, a, b, batch.labels)).backward()
        found.append([p.grad for p in module.parameters() if p.grad is not None])
    torch.testing.assert_close(found[1], found[0], rtol=1e-7, atol=1e-11)


def test_a_loss_that_is_not_there_or_does_not_take_its_options_is_refused():
    config = settings()
    config.loss.options = {"variannt": "thesis"}
    with pytest.raises(UserError, match=r"loss\.options must fit the loss barlow_twins: .*variannt"):
        make_module(config, FEATURES, stage_of(config, {"two_views": 1.0}))
    config.loss.name = "barlow_twin"
    with pytest.raises(
        UserError, match=r"loss\.name must be one of barlow_twins, .*did you mean barlow_twins"
    ):
        make_module(config, FEATURES, stage_of(config, {"two_views": 1.0}))


def test_terms_of_the_encoder_are_added_with_their_weight(tmp_path, monkeypatch):
    def terms(self, representations):
        return {"square": sum(r.values.square().mean() for r in representations.values())}

    config = settings(lr=1e-3)
    kind = type(make_module(config, FEATURES, stage_of(config, {"two_views": 1.0})).encoder)
    monkeypatch.setattr(kind, "auxiliary", terms)
    assert auxiliary.Auxiliary.of(config, stage_of(config, {"auxiliary": 1.0}), kind(FEATURES), None)
    plain, module, batches = trained(config, {"supervised": 1.0, "auxiliary": 0.5}, tmp_path)
    optimiser = torch.optim.Adam(plain.train().parameters(), lr=1e-3)
    for step, batch in enumerate(batches):
        optimiser.zero_grad()
        steps = plain.encoder.encode(batch.values, batch.lengths, batch.padding)
        (supervised(plain, batch, step) + 0.5 * terms(plain.encoder, steps)["square"]).backward()
        optimiser.step()
    assert_near(module, plain)


def test_options_of_a_stage_are_a_plain_loop(tmp_path):
    """AdamW, weight decay, clipping, a warm-up of two steps, then half a cosine, and an average of the weights."""
    own = {"optimiser": "adamw", "weight_decay": 0.1, "clip": 0.05, "warmup_steps": 2, "schedule": "cosine"}
    plain, _, batches = trained(settings(lr=1e-2, ema=0.5, **own), {"two_views": 1.0}, tmp_path)
    optimiser = torch.optim.AdamW(plain.train().parameters(), lr=1e-2, weight_decay=0.1)
    rates = [1e-2 / 2, 1e-2] + [
        1e-2 * (1 + math.cos(math.pi * i / (len(batches) - 2))) / 2 for i in range(len(batches) - 2)
    ]
    average = None
    for step, (batch, rate) in enumerate(zip(batches, rates, strict=True)):
        optimiser.param_groups[0]["lr"] = rate
        optimiser.zero_grad()
        views(plain, batch, step).backward()
        assert torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.05) > 0.05
        optimiser.step()
        now = {name: p.detach().clone() for name, p in plain.named_parameters()}
        decay = min(0.5, (1 + step) / (10 + step))
        average = now if average is None else {n: decay * average[n] + (1 - decay) * now[n] for n in now}
    saved = torch.load(tmp_path / LAST, weights_only=True)
    for name, tensor in plain.named_parameters():
        torch.testing.assert_close(saved[RAW][name], tensor, rtol=1e-4, atol=2e-5)
        torch.testing.assert_close(saved["state_dict"][name], average[name], rtol=1e-4, atol=2e-5)
    assert not torch.equal(saved[RAW]["projector.0.weight"], saved["state_dict"]["projector.0.weight"])


def test_fused_steps_are_those_of_the_loop_but_for_rounding(tmp_path):
    objectives = {"supervised": 1.0}
    _, loop, _ = trained(settings(lr=1e-3), objectives, tmp_path / "loop")
    _, fused, _ = trained(settings(lr=1e-3, fused=True), objectives, tmp_path / "fused")
    assert_near(fused, loop)
    assert (
        fused.configure_optimizers().defaults["fused"] and not loop.configure_optimizers().defaults["fused"]
    )


@pytest.mark.parametrize("better", ["lower", "higher"])
def test_a_plateau_is_pytorchs(better):
    generator = torch.Generator().manual_seed(0)
    settings = StageSettings(schedule="plateau", better=better, plateau_patience=1, plateau_factor=0.3)
    ours = Schedule(settings, 1e-2)
    weight = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1e-2)
    theirs = torch.optim.lr_scheduler.ReduceLROnPlateau(
        weight, {"lower": "min", "higher": "max"}[better], factor=0.3, patience=1
    )
    for _ in range(60):
        value = torch.rand(1, generator=generator).item()
        ours.epoch_ends(value)
        theirs.step(value)
        again = Schedule(settings, 1.0)
        again.load_state_dict(ours.state_dict())
        assert ours.rate(0, 1) == again.rate(0, 1) == weight.param_groups[0]["lr"]
    assert weight.param_groups[0]["lr"] < 1e-7


def test_an_average_is_exchanged_and_taken_back():
    layer, average = nn.Linear(2, 2), Average(0.9)
    average.update(layer, 0)
    first = layer.weight.detach().clone()
    with torch.no_grad():
        layer.weight += 1
    average.update(layer, 1)
    latest = layer.weight.detach().clone()
    average.exchange(layer)
    torch.testing.assert_close(layer.weight, first + 9 / 11)
    average.exchange(layer)
    assert torch.equal(layer.weight, latest)


def test_the_monitor_may_be_better_when_it_is_higher(tmp_path):
    config = settings(monitor="valid_effective_rank", better="higher")
    config.pretraining = replace(config.pretraining, epochs=4, patience=1, lr=1e-2)
    data = synthetic(120, max_length=5, features=FEATURES)
    stage, splits = stage_of(config, {"two_views": 1.0}), make_splits(data, config.data, 0)
    made = runs.prepare(config, stage, splits)
    history = fit(
        made.module, made.train, made.valid, tmp_path, config.run, 4, "valid_effective_rank", "higher", 1
    )
    ranks = [epoch["valid_effective_rank"] for epoch in history]
    best = torch.load(tmp_path / "best.ckpt", weights_only=True)["epoch"]
    assert best == ranks.index(max(ranks))
    assert len(ranks) == min(4, best + 2)


def test_a_monitor_needs_validation_samples():
    config = settings(monitor="valid_effective_rank", better="higher")
    data = synthetic(54, max_length=5, features=FEATURES)
    splits = make_splits(replace(data, valid=data.valid.subset([0])), config.data, 0)
    with pytest.raises(
        UserError, match="at least 2 validation samples for the monitor valid_effective_rank, got 1"
    ):
        runs.prepare(config, stage_of(config, {"two_views": 1.0}), splits)
