"""A run that is killed and resumed ends as the run that was not."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest
from killed import killed
from training_help import TINY, assert_same, checkpoint, mmfast, train

from mmfast import files
from mmfast.training.checkpoint import LastCheckpoint
from mmfast.training.module import RAW, SCHEDULE, StageModule

# Steps of the whole run: 57 // 16 batches in 4 epochs; ceil(29 / 8) in 6.
STEPS = {"pretrain": 12, "finetune": 24}


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("whole")
    pre = train("pretrain", folder / "pretrain")
    return {
        "pretrain": pre,
        "finetune": train("finetune", folder / "finetune", f"--from={pre / 'last.ckpt'}"),
    }


def options(command: str, whole: dict[str, Path]) -> list[str]:
    return [f"--from={whole['pretrain'] / 'last.ckpt'}"] if command == "finetune" else []


def assert_same_run(one: Path, other: Path) -> None:
    """Weights, optimiser, schedule, early stopping, best epoch, history and predictions are equal."""
    for name in ("last.ckpt", "best.ckpt"):
        assert (one / name).exists() == (other / name).exists()
        if not (one / name).exists():
            continue
        a, b = checkpoint(one / name), checkpoint(other / name)
        for key in ("state_dict", "optimizer_states", SCHEDULE, RAW, "epoch", "global_step"):
            assert_same(a.get(key), b.get(key), key)
        for callback, state in a.get("callbacks", {}).items():
            for key, value in state.items():
                if key not in ("dirpath", "best_k_models", "current_score") and not key.endswith("_path"):
                    assert_same(value, b["callbacks"][callback][key], f"{callback} {key}")
    predictions = [
        folder / "predictions.csv" for folder in (one, other) if (folder / "predictions.csv").exists()
    ]
    assert len({path.read_bytes() for path in predictions}) == (0 if not predictions else 1)
    assert len(predictions) in (0, 2)


@pytest.mark.parametrize("command", ["pretrain", "finetune"])
def test_sigkill_at_a_random_step_then_resume_is_bit_identical(command, whole, tmp_path):
    at = random.SystemRandom().randrange(1, STEPS[command])
    print("killed at step", at)  # shown when the test fails
    arguments = [command, *TINY, f"--run.folder={tmp_path}", *options(command, whole)]
    killed(at, arguments)
    assert not (tmp_path / "result.json").exists()
    train(command, tmp_path, *options(command, whole), "--resume")
    assert_same_run(tmp_path, whole[command])


class Died(BaseException):
    """Stands for a kill where a whole process for each would be too slow."""


@pytest.mark.parametrize("command", ["pretrain", "finetune"])
@pytest.mark.parametrize("save", [2, 4])
@pytest.mark.parametrize("moment", ["half", "after"])
def test_death_around_any_checkpoint_write(command, save, moment, whole, tmp_path, monkeypatch):
    write, seen = files.write_atomically, []

    def deadly(path, data):
        seen.append(path)
        if len(seen) == save:
            if moment == "half":
                Path(path).with_name(f".{Path(path).name}.tmp").write_bytes(bytes(data)[: len(data) // 2])
            if moment == "after":
                write(path, data)
            raise Died
        write(path, data)

    with monkeypatch.context() as patch:
        patch.setattr("mmfast.training.checkpoint.write_atomically", deadly)
        with pytest.raises(Died):
            train(command, tmp_path, *options(command, whole))
    train(command, tmp_path, *options(command, whole), "--resume")
    assert_same_run(tmp_path, whole[command])


def dies_at(monkeypatch, at: int) -> None:
    step = StageModule.training_step

    def deadly(self, batch, batch_idx):
        if self.global_step == at:
            raise Died
        return step(self, batch, batch_idx)

    monkeypatch.setattr(StageModule, "training_step", deadly)


def test_resume_without_any_checkpoint_starts_anew(whole, tmp_path, monkeypatch):
    rare = [*options("finetune", whole), "--run.checkpoint_seconds=1e9"]
    with monkeypatch.context() as patch:
        dies_at(patch, 14)
        with pytest.raises(Died):
            train("finetune", tmp_path, *rare)
    assert (tmp_path / "best.ckpt").exists() and not (tmp_path / "last.ckpt").exists()
    train("finetune", tmp_path, *rare, "--resume")
    assert_same_run(tmp_path, whole["finetune"])


def test_resume_from_before_the_best_epoch(tmp_path, monkeypatch):
    slow = ["--supervised.lr=1e-4"]
    train("finetune", tmp_path / "whole", *slow)
    with monkeypatch.context() as patch:
        dies_at(patch, 18)
        second = lambda self, trainer, _: trainer.current_epoch != 1 or trainer.save_checkpoint(self.path)  # noqa: E731
        patch.setattr(LastCheckpoint, "on_train_epoch_end", second)
        with pytest.raises(Died):
            train("finetune", tmp_path / "resumed", *slow)
    best, last = (checkpoint(tmp_path / "resumed" / name)["epoch"] for name in ("best.ckpt", "last.ckpt"))
    assert (best, last) == (3, 1)
    train("finetune", tmp_path / "resumed", *slow, "--resume")
    assert_same_run(tmp_path / "resumed", tmp_path / "whole")


def test_resume_of_linear_evaluation(whole, tmp_path, monkeypatch):
    frozen = [*options("finetune", whole), "--freeze=true"]
    train("finetune", tmp_path / "whole", *frozen)
    with monkeypatch.context() as patch:
        dies_at(patch, 10)
        with pytest.raises(Died):
            train("finetune", tmp_path / "resumed", *frozen)
    train("finetune", tmp_path / "resumed", *frozen, "--resume")
    assert_same_run(tmp_path / "resumed", tmp_path / "whole")


def test_resume_of_a_complete_run_changes_nothing(whole):
    before = {path: path.read_bytes() for path in whole["finetune"].iterdir() if path.is_file()}
    assert mmfast("finetune", f"--config={whole['finetune'] / 'config.yaml'}", "--resume") == 0
    assert before == {path: path.read_bytes() for path in whole["finetune"].iterdir() if path.is_file()}


def test_resume_after_the_last_epoch_but_before_the_result(whole, tmp_path, monkeypatch):
    def dies(*_):
        raise Died

    with monkeypatch.context() as patch:
        patch.setattr("mmfast.training.runs.save_result", dies)
        with pytest.raises(Died):
            train("finetune", tmp_path, *options("finetune", whole))
    steps = []
    monkeypatch.setattr(StageModule, "training_step", lambda *a: steps.append(a))
    train("finetune", tmp_path, *options("finetune", whole), "--resume")
    assert not steps
    assert_same_run(tmp_path, whole["finetune"])


def test_resume_in_a_folder_that_was_moved(tmp_path, monkeypatch):
    fast = ["--supervised.lr=0.1"]
    train("finetune", tmp_path / "whole", *fast)
    with monkeypatch.context() as patch:
        dies_at(patch, 18)
        with pytest.raises(Died):
            train("finetune", tmp_path / "before", *fast)
    os.rename(tmp_path / "before", tmp_path / "after")
    # So that the best of the first sitting counts.
    assert checkpoint(tmp_path / "whole/best.ckpt")["epoch"] < 4
    train("finetune", tmp_path / "after", *fast, "--resume")
    assert_same_run(tmp_path / "after", tmp_path / "whole")
