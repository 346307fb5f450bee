"""Barlow Twins loss, forward and backward: a grid of shapes against every peer, bf16, and peak memory."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path

import memory
import pytest
import torch
from peers import compiled_peers, eager_peers, embeddings, step
from races import memory_limit

from mmfast.functional import barlow_twins

# The tests' transcriptions of the published formulas: the truth, in fp64.
sys.path.append(str(Path(__file__).resolve().parents[1] / "python_tests"))
from barlow_twins_formulas import FORMULAS, gradients, relative_error

ROWS = (16, 64, 256, 1024, 4096)
COLUMNS = (64, 256, 1024, 4096, 16384)
NAMED = [(170, 1000), (32, 1000), (128, 8192), (256, 8192), (512, 1000)]
HALF = [(170, 1000), (256, 8192)]
MEMORY = [(170, 1000), (128, 8192), (256, 8192), (1024, 4096)]


def cost(shape) -> int:
    """What all but mmfast pay grows with this: operations, and passes over C."""
    rows, columns = shape
    return (rows + 200) * columns**2


GRID = sorted([*((rows, columns) for rows in ROWS for columns in COLUMNS), *NAMED], key=cost)
# Compiling and warming up takes minutes beyond these.
COMPILE_BOTH, COMPILE = 1e10, 1e12
# fp64 takes seconds beyond these: then the formula is evaluated for the official definition only, or for none. Losses
# are compared with mmfast's in fp64 instead, in the same variant, up to B^2 D of the last.
EVERY_FORMULA, ONE_FORMULA, NO_FORMULA = 2e9, 3e10, 5e10
# fp32 against fp64, relative: loss, gradient; and the loss where sums of D^2 squares go on for long.
TOLERANCES = (1e-5, 2e-5)
LONG_SUMS = 1e-3


def shape_id(shape):
    return "x".join(map(str, shape))


class Check:
    """Each contender's loss and gradients against the definition that it computes; keeps their errors."""

    def __init__(self, z_a, z_b, variants: dict[str, str], tolerances):
        self.views, self.variants, self.tolerances = (z_a, z_b), variants, tolerances
        self.losses, self.errors, self._truths = {}, {}, {}

    def _truth(self, variant):
        """(loss, gradients), (loss,) or None."""
        if variant not in self._truths:
            exact = [z.detach().double() for z in self.views]
            rows, columns = exact[0].shape
            truth = None
            if cost((rows, columns)) < (ONE_FORMULA if variant == "official" else EVERY_FORMULA):
                truth = gradients(FORMULAS[variant], *exact)
            elif rows**2 * columns < NO_FORMULA:
                truth = (barlow_twins(*exact, variant=variant),)
            self._truths[variant] = truth
        return self._truths[variant]

    def watch(self, name, call):
        """``call`` with its loss kept."""

        def run():
            self.losses[name] = call()

        return run

    def __call__(self, name):
        if name not in self.variants:
            return
        variant = self.variants[name]
        # lightly's is the official one, solo-learn's a multiple.
        scale = 0.025 if variant == "solo" else 1.0
        truth = self._truth("official" if variant in ("lightly", "solo") else variant)
        if truth is None:
            return
        loss, *grads = truth
        limits = self.tolerances if grads else (max(LONG_SUMS, self.tolerances[0]),)
        errors = [abs(float(self.losses[name]) / (scale * float(loss)) - 1)]
        errors += [
            relative_error(z.grad.double(), scale * grad) for z, grad in zip(self.views, grads, strict=False)
        ]
        self.errors[name] = errors
        assert errors[0] <= limits[0], f"{name}: loss"
        assert all(error <= limits[1] for error in errors[1:]), f"{name}: gradient"


def contenders(shape, smoke):
    """({name: peer}, {name: why it does not run})."""
    peers, excluded = eager_peers() | compiled_peers(), {}
    for name in [name for name, peer in peers.items() if peer.compiled]:
        if smoke or cost(shape) > COMPILE:
            excluded[name] = "not run: compiling and warming up would take minutes"
        elif cost(shape) > COMPILE_BOTH and name != "compiled definition":
            excluded[name] = "not run: the compiled definition stands for it, elsewhere they are alike"
    return {name: peer for name, peer in peers.items() if name not in excluded}, excluded


def run_race(race, smoke, shape, dtype=torch.float32, tolerances=TOLERANCES, yardsticks=None):
    """``yardsticks`` {name: call}: timed with the finalists, neither peers nor checked."""
    if smoke and cost(shape) > 1e9:
        pytest.skip("a smoke run takes the small sizes")
    rows, columns = shape
    peers, excluded = contenders(shape, smoke)
    z = embeddings(rows, columns, dtype)
    check = Check(*z, {"mmfast": "official", **{n: peer.variant for n, peer in peers.items()}}, tolerances)
    watched = {name: check.watch(name, step(peer.loss, *z)) for name, peer in peers.items()}
    with memory_limit() if columns > 4096 else contextlib.nullcontext():
        race(
            check.watch("mmfast", step(barlow_twins, *z)),
            {**watched, **(yardsticks or {})},
            nbytes=4 * z[0].nbytes,
            flops=6 * rows * columns * min(rows, columns),
            warm=[name for name, peer in peers.items() if peer.compiled],
            yardsticks=list(yardsticks or ()),
            excluded=excluded,
            done=check,
            op="barlow_twins",
            rows=rows,
            columns=columns,
            dtype=str(dtype).removeprefix("torch."),
            errors=check.errors,
            peers={name: {"variant": peer.variant, "source": peer.source} for name, peer in peers.items()},
        )


@pytest.mark.parametrize("shape", GRID, ids=shape_id)
def test_forward_and_backward(shape, race, smoke):
    run_race(race, smoke, shape)


@pytest.mark.parametrize("shape", HALF, ids=shape_id)
def test_bfloat16(shape, race, smoke):
    """Peers compute in the type they are given; errors are those of their arithmetic, the inputs being exact."""
    fp32 = step(barlow_twins, *embeddings(*shape))
    run_race(race, smoke, shape, torch.bfloat16, (1, 1), {"mmfast fp32": fp32})


CONTENDERS = ["mmfast", *eager_peers(), "compiled definition"]


@pytest.mark.parametrize("contender", CONTENDERS)
def test_peak_memory(contender, benchmark, smoke):
    """Above the inputs, forward and backward."""
    if not memory.can_measure():
        pytest.skip("peaks of resident memory cannot be reset here")
    if smoke and contender != "mmfast":
        pytest.skip("a smoke run takes one contender")
    shapes = MEMORY[:1] if smoke else MEMORY
    peaks = benchmark.pedantic(
        memory.in_own_process, (contender, shapes, torch.get_num_threads()), rounds=1, iterations=1
    )
    benchmark.extra_info.update(
        kind="memory",
        op="barlow_twins",
        contender=contender,
        peaks={shape_id(shape): peak for shape, peak in zip(shapes, peaks, strict=True)},
        inputs={shape_id(shape): 2 * 4 * shape[0] * shape[1] for shape in shapes},
    )
