import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from mmfast.data import BucketSampler, MultimodalBatch, MultimodalDataset, make_loader
from mmfast.errors import UserError


def dataset(lengths):
    lengths = torch.as_tensor(lengths)
    steps = torch.arange(int(lengths.sum()), dtype=torch.float32)
    return MultimodalDataset.from_flat(
        {"text": steps[:, None], "audio": steps[:, None].repeat(1, 2)}, {"text": lengths, "audio": lengths}
    )


def skewed(n, seed=0):
    words = np.exp(np.random.default_rng(seed).normal(3, 0.55, n))
    return dataset(np.clip(words, 1, 50).astype(np.int64))


def padded_share(data, batches):
    lengths = data.lengths("text").numpy()
    slots = sum(len(b) * lengths[b].max() for b in batches)
    return 1 - sum(lengths[b].sum() for b in batches) / slots


SIZES = dict(
    lengths=st.lists(st.integers(0, 12), min_size=1, max_size=60),
    batch_size=st.integers(1, 9),
    world_size=st.integers(1, 4),
    seed=st.integers(0, 2**40),
    epoch=st.integers(0, 1000),
    shuffle=st.booleans(),
    drop_last=st.booleans(),
)


def all_ranks(data, epoch, batch_size, world_size, **kwargs):
    """Batches of each rank, or an assumption that fails where the sampler refuses the sizes."""
    assume(world_size <= batch_size)
    assume(not kwargs["drop_last"] or len(data) >= batch_size)
    samplers = [
        BucketSampler(data, batch_size, rank=r, world_size=world_size, **kwargs) for r in range(world_size)
    ]
    for sampler in samplers:
        sampler.set_epoch(epoch)
    ranks = [list(sampler) for sampler in samplers]
    assert [len(sampler) for sampler in samplers] == [len(batches) for batches in ranks]
    return ranks


@settings(max_examples=150, deadline=None)
@given(**SIZES)
def test_ranks_share_the_steps_of_one_process_evenly(lengths, epoch, batch_size, drop_last, **kwargs):
    data = dataset(lengths)
    ranks = all_ranks(data, epoch, batch_size, drop_last=drop_last, **kwargs)
    (alone,) = all_ranks(data, epoch, batch_size, drop_last=drop_last, **{**kwargs, "world_size": 1})
    assert [[i for batch in step for i in batch] for step in zip(*ranks, strict=True)] == alone
    sizes = [[len(batch) for batch in step] for step in zip(*ranks, strict=True)]
    assert all(max(step) - min(step) <= 1 and sum(step) <= batch_size for step in sizes)
    seen = sorted(i for batch in alone for i in batch)
    if drop_last:
        assert {sum(step) for step in sizes} == {batch_size}
        assert len(seen) == len(set(seen)) == len(lengths) - len(lengths) % batch_size
    else:
        assert seen == list(range(len(lengths)))


@settings(max_examples=40, deadline=None)
@given(**SIZES)
def test_order_is_a_function_of_seed_and_epoch(lengths, **kwargs):
    data = dataset(lengths)
    state = torch.get_rng_state()
    first = all_ranks(data, **kwargs)
    torch.manual_seed(99)
    assert all_ranks(data, **kwargs) == first
    torch.set_rng_state(state)


def test_epochs_and_seeds_differ_and_can_be_revisited():
    data = skewed(300)
    sampler = BucketSampler(data, 16, seed=3)
    epochs = [sampler.batches(e) for e in range(5)]
    assert all(a != b for i, a in enumerate(epochs) for b in epochs[:i])
    assert epochs[0] != BucketSampler(data, 16, seed=4).batches(0)
    sampler.set_epoch(2)
    assert list(sampler) == list(sampler) == epochs[2]


def test_shuffle_mixes_within_buckets_and_orders_the_batches():
    for lengths in (torch.full((256,), 7), torch.arange(1, 257)):
        sampler = BucketSampler(dataset(lengths), 16)
        sets = [{frozenset(batch) for batch in sampler.batches(e)} for e in range(2)]
        assert not sets[0] & sets[1], "a sample must meet others of its bucket in each epoch"
    lengths = skewed(512).lengths("text")
    means = [lengths[b].float().mean().item() for b in BucketSampler(skewed(512), 16).batches(0)]
    assert means != sorted(means) and abs(np.corrcoef(means, range(len(means)))[0, 1]) < 0.5


def test_without_shuffle_the_order_is_by_length_in_every_epoch():
    data = skewed(100)
    sampler = BucketSampler(data, 8, shuffle=False)
    order = [i for batch in sampler for i in batch]
    assert order == torch.sort(data.lengths("text"), stable=True).indices.tolist()
    assert sampler.batches(0) == sampler.batches(7)


