import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmfast.data import MultimodalData, MultimodalDataset
from mmfast.errors import UserError

FEATURES = {"visual": 2, "text": 3}


def arrays(lengths, seed=0):
    rng = np.random.default_rng(seed)
    return {m: [rng.normal(size=(n, f)).astype(np.float32) for n in lengths] for m, f in FEATURES.items()}


def dataset(lengths, first_id=0, **kwargs):
    ids = np.arange(first_id, first_id + len(lengths))
    return MultimodalDataset(arrays(lengths, first_id), ids=ids, **kwargs)


def test_samples_come_back_unpadded():
    values = arrays([3, 0, 1])
    data = MultimodalDataset(values, labels=[1.0, None, -2.5], ids=[7, 5, 9], names=["a", "b", "c"])
    assert (
        len(data) == 3 and data.features == {"text": 3, "visual": 2} and data.modalities == ("text", "visual")
    )
    assert data.lengths("text").tolist() == [3, 0, 1] and data.names == ["a", "b", "c"]
    assert data.ids.dtype == torch.int64 and data.labels.dtype == torch.float32
    for i in range(3):
        for modality in FEATURES:
            assert np.array_equal(data[i].values[modality].numpy(), values[modality][i])
    assert data[2].label == -2.5 and math.isnan(data[1].label)
    assert (data[-1].id, data[-1].name) == (9, "c")
    with pytest.raises(IndexError, match="index must be below 3, got 3"):
        data[3]


def test_defaults_are_unlabelled_and_numbered():
    data = MultimodalDataset(arrays([1, 2]))
    assert torch.isnan(data.labels).all()
    assert data.ids.tolist() == [0, 1] and data.names == ["0", "1"]


@settings(max_examples=40, deadline=None)
@given(st.data(), st.lists(st.integers(0, 4), min_size=1, max_size=7))
def test_subset_selects_in_order(data, lengths):
    whole = dataset(lengths, labels=np.arange(len(lengths)))
    picks = data.draw(st.lists(st.integers(0, len(lengths) - 1), unique=True))
    part = whole.subset(picks)
    assert part.ids.tolist() == picks and part.labels.tolist() == picks
    for modality in FEATURES:
        wanted = [whole[i].values[modality] for i in picks]
        assert part.lengths(modality).tolist() == [len(w) for w in wanted]
        assert torch.equal(part.flat(modality), torch.cat([torch.empty(0, FEATURES[modality]), *wanted]))
        for sample, value in zip(part, wanted, strict=True):
            assert torch.equal(sample.values[modality], value)


def test_subset_shares_memory_and_takes_masks():
    whole = dataset([2, 3, 1])
    part = whole.subset(np.array([False, True, True]))
    assert part.ids.tolist() == [1, 2]
    assert part[0].values["text"].data_ptr() == whole[1].values["text"].data_ptr()


def test_with_labels_leaves_the_original_alone():
    whole = dataset([1, 1], labels=[1, 2])
    assert whole.with_labels([3, math.nan]).labels[0] == 3
    assert whole.labels.tolist() == [1, 2]


def test_map_sees_the_steps_of_a_subset_only():
    part = dataset([2, 3, 1]).subset([2, 0])
    doubled = part.map(lambda modality, steps: 2 * steps)
    assert doubled.ids.tolist() == [2, 0]
    assert torch.equal(doubled[0].values["text"], 2 * part[0].values["text"])
    assert torch.equal(doubled[1].values["visual"], 2 * part[1].values["visual"])


def test_concatenate_keeps_order_and_refuses_repeated_ids():
    joined = MultimodalDataset.concatenate([dataset([1, 2]), dataset([3], first_id=5)])
    assert joined.ids.tolist() == [0, 1, 5] and joined.lengths("text").tolist() == [1, 2, 3]
    with pytest.raises(UserError, match="ids must be unique, got 0 twice"):
        MultimodalDataset.concatenate([dataset([1]), dataset([2])])
    with pytest.raises(UserError, match="concatenate: features must be"):
        MultimodalDataset.concatenate([dataset([1]), MultimodalDataset.empty({"text": 4})])


