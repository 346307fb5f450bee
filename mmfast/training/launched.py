"""How many processes a run has: what its settings say, and what torchrun or srun has started."""

from __future__ import annotations

import os
from dataclasses import replace

from mmfast.errors import UserError
from mmfast.training.config import RunConfig


def several(run: RunConfig) -> bool:
    """Whether the run takes a process group."""
    return run.devices * run.nodes > 1 or run.strategy == "ddp"


def as_launched(run: RunConfig) -> RunConfig:
    """``run`` with the numbers of devices and nodes that torchrun started.

    Under SLURM they must be asked for, as Lightning wants it: tasks side by side may as well be runs of their own.

    Raises:
        UserError: the settings ask for other numbers than torchrun or srun started; several nodes, and nothing says
            where they meet.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        local = _number("LOCAL_WORLD_SIZE")
        found, by = (local, _number("WORLD_SIZE") // local), "torchrun"
        if (run.devices, run.nodes) == (1, 1):
            return replace(run, devices=found[0], nodes=found[1])
    elif several(run) and by_slurm():
        found, by = (_number("SLURM_NTASKS_PER_NODE"), _number("SLURM_NNODES")), "srun"
    else:
        if run.nodes > 1 and not {"MASTER_ADDR", "MASTER_PORT", "NODE_RANK"} <= os.environ.keys():
            raise UserError(
                "config: run.nodes must be 1 unless torchrun, srun, or MASTER_ADDR, MASTER_PORT and NODE_RANK in the "
                f"environment say where the nodes meet, got {run.nodes}"
            )
        return run
    for name, there, asked in zip(("devices", "nodes"), found, (run.devices, run.nodes), strict=True):
        if there != asked:
            raise UserError(f"config: run.{name} must be the {there} that {by} started, got {asked}")
    return run


def by_slurm() -> bool:
    """Whether srun started this process; a shell in an allocation is none of its tasks."""
    return "SLURM_NTASKS" in os.environ and os.environ.get("SLURM_JOB_NAME") not in ("bash", "interactive")


def speaks() -> bool:
    """Whether this process is the first on its machine, the one that says what is wrong before processes have met."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


def _number(name: str) -> int:
    return int(os.environ.get(name, 1))
