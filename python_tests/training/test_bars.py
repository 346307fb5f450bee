"""Progress: what is said of long work while it runs, where, and how long it says it will take."""

from __future__ import annotations

import io
import os
import pty
import re
import subprocess
import sys

import pytest
from training_help import TINY, mmfast, train

from mmfast.training import bars
from mmfast.training.bars import Board, Clock, Standing, duration

RUN = re.compile(r"^ *(\d+) %  (?:(?:about|at most) \d+ s left; )?(\d+) of (\d+) runs; (.+): (.+)$")


def test_time_left_is_estimated_from_this_sitting():
    clock = Clock()
    assert clock.left(0.5, now=100.0) is None, "half was done before, which says nothing of the speed"
    assert clock.left(0.5, now=110.0) is None
    assert clock.left(0.6, now=120.0) == pytest.approx(80.0)
    assert clock.left(1.0, now=200.0) == 0
    assert [duration(s) for s in (3.4, 89, 150, 3 * 3600 + 5 * 60)] == ["3 s", "89 s", "2 min", "3 h 5 min"]


def test_runs_count_by_their_costs():
    told = []
    board = Board({"a": 3.0, "b": 1.0, "c": 4.0}, told.append)
    board.complete("c")
    board("a", Standing(0.5, "epoch 1 of 2"))
    board("b", Standing(1.0, "complete"))
    assert told == [
        Standing(5.5 / 8, "1 of 3 runs; a: epoch 1 of 2"),
        Standing(6.5 / 8, "2 of 3 runs; b: complete"),
    ]


@pytest.mark.parametrize(
    ("mode", "terminal", "shown"),
    [
        ("off", True, False),
        ("auto", False, False),
        ("auto", True, True),
        ("on", False, True),
        ("on", True, True),
    ],
)
def test_modes(mode, terminal, shown, monkeypatch):
    stream = io.StringIO()
    stream.isatty = lambda: terminal
    monkeypatch.setattr(sys, "stdout", stream)
    with bars.bar(mode) as tell:
        assert (tell is not None) is shown
        if tell is not None:
            tell(Standing(0.25, "here"))
            tell(Standing(1.0, "done"))
    assert ("done" in stream.getvalue()) is shown


def test_training_says_epoch_loss_and_time_left(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bars, "LINE_SECONDS", 0.0)
    monkeypatch.setattr(bars, "MESSAGE_SECONDS", 0.0)
    train("pretrain", tmp_path / "pre", "--run.progress=on", "--pretraining.epochs=2")
    lines = [line for line in capsys.readouterr().out.splitlines() if " %  " in line]
    # 57 inputs in batches of 16: three steps an epoch, and the beginning and the end.
    assert len(lines) == 8
    assert lines[0] == "  0 %  epoch 1 of 2"
    assert all(
        re.fullmatch(r" *\d+ %  about \d+ s left; epoch [12] of 2, loss \S+", line) for line in lines[1:7]
    )
    assert re.fullmatch(r"100 %  epoch 2 of 2, loss \S+", lines[-1])
    shares = [int(line.split("%")[0]) for line in lines]
    assert shares == sorted(shares)
    train("finetune", tmp_path / "fine", "--run.progress=on", "--supervised.epochs=2")
    assert "at most " in capsys.readouterr().out, "early stopping may end it sooner"


def test_training_is_silent_where_nobody_looks(tmp_path, capsys):
    train("pretrain", tmp_path, "--pretraining.epochs=1")
    assert "%" not in capsys.readouterr().out


QUICK = ["--supervised.epochs=2", "--pretraining.epochs=2", "--experiment.methods=[FS, LE]"]


@pytest.mark.parametrize("workers", [1, 2])
def test_an_experiment_says_where_all_runs_stand(workers, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(bars, "LINE_SECONDS", 0.0)
    arguments = [*QUICK, "--experiment.seeds=[0, 1]", f"--experiment.workers={workers}", "--run.progress=on"]
    train("experiment", tmp_path, *arguments)
    lines = capfd.readouterr().out.splitlines()
    said = [match.groups() for line in lines if (match := RUN.match(line))]
    assert {run for *_, run, _ in said} == {
        f"seed {seed}, {name}" for seed in (0, 1) for name in ("pretraining", "FS", "LE")
    }
    assert all(total == "6" for _, _, total, *_ in said)
    assert any(re.match(r"epoch 2 of 2, loss ", text) for *_, text in said)
    assert said[-1][:2] == ("100", "6")
    assert any(" s left; " in line for line in lines)
    assert sum(line.startswith("seed 0, FS: MAE") for line in lines) == 1, "workers' own lines are kept, once"
    # Complete already: counted before the clock starts, so nothing is left to wait for.
    train("experiment", tmp_path, *arguments)
    again = [line for line in capfd.readouterr().out.splitlines() if RUN.match(line)]
    assert all(line.startswith("100 %  6 of 6 runs; ") for line in again)


def test_an_experiment_prints_plain_lines_where_nobody_looks(tmp_path, capfd):
    train("experiment", tmp_path, *QUICK, "--experiment.seeds=[0]", "--experiment.workers=1")
    out = capfd.readouterr().out
    assert not any(RUN.match(line) for line in out.splitlines()) and "seed 0, FS: MAE" in out


def test_a_bar_on_a_terminal(tmp_path):
    outer, inner = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "mmfast", "pretrain", *TINY, f"--run.folder={tmp_path}"],
        stdout=inner,
        stderr=subprocess.PIPE,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "80"},
    )
    os.close(inner)
    text = b""
    while True:
        try:
            text += os.read(outer, 65536)
        except OSError:  # the other end is closed
            break
    os.close(outer)
    assert process.wait() == 0, process.stderr.read()
    process.stderr.close()
    plain = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text.decode())
    assert re.search(r"\d+ % \S* *about \d+ s left; epoch \d of 4, loss", plain)
    assert plain.rstrip().splitlines()[-1].startswith("pre-trained on 57 samples for 4 epochs")


def test_off_is_off(tmp_path, capfd):
    assert mmfast("pretrain", *TINY, f"--run.folder={tmp_path}", "--run.progress=off") == 0
    assert "epoch 1" not in capfd.readouterr().out
