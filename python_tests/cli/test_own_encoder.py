"""The encoder of docs/training.md, in a folder of its own, through every command."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from killed import killed
from training_help import TINY, assert_same, checkpoint, mmfast

from mmfast.data import save, synthetic

PAGE = Path(__file__).parents[2] / "docs" / "training.md"
FLAGS = [flag for flag in TINY if not flag.startswith(("--data", "--model.hidden"))]
FLAGS += ["--data.path=data.npz", "--model.encoder=pooled.Pooled", "--model.width=5"]

# Stands in a folder of its own, as the installed program does, so that Python does not look where it is called.
PROGRAM = """
import os, signal, sys
from mmfast.__main__ import main

def die_at(number):
    from mmfast.training.module import StageModule
    step = StageModule.training_step
    def deadly(self, batch, batch_idx):
        if self.global_step == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return step(self, batch, batch_idx)
    StageModule.training_step = deadly

if __name__ == "__main__":
    if at := os.environ.get("DIE_AT"):
        die_at(int(at))
    sys.exit(main())
"""


@pytest.fixture
def program(tmp_path, monkeypatch):
    """Runs the program in the folder that holds ``pooled.py`` and ``data.npz``; returns the finished process."""
    monkeypatch.chdir(tmp_path)
    page = PAGE.read_text()
    (module,) = re.findall(r"^```python\n(# pooled\.py\n.*?)^```$", page, re.DOTALL | re.MULTILINE)
    assert sum(bool(line.strip()) for line in module.splitlines()) <= 20
    Path("pooled.py").write_text(module)
    features = {"text": 8, "audio": 6, "visual": 4}
    save(synthetic(120, max_length=6, features=features, task="multilabel"), "data.npz")
    script = tmp_path / "bin" / "mmfast-program"
    script.parent.mkdir()
    script.write_text(PROGRAM)

    def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
        command = [sys.executable, str(script), *arguments]
        here = {"PYTHONPATH": str(PAGE.parents[1]), "OMP_NUM_THREADS": "1", "PATH": ""}
        return subprocess.run(command, env=here | environment, capture_output=True, text=True)

    return run


def test_it_is_trained_killed_resumed_evaluated_predicted_and_embedded(program, capfd):
    done = program("pretrain", *FLAGS, "--run.folder=pre", DIE_AT="5")
    assert done.returncode == -signal.SIGKILL, done.stderr
    resumed = program("pretrain", "--config=pre/config.yaml", "--resume")
    assert resumed.returncode == 0, resumed.stderr
    assert mmfast("pretrain", *FLAGS, "--run.folder=whole") == 0
    assert_same(
        checkpoint(Path("pre/last.ckpt"))["state_dict"], checkpoint(Path("whole/last.ckpt"))["state_dict"]
    )
    assert checkpoint(Path("pre/last.ckpt"))["mmfast"]["config"]["model"]["encoder"] == "pooled.Pooled"

    given = [flag for flag in FLAGS if not flag.startswith("--model")] + ["--from=pre/last.ckpt"]
    killed(30, ["finetune", *given, "--run.folder=fine"])
    assert mmfast("finetune", *given, "--run.folder=fine", "--resume") == 0
    assert mmfast("finetune", *given, "--run.folder=fine-whole") == 0
    assert_same(*(checkpoint(Path(f"{name}/last.ckpt"))["state_dict"] for name in ("fine", "fine-whole")))
    assert checkpoint(Path("fine/best.ckpt"))["state_dict"]["head.linear.weight"].shape == (6, 15)
    assert mmfast("evaluate", "fine/best.ckpt", "--out=metrics.json") == 0
    assert mmfast("predict", "fine/best.ckpt", "--out=predictions.csv") == 0
    assert mmfast("embed", "fine/best.ckpt", "--out=vectors.npz") == 0, capfd.readouterr().err
    with np.load("vectors.npz") as file:
        assert file["fused"].shape == (120, 15) and file["modality/text"].shape == (120, 5)
        assert file["labels"].shape == (120, 6)
    header, *rows = Path("predictions.csv").read_text().splitlines()
    assert header.startswith("name,happy,happy truth,sad,") and len(rows) == 120
    assert {"f1_micro", "jaccard", "auc"} < json.loads(Path("metrics.json").read_text()).keys()


def test_workers_of_an_experiment_find_it(program):
    flags = [
        "--run.folder=all",
        "--experiment.seeds=[0, 1]",
        "--experiment.workers=2",
        "--experiment.baselines=false",
    ]
    short = ["--pretraining.epochs=1", "--supervised.epochs=1", "--experiment.methods=[FS, LE]"]
    done = program("experiment", *FLAGS, *flags, *short)
    assert done.returncode == 0, done.stderr
    assert "pooled.Pooled" in Path("all/report.md").read_text()


def test_without_its_module_a_checkpoint_says_what_is_missing(program, capfd):
    assert mmfast("finetune", *FLAGS, "--supervised.epochs=1", "--run.folder=fine") == 0
    Path("pooled.py").unlink()
    done = program("evaluate", "fine/best.ckpt")
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert "got pooled.Pooled: there is no module pooled in " in line