@pytest.mark.parametrize("padding", ["back", "front"])
def test_from_padded_drops_poisoned_padding(padding):
    padded = np.full((2, 4, 3), np.nan, np.float32)
    real = {0: np.ones((3, 3)), 1: 2 * np.ones((1, 3))}
    for i, value in real.items():
        padded[i, slice(0, len(value)) if padding == "back" else slice(4 - len(value), 4)] = value
    data = MultimodalDataset.from_padded({"text": padded}, {"text": [3, 1]}, padding)
    for i, value in real.items():
        assert np.array_equal(data[i].values["text"].numpy(), value)


def test_float64_beyond_float32_becomes_inf_without_a_warning(recwarn):
    data = MultimodalDataset({"text": [np.array([[1e300, -1e300, 1.0]])]})
    assert data[0].values["text"].tolist() == [[math.inf, -math.inf, 1.0]]
    assert not recwarn.list


@pytest.mark.parametrize("dtype", [">f8", "<f2", "i4", "u2"])
def test_numeric_dtypes_are_converted(dtype):
    data = MultimodalDataset({"text": [np.arange(6).reshape(2, 3).astype(dtype)]})
    assert data[0].values["text"].tolist() == [[0, 1, 2], [3, 4, 5]]


BAD = [
    (dict(values={}), "at least one modality, got none"),
    (dict(values={"text": []}), "must hold at least one sample"),
    (dict(values={"text": [np.ones(3)]}), r"values\['text'\]\[0\] must be \(n, F\), got shape \(3,\)"),
    (dict(values={"text": [np.ones((1, 3)), np.ones((1, 4))]}), r"\[1\] must have 3 features .* got 4"),
    (
        dict(values={"text": [np.ones((1, 3))], "audio": [np.ones((1, 3))] * 2}),
        r"lengths\['audio'\] must be \(1,\) integers, got int64 of shape \(2,\)",
    ),
    (dict(labels=[1.0]), r"labels must be \(2,\) or \(2, K\), got shape \(1,\)"),
    (
        dict(labels=["good", 2.5]),
        r"labels must be names of classes throughout, or None for none, got 2.5 in labels\[1\]",
    ),
    (dict(labels=[1.0, math.inf]), "labels must be finite, or NaN for none, got inf"),
    (dict(ids=[3, 3]), "ids must be unique, got 3 twice"),
    (dict(ids=[0.5, 1.5]), r"ids must be \(2,\) integers, got float64"),
    (dict(names=["a"]), "names must be 2 strings, one per sample, got 1"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD)
def test_bad_input_is_named(arguments, message):
    with pytest.raises(UserError, match=f"MultimodalDataset: .*{message}"):
        MultimodalDataset(**({"values": {"text": [np.ones((1, 3)), np.ones((2, 3))]}} | arguments))


def test_faults_of_a_sample_name_it():
    names = ["first", "second"]
    for make, sentence in (
        (
            lambda: MultimodalDataset({"text": [np.ones((1, 3)), np.ones((1, 2))]}, names=names),
            "values['text'][1] of sample 'second' must have 3 features as the first sample, got 2",
        ),
        (
            lambda: MultimodalDataset({"text": [np.ones((1, 3)), np.ones(3)]}, names=names),
            "values['text'][1] of sample 'second' must be (n, F), got shape (3,)",
        ),
        (
            lambda: MultimodalDataset({"text": [np.ones((1, 3))] * 2}, [0.0, -math.inf], names=names),
            "got -inf in labels[1] of sample 'second'",
        ),
        (
            lambda: MultimodalDataset({"text": [np.ones((1, 3))] * 2}, names=names).with_labels(
                [math.inf, 0]
            ),
            "got inf in labels[0] of sample 'first'",
        ),
        (
            lambda: MultimodalDataset.from_padded(
                {"text": np.ones((2, 3, 1))}, {"text": [1, 4]}, names=names
            ),
            "lengths['text'][1] of sample 'second' must be at most the 3 steps of its values, got 4",
        ),
        (
            lambda: MultimodalDataset.from_flat({"text": torch.ones(1, 1)}, {"text": [2, -1]}),
            "lengths['text'][1] must be 0 or more, got -1",
        ),
    ):
        with pytest.raises(UserError) as caught:
            make()
        assert sentence in str(caught.value)


def test_samples_that_are_not_aligned_or_hold_nothing():
    text, audio = [2, 3, 0, 0, 1], [2, 4, 0, 5, 0]
    data = MultimodalDataset(
        {m: [np.ones((n, 1)) for n in ns] for m, ns in (("text", text), ("audio", audio))}
    )
    assert data.unaligned().tolist() == [False, True, False, False, False]
    assert data.without_steps().tolist() == [False, False, True, False, False]
    empty = MultimodalDataset.empty({"text": 1, "audio": 1})
    assert len(empty.unaligned()) == len(empty.without_steps()) == 0


def test_words_are_no_features():
    with pytest.raises(TypeError, match=r"values\['text'\]\[0\] must hold numbers, got dtype <U"):
        MultimodalDataset({"text": [np.array([["a"]])]})


@pytest.mark.parametrize(
    ("lengths", "message"),
    [
        ({"text": [1, 1]}, "must add up to the 3 steps of its values, got 2"),
        ({"text": [4, -1]}, "must be 0 or more, got -1"),
        ({"audio": [3]}, "lengths must name 'text' as values do, got"),
    ],
)
def test_bad_flat_lengths_are_named(lengths, message):
    with pytest.raises(UserError, match=message):
        MultimodalDataset.from_flat({"text": torch.zeros(3, 2)}, lengths)


def test_padded_lengths_stay_within_the_steps():
    with pytest.raises(
        UserError, match=r"lengths\['text'\]\[0\] must be at most the 4 steps of its values, got 5"
    ):
        MultimodalDataset.from_padded({"text": torch.zeros(2, 4, 3)}, {"text": [5, 1]})


def test_data_fills_absent_splits_with_empty_ones():
    data = MultimodalData(test=dataset([1, 2]))
    assert (len(data.train), len(data.valid), len(data.test)) == (0, 0, 2)
    assert list(data.splits()) == ["test"] and data.features == {"text": 3, "visual": 2}


def test_data_refuses_leaks_and_strangers():
    with pytest.raises(UserError, match=r"ids must be unique over the splits.*got 1 twice"):
        MultimodalData(train=dataset([1, 2]), test=dataset([1], first_id=1))
    with pytest.raises(UserError, match="every split must have the features"):
        MultimodalData(train=dataset([1]), valid=MultimodalDataset.empty({"text": 9}))
    with pytest.raises(UserError, match="at least one split must be given"):
        MultimodalData()


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ([-0.4, 1.0], (-1, 1)),
        ([0.2, -1.2], (-3, 3)),
        ([math.nan, -3.0], (-3, 3)),
        ([1.0, 7.0], (1, 7)),
        ([5.0, 5.0], (4, 6)),
        ([math.nan, math.nan], (-3, 3)),
    ],
)
def test_a_range_of_labels_that_is_not_given_holds_them(labels, expected):
    train = dataset([1, 1], labels=labels)
    assert MultimodalData(train).label_range == MultimodalData(test=train).label_range == expected
    assert MultimodalData(train, label_range=(np.float32(-2), 2)).label_range == (-2.0, 2.0)


@pytest.mark.parametrize(
    "label_range", [(3, -3), (1,), (1, 1), (0, math.inf), (math.nan, 1), 3, "ab", (1, 2, 3)]
)
def test_a_range_of_labels_that_is_none_is_refused_before_it_is_saved(label_range):
    with pytest.raises(UserError, match="label_range must be two increasing numbers"):
        MultimodalData(dataset([1]), label_range=label_range)


def test_pretraining_sees_each_sample_once():
    train, pool = dataset([1, 2, 3]), dataset([1, 1], first_id=10)
    assert MultimodalData(train=train).pretraining() is train
    assert MultimodalData(train=train, unlabelled=train).pretraining() is train
    both = MultimodalData(train=train, unlabelled=pool)
    assert both.pretraining().ids.tolist() == [0, 1, 2, 10, 11]
    fold = train.subset([0, 2])
    assert both.pretraining(fold).ids.tolist() == [0, 2, 10, 11]
    assert MultimodalData(train=train, unlabelled=train).pretraining(fold).ids.tolist() == [0, 2, 1]
