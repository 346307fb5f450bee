import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmfast.data import MultimodalData, MultimodalDataset, divide, folds, label_share
from mmfast.errors import UserError


def dataset(n, labels=None):
    labels = np.random.default_rng(0).integers(-2, 3, n) if labels is None else labels
    return MultimodalDataset({"text": [np.ones((1, 2))] * n}, labels=labels)


def kept(data):
    return set(torch.nonzero(~torch.isnan(data.labels)).flatten().tolist())


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 80), st.floats(0, 1), st.floats(0, 1), st.integers(0, 1000))
def test_label_share_is_exact_nested_and_seeded(n, share, other, seed):
    data = dataset(n)
    low, high = sorted((share, other))
    small, large = label_share(data, low, seed), label_share(data, high, seed)
    assert len(kept(small)) == round(low * n)
    assert kept(small) <= kept(large)
    assert kept(label_share(data, low, seed)) == kept(small)
    rows = list(kept(small))
    assert torch.equal(small.labels[rows], data.labels[rows])
    assert kept(data) == set(range(n))


def test_label_share_counts_labelled_samples_only():
    data = dataset(10, [1.0] * 6 + [math.nan] * 4)
    assert len(kept(label_share(data, 0.5, 0))) == 3 and kept(label_share(data, 1, 0)) == set(range(6))


def test_label_share_depends_on_the_seed():
    data = dataset(100)
    assert kept(label_share(data, 0.2, 0)) != kept(label_share(data, 0.2, 1))


@pytest.mark.parametrize("share", [-0.1, 1.5, math.nan])
def test_label_share_names_a_bad_share(share):
    with pytest.raises(UserError, match=r"label_share: share must lie in \[0, 1\]"):
        label_share(dataset(4), share, 0)


