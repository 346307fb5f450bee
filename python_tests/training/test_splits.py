"""What phases train on where data are divided by the settings: protocols, pools, groups."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from training_help import mmfast

from mmfast.data import MultimodalData, MultimodalDataset, save
from mmfast.errors import UserError
from mmfast.training.data_config import DataConfig
from mmfast.training.splits import fold_count, identity, load_data, make_splits, named_parts, select


def dialogues(each=6, sessions=5, first=0, labels=True):
    """Sessions of two speakers each with so many samples, of four classes."""
    speakers = [f"Ses0{s}{who}" for s in range(1, sessions + 1) for who in "FM"]
    rows = [(speaker, i) for speaker in speakers for i in range(each)]
    return MultimodalDataset(
        {"audio": [np.random.default_rng(first + i).normal(size=(3 + i % 4, 3)) for i in range(len(rows))]},
        [["angry", "happy", "neutral", "sad"][i % 4] for i in range(len(rows))] if labels else None,
        ids=range(first, first + len(rows)),
        names=[f"{first}:{speaker}_{i}" for speaker, i in rows],
        groups={"speaker": [s for s, _ in rows], "session": [s[4] for s, _ in rows]},
    )


@pytest.fixture
def path(tmp_path):
    pool = dialogues(each=2, first=1000, labels=False)
    save(MultimodalData(dialogues(), unlabelled=pool, name="dialogues"), tmp_path / "data.npz")
    return tmp_path / "data.npz"


def test_every_fold_pretrains_on_other_sessions_alone_and_each_sample_is_tested_once(path):
    config = DataConfig(str(path), split="speaker")
    data, tested, trained = load_data(config), [], []
    assert fold_count(data, config) == 10
    for fold in range(10):
        splits = make_splits(data, replace(config, fold=fold), seed=0)
        held_out = set(splits.valid.groups["session"]) | set(splits.test.groups["session"])
        assert len(held_out) == 1 and held_out.isdisjoint(splits.inputs.groups["session"])
        assert (len(splits.train), len(splits.valid), len(splits.test)) == (48, 6, 6)
        assert len(splits.inputs) == 48 + 16, "training samples and the pool of the other sessions"
        tested += splits.test.ids.tolist()
        trained.append((splits.train.names, splits.standardiser.mean["audio"].tolist()))
    assert sorted(tested) == list(range(60))
    assert all(trained[i] == trained[i + 1] for i in range(0, 10, 2)) and trained[0] != trained[2]
    with pytest.raises(UserError, match=r"data\.fold must lie in \[0, 10 folds of data dialogues\), got 10"):
        make_splits(data, replace(config, fold=10), seed=0)


def test_labels_are_reduced_within_a_fold(path):
    config = DataConfig(str(path), split="session", fold=2, label_share=0.5)
    splits = make_splits(load_data(config), config, seed=0)
    assert (len(splits.train), len(splits.valid), len(splits.test), len(splits.inputs)) == (
        18,
        6,
        12,
        36 + 12,
    )


def test_protocols_are_other_data_for_a_run_that_goes_on(path):
    known = {
        identity(load_data(DataConfig(str(path), split=split, split_seed=seed)))
        for split, seed in (
            (None, 0),
            ("speaker", 0),
            ("session", 0),
            ("kfold:4", 0),
            ("kfold:4", 1),
            ("kfold:5", 0),
        )
    }
    assert len(known) == 6
    again = [identity(load_data(DataConfig(str(path), split="kfold:4"))) for _ in range(2)]
    assert again[0] == again[1] and again[0] in known


def test_without_settings_all_that_is_cross_validated_is_tested(path):
    data = load_data(DataConfig(str(path), split="speaker"))
    assert len(named_parts(data)["test"]) == 60 and len(select(data, "all")) == 80


def test_a_pool_of_another_file_is_pretrained_on_and_loses_copies_of_what_is_held_out(path):
    more = dialogues(each=1, first=2000)
    both = MultimodalDataset.concatenate([more, dialogues().subset(range(30, 60))])
    save(MultimodalData(test=both), path.parent / "more.npz")
    config = DataConfig(str(path), split="speaker:Ses05M", pool=[str(path.parent / "more.npz")])
    splits = make_splits(load_data(config), config, seed=0)
    held_out = torch.cat([splits.valid.fingerprints(), splits.test.fingerprints()])
    assert len(splits.inputs) == 48 + 16 + 10 + 18 and not splits.inputs.among(held_out).any()
    assert splits.targets == ("angry", "happy", "neutral", "sad")


def test_the_pool_of_given_splits_has_no_group_that_is_kept_out_of_training():
    whole, pool = dialogues(), dialogues(each=1, first=500, labels=False)
    sessions = np.array(whole.groups["session"])
    split = {"train": whole.subset(sessions < "4"), "valid": whole.subset(sessions == "4")}
    data = MultimodalData(**split, test=whole.subset(sessions == "5"), unlabelled=pool)
    assert set(named_parts(data, DataConfig())["unlabelled"].groups["session"]) == {"1", "2", "3"}
    mixed = MultimodalData(whole.subset(range(0, 60, 2)), test=whole.subset(range(1, 60, 2)), unlabelled=pool)
    assert len(named_parts(mixed, DataConfig())["unlabelled"]) == 10, "training itself has these speakers"


def rated(size, slips, unlabelled=0):
    """Labels from -3 to 3, but for some of 10/3, as a few of CMU-MOSEI; the unlabelled come last."""
    labels = [10 / 3] * slips + list(np.linspace(-3, 3, size - slips)) + [np.nan] * unlabelled
    return MultimodalDataset({"text": np.arange(len(labels), dtype=float)[:, None, None]}, labels)


def with_parts(train, **parts):
    """Data in [-3, 3] of parts that have ids of their own."""
    first, named = len(train), {"train": train}
    for name, part in parts.items():
        named[name] = part.identified(range(first, first + len(part)), part.names, None)
        first += len(part)
    return MultimodalData(**named, label_range=(-3, 3), name="rated")


@pytest.mark.parametrize("part", ["train", "valid", "test"])
def test_one_label_in_a_hundred_is_a_slip_and_two_are_refused(part):
    def data(*counts):
        parts = {"train": rated(100, 0), "valid": rated(100, 0), "test": rated(100, 0)}
        return with_parts(**parts | {part: rated(*counts)})

    splits = make_splits(data(100, 1), DataConfig(), seed=0)
    assert len(getattr(splits, part)) == 100
    assert getattr(splits, part).labels.max() == np.float32(10 / 3), "it is kept as it is"
    rule = r"labels must lie in \[-3, 3\], label_range of data rated, but for one in a hundred, got 3.33333 in sample"
    with pytest.raises(UserError, match=rf"{rule} .* and 1 more$"):
        make_splits(data(100, 2), DataConfig(), seed=0)
    make_splits(data(200, 2), DataConfig(), seed=0)
    with pytest.raises(UserError, match=rule):
        make_splits(data(99, 1, 100), DataConfig(), seed=0)  # a hundredth of those that have labels


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--data.split=kfold:1"], "config: data.split must be shares of train, valid and test"),
        (["--data.split=[0.7, 0.2]"], "config: data.split must be shares of train, valid and test"),
        (["--data.split=actor"], "split: 'actor' must be one of the groups speaker, session of the data"),
        (["--data.split=lost.json"], "lost.json: no such file"),
        (["--data.group=speaker"], "config: data.group must be null without data.split"),
        (
            ["--data.split=speaker", "--data.fold=10"],
            "config: data.fold must lie in [0, 10 folds of data dialogues)",
        ),
        (["--data.split=speaker:Ses01F", "--data.fold=1"], "config: data.fold must be 0 for data dialogues"),
        (["--data.pool=[lost.npz]"], "lost.npz does not exist"),
    ],
)
def test_settings_of_splits_that_cannot_be_are_refused_in_a_sentence(
    path, flags, message, capsys, monkeypatch
):
    monkeypatch.chdir(path.parent)
    arguments = [f"--data.path={path}", "--run.folder=run", "--run.threads=1", "--model.hidden=8", *flags]
    assert mmfast("finetune", *arguments) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and not (path.parent / "run").exists()
