"""What a run ran on: versions, kernels, machine, state of the surrounding repository."""

from __future__ import annotations

import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from mmfast.backends import info
from mmfast.training.processes import world_size
from mmfast.version import __version__

PACKAGES = ("numpy", "lightning", "scikit-learn", "h5py")


def environment() -> dict[str, Any]:
    """Versions, device and backends in use, saved beside the configuration of every run."""
    return {
        "mmfast": __version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        **{name: _version(name) for name in PACKAGES},
        "system": platform.platform(),
        "threads": torch.get_num_threads(),
        "processes": world_size(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "backends": {op: facts["uses"] for op, facts in info()["ops"].items()},
        "git": git_state(),
    }


def git_state() -> dict[str, Any] | None:
    """Commit of the working directory's repository and whether tracked files differ from it; None outside of one."""
    commit = _git("rev-parse", "HEAD")
    return commit and {
        "commit": commit,
        "modified": bool(_git("status", "--porcelain", "--untracked-files=no")),
    }


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
