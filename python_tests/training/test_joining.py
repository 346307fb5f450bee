"""Processes that Lightning or torchrun started: they meet, speak with one voice, and end together."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from training_help import TINY, assert_same, checkpoint, mmfast

from mmfast.errors import UserError
from mmfast.training import joining
from mmfast.training.config import RunConfig
from mmfast.training.launched import as_launched, several

PATIENCE = 100
# A script of the user's, which Lightning starts again for the second process: there a step ends the process.
ENDING = """
import os, signal, sys
from mmfast.cli.main import main
from mmfast.errors import UserError
from mmfast.training.module import StageModule
step, me = StageModule.training_step, os.environ.get("LOCAL_RANK", "0")
def ending(self, batch, batch_idx):
    if me == os.environ["WHO"] and self.global_step == 8:
        exec(os.environ["HOW"])
    return step(self, batch, batch_idx)
StageModule.training_step = ending
if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
"""


def launch(words, folder, *arguments, **environment):
    """A command in a session of its own, with these settings for the tiny runs."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.Popen(
        [sys.executable, *map(str, words), *TINY, f"--run.folder={folder}", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        start_new_session=True,
    )


def ended(process, patience=PATIENCE):
    """Exit status and what was printed, of a process that must end, with all that it started."""
    try:
        out, err = process.communicate(timeout=patience)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        pytest.fail(f"hangs: {process.communicate()}")
    until = time.monotonic() + 10
    while left := alive(process.pid):
        if time.monotonic() > until:
            os.killpg(process.pid, signal.SIGKILL)
            pytest.fail(f"processes live on: {left}")
        time.sleep(0.1)
    return process.returncode, out, err


