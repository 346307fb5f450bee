"""``mmfast inspect`` and ``mmfast convert``: what they print and write, and what they refuse before they do."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from training_help import mmfast

from mmfast.data import MultimodalData, MultimodalDataset, inspect, load, save, synthetic


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    data = synthetic(60, max_length=6, features={"text": 8, "audio": 6, "visual": 4})
    save(data, folder / "a.npz")
    train = data.train
    names = ["é", "\N{SNOWMAN}", "b", *train.names[3:]]
    train = train.identified(train.ids, names, train.groups)
    train._labels[:3] = 9
    save(MultimodalData(train, label_range=(-3, 3)), folder / "names.npz")
    (folder / "text.txt").write_text("words")
    return folder


def test_inspect_prints_the_report_and_json(made, capsys):
    assert mmfast("inspect", made / "a.npz") == 0
    assert capsys.readouterr().out == inspect(made / "a.npz").text() + "\n"
    assert mmfast("inspect", made / "a.npz", "--json", "--verify") == 0
    assert json.loads(capsys.readouterr().out)["fingerprint"] == load(made / "a.npz").fingerprint()


def test_convert_writes_one_file_and_one_line(made, tmp_path, capsys):
    target = tmp_path / "b.npz"
    assert mmfast("convert", made / "a.npz", target) == 0
    told, known = capsys.readouterr().out, load(made / "a.npz").fingerprint()
    size = f"{target.stat().st_size / 1000:.0f} kB"
    assert told == f"{target}: 60 samples, 3 modalities, {size}, fingerprint {known}\n"
    assert [p.name for p in tmp_path.iterdir()] == ["b.npz"]


WRONG = {
    "target exists": (["convert", "{made}/a.npz", "{made}/names.npz"], "exists already; --force replaces it"),
    "source is target": (["convert", "{made}/a.npz", "{made}/a.npz"], "exists already; --force replaces it"),
    "target is a folder": (
        ["convert", "{made}/a.npz", "{made}", "--force"],
        "TARGET must be a file to write",
    ),
    "no such folder": (
        ["convert", "{made}/a.npz", "{made}/none/b"],
        "TARGET must be in a folder that exists",
    ),
    "no target": (["convert", "{made}/a.npz"], "the following arguments are required: TARGET"),
    "no source": (["convert", "{made}/none", "{new}/b.npz"], "none does not exist"),
    "foreign": (["convert", "{made}/text.txt", "{new}/b.npz"], "is of no known kind"),
    "option of another layout": (
        ["convert", "{made}/a.npz", "{new}/b.npz", "--labels=T"],
        "labels must not be given for an mmfast .npz file",
    ),
    "dtype": (
        ["convert", "{made}/a.npz", "{new}/b", "--dtype=float8"],
        "--dtype must be one of float32, float16",
    ),
    "flag": (["convert", "{made}/a.npz", "{new}/b", "--modality=x"], "did you mean --modalities?"),
    "rate": (["inspect", "{made}/a.npz", "--rate=0"], "--rate must be positive, got 0"),
    "seed": (["inspect", "{made}/a.npz", "--seed=x"], "--seed"),
    "inspect nothing": (["inspect"], "the following arguments are required: source"),
    "inspect with a foreign option": (["inspect", "synthetic", "--labels=T"], "synthetic takes the options"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_one_sentence_and_nothing_is_made(case, made, tmp_path, capsys):
    arguments, sentence = WRONG[case]
    before = {path: path.read_bytes() for path in made.iterdir()}
    assert mmfast(*(a.format(made=made, new=tmp_path) for a in arguments)) == 2
    error = capsys.readouterr().err
    assert sentence in error and error.count("\n") == 1 and error.startswith("mmfast: ")
    assert list(tmp_path.iterdir()) == [] and {path: path.read_bytes() for path in made.iterdir()} == before


def test_force_replaces_a_file_and_even_the_source(made, tmp_path):
    target = tmp_path / "b.npz"
    target.write_text("old")
    assert mmfast("convert", made / "a.npz", target, "--force") == 0
    assert mmfast("convert", target, target, "--force") == 0
    assert load(target).fingerprint() == load(made / "a.npz").fingerprint()


def test_a_conversion_that_is_interrupted_leaves_the_old_file(made, tmp_path, monkeypatch, capsys):
    target = tmp_path / "b.npz"
    target.write_text("old")

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    assert mmfast("convert", made / "a.npz", target, "--force") == 130
    assert target.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["b.npz"]
    assert capsys.readouterr().err == "mmfast: interrupted\n"


def test_a_terminal_without_unicode_gets_ascii(made):
    done = subprocess.run(
        [sys.executable, "-m", "mmfast", "inspect", str(made / "names.npz")],
        capture_output=True,
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
    )
    assert (done.returncode, done.stderr) == (0, b"")
    out = done.stdout.decode("ascii")
    assert r"(\xe9, \u2603, b)" in out and "@" in out


def test_data_to_be_cross_validated_are_counted(tmp_path, capsys):
    text = [np.ones((2, 3)) * i for i in range(8)]
    groups = {"speaker": [f"s{i % 4}" for i in range(8)]}
    data = MultimodalData(train=MultimodalDataset({"text": text}, labels=range(8), groups=groups))
    save(data, tmp_path / "a.mmfast")
    assert mmfast("convert", tmp_path / "a.mmfast", tmp_path / "b.mmfast", "--split", "speaker") == 0
    assert "b.mmfast: 8 samples" in capsys.readouterr().out
    assert mmfast("inspect", tmp_path / "b.mmfast", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["groups"] == {"speaker": {f"s{i}": 2 for i in range(4)}}
    assert not any("give --split" in said for said in told["warnings"])


def test_data_to_be_cross_validated_are_aligned_or_refused(tmp_path, capsys):
    values = {
        "text": [np.ones((2, 3)) * i for i in range(8)],
        "audio": [np.ones((3, 2)) * i for i in range(8)],
    }
    groups = {"speaker": [f"s{i % 4}" for i in range(8)]}
    save(
        MultimodalData(train=MultimodalDataset(values, labels=range(8), groups=groups)), tmp_path / "a.mmfast"
    )
    folded = tmp_path / "folded.mmfast"
    assert mmfast("convert", tmp_path / "a.mmfast", folded, "--split", "speaker") == 0
    assert mmfast("inspect", folded, "--align", "strict") == 2
    assert "align" in capsys.readouterr().err
    assert load(folded, align="text").cross_validation.lengths("audio").tolist() == [2] * 8