@settings(max_examples=60, deadline=None)
@given(st.integers(3, 90), st.integers(2, 8), st.integers(0, 100), st.floats(0.05, 0.9))
def test_folds_test_each_sample_once_and_never_train_on_it(n, n_folds, seed, valid_share):
    if n_folds > n or n - -(-n // n_folds) < 2:
        return
    data = dataset(n)
    tested = []
    for fold in folds(data, n_folds, seed, valid_share):
        parts = [set(part.ids.tolist()) for part in fold]
        assert all(parts) and sum(map(len, parts)) == n and set().union(*parts) == set(range(n))
        rest = n - len(parts[2])
        assert len(parts[1]) == min(max(round(valid_share * rest), 1), rest - 1)
        assert len(parts[2]) in (n // n_folds, -(-n // n_folds))
        tested += sorted(parts[2])
    assert sorted(tested) == list(range(n))


def test_folds_follow_the_label_distribution():
    labels = np.random.default_rng(1).normal(size=120)
    for fold in folds(dataset(120, labels), 5, seed=3):
        for part in (fold.valid, fold.test):
            assert abs(part.labels.mean() - labels.mean()) < 0.15
            assert abs(part.labels.std() - labels.std()) < 0.2


def test_folds_are_seeded():
    def tests(seed):
        return [fold.test.ids.tolist() for fold in folds(dataset(40), 4, seed)]

    assert tests(0) == tests(0) != tests(1)


@pytest.mark.parametrize(
    ("n", "arguments", "message"),
    [
        (10, dict(n_folds=1), r"n_folds must lie in \[2, samples = 10\]"),
        (10, dict(n_folds=11), r"n_folds must lie in \[2, samples = 10\]"),
        (2, dict(n_folds=2), "leave two for train and valid, got 2"),
        (10, dict(valid_share=1.0), r"valid_share must lie in \(0, 1\), got 1.0"),
    ],
)
def test_folds_name_bad_sizes_at_the_call(n, arguments, message):
    with pytest.raises(UserError, match=f"folds: .*{message}"):
        folds(dataset(n), **arguments)


def test_folds_and_shares_follow_the_ids_and_not_the_order_of_the_samples():
    data = dataset(40)
    shuffled = data.subset(np.random.default_rng(5).permutation(40))
    for ours, theirs in zip(folds(data, 4), folds(shuffled, 4), strict=True):
        assert [ids(part) for part in ours] == [ids(part) for part in theirs]
    shares = [label_share(d, 0.3, 0) for d in (data, shuffled)]
    assert len({frozenset(d.ids[~d.labels.isnan()].tolist()) for d in shares}) == 1


def test_folds_need_labels():
    with pytest.raises(UserError, match="every sample must have a label, 1 of 3 have none"):
        folds(dataset(3, [1.0, math.nan, 2.0]), 2)


def lone(n, unlabelled=0, **splits):
    """Data in one split: n labelled samples, each of its own value, then some without a label."""
    values = {"text": [np.full((1, 2), i) for i in range(n + unlabelled)]}
    whole = MultimodalDataset(values, [i % 5 - 2 for i in range(n)] + [math.nan] * unlabelled)
    return MultimodalData(**(splits or {"train": whole})), whole


def ids(dataset):
    return set(dataset.ids.tolist())


def test_shares_is_a_partition_by_shares_and_leaves_unlabelled_samples_to_train():
    data, whole = lone(50, unlabelled=7)
    parts = divide(data, (0.7, 0.1, 0.2))
    assert [len(parts.train), len(parts.valid), len(parts.test)] == [42, 5, 10]
    assert ids(parts.train) | ids(parts.valid) | ids(parts.test) == ids(whole)
    assert set(range(50, 57)) < ids(parts.train)
    assert parts.name == data.name and parts.label_range == data.label_range


def test_shares_depends_on_seed_and_contents_and_not_on_order_or_ids():
    data, whole = lone(30)
    order = np.random.default_rng(3).permutation(30)
    values = {"text": [whole[i].values["text"] for i in order]}
    shuffled = MultimodalData(train=MultimodalDataset(values, whole.labels[order]))

    def tests(data, seed=0):
        return set(divide(data, (0.6, 0.2, 0.2), seed=seed).test.fingerprints().tolist())

    assert tests(data) == tests(shuffled) != tests(data, seed=1)


def test_shares_keeps_equal_samples_together():
    values = {"text": [np.full((1, 2), i // 3) for i in range(60)]}
    parts = divide(MultimodalData(train=MultimodalDataset(values, np.zeros(60))), (0.5, 0.25, 0.25))
    groups = [{i // 3 for i in ids(part)} for part in (parts.train, parts.valid, parts.test)]
    assert sum(map(len, groups)) == len(set.union(*groups)) == 20
    assert [len(parts.train), len(parts.valid), len(parts.test)] == [30, 15, 15]


def test_shares_of_a_lone_test_split_and_of_a_missing_validation_split():
    _, whole = lone(20)
    parts = divide(MultimodalData(test=whole), (0.5, 0.2, 0.3))
    assert [len(parts.train), len(parts.valid), len(parts.test)] == [10, 4, 6]
    train, test = whole.subset(range(15)), whole.subset(range(15, 20))
    parts = divide(MultimodalData(train=train, test=test), (0.8, 0.2, 0))
    assert [len(parts.train), len(parts.valid), len(parts.test)] == [12, 3, 5] and ids(parts.test) == ids(
        test
    )
    assert [len(divide(MultimodalData(test=whole), (0.5, 0.5, 0)).test)] == [0]


@pytest.mark.parametrize("pool_is_train", [True, False])
def test_shares_takes_held_out_samples_out_of_the_pool(pool_is_train):
    data, whole = lone(20, unlabelled=5)
    more = MultimodalDataset({"text": [np.ones((2, 2))]}, ids=[100])
    data = MultimodalData(whole, unlabelled=whole if pool_is_train else more)
    parts = divide(data, (0.5, 0.25, 0.25))
    assert not ids(parts.pretraining()) & (ids(parts.valid) | ids(parts.test))
    assert (parts.unlabelled is parts.train) == pool_is_train
    assert ids(parts.pretraining()) == ids(parts.train) | (set() if pool_is_train else {100})


def test_shares_gives_every_part_a_sample():
    parts = divide(lone(3)[0], (0.9, 0.05, 0.05))
    assert [len(parts.train), len(parts.valid), len(parts.test)] == [1, 1, 1]


@pytest.mark.parametrize(
    ("data", "shares", "message"),
    [
        (lone(9)[0], (0.7, 0.1), "must be shares of train"),
        (lone(9)[0], (0.7, 0.1, 0.1), "must be shares of train"),
        (lone(9)[0], (1.0, 0.0, 0.0), "must be shares of train"),
        (lone(9)[0], (0.5, math.nan, 0.5), "must be shares of train"),
        (lone(9)[0], (1.2, -0.4, 0.2), "must be shares of train"),
        (lone(9)[0], ("0.7", "0.1", "0.2"), "must be shares of train"),
        (lone(2, unlabelled=9)[0], (0.7, 0.1, 0.2), "2 labelled samples are too few"),
        (
            MultimodalData(train=dataset(9)),
            (0.7, 0.1, 0.2),
            "the 9 labelled samples are of only 1 groups that must stay together, too few for 3 parts",
        ),
    ],
)
def test_shares_names_what_cannot_be_divided(data, shares, message):
    with pytest.raises(UserError, match=f"split: .*{message}"):
        divide(data, shares)


def test_shares_replace_the_splits_and_the_cross_validation_that_there_are():
    _, whole = lone(40)
    own = dict(
        train=whole.subset(range(10)), valid=whole.subset(range(10, 20)), test=whole.subset(range(20, 30))
    )
    more = whole.subset(range(25, 40))
    parts = divide(MultimodalData(**own, cross_validation=more, unlabelled=own["train"]), "0.5,0.25,0.25")
    assert [len(parts.train), len(parts.valid), len(parts.test)] == [20, 10, 10]
    assert ids(parts.train) | ids(parts.valid) | ids(parts.test) == set(range(40))
    assert parts.cross_validation is None and parts.protocol is None and parts.unlabelled is parts.train
    kept = divide(MultimodalData(**own), "0.5,0.5,0")
    assert ids(kept.test) == ids(own["test"]) and len(kept.train) == len(kept.valid) == 10


@pytest.mark.parametrize("n", [100, 103])
def test_sizes_are_floors_of_shares_as_they_are_written(n):
    parts = divide(lone(n)[0], (0.42, 0.29, 0.29))
    assert len(parts.valid) == len(parts.test) == 29


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(0, 4), min_size=12, max_size=120),
    st.floats(0.05, 0.4),
    st.floats(0.05, 0.4),
    st.integers(0, 99),
)
def test_parts_have_exact_sizes_and_the_shares_of_classes_give_or_take_one(classes, valid, test, seed):
    n = len(classes)
    values = {"text": [np.full((1, 2), i) for i in range(n)]}
    data = MultimodalData(MultimodalDataset(values, classes), task="classification")
    parts = divide(data, (1 - valid - test, valid, test), seed=seed)
    sizes = [max(int(share * n + 1e-6), 1) for share in (valid, test)]
    assert [len(parts.train), len(parts.valid), len(parts.test)] == [n - sum(sizes), *sizes]
    assert sorted([*ids(parts.train), *ids(parts.valid), *ids(parts.test)]) == list(range(n))
    counts = np.bincount(classes, minlength=5)
    for part, allowed in ((parts.test, 1), (parts.valid, 1 + sizes[0] / (n - sizes[1]))):
        found = np.bincount(part.labels.long().numpy(), minlength=5)
        assert (abs(found - len(part) * counts / n) < allowed + 1e-9).all()


TRIPLES = st.lists(st.tuples(*[st.integers(0, 12)] * 3), min_size=10, max_size=60)


def tied(rows, order=None):
    """Samples with a video, a speaker and a content each."""
    rows = [rows[i] for i in (range(len(rows)) if order is None else order)]
    return MultimodalDataset(
        {"text": [np.full((1, 2), row[2]) for row in rows]},
        [float(row[0] % 3) for row in rows],
        names=[f"name {i}" for i in (range(len(rows)) if order is None else order)],
        groups={"video": [f"v{row[0]}" for row in rows], "speaker": [f"s{row[1]}" for row in rows]},
    )


@settings(max_examples=80, deadline=None)
@given(TRIPLES, st.integers(0, 50), st.sampled_from(["0.5,0.25,0.25", "kfold:3:1", "0.8,0.2,0"]))
def test_no_video_speaker_or_content_is_on_two_sides_and_order_does_not_matter(rows, seed, spec):
    whole = tied(rows)
    try:
        parts = divide(MultimodalData(whole), spec, seed=seed)
    except UserError as error:
        assert "samples" in str(error)
        return
    sides = [parts.train, parts.valid, parts.test]
    assert sorted(name for part in sides for name in part.names) == sorted(whole.names)
    for of in (
        lambda d: d.groups.get("video", []),
        lambda d: d.groups.get("speaker", []),
        lambda d: d.fingerprints().tolist(),
    ):
        found = [set(of(part)) for part in sides]
        assert sum(map(len, found)) == len(set.union(*found))
    order = np.random.default_rng(seed).permutation(len(rows)).tolist()
    again = divide(MultimodalData(tied(rows, order)), spec, seed=seed)
    assert [set(p.names) for p in sides] == [set(p.names) for p in (again.train, again.valid, again.test)]


def test_one_group_is_chosen_in_place_of_all():
    whole = tied([(i % 2, i // 3, i) for i in range(30)])
    with pytest.raises(UserError, match="of only 1 groups that must stay together"):
        divide(MultimodalData(whole), "0.6,0.2,0.2")
    parts = divide(MultimodalData(whole), "0.6,0.2,0.2", group="speaker")
    assert [len(set(p.groups["speaker"])) for p in (parts.train, parts.valid, parts.test)] == [6, 2, 2]
    with pytest.raises(UserError, match="split: 'session' must be one of the groups video, speaker"):
        divide(MultimodalData(whole), "0.6,0.2,0.2", group="session")


def test_groups_that_are_unknown_tie_nothing_together():
    whole = lone(20)[1].identified(range(20), list(map(str, range(20))), {"speaker": [""] * 20})
    assert len(divide(MultimodalData(whole), "0.5,0.25,0.25").test) == 5


WORDS = [
    "0.7,0.2",
    "0.7,0.1,0.3",
    "kfold",
    "kfold:1",
    "kfold:5:5",
    "kfold:a",
    "kfold:5:1:1",
    "",
    "speaker:",
    "[a]",
    3,
]


@pytest.mark.parametrize("spec", WORDS)
def test_words_that_say_no_split_are_refused(spec):
    with pytest.raises(UserError, match=r"split: must be shares of train.*, got "):
        divide(lone(9)[0], spec)


def test_label_share_keeps_at_least_as_many_as_asked_for_if_there_are():
    assert len(kept(label_share(dataset(20), 0.01, 0, least=1))) == 1
    assert len(kept(label_share(dataset(2, [math.nan] * 2), 0.01, 0, least=1))) == 0


def grouped(sizes, unlabelled=0):
    """One sample a number, in groups of these sizes; labels rise with the group; then samples without a label."""
    group = np.repeat(np.arange(len(sizes)), sizes)
    groups = [f"speaker {g}" for g in group] + [f"speaker {i % len(sizes)}" for i in range(unlabelled)]
    labels = [*(group / 10), *[math.nan] * unlabelled]
    values = {"text": [np.full((1, 2), i) for i in range(len(labels))]}
    return MultimodalDataset(values, labels, groups=groups)


@pytest.mark.parametrize("seed", range(4))
def test_shares_keeps_groups_together(seed):
    whole = grouped([3, 1, 4, 1, 5, 9, 2, 6], unlabelled=16)
    parts = divide(MultimodalData(whole), (0.6, 0.2, 0.2), seed=seed)
    speakers = [set(part.groups["group"]) for part in (parts.train, parts.valid, parts.test)]
    assert sum(map(len, speakers)) == len(set.union(*speakers)) == 8, "also those without a label"
    assert sum(map(len, (parts.train, parts.valid, parts.test))) == len(whole)
    order = np.random.default_rng(seed).permutation(len(whole))
    again = divide(MultimodalData(whole.subset(order)), (0.6, 0.2, 0.2), seed=seed)
    assert set(again.test.groups["group"]) == speakers[2]
    two = MultimodalData(grouped([5, 5]))
    with pytest.raises(
        UserError, match="the 10 labelled samples are of only 2 groups that must stay together"
    ):
        divide(two, (0.6, 0.2, 0.2), seed=seed)


def test_shares_takes_held_out_groups_and_contents_out_of_the_pool():
    whole = grouped([2] * 10)
    pool = MultimodalDataset(
        {"text": [np.ones((3, 2)) * i for i in range(10)]},
        ids=range(100, 110),
        groups=[f"speaker {i}" for i in range(10)],
    )
    parts = divide(MultimodalData(whole, unlabelled=pool), (0.6, 0.2, 0.2))
    assert set(parts.unlabelled.groups["group"]) == set(parts.train.groups["group"])
    _, whole = lone(20)
    twins = MultimodalDataset({"text": [s.values["text"] for s in whole]}, ids=range(100, 120))
    parts = divide(MultimodalData(whole, unlabelled=twins), (0.5, 0.25, 0.25))
    held_out = torch.cat([parts.valid.fingerprints(), parts.test.fingerprints()])
    assert len(parts.unlabelled) == 10 and not parts.unlabelled.among(held_out).any()


def test_folds_keep_groups_together_and_follow_their_labels():
    data = grouped([1, 2, 3, 4, 5] * 6)
    tested = []
    for fold in folds(data, 5, seed=1):
        speakers = [set(part.groups["group"]) for part in fold]
        assert all(speakers) and sum(map(len, speakers)) == len(set.union(*speakers)) == 30
        assert len(speakers[2]) == 6 and abs(fold.test.labels.mean() - data.labels.mean()) < 0.4
        tested += sorted(ids(fold.test))
    assert sorted(tested) == list(range(len(data)))
    with pytest.raises(UserError, match=r"n_folds must lie in \[2, groups = 3\]"):
        folds(grouped([4, 4, 4]), 4)
