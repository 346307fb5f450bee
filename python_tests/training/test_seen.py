"""What a network was trained on cannot test it, whatever name, path or format it comes under."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from training_help import TINY, checkpoint, mmfast, train

from mmfast.data import MultimodalData, MultimodalDataset, load, save, synthetic
from mmfast.training.data_config import DataConfig
from mmfast.training.splits import make_splits

FEATURES = {"text": 8, "audio": 6, "visual": 4}
SHORT = ["--supervised.epochs=2", "--pretraining.epochs=1"]


def renamed(dataset: MultimodalDataset, first: int = 10_000) -> MultimodalDataset:
    """The same samples in another order, with other ids and names."""
    dataset = dataset.subset(range(len(dataset) - 1, -1, -1))
    return MultimodalDataset.from_flat(
        {m: dataset.flat(m) for m in FEATURES},
        {m: dataset.lengths(m) for m in FEATURES},
        dataset.labels,
        torch.arange(first, first + len(dataset)),
        [f"clip {i}" for i in range(len(dataset))],
    )


@pytest.fixture(scope="module")
def folded(tmp_path_factory) -> Path:
    """A pool, samples to cross-validate, pre-training and fine-tuning on fold 1 of 3."""
    folder = tmp_path_factory.mktemp("folded")
    made = synthetic(160, max_length=6, missing=0.0, features=FEATURES).train
    data = MultimodalData(unlabelled=made.subset(range(40)), cross_validation=made.subset(range(40, 100)))
    save(data, folder / "data.npz")
    mine = [f"--data.path={folder / 'data.npz'}", "--data.folds=3", "--data.fold=1", *SHORT]
    train("pretrain", folder / "pre", *mine)
    train("finetune", folder / "fine", *mine, f"--from={folder / 'pre/last.ckpt'}")
    return folder


def evaluated(best: Path, data: Path | None, out: Path, *more: str) -> dict:
    given = [] if data is None else [f"--data={data}"]
    assert mmfast("evaluate", best, *given, f"--out={out}", *more) == 0
    return json.loads(out.read_text())


@pytest.mark.parametrize("way", ["the file", "a relative path", "a link", "a copy", "other names and order"])
def test_the_same_data_are_tested_on_the_runs_own_fold(way, folded, tmp_path, capsys, monkeypatch):
    path = folded / "data.npz"
    if way == "a relative path":
        monkeypatch.chdir(folded)
        path = Path("data.npz")
    elif way == "a link":
        os.symlink(path, tmp_path / "link.npz")
        path = tmp_path / "link.npz"
    elif way == "a copy":
        path = shutil.copy(path, tmp_path / "copy.npz")
    elif way == "other names and order":
        data = load(path)
        pool, rest = renamed(data.unlabelled), data.cross_validation
        # Folds follow the order of the samples, so that here only what surrounds them changes.
        save(MultimodalData(unlabelled=pool, cross_validation=rest, name="other"), tmp_path / "other.npz")
        path = tmp_path / "other.npz"
    metrics = evaluated(folded / "fine/best.ckpt", path, tmp_path / "m.json")
    assert metrics == json.loads((folded / "fine/result.json").read_text())["metrics"]
    assert "test, 20 samples" in capsys.readouterr().out


def test_what_it_was_trained_on_is_refused_in_other_data(folded, tmp_path, capsys):
    best, own = folded / "fine/best.ckpt", load(folded / "data.npz")
    everything = MultimodalDataset.concatenate([own.cross_validation, own.unlabelled])
    save(MultimodalData(test=renamed(everything)), tmp_path / "again.npz")
    assert mmfast("evaluate", best, f"--data={tmp_path / 'again.npz'}") == 2
    # 60 in three folds: 20 to test, 8 of the rest to validate. The pool of 40 was seen without labels.
    said = "got 32 trained on, 8 used to choose the epoch, 40 seen by pre-training, without labels of 100;"
    assert said in capsys.readouterr().err
    metrics = evaluated(best, tmp_path / "again.npz", tmp_path / "m.json", "--split=unseen")
    assert metrics["mae"] == pytest.approx(
        json.loads((folded / "fine/result.json").read_text())["metrics"]["mae"], rel=1e-5
    )
    out, error = capsys.readouterr()
    assert "unseen, 20 samples" in out and error == ""


def test_what_only_pretraining_saw_is_said(folded, tmp_path, capsys):
    save(MultimodalData(test=renamed(load(folded / "data.npz").unlabelled)), tmp_path / "pool.npz")
    evaluated(folded / "fine/best.ckpt", tmp_path / "pool.npz", tmp_path / "m.json")
    sentence = "mmfast: warning: evaluate: of 40 samples, 40 seen by pre-training, without labels\n"
    assert capsys.readouterr().err == sentence


def test_the_runs_own_training_split_is_evaluated_when_it_is_asked_for(folded, tmp_path, capsys):
    best = folded / "fine/best.ckpt"
    evaluated(best, None, tmp_path / "m.json", "--split=train")
    assert "of 32 samples, 32 trained on" in capsys.readouterr().err
    assert mmfast("evaluate", best, "--split=all") == 2
    assert "--split unseen leaves them out" in capsys.readouterr().err


def test_predict_says_what_it_was_trained_on(folded, tmp_path, capsys):
    best, out = folded / "fine/best.ckpt", tmp_path / "p.csv"
    assert mmfast("predict", best, f"--out={out}") == 0
    error = capsys.readouterr().err
    assert error.startswith(
        "mmfast: warning: predict: of 100 samples, 32 trained on, 8 used to choose the epoch"
    )
    assert mmfast("predict", best, f"--out={out}", "--split=test") == 0
    assert capsys.readouterr().err == ""


def test_a_checkpoint_knows_what_pretraining_saw(folded):
    splits = make_splits(load(folded / "data.npz"), DataConfig(folds=3, fold=1), seed=0)
    pre, fine = (checkpoint(folded / name)["mmfast"]["seen"] for name in ("pre/last.ckpt", "fine/best.ckpt"))
    assert torch.equal(pre["inputs"], splits.inputs.fingerprints()) and not len(pre["labels"])
    assert torch.equal(fine["inputs"], pre["inputs"])
    assert torch.equal(fine["labels"], splits.train.fingerprints())
    assert torch.equal(fine["selection"], splits.valid.fingerprints())


def test_another_fold_than_that_of_the_pretraining_is_said(folded, tmp_path, capsys):
    train("finetune", tmp_path, f"--from={folded / 'pre/last.ckpt'}", "--data.fold=0", *SHORT)
    error = capsys.readouterr().err
    # All of fold 0 but the eight that validated fold 1 were inputs of its pre-training.
    assert "test samples, " in error and " seen by pre-training, without labels" in error
    assert json.loads((tmp_path / "result.json").read_text())["seen"]["test"]["inputs"] > 0


def test_copies_within_the_data_are_said(tmp_path, capsys):
    data = synthetic(80, max_length=6, missing=0.0, features=FEATURES)
    copies = renamed(data.train.subset(range(5)))
    save(replace(data, test=MultimodalDataset.concatenate([data.test, copies])), tmp_path / "data.npz")
    folder = train("finetune", tmp_path / "run", f"--data.path={tmp_path / 'data.npz'}", *SHORT)
    assert "finetune: of the 21 test samples, 5 trained on\n" in capsys.readouterr().err
    assert mmfast("evaluate", folder / "best.ckpt") == 2
    assert mmfast("evaluate", folder / "best.ckpt", "--split=unseen") == 0
    assert "unseen, 16 samples" in capsys.readouterr().out


def test_a_run_that_divided_its_data_itself_finds_them_again(tmp_path, capsys):
    save(synthetic(80, max_length=6, features=FEATURES).train, tmp_path / "one.npz")
    divided = ["--data.split=[0.6, 0.2, 0.2]", f"--data.path={tmp_path / 'one.npz'}"]
    folder = train("finetune", tmp_path / "run", *divided, *SHORT)
    own = json.loads((folder / "result.json").read_text())["metrics"]
    shutil.copy(tmp_path / "one.npz", tmp_path / "copy.npz")
    assert evaluated(folder / "best.ckpt", tmp_path / "copy.npz", tmp_path / "m.json") == own


def overwrite(path: Path) -> None:
    data = load(path)
    save(replace(data, unlabelled=data.unlabelled.map(lambda _, steps: steps + 1)), path)


def test_data_in_another_order_do_not_leak_through_other_folds(folded, tmp_path, capsys):
    data = load(folded / "data.npz")
    save(replace(data, cross_validation=renamed(data.cross_validation)), tmp_path / "order.npz")
    assert mmfast("evaluate", folded / "fine/best.ckpt", f"--data={tmp_path / 'order.npz'}") == 2
    assert "trained on" in capsys.readouterr().err
    evaluated(folded / "fine/best.ckpt", tmp_path / "order.npz", tmp_path / "m.json", "--split=unseen")
    assert "unseen, 20 samples" in capsys.readouterr().out
    resumed = ["--data.folds=3", "--data.fold=1", *SHORT, f"--run.folder={folded / 'pre'}", "--resume"]
    assert mmfast("pretrain", *TINY, *resumed, f"--data.path={tmp_path / 'order.npz'}") == 2
    assert "data.path must be what its run read" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["pretrain", "finetune", "experiment"])
def test_data_that_were_overwritten_are_noticed(command, folded, tmp_path, capsys):
    path, folder = tmp_path / "data.npz", tmp_path / "run"
    shutil.copy(folded / "data.npz", path)
    few = ["--experiment.methods=[FS]", "--experiment.seeds=[0]", "--experiment.workers=1", "--data.folds=2"]
    given = [f"--data.path={path}", *SHORT, *(few if command == "experiment" else [])]
    train(command, folder, *given)
    overwrite(path)
    capsys.readouterr()
    again = [] if command == "experiment" else ["--resume"]
    assert mmfast(command, *TINY, f"--run.folder={folder}", *given, *again) == 2
    assert "data.path must be what its run read, with the fingerprint" in capsys.readouterr().err
    if command == "finetune":
        assert mmfast("evaluate", folder / "best.ckpt") == 2
        assert "must be those it was trained on, with the fingerprint" in capsys.readouterr().err
        assert mmfast("evaluate", folder / "best.ckpt", f"--data={path}", "--split=unseen") == 0


def test_a_run_goes_on_under_other_paths_of_the_same_data_and_weights(folded, tmp_path, monkeypatch, capsys):
    shutil.copytree(folded, tmp_path / "moved")
    monkeypatch.chdir(tmp_path / "moved")
    os.symlink("data.npz", "link.npz")
    settings = [*TINY, "--data.folds=3", "--data.fold=1", *SHORT, "--resume", "--run.folder=fine"]
    for path, source in (("data.npz", "pre/last.ckpt"), ("./link.npz", f"{folded}/pre/last.ckpt")):
        assert mmfast("finetune", *settings, f"--data.path={path}", f"--from={source}") == 0
    train("pretrain", tmp_path / "other", *SHORT, "--run.seed=5", "--data.path=data.npz")
    assert mmfast("finetune", *settings, "--data.path=data.npz", f"--from={tmp_path}/other/last.ckpt") == 2
    assert "from must be what its run read" in capsys.readouterr().err
