"""Which implementation of an op runs: compiled kernels, Triton kernels, or the plain-PyTorch reference.

cpu        ``mmfast._C``, C++ kernels on CPU tensors
cuda       ``mmfast._C``, CUDA kernels on CUDA tensors, where the package was built with nvcc
triton     ``mmfast.triton``, the same kernels in Triton on CUDA tensors, where it was not
reference  plain PyTorch, on any device; always there, and the oracle of the tests

On CUDA tensors cuda goes before triton before reference, on CPU tensors cpu before reference, among those that have
kernels of the op (``OPS``).
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import importlib.util
import json
import os
import platform
import threading
import warnings
from pathlib import Path

import torch

from mmfast import cuda_runtime
from mmfast.cuda_runtime import version
from mmfast.errors import UserError
from mmfast.version import __version__

NAMES = ("cpu", "cuda", "triton", "reference")
_ALL = ("cpu", "cuda", "triton")
# Of which ops a backend other than the reference has kernels.
OPS = {
    "augment_draw": _ALL,
    "augment_apply": _ALL,
    "barlow_twins": _ALL,
    "similarity": _ALL,
    "triplets": ("cpu",),
    "pkt": (),
    "vicreg": (),
    "recurrent": ("cpu",),
}
_AUTOMATIC = {"cpu": ("cpu",), "cuda": ("cuda", "triton")}

try:
    from mmfast import _C
except ImportError as error:
    _C = None
    _load_error = str(error)
else:
    _load_error = ""


@functools.cache
def build_record() -> dict:
    """What setup.py wrote when the package was built; empty for a source tree that was never built."""
    path = Path(__file__).with_name("_build.json")
    return json.loads(path.read_text()) if path.exists() else {}


def _why_not_built(kind: str) -> str:
    reason = build_record().get(kind, {"reason": "the package was not built"}).get("reason")
    return reason or _load_error


def _missing_kernels() -> str:
    """What a build has less than it was meant to have, in a sentence; empty if nothing."""
    native, cuda = (build_record().get(kind, {}) for kind in ("native", "cuda"))
    if _C is None and "MMFAST_NATIVE=0" not in native.get("reason", ""):
        return (
            f"mmfast has no C++ kernels ({_why_not_built('native')}): everything runs in plain PyTorch, several "
            "times slower. Building with MMFAST_NATIVE=1 shows the failure, MMFAST_NATIVE=0 leaves them out"
        )
    if cuda.get("failed"):
        return (
            f"mmfast has no CUDA kernels, though nvcc was there ({cuda['reason']}): CUDA tensors are served by "
            "Triton or plain PyTorch. Building with MMFAST_CUDA=1 shows the failure, MMFAST_CUDA=0 leaves them out"
        )
    return ""


# pip shows nothing of a build that went through, so this is the first place where it can be seen.
if _missing := _missing_kernels():
    warnings.warn(_missing, RuntimeWarning, stacklevel=2)


def emulated() -> bool:
    """Whether the CUDA kernels were compiled for the CPU (``MMFAST_CUDA=emulate``, for tests)."""
    return bool(build_record().get("cuda", {}).get("emulated"))


def _why_not_cpu(device: torch.device) -> str:
    if _C is None:
        return f"no C++ kernels: {_why_not_built('native')}"
    return "" if device.type == "cpu" else f"its kernels take CPU tensors, not {device.type} ones"


def _why_not_cuda(device: torch.device) -> str:
    if not hasattr(_C, "cuda_capability"):
        reason = _why_not_built("native" if _C is None else "cuda")
        return f"no CUDA kernels: {reason}"
    if emulated():
        return "" if device.type == "cpu" else "its kernels were built to be emulated on CPU tensors"
    if device.type == "cuda":
        index = device.index
        if index is None:
            index = torch.cuda.current_device() if torch.cuda.is_initialized() else 0
        return _no_code_on(index)
    count = _cuda_runtime()["devices"]
    here = "" if count > 0 else f" (no device is here: {cuda_error(-count) if count else 'none found'})"
    return f"its kernels take CUDA tensors, not {device.type} ones{here}"


@functools.cache
def _cuda_runtime() -> dict:
    """:func:`mmfast.cuda_runtime.facts`, asked without initialising what is not initialised."""
    return (cuda_runtime.facts if torch.cuda.is_initialized() else cuda_runtime.facts_from_elsewhere)(_C)


@functools.cache
def _no_code_on(index: int) -> str:
    facts = _cuda_runtime()
    count, runtime, driver = facts["devices"], facts["runtime"], facts["driver"]
    if count <= index:
        why = cuda_error(-count) if count < 0 else f"it finds {count} devices"
        return (
            f"its CUDA runtime {version(runtime)} cannot use device {index} with a driver for "
            f"CUDA {version(driver)}: {why}"
        )
    # A driver compiles no PTX that is newer than itself.
    return _no_code_for(facts["capabilities"][index], ptx=driver // 10 >= runtime // 10)


def _no_code_for(device: int, ptx: bool = True) -> str:
    """Why no code of this build runs on a device of a compute capability, such as 89; empty if some does.

    Machine code runs on later devices of its generation (80 on 89), that of ``f`` too, that of ``a`` on its own
    device only; PTX, which is that of the oldest without a letter, on all later devices if it can be compiled.
    """
    archs = build_record()["cuda"]["archs"]
    general = [int(arch) for arch in archs if arch.isdigit()]
    if ptx and general and device >= min(general):
        return ""
    for arch in archs:
        number = int(arch.rstrip("af"))
        if number == device or (number // 10 == device // 10 and number < device and arch[-1] != "a"):
            return ""
    also = "" if ptx else ", its PTX is too new for the driver"
    return f"its kernels were built for sm_{', sm_'.join(archs)}{also}, and this device is sm_{device}"


@functools.cache
def _triton_missing() -> str:
    return "" if importlib.util.find_spec("triton") else "the package triton is not installed"


def _why_not_triton(device: torch.device) -> str:
    if missing := _triton_missing():
        return missing
    interpreted = os.environ.get("TRITON_INTERPRET", "0") == "1"
    if device.type == "cuda" or (device.type == "cpu" and interpreted):
        return ""
    return f"its kernels take CUDA tensors (CPU ones with TRITON_INTERPRET=1), not {device.type} ones"


_WHY_NOT = {
    "cpu": _why_not_cpu,
    "cuda": _why_not_cuda,
    "triton": _why_not_triton,
    "reference": lambda device: "",
}


def why_not(name: str, device: torch.device | str, op: str | None = None) -> str:
    """Why a backend cannot serve tensors on ``device``, or an op of them; empty if it can."""
    if op is not None and name not in (*OPS[op], "reference"):
        return f"{op} has no {name} kernels (only {', '.join((*OPS[op], 'reference'))})"
    return _WHY_NOT[name](torch.device(device))


def cuda_error(code: int) -> str:
    """The CUDA runtime's name for an error code."""
    return _C.cuda_error_string(code)


