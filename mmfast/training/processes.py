"""The processes of one run: which of them this is, and what they know together.

Without a process group, or with one of a single process, this one is alone and all of it costs nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


def world_size() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Which of them this is, from 0."""
    return dist.get_rank() if world_size() > 1 else 0


def is_main() -> bool:
    """Whether this is the one process that writes and prints."""
    return rank() == 0


def total(x: Tensor) -> Tensor:
    """The sum over all processes of a tensor of one shape and dtype, without its graph; bit-equal on all of them."""
    x = x.detach()
    if world_size() > 1:
        x = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(x)
    return x


def rows(x: Tensor) -> Tensor:
    """The rows (n, ...) of all processes in their order, without their graph; n may differ, the rest may not."""
    x = x.detach()
    if world_size() == 1:
        return x
    counts = torch.zeros(world_size(), dtype=torch.int64, device=x.device)
    counts[rank()] = len(x)
    counts = total(counts).tolist()
    padded = x.new_zeros(max(counts), *x.shape[1:])
    padded[: len(x)] = x
    every = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(every, padded)
    return torch.cat([part[:count] for part, count in zip(every, counts, strict=True)])


def agreed(answer: Callable[[], T]) -> T:
    """What ``answer`` returns to process 0, on all processes; the others do not call it, and wait until it is there.

    For what only one may do or decide: look at a folder, read a clock.
    """
    if world_size() == 1:
        return answer()
    box = [answer() if is_main() else None]
    dist.broadcast_object_list(box, src=0)
    return box[0]
