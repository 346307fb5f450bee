"""Kernels on a GPU: augmentation against a plain copy, losses against eager and compiled PyTorch.

Contenders take turns in the same rounds; times are medians of CUDA events around several calls in a row, so they
hold whatever Python takes where that is longer than the kernels; CUDA graphs of the same calls show how much that is.
Kernels alone, from the profiler, are compared with a copy that moves the same bytes, which like them stay in the
cache where they fit. Rows that matter most come first.

Usage: python benchmarks/gpu.py [--out results.json] [--seconds 130]
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import functools
import itertools
import json
import math
import statistics
import subprocess
import time
from functools import partial

import torch
import torch.nn.functional as F
from plain_similarity import LOSSES

import mmfast
from mmfast import GaussianNoise, SeqAug, TimeMask, TwoViews, backends
from mmfast.functional import barlow_twins
from mmfast.ops.augment import augment_apply

FEATURES = {"text": 300, "audio": 74, "visual": 35}
ALPHA = {"text": 0.15, "audio": 0.10, "visual": 0.20}
STEPS = {"seqaug": partial(SeqAug, ALPHA), "masking": TimeMask, "noise": GaussianNoise}
CHAINS = ("seqaug+masking", "noise+seqaug+masking", *STEPS)
# Whether steps fire: all of them (the worst case), as often as by default, none.
CHANCES = {"p = 1": {"p": 1.0}, "default p": {}, "p = 0": {"p": 0.0}}
SEEDS = 8  # plans that take turns, so that no single draw decides
KEY_SHAPES = [(170, 1000), (256, 8192), (2048, 8192), (32, 128), (128, 8192), (4096, 1024)]
GRID = [(b, d) for b in (32, 128, 512, 2048, 4096) for d in (128, 512, 2048, 8192)]
# Precision: dtype of the embeddings and whether fp32 products may use TF32.
MODES = {"fp32": (torch.float32, False), "tf32": (torch.float32, True), "bf16": (torch.bfloat16, False)}
DEVICE = "cuda"
SAMPLE = 2e-3  # seconds of calls in a row that one event pair spans
ROUNDS = 7


def milliseconds(call, calls: int) -> float:
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(calls):
        call()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop) / calls


def race(contenders: dict, rounds: int = ROUNDS) -> dict[str, float]:
    """Median milliseconds a call of each that works, measured in turns."""
    calls = {}
    for name, call in contenders.items():
        try:
            for _ in range(3):
                call()
            calls[name] = max(1, math.ceil(SAMPLE * 1e3 / milliseconds(call, 2)))
        except Exception as error:
            print(f"{name} is left out: {type(error).__name__}: {error}", flush=True)
    times = {name: [] for name in calls}
    for _ in range(rounds):
        for name, count in calls.items():
            times[name].append(milliseconds(contenders[name], count))
    return {name: statistics.median(values) for name, values in times.items()}


def late(make):
    """What ``make()`` returns, made when it is first called: so that a failure costs one contender."""
    made = functools.cache(make)
    return lambda *arguments: made()(*arguments)


def kernel_times(call, calls: int = 10) -> dict[str, float]:
    """{kernel: milliseconds a call} as the profiler sees them."""
    call()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(calls):
            call()
        torch.cuda.synchronize()
    return {
        e.key: e.self_device_time_total / 1e3 / calls
        for e in profile.key_averages()
        if e.self_device_time_total
    }


@contextlib.contextmanager
def tf32(allowed: bool):
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def environment() -> dict:
    properties = torch.cuda.get_device_properties(0)
    query = "--query-gpu=name,driver_version,clocks.max.sm,clocks.max.mem,power.limit"
    smi = subprocess.run(["nvidia-smi", query, "--format=csv,noheader"], capture_output=True, text=True)
    return {
        "date": datetime.date.today().isoformat(),
        "device": properties.name,
        "multiprocessors": properties.multi_processor_count,
        "memory": properties.total_memory,
        "nvidia-smi": smi.stdout.strip(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "mmfast": backends.info(),
    }


@functools.cache
def machine() -> dict:
    """Bytes read and written a second by a plain copy, and operations a second of matrix products."""
    source = torch.empty(2**28, device=DEVICE)
    target = torch.empty_like(source)
    copy = race({"copy": lambda: target.copy_(source)})["copy"]
    rates = {"copy_bandwidth": 2 * source.nbytes / copy * 1e3}
    for mode, (dtype, allowed) in MODES.items():
        n = 4096 if mode == "fp32" else 8192
        x, y = (torch.randn(n, n, device=DEVICE, dtype=dtype) for _ in range(2))
        with tf32(allowed):
            rates[f"matmul_{mode}"] = 2 * n**3 / race({"mm": lambda x=x, y=y: x @ y}, 3)["mm"] * 1e3
    return rates


@functools.cache
def copy_time(nbytes: int) -> float:
    """Milliseconds of the copying kernel that reads and writes so many bytes in all, again and again the same."""
    source = torch.empty(max(nbytes // 2, 1), dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    return sum(kernel_times(lambda: target.copy_(source)).values())


def graphed(call):
    """Replays of a CUDA graph of ``call``."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def augmentation(batch: int, dtype: torch.dtype, which: str, chance: str, lengths: str) -> dict:
    """Two views of three modalities. apply alone, the whole call, and a copy that moves the same bytes."""
    torch.manual_seed(0)
    xs = {k: torch.randn(batch, 50, f, device=DEVICE, dtype=dtype) for k, f in FEATURES.items()}
    ragged = ((torch.rand(batch) ** 1.2 * 50).long().clamp(min=1)).to(DEVICE)
    real = ragged if lengths == "ragged" else torch.full_like(ragged, 50)
    nbytes = 3 * sum(x.nbytes for x in xs.values())
    views = TwoViews([STEPS[name](**CHANCES[chance]) for name in which.split("+")])
    plans = itertools.cycle([views.draw(xs, real, seed=seed) for seed in range(SEEDS)])

    def apply():
        plan = next(plans)
        return augment_apply(list(xs.values()), [real] * 3, plan.seed, None, plan.words, plan.chains, False)

    def on(backend, call):
        def run():
            with mmfast.backend(backend):
                return call()

        return run

    contenders = {
        "apply": apply,
        "draw": lambda: views.draw(xs, real),
        "call": lambda: views(xs, real),
        "call, graph": late(lambda: graphed(lambda: views(xs, real))),
        "apply, triton": on("triton", apply),
        "call, reference": on("reference", lambda: views(xs, real)),
        "copy": lambda: [(x.clone(), x.clone()) for x in xs.values()],
    }
    if "noise" in which:
        contenders["eager noise"] = lambda: [
            (x + 0.1 * torch.randn_like(x), x + 0.1 * torch.randn_like(x)) for x in xs.values()
        ]
    times = race(contenders)
    kernels = kernel_times(lambda: views(xs, real), calls=SEEDS)
    copies = sum(kernel_times(contenders["copy"]).values())
    applied = sum(value for name, value in kernels.items() if "apply_kernel" in name)
    return {
        "what": "augmentation",
        "batch": batch,
        "dtype": str(dtype).removeprefix("torch."),
        "chain": which,
        "chance": chance,
        "lengths": lengths,
        "bytes": nbytes,
        "times": times,
        "kernels": kernels,
        "copy_kernels": copies,
        "apply_over_copy": applied / copies if applied and copies else None,
    }


