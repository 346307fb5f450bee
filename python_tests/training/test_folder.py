"""A run's folder is taken once everything is accepted, and holds a run once there is something to lose."""

from __future__ import annotations

import pytest
from training_help import TINY, mmfast, train

SHORT = {
    "pretrain": ["--pretraining.epochs=1"],
    "finetune": ["--supervised.epochs=1"],
    "experiment": [
        "--supervised.epochs=1",
        "--experiment.methods=[FS]",
        "--experiment.seeds=[0]",
        "--experiment.workers=1",
    ],
}
# What only the data, a network, a view or the device can tell; what each command builds it is told by.
WRONG = {
    "--data.path=nowhere": SHORT,
    "--data.fold=2": SHORT,
    "--model.hidden=0": SHORT,
    "--model.hidden=1000000": SHORT,
    "--model.hidden=1000000000000": SHORT,
    "--model.projector=[16, 1000000000000]": ("pretrain",),
    "--model.masking=2": SHORT,
    "--run.precision=16-mixed": SHORT,
    "--run.accelerator=mps": SHORT,
    "--run.threads=1000000000": SHORT,
    "--supervised.head_dropout=1": ("finetune", "experiment"),
    "--data.label_share=0.001": ("finetune", "experiment"),
    "--data.synthetic.labelled=0": ("finetune", "experiment"),
    "--from=nowhere.ckpt": ("finetune",),
    "--augmentation.preset=blur": ("pretrain",),
    "--augmentation.view_a=[{name: seqaug, alpha: {texts: 0.1}}]": ("pretrain",),
}


@pytest.mark.parametrize("command", SHORT)
def test_a_refused_command_leaves_no_folder_so_that_the_right_one_works(command, tmp_path, capsys):
    folder = tmp_path / "run"
    for wrong, commands in WRONG.items():
        if command in commands:
            assert mmfast(command, *TINY, *SHORT[command], f"--run.folder={folder}", wrong) == 2, wrong
            assert not folder.exists(), wrong
    train(command, folder, *SHORT[command])


def test_an_experiment_refuses_what_only_its_pretraining_would(tmp_path):
    folder = tmp_path / "run"
    arguments = [
        *TINY,
        f"--run.folder={folder}",
        "--experiment.methods=[FS, LE]",
        "--augmentation.preset=blur",
    ]
    assert mmfast("experiment", *arguments) == 2
    assert not folder.exists()


@pytest.mark.parametrize(
    ("command", "lr"), [("pretrain", "--pretraining.lr"), ("finetune", "--supervised.lr")]
)
def test_a_run_without_a_checkpoint_is_started_anew_with_other_settings(command, lr, tmp_path, capsys):
    assert mmfast(command, *TINY, *SHORT[command], f"--run.folder={tmp_path}", f"{lr}=1e30") == 2
    assert f"at step 1; lower {lr[2:]}, 1e+30 now" in capsys.readouterr().err
    train(command, tmp_path, *SHORT[command], f"{lr}=1e-3")
    assert mmfast(command, *TINY, *SHORT[command], f"--run.folder={tmp_path}", f"{lr}=1e-3") == 2
    assert "holds a run already" in capsys.readouterr().err


def test_an_experiment_without_a_checkpoint_is_started_anew_with_other_settings(tmp_path):
    arguments = [*TINY, f"--run.folder={tmp_path}", *SHORT["experiment"], "--experiment.baselines=false"]
    assert mmfast("experiment", *arguments, "--supervised.lr=1e30") == 2
    assert mmfast("experiment", *arguments, "--supervised.lr=1e-3") == 0


def test_a_configuration_of_the_users_is_not_overwritten(tmp_path, capsys):
    mine = tmp_path / "config.yaml"
    mine.write_text("# mine\npretraining: {epochs: 1}\n")
    assert mmfast("pretrain", *TINY, f"--config={mine}", f"--run.folder={tmp_path}") == 2
    assert "holds a run already" in capsys.readouterr().err
    assert mine.read_text().startswith("# mine")
