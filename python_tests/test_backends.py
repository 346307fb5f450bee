"""Choice of backend, the build record, and what importing the package costs."""

import contextlib
import functools
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import mmfast
from mmfast import backends
from mmfast.ops.native import call_cuda

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def python(code, **env):
    """Standard output of ``code`` in a fresh interpreter."""
    import os

    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **env}
    )
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()


def available(monkeypatch, *names):
    """Backends as on a machine where these serve CUDA tensors."""
    for name in ("cuda", "triton"):
        reason = "" if name in names else f"no {name} here"
        monkeypatch.setitem(backends._WHY_NOT, name, lambda device, reason=reason: reason)


@pytest.mark.parametrize(
    "names, chosen", [(["cuda", "triton"], "cuda"), (["triton"], "triton"), ([], "reference")], ids=str
)
def test_the_fastest_available_backend_serves_each_device(native, monkeypatch, names, chosen):
    available(monkeypatch, *names)
    assert backends.choose("augment_apply", CUDA) == chosen
    assert backends.choose("augment_apply", CPU) == "cpu"


@pytest.mark.parametrize(
    "name, device, reason", [("cpu", CUDA, "its kernels take CPU tensors, not cuda ones")]
)
def test_a_backend_can_be_forced_and_is_given_back(native, name, device, reason):
    with mmfast.backend("reference"):
        assert backends.choose("augment_apply", CPU) == "reference"
        with (
            pytest.raises(
                mmfast.UserError, match=f"augment_apply: the {name} backend was asked for, but {reason}"
            ),
            mmfast.backend(name),
        ):
            backends.choose("augment_apply", device)
        assert backends.choose("augment_apply", CPU) == "reference"


@pytest.mark.parametrize(
    "archs, capability, runs",
    [
        ("80 90 100", (8, 0), True),
        ("80 90 100", (8, 9), True),
        ("80 90 100", (9, 0), True),
        ("80 90 100", (12, 0), True),
        ("80 90 100", (7, 5), False),
        ("90a", (9, 0), True),
        ("100", (9, 0), False),
        ("86", (8, 0), False),
    ],
)
def test_a_device_needs_machine_code_of_its_generation(monkeypatch, archs, capability, runs):
    monkeypatch.setattr(backends, "build_record", lambda: {"cuda": {"archs": archs.split()}})
    reason = backends._no_code_for(capability)
    assert (reason == "") == runs
    if not runs:
        assert f"this device is sm_{capability[0]}{capability[1]}" in reason