def plain(z_a, z_b, lambd=5e-3):
    """The published form in PyTorch: batch norm in fp32, the product in the dtype of the embeddings."""
    a, b = (F.batch_norm(z.float(), None, None, training=True, eps=1e-5).to(z.dtype) for z in (z_a, z_b))
    c = (a.T @ b).float() / len(a)
    off = c.flatten()[:-1].view(len(c) - 1, len(c) + 1)[:, 1:]
    return (c.diagonal() - 1).square().sum() + lambd * off.square().sum()


def kernel_bytes(name: str, rows: int, columns: int, element: int, gram: bool) -> int | None:
    """The fewest bytes a kernel of ours can move; None for other people's."""
    cells, n = rows * columns, rows if gram else columns
    return {
        "standardise_whole": 4 * cells * element,
        "chunk_moments": 2 * cells * element,
        "standardise_chunk": 4 * cells * element,
        "loss_kernel": (2 if gram else 1) * 4 * n * n,
        "narrow_kernel": (2 if gram else 1) * 6 * n * n,
        "chunk_products": 2 * cells * (4 + element),
        "gradient_kernel": 2 * cells * (4 + 2 * element),
    }.get(next((part for part in name.replace("<", "::").split("::") if part.endswith(_OURS)), ""))


_OURS = ("_whole", "_moments", "_chunk", "_kernel", "_products")