@pytest.mark.parametrize(("n", "batch_size", "limit"), [(2000, 32, 0.08), (2000, 170, 0.25), (300, 32, 0.25)])
def test_buckets_pad_less_than_random_batches(n, batch_size, limit):
    data = skewed(n)
    order = np.random.default_rng(1).permutation(n)
    random = padded_share(data, [order[i : i + batch_size] for i in range(0, n, batch_size)])
    bucketed = padded_share(data, list(BucketSampler(data, batch_size)))
    assert bucketed < limit < 0.45 < random


def test_ranks_share_a_bucket_at_each_step():
    data = skewed(1000)
    lengths = data.lengths("text").float()
    ranks = [BucketSampler(data, 50, rank=r, world_size=2).batches(0) for r in range(2)]
    apart = [abs(lengths[a].mean() - lengths[b].mean()).item() for a, b in zip(*ranks, strict=True)]
    assert max(apart) < 5 < lengths.std()


def test_drop_last_leaves_out_any_sample_not_only_the_longest():
    data = dataset(torch.arange(1, 20))
    sampler = BucketSampler(data, 10, drop_last=True)
    left_out = [set(range(19)) - {i for b in sampler.batches(e) for i in b} for e in range(60)]
    assert all(len(out) == 9 for out in left_out)
    assert set().union(*left_out) == set(range(19))


def test_missing_modalities_do_not_break_the_buckets():
    text = torch.tensor([5, 0, 9, 0])
    audio = torch.tensor([5, 9, 9, 5])
    data = MultimodalDataset.from_flat(
        {"text": torch.zeros(14, 3), "audio": torch.zeros(28, 2)}, {"text": text, "audio": audio}
    )
    assert list(BucketSampler(data, 2, shuffle=False)) == [[3, 0], [1, 2]]


def test_an_empty_data_set_has_no_batches():
    sampler = BucketSampler(MultimodalDataset.empty({"text": 3}), 4)
    assert len(sampler) == 0 and list(sampler) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(batch_size=0), "batch_size must be an integer >= 1, got 0"),
        (dict(batch_size=2.5), "batch_size must be an integer >= 1, got 2.5"),
        (dict(seed=2**64), "seed must have 64 bits at most, got 18446744073709551616"),
        (dict(rank=2, world_size=2), r"rank must lie in \[0, world_size = 2\), got 2"),
        (
            dict(batch_size=9, drop_last=True),
            "drop_last leaves no step, 5 samples are fewer than batch_size = 9",
        ),
        (
            dict(batch_size=1, world_size=2),
            "batch_size must be at least the 2 processes that share it, got 1",
        ),
    ],
)
def test_bad_sizes_are_named(arguments, message):
    with pytest.raises(UserError, match=f"BucketSampler: {message}"):
        BucketSampler(dataset([1, 2, 3, 4, 5]), **({"batch_size": 2} | arguments))


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("padding", ["back", "front"])
def test_loader_gives_every_sample_as_it_is(num_workers, padding):
    data = skewed(70)
    state = torch.get_rng_state()
    loader = make_loader(data, 16, True, False, 5, num_workers=num_workers, padding=padding)
    for epoch in range(2):
        loader.batch_sampler.set_epoch(epoch)
        seen = []
        for batch in loader:
            assert isinstance(batch, MultimodalBatch) and batch.padding == padding
            for row, id, n in zip(batch.values["audio"], batch.ids, batch.lengths["audio"], strict=True):
                real = row[:n] if padding == "back" else row[len(row) - n :]
                assert torch.equal(real, data[int(id)].values["audio"])
            seen.append(batch.ids.tolist())
        assert seen == loader.batch_sampler.batches(epoch) and len(seen) == len(loader)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_rank_without_a_sample_in_a_step_gets_one_that_counts_for_nothing():
    data = skewed(9)
    loaders = [make_loader(data, 4, True, False, 5, rank=r, world_size=2) for r in range(2)]
    steps = list(zip(*loaders, strict=True))
    assert sorted((len(a), len(b), a.filler, b.filler) for a, b in steps) == [
        (1, 1, False, True),
        (2, 2, False, False),
        (2, 2, False, False),
    ]
    for filler in (batch for step in steps for batch in step if batch.filler):
        assert filler.labels.isnan().all() and filler.lengths["text"] > 0


def test_lightning_finds_set_epoch():
    sampler = BucketSampler(skewed(50), 8)
    sampler.sampler.set_epoch(3)
    assert list(sampler) == sampler.batches(3)
