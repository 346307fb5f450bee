"""Fair races: every contender in every round, beside what this machine's memory and arithmetic can do.

pytest-benchmark's own table has mmfast alone. Above it stand the medians of the races and how many times
faster mmfast is; ``--benchmark-json FILE`` keeps all of it, with the machine. ``--benchmark-disable`` runs each
benchmark once, on small sizes, without timing.
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

# Seconds: what a contender's calls in one round take at least, and what the rounds of a race take in all.
SAMPLE, BUDGET = 0.005, 4.0
ROUNDS = (5, 100)
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


def time_of(function, calls: int) -> float:
    """Seconds a call, over calls in a row."""
    start = time.perf_counter()
    for _ in range(calls):
        function()
    return (time.perf_counter() - start) / calls


def best_time(function, calls: int = 1) -> float:
    return min(time_of(function, calls) for _ in range(9))


class Machine:
    """What a plain copy and a plain matrix product reach here, measured when first asked for."""

    @functools.cache  # noqa: B019 - one object a session
    def copy_bandwidth(self, nbytes: int) -> float:
        """Bytes read and written a second by a copy that moves ``nbytes`` in all, in cache where they fit."""
        source = torch.ones(max(1, nbytes // 8))
        target = torch.empty_like(source)
        return nbytes / best_time(lambda: target.copy_(source), calls=max(1, 2**22 // nbytes))

    @functools.cached_property
    def matmul_rate(self) -> float:
        """fp32 operations a second, of the better of torch's libraries."""
        x = torch.ones(1024, 1024)
        return 2 * 1024**3 / min(best_time(lambda: x @ x), best_time(lambda: product(x, x)))


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
        contenders = {"mmfast": ours, **baselines}
        if smoke:
            for call in baselines.values():
                call()
            return benchmark(ours)

        calls = {}
        for name, call in contenders.items():
            call()
            calls[name] = max(1, round(SAMPLE / time_of(call, 2)))
        times = {name: [] for name in contenders}
        round_time = sum(time_of(call, calls[name]) for name, call in contenders.items())
        for _ in range(min(max(int(BUDGET / round_time), ROUNDS[0]), ROUNDS[1])):
            for name, call in contenders.items():
                times[name].append(time_of(call, calls[name]))
        medians = {name: statistics.median(values) for name, values in times.items()}
        median = medians["mmfast"]

        bandwidth = machine.copy_bandwidth(nbytes)
        floor = nbytes / bandwidth
        if flops:
            rate = machine.matmul_rate
            floor += flops / rate
            benchmark.extra_info.update(matmul_rate=rate, share_of_matmul_rate=flops / median / rate)
        benchmark.extra_info.update(
            bytes=nbytes,
            flops=flops,
            copy_bandwidth=bandwidth,
            share_of_copy_bandwidth=nbytes / median / bandwidth,
            floor=floor,
            share_of_floor=floor / median,
            quartiles={name: statistics.quantiles(values) for name, values in times.items()},
            speedup={name: medians[name] / median for name in baselines},
        )
        request.config.stash[_TABLE].append((request.node.name, median, floor / median, medians))
        return benchmark.pedantic(ours, iterations=calls["mmfast"], rounds=ROUNDS[0])

    return run


def pytest_terminal_summary(terminalreporter, config):
    if not config.stash[_TABLE]:
        return
    terminalreporter.section("races: medians in ms (and how many times faster mmfast is)")
    for name, median, share, medians in config.stash[_TABLE]:
        cells = [f"mmfast {median * 1e3:.3f} ({share:.0%} of the floor's speed)"]
        for other, value in medians.items():
            if other != "mmfast":
                cells.append(f"{other} {value * 1e3:.3f} ({value / median:.1f}x)")
        terminalreporter.write_line(f"{name:40} {'  '.join(cells)}")
