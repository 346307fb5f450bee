"""Choice of backend, the build record, and what importing the package costs."""

import subprocess
import sys

import pytest
import torch

import mmfast
from mmfast import backends

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def python(code, **env):
    """Standard output of ``code`` in a fresh interpreter."""
    import os

    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **env}
    )
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()


def test_kernels_are_used_on_the_cpu_and_the_reference_elsewhere(native):
    assert backends.choose("augment_apply", CPU) == "native"
    assert backends.choose("augment_apply", CUDA) == "reference"


def test_a_backend_can_be_forced_and_is_given_back():
    with mmfast.backend("reference"):
        assert backends.choose("augment_apply", CPU) == "reference"
        with (
            pytest.raises(
                mmfast.UserError, match="the native backend was asked for, but there are no compiled"
            ),
            mmfast.backend("native"),
        ):
            backends.choose("augment_apply", CUDA)
        assert backends.choose("augment_apply", CPU) == "reference"


def test_environment_variable_forces_a_backend():
    code = "import torch; from mmfast import backends; print(backends.choose('augment_apply', torch.device('cpu')))"
    assert python(code, MMFAST_BACKEND="reference") == "reference"


@pytest.mark.parametrize("name", ["cuda", "", "Native"])
def test_unknown_backends_are_named(name, monkeypatch):
    with (
        pytest.raises(
            mmfast.UserError, match=f"backend: the backend must be one of native, reference, got '{name}'"
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
    assert backends.why_not_native() == "no compiled kernels: no C++ compiler"
    assert mmfast.info()["ops"]["augment_apply (cpu)"] == {
        "uses": "reference",
        "native": "no compiled kernels: no C++ compiler",
        "reference": "available",
    }
    assert "uses: reference" in backends.info_text()


def test_info_tells_versions_build_and_backends(native):
    facts = mmfast.info()
    assert facts["mmfast"] == mmfast.__version__
    assert facts["torch"] == torch.__version__
    assert facts["native"]["built"] and facts["native"]["compiler"]
    assert facts["instruction sets"] == native.isas()
    assert {row["uses"] for name, row in facts["ops"].items() if name.endswith("(cpu)")} == {"native"}
    assert set(facts["cuda"]) & {"reason", "nvcc"}


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