def compared(ours, theirs, rows: int, columns: int, mode: str, compiled: bool) -> dict:
    """Times, peaks and kernels of two losses of two views; with ``compiled``, also compiled and in CUDA graphs."""
    dtype, allowed = MODES[mode]
    torch.manual_seed(0)
    z_a = torch.randn(rows, columns, device=DEVICE)
    z_b = (z_a + 0.5 * torch.randn_like(z_a)).to(dtype).requires_grad_()
    z_a = z_a.to(dtype).requires_grad_()

    def step(function):
        def run():
            z_a.grad = z_b.grad = None
            function(z_a, z_b).backward()

        return run

    with tf32(allowed):
        contenders = {"mmfast": ours, "eager": theirs}
        if compiled:
            torch._dynamo.reset()
            contenders |= {
                "mmfast, graph": late(lambda: torch.cuda.make_graphed_callables(ours, (z_a, z_b))),
                "compiled": torch.compile(theirs, dynamic=False),
                "compiled, graph": torch.compile(theirs, dynamic=False, mode="reduce-overhead"),
            }
        times = race({name: step(function) for name, function in contenders.items()})
        peaks = {}
        for name, function in {"mmfast": ours, "eager": theirs}.items():
            z_a.grad = z_b.grad = None
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            step(function)()
            peaks[name] = torch.cuda.max_memory_allocated() - before
        kernels = kernel_times(step(ours))
    best = min(value for name, value in times.items() if not name.startswith("mmfast"))
    fastest = min(value for name, value in times.items() if name.startswith("mmfast"))
    return {
        "rows": rows,
        "columns": columns,
        "mode": mode,
        "times": times,
        "speedup": best / times["mmfast"],
        "best_speedup": best / fastest,
        "peak_bytes": peaks,
        "kernels": kernels,
    }


def share_of_floor(row: dict, nbytes: float, flops: float) -> float:
    rates = machine()
    floor = nbytes / rates["copy_bandwidth"] + flops / rates[f"matmul_{row['mode']}"]
    return floor * 1e3 / row["times"]["mmfast"]


def loss(rows: int, columns: int, mode: str, compiled: bool) -> dict:
    """Barlow Twins, forward and backward."""
    gram, element = 4 * rows < 3 * columns, MODES[mode][0].itemsize
    row = compared(barlow_twins, plain, rows, columns, mode, compiled)
    own = {}
    for name, value in row["kernels"].items():
        if nbytes := kernel_bytes(name, rows, columns, element, gram):
            own[name] = {"ms": value, "over_copy": value / copy_time(nbytes)}
    flops = 2 * rows * columns * (4 * rows if gram else 3 * columns)
    return {
        "what": "barlow_twins",
        "form": "gram" if gram else "direct",
        **row,
        "own_kernels": own,
        "share_of_floor": share_of_floor(row, 12 * rows * columns * element, flops),
    }


