"""Every Triton kernel compiled for real GPUs, without one: vector accesses, registers, spills, precision."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import rotation

pytest.importorskip("triton")

HERE = Path(__file__).parents[1]
# Per kernel and case, with room for the compilers of Triton 3.6 to 3.9: registers, and bytes of stack, which
# are spilled registers (in `draw` also what an fp64 cosine sets aside).
BUDGETS = json.loads((HERE / "triton_budgets.json").read_text())
# Architecture -> dtypes, of each run and of those whose turn it is.
ARCHITECTURES = {90: ["float32", "bfloat16"]}
TURNS = [{90: ["float64"]}, {90: ["float16"]}, {80: ["float32", "bfloat16"]}, {100: ["float32", "bfloat16"]}]
for number, turn in enumerate(TURNS):
    if rotation.mine(number):
        ARCHITECTURES |= {arch: ARCHITECTURES.get(arch, []) + dtypes for arch, dtypes in turn.items()}
STREAMED = {
    "moments", "standardise", "gram", "correlation", "narrow", "projection", "gradient", "adjoint",
    "units", "row_gradients", "similarity_forward", "similarity_backward",
}  # fmt: skip
WRITTEN = {"standardise", "narrow", "gradient", "adjoint", "units", "row_gradients", "similarity_backward"}


@pytest.fixture(scope="session")
def records(tmp_path_factory):
    """What the compiler made of every launch; by processes of their own, for ours interprets kernels."""
    running = {}
    for arch, dtypes in ARCHITECTURES.items():
        cache = tmp_path_factory.mktemp(f"triton_{arch}")
        paths = [str(HERE.parent), os.environ.get("PYTHONPATH", "")]
        running[arch] = subprocess.Popen(
            [sys.executable, HERE / "triton_compile.py", str(arch), *dtypes],
            env={**os.environ, "TRITON_CACHE_DIR": str(cache), "PYTHONPATH": os.pathsep.join(paths)},
            stdout=subprocess.PIPE,
            text=True,
        )
    results = []
    for process in running.values():
        text, _ = process.communicate()
        assert process.returncode == 0
        results += json.loads(text)
    return results


def label(record):
    return f"{record['kernel']} {record['case']} sm_{record['arch']}"


def test_budgets(records):
    over = [
        f"{label(record)}: {name} {record[name]}, budget {limit}"
        for record in records
        for name, limit in zip(("reg", "stack"), BUDGETS[f"{record['kernel']} {record['case']}"], strict=True)
        if record[name] > limit
    ]
    assert not over, "\n".join(over)
    dtypes = {dtype for some in ARCHITECTURES.values() for dtype in some}
    expected = {name for name in BUDGETS if set(name.split()) & dtypes}
    assert {f"{record['kernel']} {record['case']}" for record in records} == expected
    assert all(record["local"] == 0 for record in records)


def test_vector_accesses(records):
    """Whole rows move 16 bytes at a time wherever sizes allow it."""
    for record in records:
        kernel, case = record["kernel"], record["case"]
        if kernel == "apply":
            assert record["vector_loads"] >= (0 if "strided" in case else 1), label(record)
            assert record["vector_stores"] >= 2, label(record)
        elif kernel in STREAMED and "odd" not in case:
            assert record["vector_loads"] >= 1, label(record)
            assert record["vector_stores"] >= (kernel in WRITTEN), label(record)


def test_single_precision_stays_single(records):
    for record in records:
        if "float64" not in record["case"] and record["kernel"] != "draw":
            assert not record["fp64"], label(record)


def test_numbers_of_launches(records):
    """One to draw, apply two views or pull them back; eight for the loss with its gradient; one each for rows."""
    launches = [r["kernel"] for r in records if r["arch"] == 90 and r["case"] == "bfloat16"]
    augmentation = ["adjoint", "apply"]
    loss = ["moments", "standardise", "gap", "gram", "loss", "narrow", "projection", "gradient"]
    assert launches == augmentation + loss + ["units", "row_gradients"]
    assert [r["kernel"] for r in records].count("draw") == len(ARCHITECTURES)


def test_importing_the_package_leaves_triton_alone():
    code = (
        "import sys, mmfast, mmfast.ops.augment, mmfast.ops.barlow_twins, mmfast.ops.similarity.total; "
        "assert 'triton' not in sys.modules"
    )
    paths = os.pathsep.join([str(HERE.parent), os.environ.get("PYTHONPATH", "")])
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": paths})
