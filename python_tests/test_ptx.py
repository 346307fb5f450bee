"""The PTX of the similarity losses' CUDA kernels, executed without a GPU: results, memory, races, and what it costs.

Skipped without nvcc, or without the executor, which is not part of the project. ``ptx_budgets.json`` holds the most
warp instructions and 32-byte sectors that 32 numbers of a row may take, in rows of 4096.
"""

import functools
import json
import os
import re
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from similarity_help import rule_of

from mmfast.ops.native import DTYPE_CODES
from mmfast.ops.similarity.kernels import Plain
from mmfast.ops.similarity.passes import KINDS, Rule
from mmfast.ops.similarity.rows import rows_of, to_rows

ROOT = Path(__file__).resolve().parents[1]
TOOL = Path(os.environ.get("MMFAST_SHARED", ROOT.parent / "shared")) / "tools/ptx"
BUDGETS = json.loads(Path(__file__).with_name("ptx_budgets.json").read_text())
LETTERS = {
    torch.float32: "f",
    torch.float64: "d",
    torch.bfloat16: r"NS_8bfloat16E",
    torch.float16: r"NS_7float16E",
}

pytestmark = pytest.mark.skipif(
    not (shutil.which("nvcc") and (TOOL / "executor.py").exists()),
    reason="no nvcc on PATH, or no PTX executor",
)


def complete(executor):
    """Teaches the executor what exponentials and logarithms need."""
    executor._PLAIN.setdefault("ex2", np.exp2)
    executor._PLAIN.setdefault("lg2", np.log2)
    plain = executor._Block._execute

    def execute(self, x, group):
        down = x.opcode[:2] == ("fma", "rm")
        exact = [self._value(o, x.type).astype(np.float64) for o in x.operands[1:]] if down else None
        plain(self, x, group)
        if down:
            exact, found = exact[0] * exact[1] + exact[2], self._value(x.operands[0], x.type)
            self._write(x.operands[0], np.where(found > exact, np.nextafter(found, -np.inf), found), group)
        if "sat" in x.opcode:
            found = self._value(x.operands[0], x.type)
            clipped = np.where(np.isnan(found), 0, np.clip(found, 0, 1)).astype(found.dtype)
            self._write(x.operands[0], clipped, group)

    flag = executor._Block._flag
    executor._Block._execute = execute
    executor._Block._flag = lambda self, name: flag(self, "1" if name == "-1" else name)


class Machine:
    """Memory, and the kernels of similarity.cu and similarity_rows.cu by name."""

    def __init__(self, executor, folder):
        self.executor, self.folder = executor, folder
        self.memory = executor.Memory(1 << 24)

    @functools.cache  # noqa: B019 - one object a module
    def kernel(self, source, name):
        ptx = self.folder / f"{source}.ptx"
        names = re.findall(r"\.entry\s+([\w$]+)\s*\(", ptx.read_text())
        (mangled,) = [x for x in names if re.search(name, x)]
        return self.executor.Kernel(ptx, mangled)

    def put(self, x, name):
        bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
        x = x.contiguous()
        return self.memory.allocate(x.nbytes, x.view(bits).numpy(), name)

    def room(self, shape, dtype, name):
        return self.memory.allocate(int(np.prod(shape)) * dtype.itemsize, None, name)

    def take(self, address, shape, dtype):
        raw = self.memory.array(address, f"i{dtype.itemsize}", int(np.prod(shape)))
        return torch.from_numpy(raw).view(dtype).reshape(shape)

    def run(self, source, name, rows, columns, *arguments):
        """Launches a block a row, as threads_of_row of csrc/cuda/block.h has it; what it did, without a fault."""
        threads = 32 if columns <= 256 else 64 if columns <= 512 else 128 if columns <= 1024 else 256
        kernel = self.kernel(source, name)
        values = [x if isinstance(x, bytes) else struct.pack("<q", x) for x in arguments]
        report = kernel.run(self.memory, (rows, 1), threads, kernel.pack(values))
        assert not report.faults, report.faults
        return report


