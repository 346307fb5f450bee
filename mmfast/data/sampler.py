"""Batches of samples of similar length."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from numbers import Integral

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from mmfast.checks import check_seed
from mmfast.data.batch import collate
from mmfast.data.dataset import MultimodalDataset
from mmfast.errors import UserError

# Steps of samples that are shuffled together: more mixes better, fewer pads less.
STEPS_PER_BUCKET = 2


class BucketSampler(Sampler[list[int]]):
    """Batch sampler that puts samples of similar length together, so that little is padded.

    The samples, sorted by length (longest modality, then real cells), are cut into buckets of
    `STEPS_PER_BUCKET` steps. Shuffling orders ties, each bucket and the steps at random; without it the order
    is by length. One step is one batch on each of `world_size` ranks, all of the same bucket, so that the
    ranks finish together.

    The order is a pure function of (seed, epoch): `set_epoch` chooses the epoch, and torch's random state is
    neither read nor changed. Every sample occurs exactly once per epoch over all ranks, except those that
    `drop_last` leaves out, which are drawn anew each epoch. Without `drop_last` the samples of the last,
    incomplete step are spread evenly over the ranks, so that every rank sees the same number of batches.

    Args:
        dataset: gives the lengths.
        batch_size: samples per batch and rank.
        shuffle: random order, a new one for each epoch.
        drop_last: leave out the incomplete step.
        seed: of the order.
        rank, world_size: which of how many processes this is.

    Raises:
        UserError: sizes out of range, or too few samples for a batch on every rank.
    """

    def __init__(
        self,
        dataset: MultimodalDataset,
        batch_size: int,
        shuffle: bool = True,
        drop_last: bool = False,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        for name, value, least in (("batch_size", batch_size, 1), ("world_size", world_size, 1)):
            if not isinstance(value, Integral) or value < least:
                raise UserError(f"BucketSampler: {name} must be an integer >= {least}, got {value!r}")
        if rank not in range(world_size):
            raise UserError(f"BucketSampler: rank must lie in [0, world_size = {world_size}), got {rank!r}")
        self._key = _sort_key(dataset)
        self._step = batch_size * world_size
        self._shuffle, self._drop_last, self._seed = (
            shuffle,
            drop_last,
            check_seed("BucketSampler", "seed", seed),
        )
        self._rank, self._world_size = rank, world_size
        self._epoch = 0
        self._sizes = self._step_sizes(len(dataset), batch_size)

    def _step_sizes(self, n: int, batch_size: int) -> list[int]:
        full, rest = divmod(n, self._step)
        sizes = [self._step] * full
        if self._drop_last and rest and not full:
            raise UserError(
                f"BucketSampler: drop_last leaves no batch, {n} samples are fewer than "
                f"batch_size * world_size = {self._step}"
            )
        if self._drop_last or rest == 0:
            return sizes
        if rest < self._world_size and full and batch_size > 1:
            # Too few samples for one on each rank: share them with a full step.
            both = sizes.pop() + rest
            return [*sizes, both - both // 2, both // 2]
        if rest < self._world_size:
            raise UserError(
                f"BucketSampler: {n} samples cannot give each of {self._world_size} ranks the same number of "
                f"batches of at most {batch_size}; use drop_last or other sizes"
            )
        return [*sizes, rest]

    @property
    def sampler(self) -> BucketSampler:
        """Itself: Lightning calls `set_epoch` on the `sampler` of a batch sampler."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Choose the order; call it before iterating over each epoch."""
        self._epoch = epoch

    def __len__(self) -> int:
        """Batches per epoch, the same on every rank and in every epoch."""
        return len(self._sizes)

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.batches(self._epoch))

    def batches(self, epoch: int) -> list[list[int]]:
        """This rank's batches of an epoch, as indices into the data set."""
        generator = torch.Generator("cpu").manual_seed(_mix(self._seed, epoch))

        def permutation(n: int) -> Tensor:
            if self._shuffle:
                return torch.randperm(n, generator=generator, device="cpu")
            return torch.arange(n, device="cpu")

        # Cut before sorting: any sample may be left out, not only the longest.
        order = permutation(len(self._key))[: sum(self._sizes)]
        order = order[torch.sort(self._key[order], stable=True).indices]
        buckets = order.split(self._step * STEPS_PER_BUCKET)
        order = torch.cat([bucket[permutation(len(bucket))] for bucket in buckets])
        steps = order.split(self._sizes) if self._sizes else ()
        mine = (step.tensor_split(self._world_size)[self._rank] for step in steps)
        batches = [indices.tolist() for indices in mine]
        return [batches[i] for i in permutation(len(batches)).tolist()]


def make_loader(
    dataset: MultimodalDataset,
    batch_size: int,
    shuffle: bool,
    drop_last: bool,
    seed: int,
    num_workers: int = 0,
    padding: str = "back",
    rank: int = 0,
    world_size: int = 1,
) -> DataLoader:
    """DataLoader of `MultimodalBatch`es in length buckets; arguments as in `BucketSampler` and `collate`.

    Before each epoch call `loader.batch_sampler.set_epoch(epoch)` (Lightning does). With several ranks, tell
    Lightning `use_distributed_sampler=False`: the sampler shards by itself.
    """
    return DataLoader(
        dataset,
        batch_sampler=BucketSampler(dataset, batch_size, shuffle, drop_last, seed, rank, world_size),
        collate_fn=partial(collate, padding=padding),
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
        pin_memory=torch.cuda.is_available(),
        # DataLoader draws a number per epoch: from here, so that the global random state stays as it is.
        generator=torch.Generator("cpu").manual_seed(check_seed("make_loader", "seed", seed)),
    )


def _sort_key(dataset: MultimodalDataset) -> Tensor:
    lengths = [dataset.lengths(m) for m in dataset.modalities]
    cells = sum(n * f for n, f in zip(lengths, dataset.features.values(), strict=True))
    return dataset.longest() * (int(cells.max()) + 1 if len(cells) else 1) + cells


def _mix(seed: int, epoch: int) -> int:
    # An odd multiplier sends different epochs of one seed to different generator seeds, modulo 2^63.
    return (seed + epoch * 0x9E3779B97F4A7C15) % 2**63
