"""The example of a user's own data in docs/data.md, as it stands there: saved, looked at, trained on."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
from training_help import mmfast

from mmfast.data import MultimodalData, MultimodalDataset, load, save
from mmfast.training.data_config import DataConfig
from mmfast.training.splits import load_data

PAGE = Path(__file__).parents[2] / "docs" / "data.md"
# Flags that make the commands of the example small and change nothing else.
SMALL = {
    "pretrain": [
        "--model.hidden=8",
        "--model.projector=[16, 16]",
        "--pretraining.epochs=2",
        "--run.threads=1",
    ],
    "finetune": ["--supervised.epochs=2", "--run.threads=1"],
}


def example() -> dict[str, str]:
    """Language -> text of the code blocks under "Your own data"."""
    section = PAGE.read_text().split("## Your own data")[1].split("\n## ")[0]
    return dict(re.findall(r"```(\w+)\n(.*?)```", section, re.DOTALL))


@pytest.fixture
def mine(tmp_path, monkeypatch) -> Path:
    """The file that the example writes, in the current folder."""
    monkeypatch.chdir(tmp_path)
    exec(example()["python"], {})
    return tmp_path / "mine.npz"


def test_the_example_trains_as_it_stands(mine, capsys):
    for line in example()["sh"].splitlines():
        program, command, *arguments = shlex.split(line)
        assert program == "mmfast"
        assert mmfast(command, *arguments, *SMALL.get(command, [])) == 0, capsys.readouterr().err
    result = json.loads((mine.parent / "runs/mine/result.json").read_text())
    assert result["samples"] == {"train": 21, "valid": 3, "test": 6}, "30 labelled clips by 0.7, 0.1, 0.2"
    pretrained = json.loads((mine.parent / "runs/mine-ssl/result.json").read_text())
    assert pretrained["samples"]["inputs"] == 28, (
        "training clips, and those without a label of their speakers"
    )
    assert "test, 6 samples" in capsys.readouterr().out


def test_the_split_is_the_same_for_every_seed_of_a_run_and_follows_its_own(mine):
    one, again, other = (
        load_data(DataConfig(str(mine), split=[0.7, 0.1, 0.2], split_seed=seed)).test.names
        for seed in (0, 0, 1)
    )
    assert one == again != other


def test_a_lone_data_set_is_divided_too(mine, capsys):
    lone = mine.parent / "lone.npz"
    save(MultimodalDataset.concatenate([load(mine).train]), lone)
    flags = ["--data.path", lone, *SMALL["finetune"], "--model.hidden=8"]
    assert mmfast("finetune", *flags, "--run.folder=a") == 2
    assert (
        "its train and unlabelled splits are empty; samples that come in one split" in capsys.readouterr().err
    )
    assert mmfast("finetune", *flags, "--data.split=[0.5, 0.2, 0.3]", "--run.folder=b") == 0


WRONG = {
    "no split": (
        [],
        "no labelled samples in the valid split; samples that come in one split are divided by data.split",
    ),
    "shares": (["--data.split=[0.7, 0.2]"], "data.split must be shares of train, valid and test"),
    "no number": (["--data.split=[0.7, .nan, 0.3]"], "data.split must be shares of train, valid and test"),
    "seed": (
        ["--data.split=[0.7, 0.1, 0.2]", f"--data.split_seed={2**64}"],
        "data.split_seed must be of 64 bits, got 18446744073709551616",
    ),
    "label_share too small": (
        ["--data.split=[0.7, 0.1, 0.2]", "--data.label_share=0.01"],
        "data.label_share must leave at least one of the 21 labelled training samples, got 0.01, that is 0.21",
    ),
    "label_share nan": (["--data.label_share=.nan"], "data.label_share must be in (0, 1], got nan"),
    "label_share above 1": (["--data.label_share=1.5"], "data.label_share must be in (0, 1], got 1.5"),
}


@pytest.mark.parametrize(
    ("case", "command"),
    [
        (case, command)
        for case in WRONG
        for command in ("pretrain", "finetune", "experiment")
        if (case, command) != ("no split", "pretrain")  # which needs no labels
    ],
)
def test_what_cannot_be_trained_is_refused_before_anything_runs(case, command, mine, capsys, monkeypatch):
    monkeypatch.setattr("mmfast.training.runs.fit", lambda *args, **kwargs: pytest.fail("something was run"))
    arguments, sentence = WRONG[case]
    assert mmfast(command, "--data.path=mine.npz", "--run.folder=x", "--run.threads=1", *arguments) == 2
    error = capsys.readouterr().err
    assert sentence in error and error.count("\n") == 1


@pytest.mark.parametrize("command", ["pretrain", "finetune", "experiment", "evaluate", "predict"])
def test_a_sample_whose_modalities_differ_in_length_is_named(command, mine, capsys):
    data = load(mine).train
    samples = [data[i] for i in range(len(data))]
    values = {m: [s.values[m] for s in samples] for m in data.modalities}
    values["audio"][33] = values["audio"][33].repeat(2, 1)[: len(values["audio"][33]) + 1]
    save(MultimodalData(train=MultimodalDataset(values, data.labels, names=data.names)), "longer.npz")
    arguments = [
        "--data.path=longer.npz",
        "--data.split=[0.7, 0.1, 0.2]",
        "--run.folder=x",
        "--model.hidden=8",
    ]
    if command in ("evaluate", "predict"):
        good = ["--data.path=mine.npz", *arguments[1:], *SMALL["finetune"], "--supervised.epochs=1"]
        assert mmfast("finetune", *good) == 0
        arguments = ["x/best.ckpt", "--data=longer.npz", "--split=train"]
    assert mmfast(command, *arguments) == 2
    n = len(values["audio"][33])
    error = capsys.readouterr().err
    assert f"got text {n - 1}, audio {n} in sample 'clip 33' (id 33); align the modalities first" in error


def test_a_small_share_of_labels_keeps_a_validation_sample(mine):
    result = ["--data.split=[0.7, 0.1, 0.2]", "--data.label_share=0.1", "--model.hidden=8", "--run.folder=x"]
    assert mmfast("finetune", "--data.path=mine.npz", *result, *SMALL["finetune"]) == 0
    assert json.loads(Path("x/result.json").read_text())["samples"] == {"train": 2, "valid": 1, "test": 6}