# (backend, a token) of every ``with backend(...)`` that is open, in the order in which they were entered. It is never
# changed in place: who reads it, on any thread, sees one state of it.
_forced: tuple[tuple[str, object], ...] = ()
_forcing = threading.Lock()


def _check(name: str, source: str) -> str:
    if name not in NAMES:
        raise UserError(f"{source}: the backend must be one of {', '.join(NAMES)}, got {name!r}")
    return name


@contextlib.contextmanager
def backend(name: str):
    """Run every op on one backend while the ``with`` block is open, for tests and comparisons.

    It holds for the whole process, not for the thread or task that enters it: backward passes run on threads of
    autograd's own, which have to take the backend of the forward pass. Of several blocks that are open at once,
    nested or on several threads, the one that was entered last holds, for all threads; each takes back only itself
    when it ends. Threads that need different backends at the same time belong in processes of their own.

    Enter it outside of compiled functions: what is compiled chooses its backend when it runs.

    The environment variable ``MMFAST_BACKEND`` does the same from the start. A backend that cannot serve a call
    raises there and says why.
    """
    global _forced
    mine = _check(name, "backend"), object()
    with _forcing:
        _forced += (mine,)
    try:
        yield
    finally:
        with _forcing:
            _forced = tuple(other for other in _forced if other is not mine)


def _automatic(op: str, device: torch.device) -> str:
    for name in _AUTOMATIC.get(device.type, ()):
        if name in OPS[op] and not _WHY_NOT[name](device):
            return name
    return "reference"


def asked() -> str | None:
    """The backend that was asked for, if any."""
    forced = _forced
    return forced[-1][0] if forced else os.environ.get("MMFAST_BACKEND")


def choose(op: str, device: torch.device) -> str:
    """The backend that serves ``op`` for tensors on ``device``."""
    wanted = asked()
    if wanted is None:
        return _automatic(op, device)
    if reason := why_not(_check(wanted, "MMFAST_BACKEND"), device, op):
        raise UserError(f"{op}: the {wanted} backend was asked for, but {reason}")
    return wanted


def _used(op: str, device: torch.device) -> str:
    try:
        return choose(op, device)
    except UserError as error:
        return f"none ({error})"


def info() -> dict:
    """Versions, build record, and per op and device the backend in use and why not the others.

    Does not initialise CUDA: a process that has asked can still be forked.
    """
    record = build_record()
    warning = {"warning": missing} if (missing := _missing_kernels()) else {}
    unbuilt = {"built": False, "reason": "the package was not built"}
    facts = warning | {
        "mmfast": record.get("version") or __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "native": record.get("native", unbuilt),
        "cuda": dict(record.get("cuda", unbuilt)),
        "triton": _triton_missing() or importlib.metadata.version("triton"),
        "ops": {},
    }
    if _C is not None:
        facts["instruction sets"] = _C.isas()
        if kernels := sorted(name for name in dir(_C) if name.startswith("cuda_") and name not in _CUDA_HELP):
            facts["cuda"]["kernels"] = [name.removeprefix("cuda_") for name in kernels]
        if hasattr(_C, "cuda_capability") and not emulated():
            facts["cuda"] |= _described(_cuda_runtime())
    for op in OPS:
        # device_count() asks the driver's management library; is_available() would initialise the driver.
        for device in ["cpu"] + ["cuda"] * (torch.cuda.device_count() > 0):
            row = {"uses": _used(op, torch.device(device))}
            row |= {name: why_not(name, device, op) or "available" for name in NAMES}
            facts["ops"][f"{op} ({device})"] = row
    return facts


def _described(facts: dict) -> dict:
    count = facts["devices"]
    return {
        "runtime": version(facts["runtime"]),
        "driver": version(facts["driver"]) if facts["driver"] else "none",
        "devices": [f"sm_{number}" for number in facts["capabilities"]]
        or (cuda_error(-count) if count else 0),
    }


_CUDA_HELP = (
    "cuda_device_count",
    "cuda_capability",
    "cuda_runtime_version",
    "cuda_driver_version",
    "cuda_error_string",
)


def info_text() -> str:
    """:func:`info` as lines for a terminal."""

    def lines(value, indent):
        for key, item in value.items():
            if isinstance(item, dict):
                yield f"{' ' * indent}{key}:"
                yield from lines(item, indent + 2)
            else:
                item = ", ".join(item) if isinstance(item, list) else item
                yield f"{' ' * indent}{key}: {item}"

    return "\n".join(lines(info(), 0))
