"""Data of any size: what a file costs to open, to standardise and to read, beside the training that it is read for.

Writes sequences of `FEATURES` as a stream, with names, speakers and labels, then opens the file as `mmfast pretrain`
does. Reading takes turns with steps of the default model, of which the medians are compared. Memory is what the
process holds beside files (RssAnon, Linux).
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from mmfast.data.corpus import MultimodalData
from mmfast.data.load import load
from mmfast.data.sampler import make_loader
from mmfast.data.writing import DataWriter, planned
from mmfast.functional import barlow_twins
from mmfast.training.components import make_module
from mmfast.training.config import Config
from mmfast.training.splits import load_data, make_splits
from mmfast.training.stages import pretraining_stage

FEATURES = {"text": 64, "audio": 16, "visual": 16}
SHARES = {"train": 0.98, "valid": 0.01, "test": 0.01}
LONGEST = 12
TOGETHER = 4096
SPEAKERS = 1000
# Batches that are read, and steps that are trained, in one turn.
READ, TRAINED = 100, 3


def anonymous() -> float:
    """MiB of this process that lie in no file."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("RssAnon"))) / 1024


def plan(samples: int, generator: torch.Generator) -> MultimodalData:
    """Splits whose values are yet to come."""
    splits, first = {}, 0
    for split, share in SHARES.items():
        n = round(samples * share)
        # The default model wants one length for all modalities of a sample.
        lengths = torch.randint(1, LONGEST + 1, (n,), generator=generator)
        ids = range(first, first + n)
        splits[split] = planned(
            FEATURES,
            dict.fromkeys(FEATURES, lengths),
            labels=torch.rand(n, generator=generator) * 6 - 3,
            ids=torch.arange(first, first + n),
            names=[f"video{i // 20}[{i}]" for i in ids],
            groups={"speaker": [f"speaker{i % SPEAKERS}" for i in ids]},
        )
        first += n
    return MultimodalData(**splits, label_range=(-3, 3))


def write(path: Path, samples: int) -> None:
    generator = torch.Generator().manual_seed(0)
    data = plan(samples, generator)
    with DataWriter(path, data) as writer:
        for split in SHARES:
            dataset = getattr(data, split)
            for first in range(0, len(dataset), TOGETHER):
                stop = min(first + TOGETHER, len(dataset))
                steps = {m: int(dataset.lengths(m)[first:stop].sum()) for m in FEATURES}
                values = {m: torch.randn(steps[m], f, generator=generator) for m, f in FEATURES.items()}
                writer.add_samples(split, values, stop)


class Timed:
    """Prints what was done, in seconds and MiB; the first number is the machine's as much as ours."""

    def __init__(self, what: str):
        self._what = what

    def __enter__(self) -> None:
        self._memory, self._start = anonymous(), time.perf_counter()

    def __exit__(self, *_) -> None:
        took = time.perf_counter() - self._start
        print(f"{self._what}: {took:.2f} s, {anonymous() - self._memory:+.0f} MiB", flush=True)


def endless(loader) -> Iterator:
    while True:
        yield from loader


def measure(path: Path, batch_size: int, turns: int, workers: int) -> None:
    with Timed("open"):
        load(path)
    config = Config()
    config.data.path = str(path)
    with Timed("open, standardise and split, as training does"):
        splits = make_splits(load_data(config.data), config.data, config.run.seed)
    loader = make_loader(splits.inputs, batch_size, shuffle=True, drop_last=True, seed=0, num_workers=workers)
    with Timed("order of an epoch"):
        loader.batch_sampler.batches(0)
    module = make_module(config, splits.features, pretraining_stage(config)).train()
    augment = module.objectives["two_views"].augment
    optimizer = torch.optim.Adam(module.parameters(), lr=1e-3)

    def step(batch) -> None:
        views = augment(batch.values, batch.lengths, ids=batch.ids, padding=batch.padding)
        embeddings = [module.projector(module.encoder(v, batch.lengths, batch.padding)) for v in views]
        optimizer.zero_grad()
        barlow_twins(*embeddings).backward()
        optimizer.step()

    batches = endless(loader)
    step(next(batches))
    base, most, reading, training = anonymous(), 0.0, [], []
    for _ in range(turns):
        start = time.perf_counter()
        for _ in range(READ):
            next(batches)
        reading.append((time.perf_counter() - start) / READ / batch_size)
        given = [next(batches) for _ in range(TRAINED)]
        start = time.perf_counter()
        for batch in given:
            step(batch)
        training.append((time.perf_counter() - start) / TRAINED / batch_size)
        most = max(most, anonymous() - base)
    read, trained = statistics.median(reading), statistics.median(training)
    print(f"read, {workers} workers: {1 / read:.0f} samples/s; trained: {1 / trained:.0f} samples/s")
    print(
        f"reading is {trained / read:.1f} times as fast as training (medians of {turns} turns), {most:+.0f} MiB"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--samples", type=int, default=1_000_000)
    parser.add_argument("--folder", help="where the file is written, and deleted afterwards")
    parser.add_argument("--batch-size", type=int, default=170)
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--workers", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        path = Path(folder, "scale.mmfast")
        with Timed("write"):
            write(path, arguments.samples)
        print(f"{arguments.samples} samples, {os.path.getsize(path) / 1e9:.2f} GB")
        measure(path, arguments.batch_size, arguments.turns, arguments.workers)


if __name__ == "__main__":
    main()
