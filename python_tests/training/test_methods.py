"""Methods: stages from a file, one folder each, refused before anything is trained, resumed exactly."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import yaml
from killed import killed
from training_help import TINY, assert_same, checkpoint, mmfast

from mmfast.training.checkpoint import LastCheckpoint
from mmfast.training.config import Config
from mmfast.training.methods import METHODS, stages_of
from mmfast.training.module import StageModule
from mmfast.training.stages import pretraining_stage, supervised_stage

# 57 // 16 steps in 4 epochs; ceil(29 / 8) in 4, two of them with a frozen encoder.
STAGES = [
    {"name": "pre", "objectives": {"two_views": 1.0}, "epochs": 4, "optimiser": "adamw", "weight_decay": 0.01,
     "schedule": "cosine", "warmup_steps": 2, "clip": 1.0, "ema": 0.9},
    {"name": "tune", "objectives": {"supervised": 1.0}, "epochs": 4, "frozen": {"encoder": 2}},
]  # fmt: skip


def method(folder: Path, stages=STAGES, **sections) -> Path:
    path = folder / "method.yaml"
    path.write_text(yaml.safe_dump({"stages": stages, **sections}))
    return path


def run(path: Path, folder: Path, *more: str) -> Path:
    assert mmfast("train", path, *TINY, f"--run.folder={folder}", *more) == 0
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    return run(method(folder), folder / "run")


def assert_same_outcome(one: Path, other: Path) -> None:
    for stage in ("pre", "tune"):
        for name in ("last.ckpt", "best.ckpt"):
            assert (one / stage / name).exists() == (other / stage / name).exists()
            if (one / stage / name).exists():
                a, b = checkpoint(one / stage / name), checkpoint(other / stage / name)
                assert_same(a["state_dict"], b["state_dict"], f"{stage} {name}")
                for key in ("optimizer_states", "mmfast schedule", "mmfast weights"):
                    assert_same(a.get(key), b.get(key), f"{stage} {name} {key}")
        a, b = (json.loads((folder / stage / "result.json").read_text()) for folder in (one, other))
        assert a["history"] == b["history"]
    assert (one / "tune/predictions.csv").read_bytes() == (other / "tune/predictions.csv").read_bytes()


def test_each_stage_has_a_folder_and_starts_from_the_one_before(whole, capsys):
    result = json.loads((whole / "result.json").read_text())
    assert list(result["stages"]) == ["pre", "tune"]
    handover = result["stages"]["tune"]["handover"]["encoder"]
    given = {n: t for n, t in checkpoint(whole / "pre/last.ckpt")["state_dict"].items() if "encoder." in n}
    assert handover["tensors"] == len(given)
    assert result["metrics"] == result["stages"]["tune"]["metrics"]
    # The encoder is frozen for two epochs of four, so that it moves in the end.
    best = checkpoint(whole / "tune/best.ckpt")
    moved = any(not best["state_dict"][name].equal(tensor) for name, tensor in given.items())
    assert moved == (best["epoch"] >= 2)
    assert mmfast("evaluate", whole / "tune/best.ckpt") == 0
    assert "test, 16 samples" in capsys.readouterr().out


def test_a_finished_stage_is_not_repeated_and_a_finished_method_neither(whole, tmp_path, monkeypatch):
    folder, path = tmp_path / "run", method(tmp_path)

    class Died(BaseException):
        pass

    trained, step = [], StageModule.training_step

    def deadly(self, batch, batch_idx):
        trained.append(self.stage.name)
        if self.stage.name == "tune" and self.global_step == 5:
            raise Died
        return step(self, batch, batch_idx)

    with monkeypatch.context() as patch:
        patch.setattr(StageModule, "training_step", deadly)
        with pytest.raises(Died):
            run(path, folder)
        patch.setattr(StageModule, "training_step", lambda s, *a: trained.append(s.stage.name) or step(s, *a))
        trained.clear()
        run(path, folder, "--resume")
        assert set(trained) == {"tune"}
        trained.clear()
        run(folder / "config.yaml", folder, "--resume")
        assert not trained
    assert_same_outcome(folder, whole)


# Within the warm-up and the cosine, with an average; before, at and after the encoder thaws at step 8.
@pytest.mark.parametrize("stage, at", [("pre", 1), ("pre", 7), ("tune", 6), ("tune", 8), ("tune", 13)])
def test_sigkill_in_any_stage_then_resume_is_bit_identical(stage, at, whole, tmp_path):
    path, folder = method(tmp_path), tmp_path / "run"
    arguments = ["train", str(path), *TINY, f"--run.folder={folder}"]
    killed(at, arguments, stage)
    assert not (folder / "result.json").exists()
    run(path, folder, "--resume")
    assert_same_outcome(folder, whole)


def test_resume_from_any_epoch_of_a_thawing_stage(whole, tmp_path, monkeypatch):
    """Only the checkpoint of the second epoch is there: the last one before the encoder learns."""

    class Died(BaseException):
        pass

    path, folder = method(tmp_path), tmp_path / "run"
    save, step = LastCheckpoint.on_train_epoch_end, StageModule.training_step

    def second(self, trainer, module):
        if module.stage.name == "pre" or trainer.current_epoch == 1:
            save(self, trainer, module)

    def deadly(self, batch, batch_idx):
        if self.stage.name == "tune" and self.global_step == 14:
            raise Died
        return step(self, batch, batch_idx)

    with monkeypatch.context() as patch:
        patch.setattr(LastCheckpoint, "on_train_epoch_end", second)
        patch.setattr(StageModule, "training_step", deadly)
        with pytest.raises(Died):
            run(path, folder)
    assert checkpoint(folder / "tune/last.ckpt")["epoch"] == 1
    run(path, folder, "--resume")
    assert_same_outcome(folder, whole)


def test_a_method_that_was_moved_goes_on(whole, tmp_path):
    folder, path = tmp_path / "before", method(tmp_path)
    run(path, folder)
    os.remove(folder / "result.json")
    os.remove(folder / "tune/result.json")
    os.rename(folder, tmp_path / "after")
    run(path, tmp_path / "after", "--resume")
    assert_same_outcome(tmp_path / "after", whole)


def test_the_table_of_methods_is_made_of_the_stages_of_pretrain_and_finetune():
    config = Config()
    stages = {name: stages_of(config, known.stages) for name, known in METHODS.items()}
    pre, tune, linear = pretraining_stage(config), supervised_stage(config), supervised_stage(config, True)
    wanted = {"FS": [tune], "SLE": [linear], "SSL": [pre, tune], "LE": [pre, linear]}
    assert stages == wanted


WRONG = {
    "no stages": ({"stages": []}, "stages must be a list of one stage or more"),
    "no name": ([{"objectives": {"supervised": 1}}], "stages[0]: name must be letters"),
    "two of a name": ([STAGES[1], STAGES[1]], "stages[1]: name must be another"),
    "unknown objective": (
        [{"name": "a", "objectives": {"supervized": 1}}],
        "stages[0] a: an objective must be one of supervised, two_views, many_views, auxiliary, got 'supervized'; "
        "did you mean supervised?",
    ),
    "weight": ([{"name": "a", "objectives": {"supervised": -1}}], "weight of supervised must be a positive number"),
    "unknown setting": ([{**STAGES[1], "epoch": 3}], "tune: there is no setting epoch; did you mean epochs?"),
    "setting of labels": ([{**STAGES[0], "linear_lr": 1.0}], "no setting linear_lr for a stage without labels"),
    "type": ([{**STAGES[1], "lr": "fast"}], "stages[0] tune: lr must be a number, got 'fast'"),
    "range": ([{**STAGES[1], "ema": 1.0}], "stages.tune.ema must be in [0, 1), got 1.0"),
    "one sample": ([{**STAGES[0], "batch_size": 1}], "stages.pre.batch_size must be at least 2"),
    "part to take": (
        [STAGES[0], {**STAGES[1], "take": ["projector"]}],
        "stages.tune.take must name parts of its network, encoder, head, got 'projector'",
    ),
    "part that is not there": (
        [STAGES[0], {**STAGES[1], "take": ["head"]}],
        "stages[1] tune: take must name parts of the stage before, encoder, projector, loss, got 'head'",
    ),
    "part to freeze": ([{**STAGES[1], "frozen": {"encodr": 1}}], "got 'encodr'; did you mean encoder?"),
    "all frozen": (
        [{**STAGES[1], "frozen": {"encoder": True, "head": 1}}],
        "stages.tune.frozen must leave a part that learns",
    ),
    "monitor": (
        [{**STAGES[1], "monitor": "valid_los"}],
        "stages.tune.monitor must be one of train_loss, valid_loss, which this stage logs, got 'valid_los'",
    ),
    "plateau of nothing": ([{**STAGES[0], "schedule": "plateau"}], "stages.pre.monitor must name a quantity"),
    "auxiliary": (
        [{"name": "a", "objectives": {"supervised": 1, "auxiliary": 1}}],
        "stages.a.objectives must fit the encoder, M3Encoder has no auxiliary terms",
    ),
    "section": ({"stages": STAGES, "modle": {}}, "there is no setting modle; did you mean model?"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_method_is_one_sentence_and_leaves_no_folder(case, tmp_path, capsys):
    stages, sentence = WRONG[case]
    path = tmp_path / "method.yaml"
    path.write_text(yaml.safe_dump(stages if isinstance(stages, dict) else {"stages": stages}))
    assert mmfast("train", path, *TINY, f"--run.folder={tmp_path / 'run'}") == 2
    error = capsys.readouterr().err
    assert sentence in error and error.startswith("mmfast: ") and error.count("\n") == 1, error
    assert not (tmp_path / "run").exists()


def test_a_method_needs_a_file(tmp_path, capsys):
    assert mmfast("train") == 2
    assert mmfast("train", tmp_path / "nowhere.yaml") == 2
    (tmp_path / "bad.yaml").write_text("stages: [")
    assert mmfast("train", tmp_path / "bad.yaml") == 2
    lines = capsys.readouterr().err.splitlines()
    assert "first word must be a YAML file with stages" in lines[0]
    assert "nowhere.yaml: No such file or directory" in lines[1]
    assert "bad.yaml: not YAML, line 1" in lines[2] and len(lines) == 3


def test_flags_come_before_the_file_and_the_file_before_the_preset(tmp_path):
    path = method(tmp_path, STAGES[1:], supervised={"lr": 0.5}, model={"hidden": 7})
    from mmfast.cli.arguments import train as arguments

    given = arguments([str(path), "--preset", "demo", "--model.hidden", "9"])
    assert given.settings.model.hidden == 9
    assert given.stages[0].settings.lr == 0.5 and given.stages[0].settings.patience == 8


def test_an_interrupted_method_says_how_to_go_on(tmp_path, monkeypatch, capsys):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("mmfast.training.runs.fit", interrupted)
    path, folder = method(tmp_path), tmp_path / "run"
    assert mmfast("train", path, *TINY, f"--run.folder={folder}") == 130
    assert f"go on with: mmfast train {folder / 'config.yaml'} --resume" in capsys.readouterr().err


def test_parts_beside_the_encoder_are_taken_over_where_they_are_named(tmp_path):
    stages = [
        {"name": "first", "objectives": {"supervised": 1}, "epochs": 1},
        {
            "name": "second",
            "objectives": {"supervised": 1},
            "epochs": 1,
            "take": ["encoder", "head"],
            "lr": 1e-30,
        },
    ]
    folder = run(method(tmp_path, stages), tmp_path / "run")
    assert list(json.loads((folder / "second/result.json").read_text())["handover"]) == ["encoder", "head"]
    first, second = (checkpoint(folder / name / "best.ckpt")["state_dict"] for name in ("first", "second"))
    assert_same(first, second)
