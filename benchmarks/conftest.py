"""Fair races: every contender in every round, beside what this machine's memory and arithmetic can do.

pytest-benchmark's own table has mmfast alone. Above it stand the medians of the races and how many times
faster mmfast is; ``--benchmark-json FILE`` keeps all of it, with the machine, for ``benchmarks/report.py``.
``--benchmark-disable`` runs each benchmark once, on small sizes, without timing.
"""

from __future__ import annotations

import functools
import platform
from pathlib import Path

import pytest
import races
import torch
from races import best_time

import mmfast
from mmfast import backends
from mmfast.ops.products import product

_TABLE = pytest.StashKey[list]()
_RANKS = pytest.StashKey[dict]()


def pytest_configure(config):
    config.stash[_TABLE] = []
    config.stash[_RANKS] = {}


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
    """race(ours, others, nbytes, flops=0, ...): times ``ours`` against ``others`` {name: call}.

    Others qualify by a call each; the three fastest run against ``ours`` in turns, beside ``yardsticks``, names
    of others that are not rivals. ``nbytes`` and ``flops`` are the least that the task must move (read and
    written) and compute; the time they take at this machine's rates is the floor. ``warm``: names of others that
    must be called once before they are timed. ``excluded`` {name: why} is kept beside those that could not run.
    ``done(name)`` is called after a first call. What else is given by name goes into the JSON as it is.
    """

    def run(
        ours, others, nbytes, flops=0, warm=(), yardsticks=(), excluded=(), done=lambda name: None, **facts
    ):
        if smoke:
            for name, call in {"mmfast": ours, **others}.items():
                call()
                done(name)
            return benchmark(ours)

        # Where time does not suffice for all, those go first that were fast in the race before.
        ranks = request.config.stash[_RANKS]
        others = {name: others[name] for name in sorted(others, key=lambda n: ranks.get(n, 0))}
        result = races.race(ours, others, warm, yardsticks, done)
        ranks |= result.qualifying
        medians = result.medians()
        median = medians.pop("mmfast")
        rivals = [name for name in medians if name not in yardsticks]

        bandwidth = machine.copy_bandwidth(nbytes)
        floor = nbytes / bandwidth
        if flops:
            rate = machine.matmul_rate
            floor += flops / rate
            benchmark.extra_info.update(matmul_rate=rate, share_of_matmul_rate=flops / median / rate)
        benchmark.extra_info.update(
            kind="race",
            bytes=nbytes,
            flops=flops,
            copy_bandwidth=bandwidth,
            share_of_copy_bandwidth=nbytes / median / bandwidth,
            floor=floor,
            share_of_floor=floor / median,
            medians={"mmfast": median, **medians},
            quartiles=result.quartiles(),
            rounds=len(result.times["mmfast"]),
            qualifying=result.qualifying,
            skipped={**dict(excluded), **result.skipped},
            yardsticks=list(yardsticks),
            best=min(rivals, key=medians.get) if rivals else None,
            speedup={name: value / median for name, value in medians.items()},
            **facts,
        )
        request.config.stash[_TABLE].append((request.node.name, median, floor / median, medians))
        return benchmark.pedantic(
            ours, iterations=result.calls["mmfast"], rounds=5 if median < races.CHEAP else 1
        )

    return run


def pytest_terminal_summary(terminalreporter, config):
    if not config.stash[_TABLE]:
        return
    terminalreporter.section("races: medians in ms (and how many times faster mmfast is)")
    for name, median, share, medians in config.stash[_TABLE]:
        cells = [f"mmfast {median * 1e3:.3f} ({share:.0%} of the floor's speed)"]
        cells += [f"{other} {value * 1e3:.3f} ({value / median:.1f}x)" for other, value in medians.items()]
        terminalreporter.write_line(f"{name:40} {'  '.join(cells)}")