@pytest.fixture(scope="module")
def machine(tmp_path_factory):
    sys.path.insert(0, str(TOOL))
    try:
        import executor
    finally:
        sys.path.remove(str(TOOL))
    complete(executor)
    folder = tmp_path_factory.mktemp("ptx")
    for source in ("similarity", "similarity_rows"):
        flags = ["-std=c++17", "-O3", "-lineinfo", "-arch=compute_90", "-ptx"]
        subprocess.run(
            ["nvcc", *flags, "-o", folder / f"{source}.ptx", ROOT / f"csrc/cuda/{source}.cu"], check=True
        )
    return Machine(executor, folder)


def passes(machine, kind, rule, scores, scale, bias, weights, start=0):
    """values, counts, numbers (4, B), H and its sums, and both reports, of the kernels."""
    dtype, (rows, candidates) = scores.dtype, scores.shape
    every = len(rule.labels[0])
    pairs = [pair or (None, None) for pair in (rule.labels, rule.ids, rule.valid)]
    addresses = [0 if x is None else machine.put(x, "integers") for pair in pairs for x in pair]
    factor = [0 if x is None else machine.put(torch.tensor([x], dtype=dtype), "scale") for x in (scale, bias)]
    wide = dtype == torch.float64
    packed = struct.pack("<?3xi?7xq8Q", wide, KINDS.index(kind), rule.itself, candidates, *addresses, *factor)
    at = machine.put(scores, "scores")
    values, counts = (machine.room(rows, dtype, name) for name in ("values", "counts"))
    numbers = machine.room((4, every), dtype, "numbers")
    letter = LETTERS[dtype]
    forward = machine.run(
        "similarity",
        rf"forward_kernelI{letter}Li{KINDS.index(kind)}E",
        rows,
        candidates,
        packed,
        start,
        at,
        values,
        counts,
        numbers + start * dtype.itemsize,
        every,
    )
    of_weights = machine.put(weights, "weights")
    sums = machine.room(rows, dtype, "sums")
    number = KINDS.index("in" if kind == "sum" else kind)
    backward = machine.run(
        "similarity",
        rf"backward_kernelI{letter}Li{number}E",
        rows,
        candidates,
        packed,
        start,
        at,
        numbers + start * dtype.itemsize,
        every,
        of_weights + start * dtype.itemsize,
        *((numbers, of_weights) if rule.itself else (0, 0)),
        at,
        sums,
    )
    found = [
        machine.take(address, shape, dtype)
        for address, shape in (
            (values, (rows,)),
            (counts, (rows,)),
            (numbers, (4, every)),
            (at, scores.shape),
            (sums, (rows,)),
        )
    ]
    return *found, forward, backward


@pytest.mark.parametrize("itself", [True, False], ids=["self", "pair"])
@pytest.mark.parametrize("kind", KINDS)
def test_passes(machine, kind, itself):
    torch.manual_seed(0)
    for rows, candidates, general in ((5, 5, True), (33, 33, False), (3, 300, True)):
        if itself and rows != candidates:
            continue
        machine.memory = machine.executor.Memory(1 << 22)
        rule = rule_of(rows, candidates, itself, general, general)
        scores, weights = torch.rand(rows, candidates) * 2 - 1, torch.linspace(-0.5, 1, rows)
        *found, _, _ = passes(machine, kind, rule, scores, 5.0, -1.0, weights)
        exact = Plain(rule, kind, torch.tensor(5.0).double(), torch.tensor(-1.0).double())
        values, counts, numbers = (torch.empty(s, dtype=torch.float64) for s in ((rows,), (rows,), (4, rows)))
        exact.forward(scores.double(), 0, values, counts, numbers)
        columns = (numbers, weights.double()) if itself else None
        h, sums = exact.backward(scores.double(), 0, numbers, weights.double(), False, columns)
        for x, y in zip(found, (values, counts, numbers, h, sums), strict=True):
            torch.testing.assert_close(x.double(), y, rtol=3e-5, atol=3e-6)


