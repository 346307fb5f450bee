"""Loss curves of a tiny run of each kind, by which a change of numbers shows, whatever the machine."""

from __future__ import annotations

import json

import pytest
import yaml
from training_help import TINY, mmfast

STAGES = [
    {"name": "pretraining", "objectives": {"two_views": 1.0}},
    {
        "name": "views",
        "objectives": {"many_views": 1.0},
        "epochs": 2,
        "optimiser": "adamw",
        "schedule": "cosine",
    },
    {"name": "supervised", "objectives": {"supervised": 1.0}, "frozen": {"encoder": 2}},
]
# As they came with torch 2.13 on a CPU.
CURVES = {
    "pretraining": [8.329587, 5.670508, 4.159892, 5.228811],
    "views": [51.18928, 47.28281],
    "supervised": [0.7967244, 0.7945499, 0.8183022, 0.7620152, 0.7647312, 0.753706],
}


def test_loss_curves(tmp_path):
    path = tmp_path / "method.yaml"
    path.write_text(yaml.safe_dump({"stages": STAGES}))
    assert mmfast("train", path, *TINY, f"--run.folder={tmp_path / 'run'}") == 0
    stages = json.loads((tmp_path / "run/result.json").read_text())["stages"]
    curves = {name: [epoch["train_loss"] for epoch in result["history"]] for name, result in stages.items()}
    for name, curve in curves.items():
        assert curve == pytest.approx(CURVES[name], rel=1e-4), name