def alive(session):
    """Processes of a session that have not ended, be they waited for or not."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, its = stat.read_text().rpartition(")")[2].split()[:4]
        except OSError:
            continue
        if int(its) == session and state not in "ZX":
            found.append(stat.parent.name)
    return found


def said(err):
    """Our own sentences."""
    return [line for line in err.splitlines() if "mmfast: " in line]


@pytest.fixture
def script(tmp_path):
    path = tmp_path / "ending.py"
    path.write_text(ENDING)
    return path


KILLED, FAILED = "os.kill(os.getpid(), signal.SIGKILL)", "raise UserError('batch: a value is wrong')"
AGAIN = "go on with: mmfast pretrain --config {}/config.yaml --resume"


@pytest.mark.parametrize(
    ("who", "how", "status", "sentence"),
    [
        pytest.param("0", KILLED, -9, f"mmfast: process 0 of 2 died; {AGAIN}", marks=pytest.mark.rotation(0)),
        pytest.param("1", FAILED, 2, "mmfast: batch: a value is wrong", marks=pytest.mark.rotation(1)),
        pytest.param("0", FAILED, 2, "mmfast: batch: a value is wrong", marks=pytest.mark.rotation(2)),
        pytest.param(
            "1", "raise RuntimeError('a fault')", 1, "mmfast: process 1 of 2 failed, its error stands above",
            marks=pytest.mark.rotation(3),
        ),
    ],
)  # fmt: skip
def test_what_ends_one_process_ends_both_with_one_sentence(who, how, status, sentence, script, tmp_path):
    folder = tmp_path / "run"
    began = launch([script, "pretrain"], folder, "--run.devices=2", WHO=who, HOW=how)
    found, out, err = ended(began)
    assert (found, said(err)) == (status, [sentence.format(folder)]), err
    assert ("fault" in how) == ("RuntimeError: a fault" in err) == ("Traceback" in err)
    assert out.count("warning: 12 optimiser steps") == 1
    assert checkpoint(folder / "last.ckpt")["global_step"] == 6 and not (folder / "result.json").exists()


SIGNALS = {
    # signal, to whom: the whole group, as a terminal does, the first process, the second.
    "Ctrl-C": (signal.SIGINT, "group"),
    "SIGTERM to the first": (signal.SIGTERM, "first"),
    "SIGTERM to the second": (signal.SIGTERM, "second"),
}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.rotation(i)) for i, n in enumerate(SIGNALS)]
)
def test_an_interruption_ends_both_processes_with_the_usual_sentence(name, tmp_path):
    number, whom = SIGNALS[name]
    began = launch(["-m", "mmfast", "pretrain"], tmp_path, "--run.devices=2", "--pretraining.epochs=100000")
    until = time.monotonic() + PATIENCE
    while not (tmp_path / "last.ckpt").exists() and time.monotonic() < until:
        time.sleep(0.1)
    second = Path(f"/proc/{began.pid}/task/{began.pid}/children").read_text().split()[0]
    {
        "group": lambda: os.killpg(began.pid, number),
        "first": lambda: os.kill(began.pid, number),
        "second": lambda: os.kill(int(second), number),
    }[whom]()
    status, _, err = ended(began, 30)
    again = f"mmfast: interrupted; go on with: mmfast pretrain --config {tmp_path}/config.yaml --resume"
    assert (status, err.splitlines()) == (130, [again])


TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "mmfast", "pretrain"]
LIGHTNING = ["-m", "mmfast", "pretrain"]


def test_killed_under_lightning_and_resumed_under_torchrun_it_is_the_run_that_was_not(script, tmp_path):
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    began = launch([script, "pretrain"], killed, "--run.devices=2", WHO="1", HOW=KILLED)
    status, out, err = ended(began)
    assert (status, said(err)) == (1, [f"mmfast: process 1 of 2 died; {AGAIN.format(killed)}"]), err
    assert out.count("warning: 12 optimiser steps") == 1
    assert checkpoint(killed / "last.ckpt")["global_step"] == 6 and not (killed / "result.json").exists()
    for began in (launch(TORCHRUN, killed, "--resume"), launch(LIGHTNING, whole, "--run.devices=2")):
        status, out, err = ended(began)
        assert status == 0 and not said(err), err
        assert [line.partition(" ")[0] for line in out.splitlines()] == ["warning:", "pre-trained"]
    one, other = (checkpoint(folder / "last.ckpt") for folder in (whole, killed))
    for key in ("state_dict", "optimizer_states", "epoch", "global_step"):
        assert_same(one[key], other[key], key)
    names = {".lock", "config.yaml", "environment.yaml", "inputs.yaml", "last.ckpt", "logs", "result.json"}
    assert {path.name for path in whole.iterdir()} == names
    assert [path.name for path in (whole / "logs").iterdir()] == ["version_0"]
    assert "devices: 2" in (whole / "config.yaml").read_text()
    assert "processes: 2" in (whole / "environment.yaml").read_text()


@pytest.mark.parametrize(
    "words",
    [
        pytest.param([*LIGHTNING, "--run.devices=2"], marks=pytest.mark.rotation(3), id="Lightning"),
        pytest.param(TORCHRUN, marks=pytest.mark.rotation(0), id="torchrun"),
    ],
)
def test_a_refusal_by_the_first_process_is_one_sentence(words, tmp_path):
    for name in ("config.yaml", "environment.yaml", "last.ckpt"):
        (tmp_path / name).write_text("")
    status, out, err = ended(launch(words, tmp_path))
    # torchrun has a status and an account of its own.
    assert status == (1 if words is TORCHRUN else 2) and out == ""
    assert said(err) == [
        f"mmfast: run.folder {tmp_path}: holds a run already; go on with it by --resume, or name another folder"
    ]


@pytest.mark.parametrize(
    ("status", "end"), [(130, (130, "interrupted")), (9, (1, "a process ended before all had met"))]
)
def test_before_they_have_met_none_waits_for_one_that_ended(status, end, monkeypatch):
    ends = []
    monkeypatch.setattr(joining, "_exit", lambda *how: ends.append(how))
    child = subprocess.Popen([sys.executable, "-c", f"raise SystemExit({status})"])
    with joining._until_met([child]):
        until = time.monotonic() + PATIENCE
        while not ends and time.monotonic() < until:
            time.sleep(0.05)
    assert ends[0] == end and joining.LAUNCHED_BY not in os.environ


def test_a_port_in_use_is_one_sentence(tmp_path):
    with socket.create_server(("", 0)) as taken:
        port = str(taken.getsockname()[1])
        began = launch(
            ["-m", "mmfast", "pretrain"], tmp_path / "run",
            TORCHELASTIC_RUN_ID="x", RANK="0", LOCAL_RANK="0", WORLD_SIZE="2", LOCAL_WORLD_SIZE="2",
            MASTER_ADDR="127.0.0.1", MASTER_PORT=port,
        )  # fmt: skip
        status, _, err = ended(began)
    assert status == 2
    assert (
        len(err.splitlines()) == 1 and f"mmfast: run: the processes cannot meet at 127.0.0.1:{port}: " in err
    )
    assert "use" in err and not (tmp_path / "run").exists()


BY_TORCHRUN = {"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4"}
BY_SRUN = {"SLURM_NTASKS": "8", "SLURM_NTASKS_PER_NODE": "4", "SLURM_NNODES": "2", "SLURM_JOB_NAME": "x"}
BY_HAND = {"MASTER_ADDR": "a", "MASTER_PORT": "1", "NODE_RANK": "0"}


@pytest.mark.parametrize(
    ("environment", "asked", "found"),
    [
        ({}, (1, 1), (1, 1)),
        ({}, (3, 1), (3, 1)),
        (BY_TORCHRUN, (1, 1), (4, 2)),
        (BY_TORCHRUN, (4, 2), (4, 2)),
        (BY_SRUN, (4, 2), (4, 2)),
        # Tasks side by side, each a run of its own.
        (BY_SRUN, (1, 1), (1, 1)),
        ({**BY_SRUN, "SLURM_JOB_NAME": "bash"}, (2, 1), (2, 1)),
        (BY_HAND, (2, 2), (2, 2)),
        (BY_TORCHRUN, (2, 1), "config: run.devices must be the 4 that torchrun started, got 2"),
        (BY_SRUN, (4, 1), "config: run.nodes must be the 2 that srun started, got 1"),
        ({}, (2, 2), "config: run.nodes must be 1 unless torchrun, srun, or MASTER_ADDR"),
    ],
)
def test_numbers_of_processes_are_those_that_were_started(environment, asked, found, monkeypatch):
    for name in (*BY_TORCHRUN, *BY_SRUN, *BY_HAND):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    run = RunConfig(devices=asked[0], nodes=asked[1])
    if isinstance(found, str):
        with pytest.raises(UserError, match=found):
            as_launched(run)
        return
    run = as_launched(run)
    assert (run.devices, run.nodes) == found and several(run) == (found != (1, 1))


@pytest.mark.parametrize(
    ("command", "flags", "message"),
    [
        (
            "experiment",
            ["--run.devices=2"],
            "experiment: run.devices and run.nodes must be 1 .* got 2, 1 and auto",
        ),
        ("pretrain", ["--run.devices=0"], "config: run.devices must be positive, got 0"),
        (
            "finetune",
            ["--run.strategy=fsdp"],
            "finetune: --run.strategy must be one of auto, ddp, got 'fsdp'",
        ),
    ],
)
def test_settings_that_cannot_be_are_refused_before_any_process_starts(
    command, flags, message, tmp_path, capsys
):
    assert mmfast(command, *TINY, f"--run.folder={tmp_path / 'run'}", *flags) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.match(f"mmfast: {message}", line), line
    assert not (tmp_path / "run").exists()
