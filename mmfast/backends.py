"""Which implementation of an op runs: compiled kernels or the plain-PyTorch reference.

native     ``mmfast._C``, C++ kernels on CPU tensors
reference  plain PyTorch, on any device; always there, and the oracle of the tests
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
from pathlib import Path

import torch

from mmfast.errors import UserError

NAMES = ("native", "reference")
OPS = ("augment_draw", "augment_apply", "barlow_twins")

try:
    from mmfast import _C
except ImportError as error:
    _C = None
    _load_error = str(error)
else:
    _load_error = ""


def build_record() -> dict:
    """What setup.py wrote when the package was built; empty for a source tree that was never built."""
    path = Path(__file__).with_name("_build.json")
    return json.loads(path.read_text()) if path.exists() else {}


def why_not_native(device: torch.device | str = "cpu") -> str:
    """Why compiled kernels cannot be used for tensors on ``device``; empty if they can."""
    device = torch.device(device)
    if _C is None:
        native = build_record().get("native", {"reason": "the package was not built"})
        return f"no compiled kernels: {native.get('reason') or _load_error}"
    if device.type != "cpu":
        return f"no compiled kernels for {device.type} tensors"
    return ""


_forced: str | None = None


def _check(name: str, source: str) -> str:
    if name not in NAMES:
        raise UserError(f"{source}: the backend must be one of {', '.join(NAMES)}, got {name!r}")
    return name


@contextlib.contextmanager
def backend(name: str):
    """Run every op inside the ``with`` block on one backend, for tests and comparisons.

    The environment variable ``MMFAST_BACKEND`` does the same for a whole process. A backend that cannot
    serve a call raises there and says why.
    """
    global _forced
    previous, _forced = _forced, _check(name, "backend")
    try:
        yield
    finally:
        _forced = previous


def choose(op: str, device: torch.device) -> str:
    """The backend that serves ``op`` for tensors on ``device``."""
    wanted = _forced or os.environ.get("MMFAST_BACKEND")
    if wanted is None:
        return "reference" if _C is None or device.type != "cpu" else "native"
    if _check(wanted, "MMFAST_BACKEND") == "native" and (reason := why_not_native(device)):
        raise UserError(f"{op}: the native backend was asked for, but there are {reason}")
    return wanted


def info() -> dict:
    """Versions, build record, and per op and device the backend in use and why not the others."""
    record = build_record()
    facts = {
        "mmfast": record.get("version") or _version(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "native": record.get("native", {"built": False, "reason": "the package was not built"}),
        "cuda": dict(record.get("cuda", {"built": False, "reason": "the package was not built"})),
        "ops": {},
    }
    if _C is not None:
        facts["instruction sets"] = _C.isas()
        if hasattr(_C, "cuda_device_count"):
            count = _C.cuda_device_count()
            facts["cuda"]["devices"] = count if count >= 0 else _C.cuda_error_string(-count)
    for op in OPS:
        for device in ["cpu"] + ["cuda"] * torch.cuda.is_available():
            facts["ops"][f"{op} ({device})"] = {
                "uses": choose(op, torch.device(device)),
                "native": why_not_native(device) or "available",
                "reference": "available",
            }
    return facts


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


def _version() -> str:
    from mmfast import __version__

    return __version__
