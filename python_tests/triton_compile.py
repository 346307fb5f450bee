"""Compiles every Triton kernel as a launch would, for a GPU that need not be there.

Usage: python triton_compile.py ARCH DTYPE...   (say 90 float32 bfloat16)
Prints JSON, one object per kernel: what was launched, and what the compiler made of it.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

# Before Triton is imported: its own functions have to be the compiled kind, too.
os.environ["TRITON_INTERPRET"] = "0"

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

from mmfast.ops.augment.plan import MASK_FEATURES, MASK_STEPS, NOISE, RESAMPLE, Step, chains, plan_width
from mmfast.ops.barlow_twins.definition import Definition
from mmfast.ops.similarity.passes import KINDS, Rule
from mmfast.triton import augment, augment_chain, barlow_twins, similarity

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
HALF = (torch.bfloat16, torch.float16)


def compiled(kernel, arguments, options, arch):
    """What JITFunction.run compiles for these arguments: same types, constants, alignments and options."""
    target = GPUTarget("cuda", arch, 32)
    backend = make_backend(target)
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, rest = bind(*arguments, **options)
    parsed, signature, constants, attributes = kernel._pack_args(
        backend, options, bound, specialization, rest
    )
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=target, options=parsed.__dict__)


def resources(cubin):
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run(
            [CUOBJDUMP, "-res-usage", file.name], check=True, capture_output=True, text=True
        ).stdout
    return {key: int(re.search(rf"\b{key.upper()}:(\d+)", text)[1]) for key in ("reg", "stack", "local")}


class Recorder:
    """Stands in for ``launch``: compiles instead."""

    def __init__(self, arch):
        self.arch, self.case, self.seen, self.records = arch, "", {}, []

    def __call__(self, kernel, programs, device, *arguments, fuse=True, warps=4):
        built = compiled(kernel, arguments, {"num_warps": warps, "enable_fp_fusion": fuse}, self.arch)
        if built.hash not in self.seen:
            ptx = built.asm["ptx"]
            self.seen[built.hash] = {
                **resources(built.asm["cubin"]),
                "vector_loads": len(re.findall(r"ld\.global[\w.:]*\.(v4\.b32|v2\.b64)", ptx)),
                "vector_stores": len(re.findall(r"st\.global[\w.:]*\.(v4\.b32|v2\.b64)", ptx)),
                "fp64": ".f64" in ptx,
            }
        name = kernel.__name__.removesuffix("_kernel")
        self.records.append({"kernel": name, "case": self.case, "arch": self.arch, **self.seen[built.hash]})


def augmentation(recorder, dtype):
    name = str(dtype).removeprefix("torch.")
    steps = [Step(kind, 1.0, "sample", 0.5, 0.1) for kind in (RESAMPLE, MASK_STEPS, MASK_FEATURES, NOISE)]
    quiet, noisy = (chains([[[step] for step in some]] * 2) for some in (steps[:3], steps))
    seed, lengths = torch.tensor([1]), torch.full((8,), 50)
    shapes = [(50, 72)]
    plan = torch.zeros(8, plan_width(noisy.steps_per_view, noisy.rows, shapes), dtype=torch.int32)
    recorder.case = name
    if dtype == torch.float32:
        augment.draw(seed, None, [lengths], noisy, 8, shapes)
    x = torch.zeros(8, *shapes[0], dtype=dtype)
    augment.adjoint([x, x], [lengths], plan, noisy, True)
    augment.apply([x], [lengths], seed, None, plan, quiet, True, True)
    recorder.case = f"{name} noise"
    augment.apply([x], [lengths], seed, None, plan, noisy, True, True)
    if dtype == torch.float32:
        recorder.case = f"{name} strided"
        augment.apply([torch.zeros(8, 50, 80)[:, :, :72]], [lengths], seed, None, plan, quiet, True, True)
        most, augment_chain.MOST_INT32 = augment_chain.MOST_INT32, 0
        recorder.case = f"{name} 64-bit"
        augment.apply([x], [lengths], seed, None, plan, quiet, True, True)
        augment_chain.MOST_INT32 = most


def barlow_twins_loss(recorder, dtype):
    rows, columns, narrow = 256, 1000, dtype in HALF
    name = str(dtype).removeprefix("torch.")
    z = torch.zeros(rows, columns, dtype=dtype)
    plain, other = Definition(), Definition(eps_outside=True, unbiased=True, divide=False)
    for recorder.case, definition in ((name, plain), (f"{name} variant", other)):
        hat, statistics = barlow_twins.standardise(z, z, definition, narrow)
        wide = statistics.dtype
        grams, products = torch.zeros(2, rows, rows, dtype=wide), torch.zeros(2, rows, columns, dtype=wide)
        if definition is plain:
            barlow_twins.gram_loss(grams, statistics, definition)
            if narrow:
                barlow_twins.narrowed(grams, dtype, 10)
            else:
                p = torch.zeros(columns, columns, dtype=wide)
                barlow_twins.correlation_loss(p, rows, statistics, definition)
        barlow_twins.gradient(
            list(products), [z, z] if narrow else list(hat), statistics, torch.ones((), dtype=wide), definition,
            True, 10, list(grams) if narrow else None, [torch.zeros_like(z), torch.zeros_like(z)],
        )  # fmt: skip


def similarity_losses(recorder, dtype):
    name = str(dtype).removeprefix("torch.")
    rows, columns = 2048, 1000
    recorder.case = name
    x, valid = torch.zeros(rows, columns, dtype=dtype), torch.ones(rows, dtype=torch.bool)
    unit = torch.zeros(rows, columns, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    similarity.units(x, valid, unit, unit[:, :1])
    similarity.row_gradients(unit, unit, unit[:, :1], unit[0, 0], x, unit[0])
    if dtype in HALF:
        return
    for kind in KINDS:
        recorder.case = f"{name} {kind}"
        similarity_passes(kind, unit, rows, True)
    recorder.case = f"{name} pair"
    similarity_passes("out", unit, rows, False)
    recorder.case = f"{name} odd"
    similarity_passes("out", unit, 201, True)


def similarity_passes(kind, like, rows, itself):
    """Of rows among themselves with all that a rule may say, or with other candidates and without anything."""
    scores, of_rows, scale = like.new_zeros(rows, rows), like.new_zeros(rows), like[0, 0]
    pair = (torch.zeros(rows, dtype=torch.int64),) * 2
    rule = Rule(pair, pair, [x.bool() for x in pair], True) if itself else Rule(pair, None, None, False)
    passes = similarity.Passes(rule, kind, scale, scale if itself else None)
    passes.forward(scores, 0, of_rows, of_rows, scores)
    if kind != "sum":  # whose derivatives are those of "in"
        passes.backward(scores, 0, scores, of_rows, True, (scores, of_rows) if itself else None)


def main():
    recorder = Recorder(int(sys.argv[1]))
    for name, module in sys.modules.items():
        if name.startswith("mmfast.triton.") and hasattr(module, "launch"):
            module.launch = recorder
    for name in sys.argv[2:]:
        for run in (augmentation, barlow_twins_loss, similarity_losses):
            run(recorder, getattr(torch, name))
    print(json.dumps(recorder.records))


if __name__ == "__main__":
    main()
