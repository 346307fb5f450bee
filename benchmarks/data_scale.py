"""Data of any size: what opening a file, its sampler and its batches cost in seconds and in memory."""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path

import torch

from mmfast.data.corpus import MultimodalData
from mmfast.data.load import load
from mmfast.data.sampler import make_loader
from mmfast.data.writing import DataWriter, planned

FEATURES = {"text": 64, "audio": 16, "visual": 16}
LONGEST = 12
TOGETHER = 4096


def anonymous() -> float:
    """MiB of this process that lie in no file."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("RssAnon"))) / 1024


def write(path: Path, samples: int) -> None:
    generator = torch.Generator().manual_seed(0)
    lengths = {m: torch.randint(1, LONGEST + 1, (samples,), generator=generator) for m in FEATURES}
    with DataWriter(path, MultimodalData(train=planned(FEATURES, lengths))) as writer:
        for first in range(0, samples, TOGETHER):
            stop = min(first + TOGETHER, samples)
            values = {
                m: torch.randn(int(lengths[m][first:stop].sum()), f, generator=generator)
                for m, f in FEATURES.items()
            }
            writer.add_samples("train", values, stop)


def measure(path: Path, batch_size: int, batches: int, workers: int) -> None:
    before, start = anonymous(), time.perf_counter()
    train = load(path).train
    print(f"open: {time.perf_counter() - start:.2f} s, {anonymous() - before:.0f} MiB")
    start = time.perf_counter()
    loader = make_loader(train, batch_size, shuffle=True, drop_last=True, seed=0, num_workers=workers)
    order = loader.batch_sampler.batches(0)
    print(f"order of an epoch: {time.perf_counter() - start:.2f} s, {len(order)} batches")
    del order
    before, start, count = anonymous(), time.perf_counter(), 0
    for batch, _ in zip(loader, range(batches), strict=False):
        count += len(batch)
    took = time.perf_counter() - start
    print(
        f"read: {count} samples in {took:.2f} s, {count / took:.0f} samples/s, {anonymous() - before:.0f} MiB"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=1_000_000)
    parser.add_argument("--folder", help="where the file is written, and deleted afterwards")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--batches", type=int, default=2000)
    parser.add_argument("--workers", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        path = Path(folder, "scale.mmfast")
        start = time.perf_counter()
        write(path, arguments.samples)
        print(f"write: {time.perf_counter() - start:.1f} s, {os.path.getsize(path) / 1e9:.2f} GB")
        measure(path, arguments.batch_size, arguments.batches, arguments.workers)


if __name__ == "__main__":
    main()
