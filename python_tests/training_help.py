"""Tiny configurations shared by the tests of training and command line."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from mmfast.cli.main import main

SHARED = Path(os.environ.get("MMFAST_SHARED", Path(__file__).parents[2] / "shared"))

# 57 training samples (29 labelled), 7 to validate, 16 to test; three small modalities of at most six steps.
TINY = [
    "--data.synthetic.samples=80",
    "--data.synthetic.labelled=0.5",
    "--data.synthetic.max_length=6",
    "--data.synthetic.features={text: 8, audio: 6, visual: 4}",
    "--model.hidden=8",
    "--model.projector=[16, 16]",
    "--pretraining.batch_size=16",
    "--pretraining.epochs=4",
    "--supervised.batch_size=8",
    "--supervised.epochs=6",
    "--supervised.lr=0.01",
    "--supervised.plateau_patience=0",
    "--run.accelerator=cpu",
    "--run.threads=1",
    "--run.tensorboard=false",
    "--run.checkpoint_seconds=0",
]


def mmfast(*arguments: str | Path) -> int:
    """The command line in this process; returns the exit status.

    Reports of experiments draw few resamples: they take most of the time of tiny ones, and their number changes
    nothing but the width of an interval.
    """
    with pytest.MonkeyPatch.context() as patch:
        if arguments[:1] == ("experiment",):
            patch.setattr("mmfast.studies.statistics.RESAMPLES", 100)
        return main([str(argument) for argument in arguments])


def train(command: str, folder: Path, *arguments: str | Path) -> Path:
    """A tiny run that must succeed; returns its folder."""
    assert mmfast(command, *TINY, f"--run.folder={folder}", *arguments) == 0
    return folder


def checkpoint(path: Path) -> dict:
    return torch.load(path, weights_only=True)


def assert_same(a, b, where: str = "") -> None:
    """Equal bit by bit, however nested."""
    assert type(a) is type(b), where
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and torch.equal(a, b), where
    elif isinstance(a, dict):
        assert list(a) == list(b), where
        for key in a:
            assert_same(a[key], b[key], f"{where}/{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{where}/{i}")
    else:
        assert a == b or (a != a and b != b), f"{where}: {a} {b}"
