"""Peak memory of a loss, forward and backward, above its inputs: what the operating system saw.

Each contender runs in a process of its own. The kernel's high-water mark of resident memory is reset before the
measured step (Linux only). The process returns every freed block above 128 KiB at once, so that the mark follows
the tensors that live, and has run the loss before, so that its code and the threads are there: on small shapes,
and if it is compiled on the measured one, since compiling takes memory of its own.

Usage: python benchmarks/memory.py CONTENDER 128x8192 [256x8192 ...], prints one JSON list of bytes
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

CLEAR = Path("/proc/self/clear_refs")
ENVIRONMENT = {
    "MALLOC_MMAP_THRESHOLD_": str(2**17),
    "MALLOC_TRIM_THRESHOLD_": str(2**17),
    # MKL would keep its buffers.
    "MKL_DISABLE_FAST_MM": "1",
}
# Both forms of mmfast's loss.
SMALL = ((16, 256), (256, 64))


def _resident(field: str) -> int:
    """Bytes, of VmRSS (now) or VmHWM (the peak)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")


def peak_of(call: Callable[[], object]) -> int:
    """Bytes of resident memory that ``call`` needs at its peak beyond what there was."""
    CLEAR.write_text("5")
    before = _resident("VmRSS")
    call()
    return max(0, _resident("VmHWM") - before)


def can_measure() -> bool:
    try:
        CLEAR.write_text("5")
    except OSError:
        return False
    return True


def in_own_process(contender: str, shapes: Sequence[tuple[int, int]], threads: int) -> list[int]:
    """Bytes for each shape."""
    command = [sys.executable, __file__, contender, *(f"{rows}x{columns}" for rows, columns in shapes)]
    paths = [str(Path(__file__).resolve().parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = {
        **os.environ,
        **ENVIRONMENT,
        "OMP_NUM_THREADS": str(threads),
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
    }
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"memory of {contender}: {done.stderr.strip().splitlines()[-1:]}")
    return json.loads(done.stdout)


def main(contender: str, *shapes: str) -> None:
    from peers import compiled_peers, eager_peers, embeddings, step

    from mmfast.functional import barlow_twins

    peaks = []
    for shape in shapes:
        z = embeddings(*map(int, shape.split("x")))
        compiled = contender.startswith("compiled ")
        if contender == "mmfast":
            loss = barlow_twins
        else:
            loss = (compiled_peers() if compiled else eager_peers())[contender].loss
        for views in [z] if compiled else [embeddings(*small) for small in SMALL]:
            step(loss, *views)()
        z[0].grad = z[1].grad = None
        peaks.append(peak_of(step(loss, *z)))
    print(json.dumps(peaks))


if __name__ == "__main__":
    main(*sys.argv[1:])
