"""Memory is estimated before the first step, and what does not fit is refused in one sentence."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from training_help import TINY, mmfast, train

from mmfast.data import MultimodalDataset
from mmfast.errors import UserError
from mmfast.models import M3Encoder
from mmfast.training import encoder, memory
from mmfast.training.config import RunConfig
from mmfast.training.objectives import two_views
from mmfast.training.predictions import STEPS, evaluation_batches

FEATURES = {"text": 8, "audio": 6}


def test_estimate_grows_with_steps_and_views_and_leaves_the_encoder_as_it_was():
    encoder = M3Encoder(FEATURES, hidden=8).eval()
    before, state = {name: p.clone() for name, p in encoder.state_dict().items()}, torch.get_rng_state()
    one, two, long = (
        memory.sample_bytes(encoder, steps, views) for steps, views in ((50, 1), (50, 2), (4000, 1))
    )
    assert 1.8 * one < two < 2 * one
    assert 4 * memory.sample_bytes(encoder, memory.MEASURED_STEPS, 1) == pytest.approx(long, rel=1e-3)
    assert not encoder.training and torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(p, before[name]) for name, p in encoder.state_dict().items())


@pytest.fixture
def unweighed(monkeypatch):
    """Weights may take what they want, for the tests that are about a step."""
    for module in (two_views, encoder):
        monkeypatch.setattr(module, "check_weights", lambda *a: None)


MEASURE = """
import sys, torch
from mmfast.models import M3Encoder
from mmfast.training.memory import sample_bytes
torch.set_num_threads(1)

def resident(field):
    rows = dict(line.split(":", 1) for line in open("/proc/self/status"))
    return 1024 * int(rows[field].split()[0])

encoder = M3Encoder({"text": 60, "audio": 40, "visual": 20}, hidden=64)
batch, steps = int(sys.argv[1]), int(sys.argv[2])
lengths = dict.fromkeys(encoder.features, torch.full((batch,), steps))

def step(batch):
    values = {name: torch.randn(batch, steps, size) for name, size in encoder.features.items()}
    encoder(values, {name: n[:batch] for name, n in lengths.items()}).sum().backward()

step(1)
estimate, base = batch * sample_bytes(encoder, steps, 1), resident("VmRSS")
step(batch)
print(estimate / (resident("VmHWM") - base))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="resident memory is read from /proc")
@pytest.mark.parametrize("batch, steps", [(64, 60), (4, 400)])
def test_estimate_is_near_what_a_step_takes(batch, steps):
    command = [sys.executable, "-c", MEASURE, str(batch), str(steps)]
    ratio = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert 0.6 < ratio < 2


@pytest.mark.parametrize("command, section", [("pretrain", "pretraining"), ("finetune", "supervised")])
def test_a_step_that_does_not_fit_is_refused_with_a_batch_size_that_does(
    command, section, tmp_path, capsys, monkeypatch, unweighed
):
    monkeypatch.setattr(memory, "sample_bytes", lambda *a: 1000)
    monkeypatch.setattr(memory, "free_bytes", lambda accelerator: 4001)
    assert mmfast(command, *TINY, f"--run.folder={tmp_path / 'run'}") == 2
    error = capsys.readouterr().err
    assert error.startswith(f"mmfast: {section}: memory for a step must be free, about ")
    assert f"lower {section}.batch_size to 4, or shorten the sequences" in error
    assert not (tmp_path / "run").exists()
    train(command, tmp_path / "run", f"--{section}.batch_size=4")


def test_where_no_batch_fits_the_sentence_names_the_model(tmp_path, capsys, monkeypatch, unweighed):
    monkeypatch.setattr(memory, "free_bytes", lambda accelerator: 1000)
    assert mmfast("pretrain", *TINY, f"--run.folder={tmp_path / 'run'}") == 2
    assert "lower model.hidden, or shorten the sequences" in capsys.readouterr().err


def test_runs_side_by_side_share_what_is_free(tmp_path, capsys, monkeypatch, unweighed):
    monkeypatch.setattr(memory, "sample_bytes", lambda *a: 1000)
    monkeypatch.setattr(memory, "free_bytes", lambda accelerator: 8001)
    arguments = (
        *TINY,
        f"--run.folder={tmp_path / 'run'}",
        "--experiment.seeds=[0, 1]",
        "--experiment.workers=2",
    )
    assert mmfast("experiment", *arguments) == 2
    assert "lower experiment.workers, 2 here, lower pretraining.batch_size to 4" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_the_least_of_machine_and_control_groups_counts(monkeypatch):
    files = {
        "/proc/meminfo": ["MemFree: 1 kB", "MemAvailable: 5000 kB"],
        "/proc/self/cgroup": ["4:memory:/batch/job", "0::/batch/job"],
        "/sys/fs/cgroup/memory/batch/job/memory.limit_in_bytes": ["9223372036854771712"],
        "/sys/fs/cgroup/memory/batch/job/memory.usage_in_bytes": ["7"],
    }
    monkeypatch.setattr(memory, "_lines", lambda path: files.get(str(path), []))
    assert memory.free_bytes("cpu") == 5000 * 1024
    files["/sys/fs/cgroup/batch/memory.max"] = ["3000000"]
    files["/sys/fs/cgroup/batch/memory.current"] = ["1000000"]
    files["/sys/fs/cgroup/batch/memory.stat"] = ["anon 1", "inactive_file 400000"]
    assert memory.free_bytes("cpu") == 2400000
    files["/sys/fs/cgroup/batch/job/memory.max"] = ["max"]
    files["/sys/fs/cgroup/batch/job/memory.current"] = ["1000000"]
    assert memory.free_bytes("cpu") == 2400000
    files.clear()
    assert memory.free_bytes("cpu") is None


def test_batches_of_long_samples_are_small_where_nothing_is_trained():
    def sizes(steps):
        values = {"text": [torch.zeros(n, 1) for n in steps]}
        return [len(batch.ids) for batch in evaluation_batches(MultimodalDataset(values))]

    assert sizes([STEPS // 3] * 7) == [3, 3, 1]
    assert sizes([2 * STEPS, 1]) == [1, 1]
    assert sizes([5] * 300) == [256, 44]
    assert sizes([0, 0]) == [2]


def test_processes_on_one_machine_share_its_memory(monkeypatch):
    features = {"text": 8, "audio": 6}
    data = MultimodalDataset.from_padded(
        {name: torch.zeros(8, 50, size) for name, size in features.items()},
        dict.fromkeys(features, torch.full((8,), 50)),
    )
    network = M3Encoder(features, hidden=8)
    loader = evaluation_batches(data)
    need = 8 * memory.sample_bytes(network, 50, 1)
    monkeypatch.setattr(memory, "free_bytes", lambda _: 1.5 * need)
    memory.check_memory("supervised", network, loader, 1, RunConfig(accelerator="cpu"))
    with pytest.raises(UserError, match=r"for 8 samples of up to 50 time steps, .*batch_size to 6,"):
        memory.check_memory("supervised", network, loader, 1, RunConfig(accelerator="cpu", devices=2))
