"""The settings of data: what reaches the reader, and what is refused before anything is claimed."""

from __future__ import annotations

import pytest
from training_help import mmfast

from mmfast.cli.arguments import pretrain
from mmfast.data import load, save, synthetic
from mmfast.errors import UserError
from mmfast.training import splits
from mmfast.training.data_config import DataConfig
from mmfast.training.splits import load_data, load_other


@pytest.fixture
def calls(monkeypatch):
    """What `load` is called with."""
    made = []

    def loaded(source, **options):
        made.append((source, options))
        return synthetic(20, max_length=3, features={"text": 2})

    monkeypatch.setattr(splits, "load", loaded)
    return made


@pytest.mark.parametrize(
    "words", [["a", "b c"], ["[a, b c]"], ['["a", "b c"]']], ids=["words", "YAML", "JSON"]
)
def test_several_sources_are_a_list_however_they_are_given(words):
    flags = ["--data.path", *words, "--data.pool", "d", "--data.split", "speaker:3", "--run.seed=1"]
    config = pretrain(flags).settings
    assert (config.data.path, config.data.pool) == (["a", "b c"], "d")
    assert (config.data.split, config.run.seed) == ("speaker:3", 1)


def test_what_a_reader_can_be_told_reaches_it(calls):
    told = {"labels": "T", "align": "text", "embedding": "glove.txt", "labels_from": "x.pt", "classes": "all"}
    config = DataConfig(["a", "b"], rate=16000, spectrogram=True, modalities=["audio", "text"], **told)
    load_data(config)
    config.pool = "c"
    load_data(config)
    told |= {"rate": 16000, "spectrogram": True, "modalities": "audio,text"}
    assert calls == [(["a", "b"], {**told, "pool": pool}) for pool in (None, "c")]


def test_other_data_are_read_in_the_same_way_as_far_as_they_have_the_choice(calls, monkeypatch):
    monkeypatch.setattr(splits, "takes", lambda path: {"labels", "align"})
    load_other("other", DataConfig("a", labels="T", rate=8000, split="speaker"))
    assert calls == [("other", {"labels": "T"})]


def test_synthetic_data_are_not_read():
    with pytest.raises(UserError, match=r"config: data\.labels must be left out for synthetic data, got 'T'"):
        load_data(DataConfig(labels="T"))


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--data.labels=T"], "labels must not be given for an mmfast .npz file"),
        (["--data.rate=0"], "data.rate must be positive, got 0"),
        (["--data.split="], "data.split must be shares of train, valid and test"),
        (
            ["--data.path", "a.npz", "a.npz"],
            "data.path must be a path or synthetic, or several paths, each once",
        ),
        (["--data.path=[]"], "data.path must be a path or synthetic, or several paths, each once"),
        (["--data.lables=T"], "there is no --data.lables; did you mean --data.labels?"),
    ],
)
def test_refusals_come_before_a_folder(flags, sentence, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save(synthetic(20, max_length=3, features={"text": 2}), "a.npz")
    assert mmfast("pretrain", "--data.path=a.npz", *flags, "--run.folder=run") == 2
    error = capsys.readouterr().err
    assert sentence in error and error.count("\n") == 1
    assert [p.name for p in tmp_path.iterdir()] == ["a.npz"] and len(load("a.npz").train)
