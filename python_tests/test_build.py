"""setup.py: it builds wherever the sources lie, for what nvcc knows, and a build that fails is told."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import test_cuda_build

ROOT = Path(__file__).resolve().parents[1]
ODD = "a b$c:d'e\"(f)|g&h;i,j#k%l é"
SOURCES = {
    "pyproject.toml": '[project]\nname = "mmfast"\nversion = "0"\n[tool.setuptools]\npackages = ["mmfast"]\n',
    "mmfast/__init__.py": "",
    "csrc/answer.h": "int MMFAST_ISA();\n",
    "csrc/cpu/answer.cpp": '#include "../answer.h"\nint MMFAST_ISA() { return 42; }\n',
    "csrc/bindings.cpp": (
        "#include <pybind11/detail/common.h>\n#define MMFAST_ISA generic\n"
        '#include "answer.h"\n'
        "#ifdef MMFAST_WITH_CUDA\nint from_cuda();\n#else\nint from_cuda() { return 0; }\n#endif\n"
        'static PyModuleDef def = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr};\n'
        "PyMODINIT_FUNC PyInit__C() {\n  PyObject* m = PyModule_Create(&def);\n"
        '  PyModule_AddIntConstant(m, "answer", generic() + from_cuda());\n  return m;\n}\n'
    ),
    "csrc/cuda/kernel.cu": "__global__ void kernel(int* x) { *x = 1; }\nint from_cuda() { return 1; }\n",
}
needs_gxx = pytest.mark.skipif(not shutil.which("g++"), reason="no g++ on PATH")
needs_nvcc = pytest.mark.skipif(not shutil.which("nvcc"), reason="no nvcc on PATH")


@pytest.fixture
def clone(tmp_path):
    """A clone with sources that compile in no time, in a folder that few tools like."""
    pytest.importorskip("ninja")
    root = tmp_path / ODD
    for name, text in SOURCES.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    shutil.copy(ROOT / "setup.py", root)
    return root


def script(path, text):
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


def build(root, *arguments, **variables):
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MMFAST_") and k != "CXX"}
    return subprocess.run(
        [sys.executable, "setup.py", "build_ext", *(arguments or ["--inplace"])],
        cwd=root,
        env={**environment, "MMFAST_CUDA": "0", **variables},
        capture_output=True,
        text=True,
    )


def record(root):
    return json.loads((root / "mmfast/_build.json").read_text())


def answer(root):
    (library,) = (root / "mmfast").glob("_C.*.so")
    spec = importlib.util.spec_from_file_location("_C", library)
    return importlib.util.module_from_spec(spec).answer


@needs_gxx
def test_a_clone_in_an_odd_folder_is_built(clone):
    """Ninja, the compiler and the shell each read the paths of sources, objects, headers and of the compiler."""
    compiler = script(clone.parent / "my g++", 'exec g++ "$@"')
    run = build(clone, MMFAST_NATIVE="1", CXX=compiler)
    assert run.returncode == 0, run.stderr
    assert record(clone)["native"]["built"] and answer(clone) == 42
    # A header that changes is noticed: the compiler's list of them is understood.
    header = clone / "csrc/answer.h"
    header.write_text("#error changed\n")
    os.utime(header, (2e9, 2e9))
    run = build(clone, MMFAST_NATIVE="1", CXX=compiler)
    assert run.returncode == 1 and "changed" in run.stderr


@needs_gxx
def test_a_compiler_may_have_arguments(clone):
    assert build(clone, MMFAST_NATIVE="1", CXX="g++ -DUNUSED='a b'").returncode == 0


@needs_gxx
@needs_nvcc
def test_cuda_kernels_are_built_in_an_odd_folder(clone):
    # nvcc itself writes paths into PTX as they are, where a double quote ends them.
    clone = clone.rename(clone.with_name(ODD.replace('"', "")))
    nvcc = script(clone / "my nvcc", f'exec {shutil.which("nvcc")} "$@"')
    run = build(clone, MMFAST_CUDA="1", MMFAST_CUDA_ARCHS="90a 80", NVCC=nvcc)
    assert run.returncode == 0, run.stderr
    assert record(clone)["cuda"]["archs"] == ["80", "90a"] and answer(clone) == 43


@needs_gxx
def test_a_failed_build_is_told_and_installs(clone):
    (clone / "csrc/cpu/answer.cpp").write_text("int MMFAST_ISA( { return 42; }\n")
    run = build(clone)
    assert run.returncode == 0
    last = run.stderr.strip().splitlines()[-5:]
    assert last[1].startswith("mmfast: THE NATIVE KERNELS WERE NOT BUILT: the compiler failed: ")
    assert "error" in last[1] and "MMFAST_NATIVE=1 makes this an error" in last[3]
    assert record(clone)["native"]["failed"]
    run = build(clone, MMFAST_NATIVE="1")
    assert run.returncode == 1 and "MMFAST_NATIVE=1, but the build failed" in run.stderr


def test_kernels_that_are_not_wanted_are_not_missed(clone):
    run = build(clone, MMFAST_NATIVE="0")
    assert run.returncode == 0 and "NOT BUILT" not in run.stderr
    assert not record(clone)["native"]["failed"]


# What `nvcc --list-gpu-code` of these releases says.
LISTED = {
    "11.8": "35 37 50 52 53 60 61 62 70 72 75 80 86 87 89 90",
    "12.4": "50 52 53 60 61 62 70 72 75 80 86 87 89 90",
    "12.8": "50 52 53 60 61 62 70 72 75 80 86 87 89 90 100 101 120",
    "13.0": "75 80 86 87 88 89 90 100 110 103 120 121",
    "20.0": "120 130",
}


@pytest.fixture
def setup_script(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    monkeypatch.delitem(sys.modules, "setup", raising=False)
    import setup

    return setup


def nvcc_that_lists(folder, codes):
    return [script(folder / "nvcc", "".join(f"echo sm_{code}\n" for code in codes.split()))]


@pytest.mark.parametrize(
    "release, archs",
    [
        ("11.8", "75 80 90"),
        ("12.4", "75 80 90"),
        ("12.8", "75 80 90 100 120"),
        ("13.0", "75 80 90 100 120"),
        ("20.0", "120"),
    ],
)
def test_default_architectures_are_those_that_nvcc_knows(setup_script, tmp_path, monkeypatch, release, archs):
    monkeypatch.delenv("MMFAST_CUDA_ARCHS", raising=False)
    assert setup_script.cuda_archs(nvcc_that_lists(tmp_path, LISTED[release])) == archs.split()
    monkeypatch.setenv("MMFAST_CUDA_ARCHS", "")
    assert setup_script.cuda_archs(nvcc_that_lists(tmp_path, LISTED[release])) == archs.split()


def test_chosen_architectures_are_checked(setup_script, tmp_path, monkeypatch):
    nvcc = nvcc_that_lists(tmp_path, LISTED["12.4"])
    monkeypatch.setenv("MMFAST_CUDA_ARCHS", "90a 80 90 80")
    assert setup_script.cuda_archs(nvcc) == ["80", "90", "90a"]
    monkeypatch.setenv("MMFAST_CUDA_ARCHS", "80 100f")
    with pytest.raises(RuntimeError, match=r"compiles for 50 .* 90, not for 100f"):
        setup_script.cuda_archs(nvcc)
    for bad in ("8.0", "80;90", "sm_80", "90b"):
        monkeypatch.setenv("MMFAST_CUDA_ARCHS", bad)
        with pytest.raises(SystemExit, match=f"such as 80 90a 120f, got '{bad}'"):
            setup_script.cuda_archs(nvcc)


def test_what_is_shipped_is_what_is_checked(setup_script):
    assert setup_script.CUDA_ARCHS == test_cuda_build.ARCHS


@pytest.mark.parametrize(
    "archs, flags",
    [
        ("80", "80,code=[sm_80,compute_80]"),
        ("80 90a 120", "90a,code=sm_90a 120,code=sm_120 80,code=[sm_80,compute_80]"),
        ("90a", "90a,code=sm_90a"),
        ("100f 120f", "100f,code=sm_100f 120f,code=sm_120f"),
    ],
)
def test_ptx_is_that_of_the_oldest_that_others_can_run(setup_script, archs, flags):
    assert setup_script.gencode(archs.split()) == [f"-gencode=arch=compute_{flag}" for flag in flags.split()]
