import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmfast.data import MultimodalBatch, Sample, collate
from mmfast.errors import UserError

FEATURES = {"visual": 2, "text": 5, "audio": 3}


def sample(lengths, id=0, label=0.0):
    generator = torch.Generator().manual_seed(id)
    values = {m: torch.randn(n, FEATURES[m], generator=generator) for m, n in lengths.items()}
    return Sample(values, label, id, f"s{id}")


def samples_of(lengths):
    return [sample(dict(zip(FEATURES, row, strict=True)), i, i / 2) for i, row in enumerate(lengths)]


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(*[st.integers(0, 7)] * 3), min_size=1, max_size=6), st.sampled_from(["back", "front"])
)
def test_collate_round_trip(lengths, padding):
    samples = samples_of(lengths)
    batch = collate(samples, padding=padding)
    assert batch.modalities == ("text", "audio", "visual")
    assert batch.padding == padding and len(batch) == len(samples)
    assert batch.ids.tolist() == [s.id for s in samples]
    assert batch.labels.tolist() == [s.label for s in samples]
    for modality, value in batch.values.items():
        count = [len(s.values[modality]) for s in samples]
        assert value.shape == (len(samples), max(count), FEATURES[modality])
        assert value.dtype == torch.float32 and batch.lengths[modality].dtype == torch.int64
        assert batch.lengths[modality].tolist() == count
        for row, s, n in zip(value, samples, count, strict=True):
            start = 0 if padding == "back" else len(row) - n
            assert torch.equal(row[start : start + n], s.values[modality])
            assert row[:start].count_nonzero() == 0 and row[start + n :].count_nonzero() == 0


def test_collate_keeps_missing_labels_as_nan():
    batch = collate(
        [sample(dict.fromkeys(FEATURES, 1), 0, math.nan), sample(dict.fromkeys(FEATURES, 1), 1, 2.0)]
    )
    assert math.isnan(batch.labels[0]) and batch.labels[1] == 2


def test_collate_keeps_nan_and_inf_cells():
    broken = sample(dict.fromkeys(FEATURES, 2))
    broken.values["audio"][0, 0], broken.values["audio"][1, 1] = math.nan, -math.inf
    value = collate([broken]).values["audio"][0]
    assert math.isnan(value[0, 0]) and value[1, 1] == -math.inf


def test_collate_names_what_does_not_fit():
    whole = sample(dict.fromkeys(FEATURES, 1))
    with pytest.raises(UserError, match=r"collate: .* at least one sample, got none"):
        collate([])
    with pytest.raises(UserError, match=r'collate: padding must be "back" or "front", got \'left\''):
        collate([whole], padding="left")
    with pytest.raises(
        UserError, match=r"collate: every sample must have the modalities .* in sample 's1' \(id 1\)"
    ):
        collate([whole, sample({"text": 1}, 1)])
    wide = Sample({**whole.values, "text": torch.zeros(1, 6)}, 0.0, 1, "wide")
    with pytest.raises(
        UserError, match=r"text must have 5 features as the first sample, got 6 in sample 'wide' \(id 1\)"
    ):
        collate([whole, wide])


def test_batch_to_moves_every_tensor():
    batch = collate(samples_of([(1, 2, 3), (0, 4, 1)]), padding="front").to("meta")
    tensors = [*batch.values.values(), *batch.lengths.values(), batch.labels, batch.ids]
    assert len(tensors) == 8 and all(t.device.type == "meta" for t in tensors)
    assert batch.padding == "front"


def test_batch_without_labels_moves():
    batch = MultimodalBatch(
        {"text": torch.zeros(2, 3, 4)}, {"text": torch.tensor([3, 0])}, None, torch.arange(2)
    )
    assert batch.to("meta").labels is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"values": {"text": torch.zeros(3, 3, 4)}}, r"values\['text'\] must be \(B, L, F\) with B = 2"),
        ({"values": {"text": torch.zeros(2, 4)}}, r"values\['text'\] must be \(B, L, F\).*got \(2, 4\)"),
        ({"lengths": {"text": torch.zeros(3)}}, r"lengths\['text'\] must be \(2,\) as ids, got shape \(3,\)"),
        ({"lengths": {"audio": torch.zeros(2)}}, r"lengths must name the modalities of values \['text'\]"),
        ({"labels": torch.zeros(3, 1)}, r"labels must be \(2,\) as ids, got shape \(3,\)"),
        ({"padding": "right"}, 'padding must be "back" or "front"'),
    ],
)
def test_batch_names_what_does_not_fit(change, message):
    good = {
        "values": {"text": torch.zeros(2, 3, 4)},
        "lengths": {"text": torch.tensor([3, 1])},
        "labels": torch.zeros(2),
        "ids": torch.arange(2),
    }
    with pytest.raises(UserError, match=f"MultimodalBatch: {message}"):
        MultimodalBatch(**(good | change))