@pytest.mark.parametrize("dtype", LETTERS, ids=str)
@pytest.mark.parametrize("cosine", [True, False], ids=["cosine", "dot"])
def test_directions_and_the_gradient_back(machine, dtype, cosine):
    torch.manual_seed(0)
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    for rows, columns, stride in ((4, 1, 1), (3, 33, 40), (2, 300, 300)):
        machine.memory = machine.executor.Memory(1 << 22)
        whole = torch.randn(rows, stride) * torch.tensor([1.0, 0.0, 300.0, 1e-4])[:rows, None]
        whole, valid = whole.to(dtype), torch.arange(rows) != rows - 1
        x, grad = whole[:, :columns], torch.randn(rows, columns, dtype=compute)
        unit, inverse = machine.room((rows, columns), compute, "unit"), machine.room(rows, compute, "inverse")
        arguments = (machine.put(whole, "x"), stride, struct.pack("<i", columns), machine.put(valid, "valid"))
        letter = LETTERS[dtype]
        flag = struct.pack("<?", cosine)
        machine.run(
            "similarity_rows", f"units_kernelI{letter}", rows, columns, *arguments, flag, unit, inverse
        )
        wanted = rows_of(x, cosine, valid)
        tolerance = {"rtol": 1e-5, "atol": 1e-6}
        torch.testing.assert_close(machine.take(unit, x.shape, compute), wanted.unit, **tolerance)
        at, scale = machine.put(grad, "grad"), machine.put(torch.tensor([3.0], dtype=compute), "scale")
        out, dots = machine.room(x.shape, dtype, "out"), machine.room(rows, compute, "dots")
        machine.run(
            "similarity_rows",
            f"row_gradients_kernelI{letter}",
            rows,
            columns,
            *(at, unit, inverse, scale, struct.pack("<i", columns), flag),
            out,
            dots,
        )
        back, along = to_rows(grad.clone(), wanted, torch.tensor(3.0, dtype=compute), dtype)
        torch.testing.assert_close(machine.take(dots, (rows,), compute), along, **tolerance)
        if dtype != compute:
            tolerance = {"rtol": 1e-2, "atol": 1e-4}
        torch.testing.assert_close(machine.take(out, x.shape, dtype), back, **tolerance)
        assert DTYPE_CODES[dtype] in range(4)


def cost(report, rows):
    """Warp instructions and sectors of 32 of the 4096 numbers of a row."""
    return report.counts["warp_instructions"] / (128 * rows), report.sectors / (128 * rows)


def test_budgets(machine):
    """Of one positive a row, by itself and with all the rest that a rule may have, in fp32."""
    torch.manual_seed(0)
    found = {}
    for kind in KINDS:
        for name in ("plain", "general"):
            machine.memory = machine.executor.Memory(1 << 24)
            labels = torch.arange(4096)
            general = name == "general"
            rule = Rule((labels[:2], labels), (labels[:2], labels) if general else None, None, False)
            if general:
                rule = rule._replace(
                    valid=(torch.ones(2, dtype=torch.bool), torch.ones(4096, dtype=torch.bool))
                )
            scores = torch.rand(2, 4096) * 2 - 1
            *_, forward, backward = passes(machine, kind, rule, scores, 5.0, None, torch.ones(2))
            for direction, report in (("forward", forward), ("backward", backward)):
                found[f"{direction} {kind} {name}"] = [round(x, 1) for x in cost(report, 2)]
    x = torch.randn(2, 4096)
    machine.memory = machine.executor.Memory(1 << 22)
    unit, inverse = machine.room(x.shape, x.dtype, "unit"), machine.room(2, x.dtype, "inverse")
    columns, flag = struct.pack("<i", 4096), struct.pack("<?", True)
    report = machine.run(
        "similarity_rows",
        "units_kernelIf",
        2,
        4096,
        machine.put(x, "x"),
        4096,
        columns,
        0,
        flag,
        unit,
        inverse,
    )
    found["units"] = [round(y, 1) for y in cost(report, 2)]
    scale, out, dots = (
        machine.put(torch.ones(1), "scale"),
        *(machine.room(n, x.dtype, "out") for n in (8192, 2)),
    )
    grad = machine.put(x, "grad")
    report = machine.run(
        "similarity_rows",
        "row_gradients_kernelIf",
        2,
        4096,
        *(grad, unit, inverse, scale, columns, flag),
        out,
        dots,
    )
    found["row_gradients"] = [round(y, 1) for y in cost(report, 2)]
    print(json.dumps(found))
    assert set(found) == set(BUDGETS), "ptx_budgets.json must name every case"
    for name, numbers in found.items():
        assert all(x <= most for x, most in zip(numbers, BUDGETS[name], strict=True)), f"{name}: {numbers}"
