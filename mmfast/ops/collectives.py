"""Rows of one batch on several processes: sums, gathering, and errors that every process raises together.

Collectives are PyTorch's functional ones; gradients through them are the callers' business.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from mmfast.errors import UserError


class Ranks(NamedTuple):
    """Where the rows of a batch are: ``rows[rank]`` on each process of ``group``; all on this one if that is None."""

    rows: tuple[int, ...]
    rank: int = 0
    group: Any = None

    @property
    def total(self) -> int:
        return sum(self.rows)

    @property
    def first(self) -> int:
        """The position of this process's first row in the whole batch."""
        return sum(self.rows[: self.rank])

    def start_sum(self, x: Tensor) -> Callable[[], Tensor]:
        """Begins to add up a tensor of the same shape on every process; the result waits for it."""
        if self.group is None:
            return lambda: x
        from torch.distributed import _functional_collectives as collectives

        total = collectives.all_reduce(x.contiguous(), "sum", self.group)
        return lambda: collectives.wait_tensor(total)

    def sum(self, x: Tensor) -> Tensor:
        """The sum of a tensor of the same shape on every process."""
        return self.start_sum(x)()

    def start_stack(self, x: Tensor) -> Callable[[], Tensor]:
        """Begins to collect (processes, *x.shape) in the order of ranks; the result waits for it."""
        if self.group is None:
            return lambda: x[None]
        from torch.distributed import _functional_collectives as collectives

        # Since PyTorch 2.13 under another name, which warns of the first.
        gather = getattr(collectives, "all_gather_single", None) or collectives.all_gather_tensor
        every = gather(x[None].contiguous(), 0, self.group)
        return lambda: collectives.wait_tensor(every)

    def stack(self, x: Tensor) -> Tensor:
        """(processes, *x.shape) of a tensor of the same shape on every process, in the order of ranks."""
        return self.start_stack(x)()

    def start_gather(self, x: Tensor) -> Callable[[], Tensor]:
        """Begins to collect the rows (total, k) of all processes, from this one's; the result waits for them."""
        if self.group is None:
            return lambda: x
        longest = max(self.rows)
        padded = x if len(x) == longest else torch.nn.functional.pad(x, (0, 0, 0, longest - len(x)))
        stack = self.start_stack(padded)

        def finish() -> Tensor:
            every = stack()
            if min(self.rows) == longest:
                return every.flatten(0, 1)
            return torch.cat([part[:rows] for part, rows in zip(every.unbind(), self.rows, strict=True)])

        return finish


def world(group) -> Any:
    """The group whose processes share a batch, the default one for None; None if this process is alone."""
    if group is None and not (dist.is_available() and dist.is_initialized()):
        return None
    group = dist.group.WORLD if group is None else group
    return group if dist.get_world_size(group) > 1 else None


def check_group(op: str, group) -> None:
    """Refuses a ``group`` that is none of torch's process groups, or that this process is not in."""
    if group is None:
        return
    if not (dist.is_available() and dist.is_initialized()):
        raise UserError(
            f"{op}: group must be None where no process group is initialised "
            f"(torch.distributed.init_process_group), got {type(group).__name__}"
        )
    if not isinstance(group, dist.ProcessGroup):
        found = (
            "a group that this process is not in"
            if group == dist.GroupMember.NON_GROUP_MEMBER
            else repr(group)
        )
        raise UserError(f"{op}: group must be a process group of this process, got {found}")


def agree(op: str, group, rows: int, facts: Mapping[str, Any], problem: Exception | None) -> Ranks:
    """The rows of every process, once all of them have found their arguments right and ``facts`` are equal.

    Every process calls this, also one that met a ``problem``: then all raise that error, of the lowest such rank.
    One collective where nothing is wrong.
    """
    digest = zlib.crc32(repr(sorted(facts.items())).encode())
    mine = torch.tensor([rows, digest, problem is not None], dtype=torch.int64, device=_device(group))
    every = Ranks((), 0, group).stack(mine).tolist()
    if any(wrong for _, _, wrong in every):
        raise_together(group, problem)
    if len({digest for _, digest, _ in every}) > 1:
        _raise_difference(op, group, facts)
    return Ranks(tuple(rows for rows, _, _ in every), dist.get_rank(group), group)


def raise_together(group, problem: Exception | None) -> None:
    """Raises on every process the ``problem`` of the lowest rank that has one; nothing if none has.

    ``group``: None where this process is alone.
    """
    if group is None:
        if problem is not None:
            raise problem
        return
    found = _exchange(group, None if problem is None else (isinstance(problem, TypeError), str(problem)))
    for rank, item in enumerate(found):
        if item is not None:
            is_type, message = item
            raise (TypeError if is_type else UserError)(f"{message} (on rank {rank} of {len(found)})")


def _raise_difference(op: str, group, facts: Mapping[str, Any]) -> None:
    every = _exchange(group, {name: str(value) for name, value in facts.items()})
    for name in facts:
        values = [other.get(name, "none") for other in every]
        if len(set(values)) > 1:
            raise UserError(f"{op}: {name} must be the same on every rank, got {', '.join(values)}")
    raise UserError(f"{op}: arguments must be the same on every rank")


def _exchange(group, item: Any) -> list:
    items = [None] * dist.get_world_size(group)
    dist.all_gather_object(items, item, group=group)
    return items


def _device(group) -> torch.device:
    """Where the tensors of the group's collectives must be."""
    return torch.device("cuda" if "nccl" in dist.get_backend(group) else "cpu")
