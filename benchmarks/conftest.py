"""Fair races: every contender in every round, beside what this machine's memory and arithmetic can do.

Under pytest-benchmark's own table stand the median of each contender and how many times faster mmfast is;
``--benchmark-json FILE`` keeps it all, with the machine. ``--benchmark-disable`` runs each benchmark once, on
small sizes, without timing.
"""

from __future__ import annotations

import functools
import platform
import statistics
import time
from pathlib import Path

import pytest
import torch

import mmfast
from mmfast import backends
from mmfast.ops.products import product

# Contenders faster than this, in seconds, run once more before they are timed: caches are warm for all.
WARM_BELOW = 0.05
# What the rounds of one race may take in all, in seconds, and how many there are.
BUDGET, ROUNDS = 4.0, (5, 100)
_TABLE = pytest.StashKey[list]()


def pytest_configure(config):
    config.stash[_TABLE] = []


def pytest_benchmark_update_machine_info(config, machine_info):
    cpuinfo = Path("/proc/cpuinfo")
    names = [ln for ln in cpuinfo.read_text().splitlines() if "model name" in ln] if cpuinfo.exists() else []
    machine_info["mmfast"] = {
        "cpu": names[0].split(":")[1].strip() if names else platform.processor(),
        "cores": torch.multiprocessing.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "mmfast": mmfast.__version__,
        "instruction set": backends._C.isas()[-1] if backends._C else "none: reference",
    }


def seconds(function, calls: int = 1) -> float:
    """Time of a call: the best of nine, since what is sought is what the machine can do."""
    function()
    times = []
    for _ in range(9):
        start = time.perf_counter()
        for _ in range(calls):
            function()
        times.append(time.perf_counter() - start)
    return min(times) / calls


class Machine:
    """What a plain copy and a plain matrix product reach here, measured when first asked for."""

    @functools.cache  # noqa: B019 - one object a session
    def copy_bandwidth(self, nbytes: int) -> float:
        """Bytes read and written a second by a copy that moves ``nbytes`` in all, in cache where they fit."""
        source = torch.ones(max(1, nbytes // 8))
        target = torch.empty_like(source)
        return nbytes / seconds(lambda: target.copy_(source), calls=max(1, 2**22 // nbytes))

    @functools.cached_property
    def matmul_rate(self) -> float:
        """fp32 operations a second, of the better of torch's libraries."""
        x = torch.ones(1024, 1024)
        return 2 * 1024**3 / min(seconds(lambda: x @ x), seconds(lambda: product(x, x)))


@pytest.fixture(scope="session")
def machine() -> Machine:
    return Machine()


@pytest.fixture
def smoke(request) -> bool:
    """Whether this run only has to show that the benchmarks work."""
    return request.config.getoption("benchmark_disable")


@pytest.fixture
def race(benchmark, machine, smoke, request):
    """race(ours, baselines, nbytes, flops=0): times ``ours`` against ``baselines`` {name: call}.

    Each round runs all contenders once, so that a busy moment of the machine meets all of them. ``nbytes``
    and ``flops`` are the least that the task must move (read and written) and compute; the time they take at
    this machine's rates is the floor.
    """

    def run(ours, baselines, nbytes, flops=0):
        if smoke:
            for contender in baselines.values():
                contender()
            return benchmark(ours)

        once = {}
        for name, call in {**baselines, "mmfast": ours}.items():
            call()
            start = time.perf_counter()
            call()
            once[name] = time.perf_counter() - start
        warm = {name: value < WARM_BELOW for name, value in once.items()}
        rounds = min(max(int(BUDGET / (2 * sum(once.values()))), ROUNDS[0]), ROUNDS[1])
        times = {name: [] for name in baselines}

        def others():
            for name, call in baselines.items():
                if warm[name]:
                    call()
                start = time.perf_counter()
                call()
                times[name].append(time.perf_counter() - start)
            if warm["mmfast"]:
                ours()

        benchmark.pedantic(ours, setup=others, rounds=rounds)
        median = benchmark.stats.stats.median
        bandwidth = machine.copy_bandwidth(nbytes)
        floor = nbytes / bandwidth + (flops / machine.matmul_rate if flops else 0)
        medians = {name: statistics.median(values) for name, values in times.items()}
        benchmark.extra_info.update(
            bytes=nbytes,
            flops=flops,
            copy_bandwidth=bandwidth,
            share_of_copy_bandwidth=nbytes / median / bandwidth,
            floor=floor,
            share_of_floor=floor / median,
            baselines={name: [value, *statistics.quantiles(times[name])] for name, value in medians.items()},
            speedup={name: value / median for name, value in medians.items()},
        )
        if flops:
            rate = machine.matmul_rate
            benchmark.extra_info.update(matmul_rate=rate, share_of_matmul_rate=flops / median / rate)
        request.config.stash[_TABLE].append((request.node.name, median, floor / median, medians))

    return run


def pytest_terminal_summary(terminalreporter, config):
    if not config.stash[_TABLE]:
        return
    write = terminalreporter.write_line
    terminalreporter.section("medians in ms, and how many times faster mmfast is")
    for name, median, share, medians in config.stash[_TABLE]:
        others = "  ".join(
            f"{other} {value * 1e3:.3f} ({value / median:.1f}x)" for other, value in medians.items()
        )
        write(f"{name:42} mmfast {median * 1e3:.3f} ({share:.0%} of the floor's speed)  {others}")
