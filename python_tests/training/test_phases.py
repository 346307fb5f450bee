"""The two phases: what is logged, what is frozen, what counts, and that they learn."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
from training_help import TINY, assert_same, checkpoint, mmfast, train

from mmfast.data import MultimodalData, MultimodalDataset, Standardiser, collate, save, synthetic
from mmfast.errors import UserError
from mmfast.training.components import make_module
from mmfast.training.config import Config, StageSettings
from mmfast.training.data_config import DataConfig
from mmfast.training.divergence import Progress, check_finite
from mmfast.training.objectives.two_views import effective_rank
from mmfast.training.optimisers import Schedule
from mmfast.training.predictions import ONE_NUMBER, encode, predict, read_predictions, write_predictions
from mmfast.training.splits import make_splits, named_parts, select
from mmfast.training.stages import pretraining_stage, supervised_stage

FEATURES = {"text": 8, "audio": 6, "visual": 4}


def small(samples: int = 60, **options) -> MultimodalData:
    return synthetic(samples, max_length=6, features=FEATURES, **options)


def settings() -> Config:
    config = Config()
    config.model.hidden, config.model.projector = 8, [16, 16]
    return config


def make_supervised(config: Config, features: dict[str, int], freeze: bool = False):
    return make_module(config, features, supervised_stage(config, freeze), task=ONE_NUMBER)


def make_pretraining(config: Config, features: dict[str, int]):
    return make_module(config, features, pretraining_stage(config))


def batch_of(dataset: MultimodalDataset, count: int = 8):
    return collate([dataset[i] for i in range(count)])


def standardised(data: MultimodalData) -> MultimodalDataset:
    return Standardiser().fit(data.train).transform(data.train)


def result(folder) -> dict:
    return json.loads((folder / "result.json").read_text())


def test_pretraining_lowers_the_loss_and_logs_its_parts(tmp_path):
    train("pretrain", tmp_path, "--pretraining.epochs=12")
    history = result(tmp_path)["history"]
    assert len(history) == 12
    assert history[-1]["train_loss"] < 0.6 * history[0]["train_loss"]
    for epoch in history:
        whole = epoch["train_on_diagonal"] + 5e-3 * epoch["train_off_diagonal"]
        assert epoch["train_loss"] == pytest.approx(whole, rel=1e-4)
        assert -1 <= epoch["train_mean_diagonal"] <= 1
        assert 0 <= epoch["train_off_diagonal_rms"] <= 1
        assert 1 <= epoch["valid_effective_rank"] <= 8
        assert 0 <= epoch["valid_off_diagonal_rms"] <= 1


def test_supervised_training_beats_the_constant_on_synthetic_data(tmp_path):
    learnt = [
        "--data.synthetic.samples=1000",
        "--data.synthetic.labelled=1.0",
        "--data.synthetic.max_length=10",
        "--data.synthetic.features={text: 20, audio: 12, visual: 8}",
        "--model.hidden=16",
        "--supervised.batch_size=32",
        "--supervised.epochs=15",
        "--supervised.lr=3e-3",
        "--supervised.plateau_patience=2",
    ]
    assert mmfast("finetune", *TINY, *learnt, f"--run.folder={tmp_path}") == 0
    _, predictions, truths = read_predictions(tmp_path / "predictions.csv")
    mae = abs(predictions[:, 0] - truths).mean()
    constant = min(abs(truths - value).mean() for value in truths)
    assert mae < 0.95 * constant
    assert result(tmp_path)["metrics"]["corr"] > 0.3
    history = result(tmp_path)["history"]
    assert history[-1]["train_loss"] < 0.8 * history[0]["train_loss"]


def test_the_best_epoch_is_tested_not_the_last(tmp_path):
    folder = train("finetune", tmp_path, "--supervised.lr=0.1", "--supervised.epochs=8")
    outcome = result(folder)
    losses = [epoch["valid_loss"] for epoch in outcome["history"]]
    assert outcome["best_epoch"] == losses.index(min(losses)) < len(losses) - 1
    assert outcome["valid_loss"] == min(losses)
    out = tmp_path / "again.csv"
    assert mmfast("predict", folder / "best.ckpt", "--split=test", f"--out={out}") == 0
    assert out.read_bytes() == (folder / "predictions.csv").read_bytes()
    assert mmfast("predict", folder / "last.ckpt", "--split=test", f"--out={out}") == 0
    assert out.read_bytes() != (folder / "predictions.csv").read_bytes()


def test_schedule_and_early_stopping_follow_the_validation_loss(tmp_path):
    folder = train(
        "finetune", tmp_path, "--supervised.epochs=40", "--supervised.patience=3", "--supervised.lr=0.03"
    )
    history = result(folder)["history"]
    best, lr, rates = math.inf, 0.03, []
    for epoch in history:
        rates.append(lr)
        # plateau_patience is 0 here, its threshold 1e-4 relative (torch's default).
        if epoch["valid_loss"] < best * (1 - 1e-4):
            best = epoch["valid_loss"]
        else:
            lr *= 0.5
    assert [epoch["lr"] for epoch in history] == pytest.approx(rates)
    losses = [epoch["valid_loss"] for epoch in history]
    assert len(losses) - 1 - losses.index(min(losses)) == 3


def test_the_rate_is_halved_after_one_epoch_more_than_are_let_pass():
    config = settings()
    config.supervised.plateau_patience = 2
    schedule, rates = Schedule(config.supervised, 1.0), []
    for loss in (1.0, 1.0, 0.99995, 1.0, 1.0):  # the third is lower by less than a ten-thousandth
        schedule.epoch_ends(loss)
        rates.append(schedule.rate(0, 10))
    assert rates == [1, 1, 1, 0.5, 0.5]
    assert "with 2 after the third" in " ".join(StageSettings.__doc__.split())


def test_frozen_encoder_stays_as_it_was_and_has_no_dropout():
    config, data = settings(), small()
    module = make_supervised(config, FEATURES, freeze=True).train()
    assert module.training and module.head.training
    assert not any(part.training for part in module.encoder.modules())
    assert [name for name, p in module.named_parameters() if p.requires_grad] == [
        "head.linear.weight",
        "head.linear.bias",
    ]
    batch = batch_of(standardised(data))
    assert torch.equal(module(batch), module(batch))
    module = make_supervised(config, FEATURES, freeze=False).train()
    assert not torch.equal(module(batch), module(batch))
    assert all(p.requires_grad for p in module.parameters())


def test_encoding_once_gives_the_same_as_encoding_every_time():
    train = standardised(small())
    module = make_supervised(settings(), FEATURES, freeze=True).train()
    batch = batch_of(train)
    before = module(batch)
    with module.encoded(train.subset(range(20)), train.subset(range(20, 30))):
        encoder, module.encoder = module.encoder, None
        torch.testing.assert_close(module(batch), before, rtol=1e-5, atol=1e-6)
        module.encoder = encoder
    assert torch.equal(module(batch), before)


def test_only_labelled_samples_count():
    train = standardised(small())
    module = make_supervised(settings(), FEATURES).eval()
    batch = batch_of(train)
    expected = (module(batch)[2:, 0] - batch.labels[2:]).abs().mean()
    batch.labels[:2] = math.nan
    terms = module.objectives["supervised"](module._step(batch))
    assert terms.weight == 6
    torch.testing.assert_close(terms.loss, expected)
    batch.labels[:] = math.nan
    assert module.training_step(batch, 0) is None


def test_methodologies_of_one_seed_start_from_the_same_encoder():
    config = settings()
    pretraining, supervised = make_pretraining(config, FEATURES), make_supervised(config, FEATURES)
    assert_same(dict(pretraining.encoder.state_dict()), dict(supervised.encoder.state_dict()))
    other = make_supervised(replace(config, run=replace(config.run, seed=1)), FEATURES)
    assert not torch.equal(
        other.encoder.fusion_attention.query.weight, supervised.encoder.fusion_attention.query.weight
    )


def test_building_networks_leaves_the_random_state_alone():
    state = torch.random.get_rng_state()
    make_pretraining(settings(), FEATURES)
    make_supervised(settings(), FEATURES)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_a_run_is_a_function_of_its_seed(tmp_path):
    one, two, other = (
        checkpoint(
            train("pretrain", tmp_path / name, f"--run.seed={seed}", "--pretraining.epochs=2") / "last.ckpt"
        )
        for name, seed in (("one", 3), ("two", 3), ("other", 4))
    )
    assert_same(one["state_dict"], two["state_dict"])
    with pytest.raises(AssertionError):
        assert_same(one["state_dict"], other["state_dict"])


def test_effective_rank():
    generator = torch.Generator().manual_seed(0)
    wide = torch.linalg.qr(torch.randn(40, 8, generator=generator) - 0.0)[0]
    centred = wide - wide.mean(0)
    # Orthonormal columns that are centred anew stay nearly so.
    assert 7.8 < effective_rank(centred) <= 8
    line = torch.randn(40, 1, generator=generator) @ torch.randn(1, 8, generator=generator)
    assert effective_rank(line + 5) == pytest.approx(1, abs=1e-3)
    assert effective_rank(torch.ones(4, 3)) == 1


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_loss_that_is_not_finite_stops_with_one_sentence(value):
    progress = Progress("pretraining", 7, "pretraining.lr", 0.5, "loss.lambd")
    with pytest.raises(
        UserError,
        match=rf"pretraining: the loss became {value} at step 7; lower pretraining\.lr, 0\.5 now, or",
    ):
        check_finite(torch.tensor(value), "loss", progress)


# What diverges shows first in the embeddings, in validation (one step an epoch), or in the loss.
DIVERGED = {
    "embeddings": ("pretrain", "--pretraining.lr=1e30", "--pretraining.batch_size=16"),
    "embeddings that are finite but too large": (
        "pretrain",
        "--pretraining.lr=1e15",
        "--pretraining.batch_size=16",
    ),
    "validation": ("pretrain", "--pretraining.lr=1e30", "--pretraining.batch_size=57"),
    "supervised loss": ("finetune", "--supervised.lr=1e30"),
}


@pytest.mark.parametrize("case", DIVERGED)
def test_a_huge_learning_rate_is_blamed_and_not_what_the_loss_was_given(case, tmp_path, capsys):
    command, lr, *more = DIVERGED[case]
    assert mmfast(command, *TINY, lr, *more, f"--run.folder={tmp_path}") == 2
    error = capsys.readouterr().err
    phase, name = {"pretrain": "pretraining", "finetune": "supervised"}[command], lr[2:].partition("=")[0]
    assert error.startswith(f"mmfast: {phase}: the ") and error.count("\n") == 1
    assert f"lower {name}, " in error and "huge values" in error


def test_before_the_first_step_the_learning_rate_is_not_blamed(tmp_path, capsys):
    assert mmfast("pretrain", *TINY, "--loss.lambd=1e38", f"--run.folder={tmp_path}") == 2
    sentence = "pretraining: the loss became inf at step 0; look for huge values in the data or loss.lambd"
    assert capsys.readouterr().err == f"mmfast: {sentence}\n"


def test_predictions_keep_the_order_and_do_not_depend_on_it():
    train = standardised(small())
    module = make_supervised(settings(), FEATURES)
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(predict(module, train.subset(order)), predict(module, train)[order])
    assert encode(module.encoder, train).shape == (len(train), 8)
    assert module.training


def test_csv_of_predictions_reads_back_bit_by_bit(tmp_path):
    train = small(labelled=0.5).train
    predictions = torch.randn(len(train), 1, generator=torch.Generator().manual_seed(0)) / 3
    write_predictions(tmp_path / "p.csv", train, predictions, ONE_NUMBER)
    names, read, truths = read_predictions(tmp_path / "p.csv")
    assert names == train.names
    assert torch.equal(torch.from_numpy(read), predictions)
    assert_same(torch.from_numpy(truths).nan_to_num(9), train.labels.nan_to_num(9))


def test_inputs_of_pretraining_hold_no_validation_or_test_sample():
    data = small()
    more = small(seed=1).train
    more = MultimodalDataset.from_flat(
        {m: more.flat(m) for m in more.modalities},
        {m: more.lengths(m) for m in more.modalities},
        ids=torch.arange(len(more)) + 1000,
    )
    data = replace(data, unlabelled=more)
    splits = make_splits(data, DataConfig(), seed=0)
    assert sorted(splits.inputs.ids.tolist()) == sorted(data.train.ids.tolist() + more.ids.tolist())
    parts = [set(dataset.ids.tolist()) for dataset in named_parts(data).values()]
    assert sum(map(len, parts)) == len(set.union(*parts)) == len(select(data, "all"))


def test_standardiser_sees_only_inputs():
    data = small()
    huge = replace(
        data,
        test=data.test.map(lambda _, steps: steps * 1e6),
        valid=data.valid.map(lambda _, steps: steps - 1e6),
    )
    one, two = (make_splits(d, DataConfig(), seed=0) for d in (data, huge))
    assert_same(one.standardiser.state_dict(), two.standardiser.state_dict())
    assert all(bool(steps.isfinite().all()) for steps in (one.inputs.flat(m) for m in FEATURES))


def test_label_share_reduces_training_and_validation_but_not_test():
    data = small(200)
    full, half = (make_splits(data, DataConfig(label_share=share), seed=0) for share in (1.0, 0.5))
    assert (len(half.train), len(half.valid)) == (round(len(full.train) / 2), round(len(full.valid) / 2))
    assert (len(half.test), len(half.inputs)) == (len(full.test), len(full.inputs))
    other = make_splits(data, DataConfig(label_share=0.5), seed=1)
    assert half.train.names != other.train.names


def test_folds_test_every_sample_once():
    data = small()
    data = MultimodalData(
        unlabelled=small(30, seed=1).train.map(lambda _, s: s), cross_validation=data.train, train=None
    )
    data.unlabelled = MultimodalDataset.from_flat(
        {m: data.unlabelled.flat(m) for m in FEATURES},
        {m: data.unlabelled.lengths(m) for m in FEATURES},
        ids=torch.arange(len(data.unlabelled)) + 500,
    )
    tested = []
    for fold in range(5):
        splits = make_splits(data, DataConfig(fold=fold), seed=0)
        tested += splits.test.ids.tolist()
        assert len(splits.inputs) == len(splits.train) + len(data.unlabelled)
        assert not set(splits.inputs.ids.tolist()) & set(splits.test.ids.tolist() + splits.valid.ids.tolist())
    assert sorted(tested) == sorted(data.cross_validation.ids.tolist())
    with pytest.raises(UserError, match=r"data\.fold must lie in \[0, data\.folds = 5\), got 5"):
        make_splits(data, DataConfig(fold=5), seed=0)


def test_optimiser_steps_are_counted_and_too_few_of_them_are_warned_about(tmp_path, capsys):
    folder = train("pretrain", tmp_path / "few")
    out = capsys.readouterr().out
    # 57 inputs in batches of 16, the incomplete one dropped, in 4 epochs.
    assert "pre-trained on 57 samples for 4 epochs (12 steps): loss" in out
    assert "warning: 12 optimiser steps of pre-training (3 an epoch) are fewer than 150" in out
    assert result(folder)["steps"] == checkpoint(folder / "last.ckpt")["global_step"] == 12
    folder = train("pretrain", tmp_path / "enough", "--pretraining.batch_size=2", "--pretraining.epochs=6")
    assert "warning" not in capsys.readouterr().out
    assert result(folder)["steps"] == 168
    folder = train("finetune", tmp_path / "fine", "--supervised.epochs=2")
    assert "for 2 epochs (8 steps), best validation MAE" in capsys.readouterr().out
    assert result(folder)["steps"] == checkpoint(folder / "last.ckpt")["global_step"] == 8


@pytest.mark.parametrize(("epochs", "warned"), [(1, True), (8, False)])
def test_training_whose_best_epoch_is_the_last_says_so(epochs, warned, tmp_path, capsys):
    train("finetune", tmp_path, "--supervised.lr=0.1", f"--supervised.epochs={epochs}")
    assert ("warning: the last epoch was the best" in capsys.readouterr().out) == warned


def test_bfloat16_is_what_a_cpu_computes_when_it_is_asked_for(tmp_path):
    one, other = (
        result(train("pretrain", tmp_path / name, "--pretraining.epochs=1", f"--run.precision={name}"))[
            "history"
        ][0]
        for name in ("32-true", "bf16-mixed")
    )
    assert other["train_loss"] != one["train_loss"]
    assert other["train_loss"] == pytest.approx(one["train_loss"], rel=0.05)


def test_a_single_batch_takes_all_samples_of_a_small_set(tmp_path, capsys):
    train("pretrain", tmp_path, "--pretraining.batch_size=170", "--pretraining.epochs=1")
    assert "only 57 samples, fewer than one batch of 170" in capsys.readouterr().out
    assert checkpoint(tmp_path / "last.ckpt")["global_step"] == 1


def test_settings_are_saved_with_the_run_and_run_again(tmp_path):
    folder = train(
        "pretrain", tmp_path / "one", "--pretraining.epochs=1", "--augmentation.preset=seqaug+noise"
    )
    environment = (folder / "environment.yaml").read_text()
    for word in ("mmfast:", "torch:", "python:", "backends:", "threads: 1", "git:"):
        assert word in environment
    again = tmp_path / "two"
    assert mmfast("pretrain", f"--config={folder / 'config.yaml'}", f"--run.folder={again}") == 0
    assert_same(checkpoint(folder / "last.ckpt")["state_dict"], checkpoint(again / "last.ckpt")["state_dict"])


def test_a_checkpoint_goes_before_a_preset_and_what_differs_from_it_is_said(tmp_path, capsys):
    source = train("pretrain", tmp_path / "pre", "--pretraining.epochs=1") / "last.ckpt"
    theirs = checkpoint(source)["mmfast"]["config"]
    short = ["--supervised.epochs=1", "--run.tensorboard=false", "--run.threads=1", f"--from={source}"]
    for name, preset in {"demo": "demo", "none": None}.items():
        folder, asked = tmp_path / name, [] if preset is None else [f"--preset={preset}"]
        capsys.readouterr()
        assert mmfast("finetune", *short, *asked, f"--run.folder={folder}") == 0
        record, out = checkpoint(folder / "best.ckpt")["mmfast"], capsys.readouterr().out
        assert (record["config"]["data"], record["config"]["model"]) == (theirs["data"], theirs["model"])
        said = "model.hidden is 8 as in pre-training, not 32 as in --preset demo" in out
        assert said == (preset is not None) and ("data.synthetic.samples is 80" in out) == said
    folder = tmp_path / "flag"
    assert mmfast("finetune", *short, "--preset=thesis", "--model.dropout=0.5", f"--run.folder={folder}") == 0
    out = capsys.readouterr().out
    assert "model.dropout is 0.5 here and was 0.2 in pre-training" in out
    assert "model.pooling is mean as in pre-training, not sum as in --preset thesis" in out
    assert checkpoint(folder / "best.ckpt")["mmfast"]["config"]["model"]["dropout"] == 0.5


def test_finetune_takes_model_data_and_standardiser_of_the_checkpoint(tmp_path):
    data = small(80, seed=5)
    save(data, tmp_path / "a.npz")
    shifted = {
        name: getattr(data, name).map(lambda _, steps: 3 * steps + 1) for name in ("train", "valid", "test")
    }
    save(replace(data, **shifted), tmp_path / "b.npz")
    source = (
        train("pretrain", tmp_path / "pre", f"--data.path={tmp_path / 'a.npz'}", "--pretraining.epochs=1")
        / "last.ckpt"
    )
    short = ["--supervised.epochs=1", "--run.accelerator=cpu", "--run.tensorboard=false", "--run.threads=1"]
    assert mmfast("finetune", f"--from={source}", f"--run.folder={tmp_path / 'own'}", *short) == 0
    own = checkpoint(tmp_path / "own" / "best.ckpt")["mmfast"]
    assert own["config"]["model"] == checkpoint(source)["mmfast"]["config"]["model"]
    assert own["config"]["data"]["path"] == str(tmp_path / "a.npz")
    other = ["--data.path", tmp_path / "b.npz", f"--run.folder={tmp_path / 'other'}"]
    assert mmfast("finetune", f"--from={source}", *other, *short) == 0
    record = checkpoint(tmp_path / "other" / "best.ckpt")["mmfast"]
    assert_same(record["standardiser"], checkpoint(source)["mmfast"]["standardiser"])
