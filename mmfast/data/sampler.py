"""Batches of samples of similar length."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from numbers import Integral

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from mmfast.checks import check_seed
from mmfast.data.batch import MultimodalBatch, Sample, collate, stand_in
from mmfast.data.dataset import MultimodalDataset
from mmfast.errors import UserError

# Steps of samples that are shuffled together: more mixes better, fewer pads less.
STEPS_PER_BUCKET = 2


class BucketSampler(Sampler[list[int]]):
    """Batch sampler that puts samples of similar length together, so that little is padded.

    The samples, sorted by length (longest modality, then real cells), are cut into buckets of
    `STEPS_PER_BUCKET` steps. Shuffling orders ties, each bucket and the steps at random; without it the order
    is by length.

    The order is a pure function of (seed, epoch): `set_epoch` chooses the epoch, and torch's random state is
    neither read nor changed. Every sample occurs exactly once per epoch over all ranks, except those that
    `drop_last` leaves out, which are drawn anew each epoch.

    Which samples make a step does not depend on `world_size`: the ranks share each step in parts that differ by
    one sample at most. The last step without `drop_last` may have fewer samples than there are ranks; then some
    of them get an empty list, and all have the same number of steps.

    Args:
        dataset: gives the lengths.
        batch_size: samples per step, over all ranks.
        shuffle: random order, a new one for each epoch.
        drop_last: leave out the incomplete step.
        seed: of the order.
        rank, world_size: which of how many processes this is.

    Raises:
        UserError: sizes out of range, or too few samples for a step.
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
        if batch_size < world_size:
            raise UserError(
                f"BucketSampler: batch_size must be at least the {world_size} processes that share it, "
                f"got {batch_size}"
            )
        self._key = _sort_key(dataset)
        self._batch_size = batch_size
        self._shuffle, self._drop_last, self._seed = (
            shuffle,
            drop_last,
            check_seed("BucketSampler", "seed", seed),
        )
        self._rank, self._world_size = rank, world_size
        self._epoch = 0
        self._sizes = self._step_sizes(len(dataset))

    def _step_sizes(self, n: int) -> list[int]:
        full, rest = divmod(n, self._batch_size)
        if self._drop_last and rest and not full:
            raise UserError(
                f"BucketSampler: drop_last leaves no step, {n} samples are fewer than batch_size = {self._batch_size}"
            )
        return [self._batch_size] * full + ([rest] if rest and not self._drop_last else [])

    @property
    def sampler(self) -> BucketSampler:
        """Itself: Lightning calls `set_epoch` on the `sampler` of a batch sampler."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Choose the order; call it before iterating over each epoch."""
        self._epoch = epoch

    def __len__(self) -> int:
        """Steps per epoch, the same on every rank and in every epoch."""
        return len(self._sizes)

    def __iter__(self) -> Iterator[list[int]]:
        return (indices.tolist() for indices in self._steps(self._epoch))

    def batches(self, epoch: int) -> list[list[int]]:
        """This rank's batches of an epoch, as indices into the data set."""
        return [indices.tolist() for indices in self._steps(epoch)]

    def _steps(self, epoch: int) -> list[Tensor]:
        generator = torch.Generator("cpu").manual_seed(_mix(self._seed, epoch))

        def permutation(n: int) -> Tensor:
            if self._shuffle:
                return torch.randperm(n, generator=generator, device="cpu")
            return torch.arange(n, device="cpu")

        # Cut before sorting: any sample may be left out, not only the longest.
        order = permutation(len(self._key))[: sum(self._sizes)]
        order = order[torch.sort(self._key[order], stable=True).indices]
        buckets = order.split(self._batch_size * STEPS_PER_BUCKET)
        order = torch.cat([bucket[permutation(len(bucket))] for bucket in buckets])
        steps = order.split(self._sizes) if self._sizes else ()
        mine = [step.tensor_split(self._world_size)[self._rank] for step in steps]
        return [mine[i] for i in permutation(len(mine)).tolist()]


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
    Lightning `use_distributed_sampler=False`: the sampler shards by itself. A rank without a sample in a step gets
    a batch with `filler` set, so that it can take part in what all must do together.
    """
    filler = dataset[0] if world_size > 1 and len(dataset) else None
    return DataLoader(
        dataset,
        batch_sampler=BucketSampler(dataset, batch_size, shuffle, drop_last, seed, rank, world_size),
        collate_fn=partial(_collate, padding=padding, filler=filler),
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
        pin_memory=torch.cuda.is_available(),
        # DataLoader draws a number per epoch: from here, so that the global random state stays as it is.
        generator=torch.Generator("cpu").manual_seed(check_seed("make_loader", "seed", seed)),
    )


def _collate(samples: list[Sample], padding: str, filler: Sample | None) -> MultimodalBatch:
    return collate(samples, padding) if samples or filler is None else stand_in(filler, padding)


def _sort_key(dataset: MultimodalDataset) -> Tensor:
    lengths = [dataset.lengths(m) for m in dataset.modalities]
    cells = sum(n * f for n, f in zip(lengths, dataset.features.values(), strict=True))
    return dataset.longest() * (int(cells.max()) + 1 if len(cells) else 1) + cells


def _mix(seed: int, epoch: int) -> int:
    # An odd multiplier sends different epochs of one seed to different generator seeds, modulo 2^63.
    return (seed + epoch * 0x9E3779B97F4A7C15) % 2**63
