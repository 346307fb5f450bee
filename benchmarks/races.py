"""Races: one qualifying call for everybody, then the fastest in turns, so that a busy moment meets all of them."""

from __future__ import annotations

import contextlib
import math
import resource
import statistics
import time
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import NamedTuple

Call = Callable[[], object]
# Seconds: what a contender's calls in one round take at least, and what the rounds of a final take in all.
SAMPLE, BUDGET = 0.02, 4.0
ROUNDS = (3, 100)
FINALISTS = 3
# Seconds after which nobody else qualifies, once ours and two others have, and that three rounds of a final take.
QUALIFYING, FINAL = 40.0, 40.0
# Seconds up to which a call is cheap enough to be repeated before it is timed.
CHEAP = 1.0


class Result(NamedTuple):
    """Seconds a call: ``times`` of the finalists by round, ``qualifying`` of all that ran; ``calls`` in a row."""

    times: dict[str, list[float]]
    qualifying: dict[str, float]
    skipped: dict[str, str]
    calls: dict[str, int]

    def medians(self) -> dict[str, float]:
        return {name: statistics.median(values) for name, values in self.times.items()}

    def quartiles(self) -> dict[str, list[float]]:
        return {name: statistics.quantiles(values) for name, values in self.times.items()}


def time_of(function: Call, calls: int = 1) -> float:
    """Seconds a call, over calls in a row."""
    start = time.perf_counter()
    for _ in range(calls):
        function()
    return (time.perf_counter() - start) / calls


def best_time(function: Call, calls: int = 1) -> float:
    return min(time_of(function, calls) for _ in range(9))


def in_a_row(seconds: float) -> int:
    return max(1, round(SAMPLE / seconds))


def qualify(
    contenders: Mapping[str, Call], warm: Collection[str], done: Callable[[str], None]
) -> tuple[dict[str, float], dict[str, str]]:
    """(seconds a call, why others have none). ``warm``: who must be called before; ``done`` follows a first call."""
    times, skipped, start = {}, {}, time.perf_counter()
    for name, call in contenders.items():
        if len(times) > 2 and time.perf_counter() - start > QUALIFYING:
            skipped[name] = "not run: the time to qualify was spent"
            continue
        try:
            seconds = time_of(call)
            done(name)
            if name in warm or seconds < CHEAP:
                seconds = time_of(call)
            if seconds < CHEAP:
                seconds = min(time_of(call, in_a_row(seconds)) for _ in range(3))
        except (MemoryError, RuntimeError) as error:
            if "memory" not in str(error):
                raise
            skipped[name] = "not run: out of memory"
            continue
        times[name] = seconds
    return times, skipped


def race(
    ours: Call,
    others: Mapping[str, Call],
    warm: Collection[str] = (),
    always: Collection[str] = (),
    done: Callable[[str], None] = lambda name: None,
) -> Result:
    """``ours`` as ``mmfast`` against the fastest of the others, and against those in ``always``."""
    qualifying, skipped = qualify({"mmfast": ours, **others}, warm, done)
    finalists = ["mmfast", *(name for name in always if name in qualifying)]
    chosen = 0
    for name in sorted(qualifying, key=qualifying.get):
        seconds = ROUNDS[0] * sum(qualifying[n] for n in (*finalists, name))
        if name not in finalists and (chosen == 0 or (chosen < FINALISTS and seconds < FINAL)):
            finalists.append(name)
            chosen += 1
    calls = {name: in_a_row(qualifying[name]) for name in finalists}
    contenders = {name: {"mmfast": ours, **others}[name] for name in finalists}
    round_time = sum(calls[name] * qualifying[name] for name in finalists)
    rounds = min(max(math.ceil(BUDGET / round_time), ROUNDS[0]), ROUNDS[1])
    times = {name: [] for name in finalists}
    for _ in range(rounds):
        for name, call in contenders.items():
            times[name].append(time_of(call, calls[name]))
    return Result(times, qualifying, skipped, calls)


@contextlib.contextmanager
def memory_limit():
    """What would not fit into the machine's free memory fails inside with an error, not by ending the process."""
    fields = {}
    for file in ("/proc/meminfo", "/proc/self/status"):
        for line in Path(file).read_text().splitlines() if Path(file).exists() else ():
            name, _, value = line.partition(":")
            fields[name] = value
    before = resource.getrlimit(resource.RLIMIT_AS)
    if "MemAvailable" in fields and "VmSize" in fields:
        free, used = (1024 * int(fields[name].split()[0]) for name in ("MemAvailable", "VmSize"))
        resource.setrlimit(resource.RLIMIT_AS, (used + int(0.9 * free), before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
