"""Data in a file: sent by their place, read when they are touched, and the same as in memory bit for bit."""

import pickle
import subprocess
import sys

import pytest
import torch

from mmfast.data.batch import collate
from mmfast.data.choose import choose
from mmfast.data.corpus import MultimodalData
from mmfast.data.dataset import MultimodalDataset
from mmfast.data.flat import Piece
from mmfast.data.load import load
from mmfast.data.sampler import make_loader
from mmfast.data.shares import label_share
from mmfast.data.standardise import Standardiser
from mmfast.data.writing import save

FEATURES = {"text": 6, "audio": 3, "visual": 2}
N = 40


@pytest.fixture(scope="module")
def memory():
    generator = torch.Generator().manual_seed(0)
    lengths = {m: torch.randint(0, 9, (N,), generator=generator) for m in FEATURES}
    lengths["audio"][:5] = 0
    values = {m: torch.randn(int(lengths[m].sum()), f, generator=generator) for m, f in FEATURES.items()}
    values["visual"][::7] = torch.nan
    return MultimodalDataset.from_flat(values, lengths, torch.randn(N, generator=generator))


@pytest.fixture(scope="module")
def mapped(memory, tmp_path_factory):
    path = tmp_path_factory.mktemp("mapped") / "a.mmfast"
    save(MultimodalData(train=memory), path)
    train = load(path).train
    assert not train.in_memory
    return train


def assert_same(one, other):
    assert one.padding == other.padding
    for m in FEATURES:
        torch.testing.assert_close(one.values[m], other.values[m], rtol=0, atol=0, equal_nan=True)
        assert torch.equal(one.lengths[m], other.lengths[m])
    torch.testing.assert_close(one.labels, other.labels, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(one.ids, other.ids)


@pytest.mark.parametrize("padding", ["back", "front"])
def test_a_batch_is_the_collated_samples_bit_for_bit(memory, mapped, padding):
    indices = [7, 0, 1, 39, 20]
    collated = collate([memory[i] for i in indices], padding)
    assert_same(memory.batch(indices, padding), collated)
    assert_same(mapped.batch(indices, padding), collated)


def test_it_is_standardised_as_it_is_read_bit_for_bit(memory, mapped):
    eager = Standardiser().fit(memory)
    lazy = Standardiser().fit(mapped)
    one, other = eager.transform(memory), lazy.transform(mapped)
    assert not other.in_memory
    for m in FEATURES:
        assert torch.equal(eager.mean[m], lazy.mean[m]) and torch.equal(eager.scale[m], lazy.scale[m])
        assert torch.equal(one.flat(m), other.flat(m))
    assert_same(other.batch([3, 1, 2]), one.batch([3, 1, 2]))


def test_its_values_are_pickled_by_their_place(mapped):
    flat = mapped._values["text"]
    text = pickle.dumps(flat)
    assert len(text) < 2000
    assert torch.equal(pickle.loads(text).whole(), flat.whole())


def test_parts_and_sums_stay_in_the_file(memory, mapped):
    halves = [mapped.subset(range(0, N, 2)), mapped.subset(range(1, N, 2))]
    both = MultimodalDataset.concatenate(halves)
    assert not any(d.in_memory for d in (*halves, both))
    order = [*range(0, N, 2), *range(1, N, 2)]
    assert_same(both.batch(range(N)), memory.batch(order))


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_workers_of_a_loader_give_the_same_batches(mapped, context):
    data = Standardiser().fit(mapped).transform(mapped)
    alone = list(make_loader(data, 16, True, False, 0))
    loader = make_loader(data, 16, True, False, 0, num_workers=1)
    loader.multiprocessing_context = context
    shared = list(loader)
    assert len(shared) == len(alone)
    for one, other in zip(alone, shared, strict=True):
        assert_same(one, other)


def test_lengths_and_their_packing_are_known_on_the_host(mapped):
    batch = mapped.batch([7, 0, 1, 39, 20])
    for m in FEATURES:
        count = batch.lengths.host[m]
        order, places, alive = batch.lengths.packing(m)
        assert torch.equal(count, mapped.lengths(m)[[7, 0, 1, 39, 20]])
        assert torch.equal(count[order], count.sort(descending=True).values)
        assert torch.equal(count[order][places], count)
        assert alive.tolist() == [int((count > t).sum()) for t in range(int(count.max()))]


ANONYMOUS = """
import sys
from mmfast.data import load
from mmfast.data.sampler import make_loader

def anonymous():
    lines = open("/proc/self/status").read().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("RssAnon"))) * 1024

next(iter(make_loader(load(sys.argv[1]).train.subset(range(64)), 32, True, False, 0)))
before = anonymous()
train = load(sys.argv[2]).train
for batch in make_loader(train, 32, shuffle=True, drop_last=False, seed=0):
    pass
print(anonymous() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_an_epoch_keeps_little_of_a_large_file_in_memory(tmp_path):
    n, features = 2000, 2048
    lengths = {"audio": torch.full((n,), 8)}
    made = MultimodalDataset.from_flat({"audio": torch.randn(8 * n, features)}, lengths)
    path = tmp_path / "large.mmfast"
    save(MultimodalData(train=made), path)
    done = subprocess.run(
        [sys.executable, "-c", ANONYMOUS, path, path], capture_output=True, text=True, check=True
    )
    assert path.stat().st_size > 120e6
    assert int(done.stdout) < path.stat().st_size / 4


def test_labels_change_and_modalities_are_chosen_without_reading_a_value(memory, mapped, monkeypatch):
    def read(*_):
        raise AssertionError("values are read")

    monkeypatch.setattr(Piece, "read", read)
    assert int(label_share(mapped, 0.5, seed=0).labelled().sum()) == N // 2
    data = MultimodalData(train=mapped)
    assert data.as_task("regression", ["mood"]).train.targets == ("mood",)
    chosen = choose(data, "audio,visual").train
    assert chosen.modalities == ("audio", "visual") and not chosen.in_memory
    monkeypatch.undo()
    assert torch.equal(chosen.flat("audio"), memory.flat("audio"))


def test_lengths_of_a_batch_pass_through_a_compiled_function(mapped):
    batch = mapped.batch(range(8))

    def total(lengths):
        return lengths["text"].sum() + lengths["audio"].max()

    compiled = torch.compile(total, fullgraph=True, backend="eager")
    assert int(compiled(batch.lengths)) == int(total(batch.lengths))
