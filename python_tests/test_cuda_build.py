"""What nvcc and ptxas make of the CUDA kernels, for every architecture that is shipped. Needs no GPU.

``cuda_budgets.json`` holds the most registers a kernel may take where a multiprocessor runs 2048 threads.
"""

import functools
import json
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from ptx import unwritten

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted(path for path in (ROOT / "csrc/cuda").glob("*.cu") if path.stem != "device")
ARCHS = ("75", "80", "90", "100", "120")  # of setup.py
TURNS = enumerate(arch for arch in ARCHS if arch != "90")
BUDGETS = json.loads(Path(__file__).with_name("cuda_budgets.json").read_text())

pytestmark = pytest.mark.skipif(
    not (shutil.which("nvcc") and shutil.which("c++filt")), reason="no nvcc, or no c++filt, on PATH"
)


def nvcc(*arguments):
    run = subprocess.run(["nvcc", "-std=c++17", "-O3", *map(str, arguments)], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    names = subprocess.run(["c++filt"], input=run.stderr, capture_output=True, text=True, check=True)
    return names.stdout


def kernel_name(signature):
    """``apply_kernel<float, float, true>`` of a demangled signature."""
    return re.sub(r"^void |mmfast::|\(anonymous namespace\)::", "", signature).partition("(")[0]


def resources(log):
    """{kernel: (registers, bytes of stack, bytes spilled)} of ``ptxas -v``."""
    found = {}
    for entry in re.split(r"Compiling entry function '", log)[1:]:
        name = kernel_name(entry[: entry.index("' for")])
        numbers = re.search(
            r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", entry
        )
        stack, stores, loads = map(int, numbers.groups())
        found[name] = (int(re.search(r"Used (\d+) registers", entry)[1]), stack, stores + loads)
    return found


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """A function: {source: resources} of an architecture."""
    folder = tmp_path_factory.mktemp("cubin")

    @functools.cache
    def report(arch):
        def compile(source):
            target = folder / f"{source.stem}.{arch}.cubin"
            return resources(nvcc("-Xptxas", "-v", f"-arch=sm_{arch}", "-cubin", "-o", target, source))

        with ThreadPoolExecutor(2) as pool:
            return dict(zip(SOURCES, pool.map(compile, SOURCES), strict=True))

    return report


@pytest.fixture(scope="module")
def ptx(tmp_path_factory):
    """{kernel: its PTX}"""
    folder = tmp_path_factory.mktemp("ptx")

    def entries(source):
        target = folder / f"{source.stem}.ptx"
        nvcc("-arch=compute_90", "-ptx", "-o", target, source)
        text = subprocess.run(
            ["c++filt"], input=target.read_text(), capture_output=True, text=True, check=True
        )
        return text.stdout.split(".entry ")[1:]

    with ThreadPoolExecutor(2) as pool:
        return {kernel_name(entry): entry for found in pool.map(entries, SOURCES) for entry in found}


@pytest.mark.parametrize(
    "arch", ["90", *(pytest.param(arch, marks=pytest.mark.rotation(i)) for i, arch in TURNS)]
)
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_registers_stay_within_budget_and_nothing_is_spilled(report, source, arch):
    found = report(arch)[source]
    assert set(found) == set(BUDGETS[source.stem]), "cuda_budgets.json must name every kernel"
    for name, (registers, stack, spilled) in found.items():
        assert (stack, spilled) == (0, 0), f"{name} uses local memory on sm_{arch}"
        budget = BUDGETS[source.stem][name]
        # With 1024 or 1536 threads at most there are more registers for each.
        assert registers <= (max(budget, 64) if arch in ("75", "120") else budget), f"{name} on sm_{arch}"


def test_fp32_kernels_use_no_double_precision(ptx):
    # Draw works SeqAug's share out in fp64, for thresholds that agree everywhere.
    for name, body in ptx.items():
        if "double" not in name and "draw" not in name:
            assert not re.search(r"\.f64\b", body), name


def test_no_register_is_read_before_it_is_written(ptx):
    """What is behind the end of a matrix has no value, even if what is made of it is stored nowhere."""
    for name, body in ptx.items():
        assert not unwritten(body), name


BRANCHES = """.visible .entry kernel(.param .u64 x)
{
	.reg .f32 	%f<4>;
	ld.param.u64 	%rd1, [x];
	setp.lt.s32 	%p1, %r9, 3;
	@%p1 bra 	$L__BB0_2;
	ld.global.nc.v2.f32 	{%f1, %f2}, [%rd1];
$L__BB0_2:
	// begin inline asm
	{cvt.rn.bf16.f32 %rs1, %f3;}
	@!%p1 bra 	$L__BB0_4;
	mov.f32 	%f4, 0f00000000;
$L__BB0_4:
	st.global.f32 	[%rd1], %f2;
	@%p2 bra 	$L__BB0_2;
	st.global.u16 	[%rd2], %rs1;
	ret;
}
"""


def test_unwritten_registers_are_found():
    assert [register for _, register in unwritten(BRANCHES)] == ["%r9", "%f3", "%f2", "%p2", "%rd2"]


def test_apply_moves_16_bytes_at_a_time(ptx):
    applies = {name: body for name, body in ptx.items() if name.startswith("apply_kernel")}
    assert len(applies) == 7
    for name, body in applies.items():
        for access in ("ld.global.nc", "st.global.cs"):
            assert re.search(re.escape(access) + r"\.v4\.[bfu]32", body), f"{name}: {access}"


def test_matrices_are_read_16_bytes_at_a_time(ptx):
    for name in ("loss_kernel<true, 4, float>", "loss_kernel<false, 4, float>", "narrow_kernel<4, bfloat16>"):
        assert re.search(r"ld\.global(\.nc)?\.v4\.[bfu]32", ptx[name]), name
    for name in ("loss_kernel<true, 2, double>", "loss_kernel<false, 2, double>"):
        assert re.search(r"ld\.global(\.nc)?\.v2\.[bfu]64", ptx[name]), name
