"""The command line: what it writes, and one sentence with status 2 for whatever a user gets wrong."""

from __future__ import annotations

import csv
import importlib
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from training_help import TINY, mmfast, train

from mmfast import __version__
from mmfast.cli.main import COMMANDS
from mmfast.data import MultimodalData, MultimodalDataset, save, synthetic
from mmfast.metrics import regression_metrics

FEATURES = {"text": 8, "audio": 6, "visual": 4}


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A folder with a pre-training run, a fine-tuning run and a few files."""
    folder = tmp_path_factory.mktemp("made")
    train("pretrain", folder / "pre", "--pretraining.epochs=1")
    train("finetune", folder / "fine", f"--from={folder / 'pre/last.ckpt'}", "--supervised.epochs=2")
    good = (folder / "fine/best.ckpt").read_bytes()
    (folder / "truncated.ckpt").write_bytes(good[: len(good) // 2])
    torch.save({"state_dict": torch.nn.Linear(2, 2).state_dict()}, folder / "foreign.ckpt")
    (folder / "file.txt").write_text("hello\n")
    data = synthetic(80, max_length=6, features=FEATURES)
    save(data, folder / "data.npz")
    (folder / "truncated.npz").write_bytes((folder / "data.npz").read_bytes()[:2000])
    save(data.train.with_labels(np.full(len(data.train), np.nan)), folder / "unlabelled.npz")
    save(MultimodalData(train=MultimodalDataset.empty(FEATURES), test=data.test), folder / "no_train.npz")
    save(replace(data, valid=MultimodalDataset.empty(FEATURES)), folder / "no_valid.npz")
    save(synthetic(80, max_length=6, features={"text": 8, "pose": 5}), folder / "pose.npz")
    save(replace(data, train=data.train.subset([complete_sample(data.train)])), folder / "one.npz")
    return folder


def complete_sample(dataset: MultimodalDataset) -> int:
    """Index of a sample that has every modality."""
    return int(torch.stack([dataset.lengths(m) for m in dataset.modalities]).amin(0).argmax())


# arguments ({made} is the folder above, {new} an unused one) and what the sentence must hold
WRONG = {
    "no such command": (["trian"], "got 'trian'; did you mean train?"),
    "unknown flag": (["pretrain", "--data.pth=x"], "there is no --data.pth; did you mean --data.path?"),
    "unknown flag of evaluate": (["evaluate", "x.ckpt", "--fast"], "evaluate: there is no --fast"),
    "missing argument": (["evaluate"], "the following arguments are required: checkpoint"),
    "wrong type": (["pretrain", "--run.seed=many"], "--run.seed must be a whole number, got 'many'"),
    "out of range": (["pretrain", "--data.label_share=0"], "data.label_share must be in (0, 1], got 0"),
    "batch of one": (["pretrain", "--pretraining.batch_size=1"], "pretraining.batch_size must be at least 2"),
    "negative weight": (["pretrain", "--loss.lambd=-1"], "loss.lambd must be finite and at least 0, got -1"),
    "no number": (["pretrain", "--pretraining.lr=nan"], "pretraining.lr"),
    "no width": (["pretrain", "--model.hidden=0"], "hidden must be at least 1, got 0"),
    "all dropped": (["finetune", "--model.dropout=1"], "dropout must be in [0, 1), got 1"),
    "no projector": (["pretrain", "--model.projector=[]"], "Projector: "),
    "too few to split": (
        ["pretrain", "--data.synthetic.samples=3"],
        "samples must be an integer >= 10, got 3",
    ),
    "no modality": (
        ["pretrain", "--data.synthetic.features={{}}"],
        "features must name at least one modality",
    ),
    "a step without name": (["pretrain", "--augmentation.view_a=[{{p: 1}}]"], "each step needs a name"),
    "a name that is none": (
        ["pretrain", "--augmentation.view_a=[{{name: [noise]}}]"],
        "a step must be one of noise",
    ),
    "a step that is none": (["pretrain", "--augmentation.view_a=[noise]"], "must be a list of mappings"),
    "an argument that is no number": (
        ["pretrain", "--augmentation.view_a=[{{name: noise, sigma: loud}}]"],
        "GaussianNoise: sigma must be",
    ),
    "an argument that is none": (
        ["pretrain", "--augmentation.view_a=[{{name: noise, apply: [all]}}]"],
        "apply must be one of",
    ),
    "unknown preset": (
        ["pretrain", "--preset=huge"],
        "--preset must be one of demo, small, thesis, got 'huge'",
    ),
    "no such configuration": (["pretrain", "--config=none.yaml"], "configuration none.yaml: No such file"),
    "configuration that is none": (
        ["pretrain", "--config={made}/file.txt"],
        "file.txt: it must hold settings",
    ),
    "no such data": (["pretrain", "--data.path={made}/none"], "none does not exist"),
    "foreign data": (["pretrain", "--data.path={made}/file.txt"], "is of no known kind"),
    "truncated data": (["pretrain", "--data.path={made}/truncated.npz"], "truncated"),
    "nothing to train on": (["pretrain", "--data.path={made}/no_train.npz"], "there is nothing to train on"),
    "one sample": (
        ["pretrain", "--data.path={made}/one.npz"],
        "there must be at least 2 training samples for a step, got 1",
    ),
    "nothing to validate with": (
        ["finetune", "--data.path={made}/no_valid.npz"],
        "no labelled samples in the valid split",
    ),
    "no labels": (["finetune", "--data.path={made}/unlabelled.npz"], "nothing to train on"),
    "alpha outside [0, 1]": (
        ["pretrain", "--augmentation.view_a=[{{name: seqaug, alpha: 1.5}}]"],
        "alpha must be in [0, 1], got 1.5",
    ),
    "q outside [0, 1]": (
        ["pretrain", "--augmentation.view_b=[{{name: masking, q: -1}}]"],
        "q must be in [0, 1], got -1",
    ),
    "unknown augmentation": (["pretrain", "--augmentation.preset=blur"], "must be one of noise, masking"),
    "unknown modality in a chain": (
        ["pretrain", "--augmentation.view_a=[{{name: seqaug, alpha: {{texts: 0.1}}}}]"],
        "must have a value for modality 'text'",
    ),
    "unknown modality in data": (
        ["pretrain", "--augmentation.preset=seqaug", "--data.path={made}/pose.npz"],
        "no alpha for the modality 'pose'",
    ),
    "other modalities than the checkpoint": (
        ["evaluate", "{made}/fine/best.ckpt", "--data={made}/pose.npz"],
        "was trained on the features text 8, audio 6, visual 4, the data have text 8, pose 5",
    ),
    "no such checkpoint": (["evaluate", "{made}/none.ckpt"], "no such file"),
    "truncated checkpoint": (["evaluate", "{made}/truncated.ckpt"], "truncated, or not a checkpoint"),
    "foreign checkpoint": (["predict", "{made}/foreign.ckpt"], "not written by mmfast"),
    "checkpoint of another kind": (["evaluate", "{made}/pre/last.ckpt"], "must be of a supervised run"),
    "weights of another kind": (["finetune", "--from={made}/fine/best.ckpt"], "must be of a pretraining run"),
    "another architecture": (
        ["finetune", "--from={made}/pre/last.ckpt", "--model.hidden=16"],
        "another architecture, encoder.recurrent.text.lstm.weight_ih_l0 is (32, 8) there and (64, 8) here",
    ),
    "nothing to resume": (["pretrain", "--resume"], "there is no run to resume"),
    "folder in use": (
        ["pretrain", "--run.folder={made}/pre"],
        "holds a run already; go on with it by --resume",
    ),
    "other settings": (
        ["pretrain", "--run.folder={made}/pre", "--resume", "--pretraining.epochs=1", "--run.seed=9"],
        "its run has run.seed = 0, got 9",
    ),
    "folder that is a file": (["pretrain", "--run.folder={made}/file.txt"], "file.txt: cannot be used"),
    "nowhere to write": (["predict", "{made}/fine/best.ckpt", "--out={made}/file.txt/x.csv"], "cannot save"),
    "no labels to evaluate on": (
        ["evaluate", "{made}/fine/best.ckpt", "--data={made}/unlabelled.npz"],
        "holds no labelled samples",
    ),
    "an empty split": (
        ["predict", "{made}/fine/best.ckpt", "--split=unlabelled"],
        "the unlabelled split holds no samples",
    ),
    "inspect nothing": (["inspect", "{made}/none"], "does not exist"),
    "inspect something else": (["inspect", "{made}/file.txt"], "is of no known kind"),
    "unknown accelerator": (
        ["pretrain", "--run.accelerator=abacus"],
        "must be one of auto, cpu, cuda, mps, got 'abacus'",
    ),
    "unknown precision": (["pretrain", "--run.precision=7"], "--run.precision must be one of 32-true"),
    "no such device": (
        ["pretrain", "--run.accelerator=mps"],
        "config: run.accelerator must be a device that this machine has, got mps",
    ),
    "a precision that the device lacks": (
        ["finetune", "--run.precision=16-mixed"],
        "config: run.precision must be one that the device cpu has, such as bf16-mixed, got 16-mixed",
    ),
    "more threads than any machine has": (
        ["pretrain", "--run.threads=1000000000"],
        "config: run.threads must be in [1, 4096], got 1000000000",
    ),
    "a fold of data that have none": (
        ["finetune", "--data.fold=1"],
        "config: data.fold must be 0 for data synthetic, which ask for no cross-validation, got 1",
    ),
}
TRAINING = ("pretrain", "finetune", "experiment")


def complete(arguments: list[str], made: Path, new: Path) -> list[str]:
    given = [argument.format(made=made, new=new) for argument in arguments]
    if given[0] not in TRAINING:
        return given
    folder = [] if any(a.startswith("--run.folder") for a in given) else [f"--run.folder={new}"]
    return [given[0], *TINY, *folder, *given[1:]]


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_is_one_sentence_with_status_2(case, made, tmp_path, capfd):
    arguments, sentence = WRONG[case]
    new = tmp_path / "new"
    status = mmfast(*complete(arguments, made, new))
    out, error = capfd.readouterr()
    assert status == 2, (out, error)
    assert error.startswith("mmfast: ") and error.endswith("\n") and error.count("\n") == 1, error
    assert sentence in error
    assert "Traceback" not in error
    assert not new.exists()


def test_real_process_wrong_input(made):
    done = subprocess.run(
        [sys.executable, "-m", "mmfast", "evaluate", str(made / "truncated.ckpt")],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("mmfast: checkpoint ")
    assert done.stdout == ""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interruption_exits_130_and_says_how_to_go_on(number, tmp_path):
    arguments = ["pretrain", *TINY, f"--run.folder={tmp_path}", "--pretraining.epochs=2000"]
    process = subprocess.Popen(
        [sys.executable, "-m", "mmfast", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # Shells let what they start in the background ignore SIGINT, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 120
    while not (tmp_path / "last.ckpt").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(number)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130, error
    again = f"mmfast pretrain --config {tmp_path / 'config.yaml'} --resume"
    assert error == f"mmfast: interrupted; go on with: {again}\n"


def test_how_to_go_on_is_quoted_and_only_said_of_a_run_that_has_begun(tmp_path, capsys, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    folder = tmp_path / "my  run's"
    for place in ("mmfast.cli.train.load_data", "mmfast.training.runs.fit"):
        with monkeypatch.context() as patch:
            patch.setattr(place, interrupted)
            assert mmfast("pretrain", *TINY, f"--run.folder={folder}") == 130
        error = capsys.readouterr().err
        if place.endswith("load_data"):
            assert error == "mmfast: interrupted\n"
    words = shlex.split(error.partition("go on with: ")[2])
    assert words == ["mmfast", "pretrain", "--config", str(folder / "config.yaml"), "--resume"]
    assert mmfast(*words[1:]) == 0


def test_a_second_process_in_one_folder_is_refused(made, tmp_path, capfd):
    import fcntl

    tmp_path.joinpath("run").mkdir()
    with open(tmp_path / "run/.lock", "w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        assert mmfast("pretrain", *TINY, f"--run.folder={tmp_path / 'run'}") == 2
    assert "another process is running in it" in capfd.readouterr().err


def test_missing_requirement_names_the_command_that_installs_it(monkeypatch, capsys):
    for name in ("jsonargparse", "lightning.pytorch"):

        def missing(_, name=name):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

        with monkeypatch.context() as patch:
            patch.setattr(importlib, "import_module", missing)
            assert mmfast("pretrain") == 2
        error = capsys.readouterr().err
        assert (
            error == f"mmfast: pretrain needs {name}, which is not installed: pip install 'mmfast[train]'\n"
        )
    with monkeypatch.context() as patch:
        patch.setattr(importlib, "import_module", lambda _: __import__("no_such_module_of_ours"))
        with pytest.raises(ModuleNotFoundError):
            mmfast("pretrain")


def test_help_lists_every_command_and_loads_no_training(tmp_path):
    code = (
        "import sys; from mmfast.cli.main import main; status = main(['--help'] if len(sys.argv) > 1 else []);"
        "assert not {'torch', 'lightning', 'jsonargparse', 'h5py', 'matplotlib'} & set(sys.modules); sys.exit(status)"
    )
    for flag in ([], ["--help"]):
        done = subprocess.run([sys.executable, "-c", code, *flag], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert all(command in done.stdout for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_each_command(command, capsys):
    with pytest.raises(SystemExit) as done:
        mmfast(command, "--help")
    assert done.value.code == 0
    assert f"mmfast {command}" in capsys.readouterr().out


def test_version_and_info(capsys):
    assert mmfast("--version") == 0
    assert capsys.readouterr().out == f"{__version__}\n"
    assert mmfast("info") == 0
    assert "torch" in capsys.readouterr().out


def test_inspect(made, capsys):
    assert mmfast("inspect", made / "data.npz") == 0
    out = capsys.readouterr().out
    assert "train: 57 samples" in out and "audio" in out


def test_evaluate_equals_metrics_of_the_predictions(made, tmp_path, capsys):
    for data in ([], [f"--data={made / 'data.npz'}"]):
        metrics, table = tmp_path / "metrics.json", tmp_path / "predictions.csv"
        assert mmfast("evaluate", made / "fine/best.ckpt", *data, f"--out={metrics}") == 0
        assert mmfast("predict", made / "fine/best.ckpt", *data, "--split=test", f"--out={table}") == 0
        with open(table, newline="") as file:
            rows = list(csv.DictReader(file))
        p, y = ([np.float32(row[key]) for row in rows] for key in ("prediction", "truth"))
        by_hand = {
            "mae": np.mean(np.abs(np.subtract(p, y, dtype=np.float64))),
            "corr": np.corrcoef(np.float64(p), np.float64(y))[0, 1],
            "acc7": np.mean(np.round(np.clip(p, -3, 3)) == np.round(np.clip(y, -3, 3))),
        }
        written = json.loads(metrics.read_text())
        assert written == regression_metrics(p, y)
        for name, value in by_hand.items():
            assert written[name] == pytest.approx(value, rel=1e-6)
        assert f"mae              {written['mae']:.4f}" in capsys.readouterr().out
    own = json.loads((made / "fine/result.json").read_text())["metrics"]
    assert mmfast("evaluate", made / "fine/best.ckpt", f"--out={metrics}") == 0
    assert json.loads(metrics.read_text()) == own


def test_predict_without_labels(made, tmp_path):
    table = tmp_path / "p.csv"
    assert (
        mmfast("predict", made / "fine/best.ckpt", f"--data={made / 'unlabelled.npz'}", f"--out={table}") == 0
    )
    with open(table, newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 57
    assert all(row["truth"] == "" and np.isfinite(float(row["prediction"])) for row in rows)
    assert len({row["name"] for row in rows}) == 57


def test_predict_all_is_every_sample_once(made, tmp_path):
    table = tmp_path / "p.csv"
    assert mmfast("predict", made / "fine/best.ckpt", f"--out={table}") == 0
    with open(table, newline="") as file:
        names = [row["name"] for row in csv.DictReader(file)]
    assert len(names) == len(set(names)) == 80


def test_a_closed_pipe_is_no_error(made):
    words = shlex.join([sys.executable, "-m", "mmfast", "inspect", str(made / "data.npz")])
    command = f"{words} | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_logs_are_written(made):
    with open(made / "fine/logs/version_0/metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert {"train_loss", "valid_loss", "lr", "epoch"} <= set(rows[0])


def test_tensorboard_files_on_request(tmp_path):
    train("pretrain", tmp_path, "--pretraining.epochs=1", "--run.tensorboard=true")
    assert list(tmp_path.rglob("events.out.tfevents.*"))


def test_output_is_quiet(made, tmp_path, capfd):
    """No advertisement, hint or warning of a library reaches the user."""
    train("finetune", tmp_path, "--supervised.epochs=1")
    out, error = capfd.readouterr()
    assert error == ""
    assert out.startswith("trained on 28 samples for 1 epochs (4 steps), best validation MAE")
    assert os.fspath(tmp_path / "best.ckpt") in out