def test_forcing_a_gpu_backend_on_cpu_tensors_says_what_it_needs(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    for name, reason in [
        ("cuda", "no CUDA kernels|its kernels take CUDA"),
        ("triton", "CUDA tensors|not installed"),
    ]:
        if backends.why_not(name, CPU):
            with (
                pytest.raises(mmfast.UserError, match=f"the {name} backend was asked for, but .*({reason})"),
                mmfast.backend(name),
            ):
                mmfast.SeqAug(p=1)(torch.zeros(2, 3, 4))


@pytest.mark.skipif(
    not hasattr(backends._C, "cuda_augment_draw") or backends.emulated() or torch.cuda.is_available(),
    reason="CUDA kernels and no GPU to run them on: not the case here",
)
def test_cuda_kernels_load_without_a_gpu_and_fail_with_a_reason():
    facts = mmfast.info()["cuda"]
    assert facts["archs"] and "augment_apply" in facts["kernels"]
    assert isinstance(facts["devices"], str) or facts["devices"] == 0
    arguments = backends._C.AugmentArguments(1, [1], [0, 0, 0, 0, 0], [0.5, 0.0], [3, 4, 0, 0], 0, 0, 6)
    with pytest.raises(RuntimeError, match=r"augment_draw: CUDA error \d+: .*(driver|device)"):
        call_cuda("augment_draw", backends._C.cuda_augment_draw, CPU, arguments, 0)


def test_blocks_of_overlapping_threads_each_take_back_only_themselves(native):
    """Entered as A, B, left as A, B: what B found when it came is not what is right when it goes."""
    first, second = contextlib.ExitStack(), contextlib.ExitStack()
    used = functools.partial(backends.choose, "augment_apply", CPU)
    before = used()
    with ThreadPoolExecutor(1) as pool:
        first.enter_context(mmfast.backend("reference"))
        pool.submit(second.enter_context, mmfast.backend("cpu")).result()
        assert used() == pool.submit(used).result() == "cpu"
        first.close()
        assert used() == pool.submit(used).result() == "cpu"
        pool.submit(second.close).result()
        assert used() == pool.submit(used).result() == before


def test_a_forced_backend_holds_on_other_threads(native):
    """Backward passes on GPUs run on threads that autograd makes."""
    with ThreadPoolExecutor(1) as pool, mmfast.backend("reference"):
        assert pool.submit(backends.choose, "augment_apply", CPU).result() == "reference"


def test_environment_variable_forces_a_backend():
    code = "import torch; from mmfast import backends; print(backends.choose('augment_apply', torch.device('cpu')))"
    assert python(code, MMFAST_BACKEND="reference") == "reference"


@pytest.mark.parametrize("name", ["native", "", "Triton"])
def test_unknown_backends_are_named(name, monkeypatch):
    with (
        pytest.raises(
            mmfast.UserError,
            match=f"backend: the backend must be one of cpu, cuda, triton, reference, got '{name}'",
        ),
        mmfast.backend(name),
    ):
        pass
    if name:
        monkeypatch.setenv("MMFAST_BACKEND", name)
        with pytest.raises(
            mmfast.UserError, match=f"MMFAST_BACKEND: the backend must be one of .* got '{name}'"
        ):
            backends.choose("augment_apply", CPU)


def test_without_kernels_the_reason_is_told(monkeypatch):
    monkeypatch.setattr(backends, "_C", None)
    monkeypatch.setattr(
        backends, "build_record", lambda: {"native": {"built": False, "reason": "no C++ compiler"}}
    )
    assert backends.why_not("cpu", CPU) == "no C++ kernels: no C++ compiler"
    row = mmfast.info()["ops"]["augment_apply (cpu)"]
    assert row["uses"] == "reference" and row["reference"] == "available"
    assert row["cpu"] == "no C++ kernels: no C++ compiler"
    assert row["cuda"] == "no CUDA kernels: no C++ compiler"
    assert "uses: reference" in backends.info_text()


def test_info_tells_versions_build_and_backends(native):
    facts = mmfast.info()
    assert facts["mmfast"] == mmfast.__version__
    assert facts["torch"] == torch.__version__
    assert facts["native"]["built"] and facts["native"]["compiler"]
    assert facts["instruction sets"] == native.isas()
    assert {row["uses"] for name, row in facts["ops"].items() if name.endswith("(cpu)")} == {"cpu"}
    assert facts["cuda"]["built"] or facts["cuda"]["reason"]


def test_instruction_sets_can_be_switched(native):
    names = native.isas()
    assert names[0] == "generic"
    before = native.use_isa("generic")
    assert before == names[-1]
    assert native.use_isa(before) == "generic"
    with pytest.raises(ValueError, match=r"use_isa: name must be one of isas\(\), got 'mmx'"):
        native.use_isa("mmx")


def test_import_is_light_and_touches_no_gpu():
    code = (
        "import sys, torch, time; before = set(sys.modules); start = time.perf_counter(); import mmfast; "
        "took = time.perf_counter() - start; "
        "new = {name.partition('.')[0] for name in set(sys.modules) - before}; "
        "print(took < 0.5, torch.cuda.is_initialized(), "
        "new & {'lightning', 'torchmetrics', 'jsonargparse', 'h5py', 'matplotlib', 'rich', 'sklearn', 'triton'})"
    )
    assert python(code) == "True False set()"