def similarity(name: str, rows: int, columns: int, mode: str, compiled: bool) -> dict:
    """A loss of similarities, forward and backward."""
    ours, theirs, factor, _ = LOSSES[name]
    row = compared(ours, theirs, rows, columns, mode, compiled)
    share = share_of_floor(row, 4 * rows * columns * MODES[mode][0].itemsize, factor * rows * rows * columns)
    return {"what": "similarity", "form": name, **row, "own_kernels": {}, "share_of_floor": share}


def show(row: dict) -> str:
    cells = "  ".join(f"{name} {value:.3f}" for name, value in row["times"].items())
    if row["what"] == "augmentation":
        over = row["apply_over_copy"]
        over = f"apply kernel takes {over:.2f} copies" if over else "no kernel times"
        where = f"{row['batch']:5} {row['dtype']:8} {row['chain']:20} {row['chance']:9} {row['lengths']:6}"
        return f"{where} {over}; ms: {cells}"
    kernels = "".join(
        f"\n      {kernel['ms'] * 1e3:8.1f} us, {kernel['over_copy']:.2f} copies: {name[:80]}"
        for name, kernel in row["own_kernels"].items()
        if (row["rows"], row["columns"]) in KEY_SHAPES
    )
    best = f", {row['best_speedup']:.2f}x in a graph" if "mmfast, graph" in row["times"] else ""
    return (
        f"{row['rows']:5} x {row['columns']:5} {row['mode']} {row['form']:8} {row['speedup']:6.2f}x the best other"
        f"{best}, {row['share_of_floor']:.0%} of the floor's speed; ms: {cells}{kernels}"
    )


def jobs() -> list:
    """Calls of the functions that measure, what matters most first, the grid last."""
    dtypes = (torch.float32, torch.bfloat16)
    key = [(loss, (*shape, mode, True)) for shape in KEY_SHAPES for mode in MODES]
    grid = [(loss, (*shape, mode, False)) for shape in GRID if shape not in KEY_SHAPES for mode in MODES]
    views = [
        (augmentation, (batch, dtype, which, chance, lengths))
        for which in CHAINS
        for batch in (170, 4096)
        for dtype in dtypes
        for chance in CHANCES
        for lengths in ("full", "ragged")
        # Of single steps, the worst case.
        if "+" in which or (chance, lengths, batch) == ("p = 1", "full", 4096)
    ]
    similar = [
        (similarity, (name, *shape, "fp32", True))
        for shape in ((170, 128), (1024, 128), (4096, 128))
        for name in ("nt_xent", "sup_con", "info_nce", "clip", "siglip")
    ]
    return [*key[: 3 * len(MODES)], *similar, *views, *key[3 * len(MODES) :], *grid]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="results.json", help="where the numbers go, after every row")
    parser.add_argument("--seconds", type=float, default=130, help="no new row is begun after this long")
    options = parser.parse_args()
    begin = time.perf_counter()
    results = {"environment": environment(), "rates": machine(), "rows": [], "skipped": []}
    print({name: f"{value / 1e12:.3g}e12" for name, value in machine().items()})

    for measure, arguments in jobs():
        if time.perf_counter() - begin > options.seconds:
            results["skipped"].append([str(a) for a in arguments])
            continue
        try:
            results["rows"].append(measure(*arguments))
            print(show(results["rows"][-1]), flush=True)
        except Exception as error:  # a row that fails must not cost the others
            print(f"{measure.__name__} {arguments}: {type(error).__name__}: {error}", flush=True)
            results["skipped"].append([*map(str, arguments), str(error)])
        with open(options.out, "w") as file:
            json.dump(results, file, indent=1, default=str)
    grid = [row["speedup"] for row in results["rows"] if row["what"] == "barlow_twins"]
    if grid:
        print(f"barlow_twins: {min(grid):.2f}x to {max(grid):.2f}x the best other over {len(grid)} cases")
    print(
        f"{len(results['rows'])} rows, {len(results['skipped'])} skipped, {time.perf_counter() - begin:.0f} s"
    )


if __name__ == "__main__":
    main()
