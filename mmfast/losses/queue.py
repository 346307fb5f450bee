"""Embeddings of earlier steps as candidates of the present one (He et al., CVPR 2020; Wang et al., CVPR 2020)."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mmfast.checks import check_bool, check_integer, told
from mmfast.errors import UserError
from mmfast.ops.barlow_twins.checks import compute_dtype
from mmfast.ops.similarity.checks import check_integers, check_rows, check_valid, refuse_not_finite
from mmfast.ops.similarity.rows import rows_of

# A label and an id that no row has.
NOBODY = torch.iinfo(torch.int64).min


class EmbeddingQueue(nn.Module):
    """The latest ``size`` rows of ``columns`` numbers that were enqueued, with their labels and ids.

    >>> loss = NTXentLoss(queue=EmbeddingQueue(4096, 128))
    >>> loss(z_a, z_b).backward()

    A loss with a queue has as candidates the batch and the queue, which takes the rows of the batch after the loss:
    those of all processes in the order of ranks, detached, divided by their lengths (unless the loss takes rows as
    they are). ``loss.eval()`` leaves the queue as it is. All of it is in ``state_dict()``; shapes never change, slots
    that are not filled are nobody's candidates.

    Buffers: rows (size, columns) float32, labels and ids (size,) int64, head () int64, the slot that is next, and
    filled () int64, how many are.
    """

    def __init__(self, size: int, columns: int):
        super().__init__()
        self.size = check_integer("EmbeddingQueue", "size", size, 1)
        self.columns = check_integer("EmbeddingQueue", "columns", columns, 1)
        device = torch.get_default_device()
        self.register_buffer("rows", torch.zeros(size, columns, device=device))
        for name in ("labels", "ids"):
            self.register_buffer(name, torch.full((size,), NOBODY, device=device))
        for name in ("head", "filled"):
            self.register_buffer(name, torch.zeros((), dtype=torch.int64, device=device))

    @property
    def valid(self) -> Tensor:
        """(size,) bool: the slots that are filled."""
        return torch.arange(self.size, device=self.filled.device) < self.filled

    @torch.no_grad()
    def reset(self) -> None:
        """Empties the queue."""
        for name, x in self.named_buffers():
            x.fill_(NOBODY if name in ("labels", "ids") else 0)

    @torch.no_grad()
    def enqueue(
        self,
        rows: Tensor,
        *,
        labels: Tensor | None = None,
        ids: Tensor | None = None,
        mask: Tensor | None = None,
        normalise: bool = True,
    ) -> None:
        """Takes rows (B, columns) in their order; of more than ``size`` the last ones stay.

        labels, ids: (B,) integers; without them the rows have no label, or are nobody's duplicates.
        mask: (B,) bool: which rows are taken.
        normalise: whether they are divided by their lengths.
        """
        op = "EmbeddingQueue.enqueue"
        self.check(op, "rows", check_rows(op, "rows", rows))
        named = "rows", rows
        mask = None if mask is None else check_valid(op, "mask", mask, named)
        refuse_not_finite(op, {"rows": rows if mask is None else torch.where(mask[:, None], rows, 0)})
        labels, ids = (
            torch.full((len(rows),), NOBODY, device=rows.device)
            if x is None
            else check_integers(op, name, x, named)
            for name, x in (("labels", labels), ("ids", ids))
        )
        new = rows_of(rows, check_bool(op, "normalise", normalise)).unit.to(self.rows.dtype)
        if mask is not None:
            order, total = mask.cumsum(0) - 1, mask.sum()
            taken = mask & (order >= total - self.size)
            # What is not taken goes to a slot behind the last.
            slots = torch.where(taken, (self.head + order) % self.size, self.size)
        else:
            total = len(new)
            slots = (self.head + torch.arange(total, device=rows.device)) % self.size
            new, labels, ids, slots = (x[-self.size :] for x in (new, labels, ids, slots))
        for buffer, x in ((self.rows, new), (self.labels, labels), (self.ids, ids)):
            if mask is None:
                buffer.index_copy_(0, slots, x)
            else:
                longer = torch.cat((buffer, buffer[:1]))
                buffer.copy_(longer.index_copy_(0, slots, x)[:-1])
        self.head.copy_((self.head + total) % self.size)
        self.filled.copy_((self.filled + total).clamp(max=self.size))

    def check(self, op: str, name: str, x: Tensor) -> None:
        """Refuses rows that cannot be beside those of the queue."""
        if x.shape[1] != self.columns:
            raise UserError(
                f"{op}: {name} must have the {self.columns} columns of the queue, got {tuple(x.shape)}"
            )
        if x.device != self.rows.device:
            raise UserError(
                f"{op}: {name} must be on the device of the queue ({self.rows.device}), got {x.device}"
            )

    def extra_repr(self) -> str:
        return f"{self.size}, {self.columns}"


class Memory(NamedTuple):
    """A queue in one call of a loss."""

    queue: EmbeddingQueue
    mask: Tensor | None
    """(B,) which rows are taken; None: all"""
    grows: bool
    named: bool = True
    """whether labels (or ids in their place) are those of samples, and not positions in the batch"""

    def beside(self, q, k, labels, ids, valid=None) -> tuple:
        """q, k, labels, ids, valid where the rows of the queue follow those of k.

        labels, ids, valid: of q and of k; ``ids`` None: nobody is a duplicate, ``valid`` None: all are.
        """
        queue, (q, k) = self.queue, (x.to(compute_dtype(x)) for x in (q, k))
        if valid is None:
            valid = [torch.ones(len(x), dtype=torch.bool, device=x.device) for x in (q, k)]
        labels, ids, valid = (
            None if x is None else (x[0], torch.cat((x[1], other)))
            for x, other in ((labels, queue.labels), (ids, queue.ids), (valid, queue.valid))
        )
        return q, torch.cat((k, queue.rows.to(k.dtype))), labels, ids, valid

    def feed(self, rows, labels, ids, valid, cosine) -> None:
        """After the loss, of the rows of all processes."""
        if not self.grows:
            return
        mask = self.mask
        if valid is not None:
            mask = valid if mask is None else mask & valid
        labels = labels if self.named else None
        self.queue.enqueue(rows.detach(), labels=labels, ids=ids, mask=mask, normalise=cosine)


# What a loss without a queue has of it: itself, which rows it takes, whether it grows.
NO_QUEUE = (None, None, False)


def memory(op: str, feeding: tuple, rows: tuple[str, Tensor], named: bool = True) -> Memory | None:
    """Of a queue, a mask and whether it grows; without a queue there is nothing to be masked."""
    queue, mask, grows = feeding
    if queue is None:
        if mask is not None:
            raise UserError(f"{op}: enqueue_mask must be None without a queue, got {told(mask)}")
        return None
    queue.check(op, *rows)
    mask = None if mask is None else check_valid(op, "enqueue_mask", mask, rows)
    return Memory(queue, mask, grows, named)


def check_queue(op: str, queue: Any) -> EmbeddingQueue | None:
    if queue is not None and not isinstance(queue, EmbeddingQueue):
        raise TypeError(f"{op}: queue must be an EmbeddingQueue or None, got {told(queue)}")
    return queue
