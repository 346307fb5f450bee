"""benchmarks/gpu.sh and gpu.py, rehearsed without a GPU: what they run, in which order, and what they make of it."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))
import gpu

SCRIPT = Path(gpu.__file__).with_name("gpu.sh")
SANITIZERS = ["memcheck", "racecheck", "synccheck", "initcheck"]
PARTS = ["build", "info", "gpu", "loss", "benchmarks", *SANITIZERS, "triton", "similarity"]
PROGRAMS = ("bash", "env", "cat", "dirname", "realpath", "mkdir", "timeout")
PROGRAMS += ("tail", "grep", "sort", "uniq", "head", "tee")


@pytest.fixture
def rehearsal(tmp_path):
    """Runs a copy of gpu.sh whose commands write down how they were called."""
    (tmp_path / "benchmarks").mkdir()
    shutil.copy(SCRIPT, tmp_path / "benchmarks")
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in PROGRAMS:
        (tools / name).symlink_to(shutil.which(name))
    log = tmp_path / "sanitizer"

    def command(name, text):
        (tools / name).write_text(f"#!{shutil.which('bash')}\n{text}\n")
        (tools / name).chmod(0o755)

    command("nvidia-smi", "echo a GPU")
    command("python", "[[ $1 == -c ]] && { echo 90; exit; }; $FAIL")

    def run(*arguments, sanitizer="exit 0", **variables):
        if sanitizer:
            command("compute-sanitizer", f'echo "$PYTORCH_NO_CUDA_MEMORY_CACHING $*" >>{log}; {sanitizer}')
        done = subprocess.run(
            ["bash", "benchmarks/gpu.sh", str(tmp_path / "out"), *arguments],
            cwd=tmp_path,
            env={"PATH": str(tools), "PYTHON": "python", **variables},
            capture_output=True,
            text=True,
        )
        lines = [line for line in done.stdout.splitlines() if line.partition(" ")[0] in PARTS]
        return done, lines, log.read_text().splitlines() if log.exists() else []

    return run


def test_the_script_runs_its_parts_in_order(rehearsal):
    done, lines, tools = rehearsal()
    assert done.returncode == 0, done.stdout
    assert [line.split()[0] for line in lines] == PARTS
    assert [tool.split("--tool ")[1].split()[0] for tool in tools] == SANITIZERS
    for tool in tools:
        assert ("--kernel-regex kns=mmfast" in tool) == ("initcheck" not in tool)
        # PyTorch's allocator would hide what runs from one tensor into the next.
        assert tool.startswith("1 ") == ("memcheck" in tool or "initcheck" in tool)


def test_without_compute_sanitizer_its_parts_are_left_out(rehearsal):
    done, lines, _ = rehearsal(sanitizer=None)
    assert done.returncode == 0
    skipped = [line for line in lines if "skipped: compute-sanitizer is not on PATH" in line]
    assert [line.split()[0] for line in skipped] == SANITIZERS


def test_parts_can_be_chosen_and_failures_are_told(rehearsal):
    done, lines, _ = rehearsal("triton", "info", FAIL="false")
    assert done.returncode == 1 and done.stdout.endswith("failed: info triton\n")
    assert [line.split()[:2] for line in lines] == [["info", "FAILED"], ["triton", "FAILED"]]


@pytest.mark.parametrize("kernel, status", [("mmfast::x<float>", 1), ("at::native::y", 0)])
def test_only_our_kernels_are_judged_by_initcheck(rehearsal, kernel, status):
    text = f"========= Uninitialized __global__ memory read of size 4 bytes\\n=========     at {kernel}+0x10"
    done, _, _ = rehearsal("initcheck", sanitizer=f"printf '{text}\\n'; exit 9")
    assert done.returncode == status


def test_what_matters_most_is_measured_first():
    jobs = gpu.jobs()
    losses = [arguments[:2] for measure, arguments in jobs if measure is gpu.loss]
    assert [arguments[:2] for _, arguments in jobs[:3]] == [gpu.KEY_SHAPES[0]] * 3
    assert set(losses[: 3 * len(gpu.KEY_SHAPES)]) == set(gpu.KEY_SHAPES)
    assert all(measure is gpu.loss and arguments[:2] in gpu.GRID for measure, arguments in jobs[-30:])
    for which in ("seqaug+masking", "noise+seqaug+masking"):
        seen = {a[3:] for measure, a in jobs if measure is gpu.augmentation and a[2] == which and a[0] == 170}
        assert seen == {(chance, lengths) for chance in gpu.CHANCES for lengths in ("full", "ragged")}


@pytest.fixture
def pretended(monkeypatch):
    """gpu.py on CPU tensors, with times that are made up."""
    monkeypatch.setattr(gpu, "DEVICE", "cpu")

    def instead(result):
        def measure(call, calls=1):
            call()
            return result

        return measure

    monkeypatch.setattr(gpu, "milliseconds", instead(1.5))
    monkeypatch.setattr(gpu, "kernel_times", instead({"apply_kernel<float>": 0.5, "loss_kernel<true>": 0.25}))
    monkeypatch.setattr(gpu, "graphed", lambda call: call)
    monkeypatch.setattr(torch.cuda, "make_graphed_callables", lambda function, arguments: function)
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    for name in ("reset_peak_memory_stats", "memory_allocated", "max_memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, lambda: 0)
    rates = {"copy_bandwidth": 1e12, "matmul_fp32": 1e13, "matmul_tf32": 1e14, "matmul_bf16": 1e15}
    monkeypatch.setattr(gpu, "machine", lambda: rates)
    gpu.copy_time.cache_clear()
    yield
    gpu.copy_time.cache_clear()


@pytest.mark.parametrize("chance", gpu.CHANCES)
def test_augmentation_is_compared_with_a_copy(pretended, monkeypatch, chance):
    drawn = []
    monkeypatch.setattr(gpu, "augment_apply", lambda *arguments: drawn.append(arguments[4]))
    row = gpu.augmentation(16, torch.float32, "noise+seqaug+masking", chance, "full")
    assert {"apply", "draw", "call", "call, graph", "call, reference", "copy", "eager noise"} <= set(
        row["times"]
    )
    assert row["apply_over_copy"] == 0.5 / 0.75
    assert "apply kernel takes 0.67 copies" in gpu.show(row)
    fired = torch.stack(drawn[: gpu.SEEDS])[:, :, 0].float().mean()
    assert fired == {"p = 1": 1, "p = 0": 0}.get(chance, fired)
    assert len({words.data_ptr() for words in drawn}) == gpu.SEEDS


def test_the_loss_races_graphs_and_compiled_code(pretended, monkeypatch, capsys):
    row = gpu.loss(16, 32, "fp32", True)
    assert set(row["times"]) == {"mmfast", "eager", "mmfast, graph", "compiled", "compiled, graph"}
    assert json.dumps(row) and "1.00x in a graph" in gpu.show(row)

    def broken(*_):
        raise RuntimeError("no graphs here")

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", broken)
    row = gpu.loss(16, 32, "fp32", True)
    assert set(row["times"]) == {"mmfast", "eager", "compiled", "compiled, graph"}
    assert "mmfast, graph is left out: RuntimeError: no graphs here" in capsys.readouterr().out
