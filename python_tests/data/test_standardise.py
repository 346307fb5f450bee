import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from mmfast.data import (
    MultimodalData,
    MultimodalDataset,
    NonFinite,
    Standardiser,
    collate,
    count_nonfinite,
    standardise,
)
from mmfast.errors import UserError

FEATURES = {"text": 4, "audio": 3}


def dataset(lengths, seed=0, first_id=0, scale=3.0):
    rng = np.random.default_rng(seed)
    values = {m: [rng.normal(5, scale, (n, f)) for n in lengths] for m, f in FEATURES.items()}
    return MultimodalDataset(values, ids=np.arange(first_id, first_id + len(lengths)))


def broken(lengths, seed=0):
    data = dataset(lengths, seed)
    data.flat("audio")[1, 0] = math.nan
    data.flat("audio")[2, 0] = -math.inf
    data.flat("audio")[2, 2] = math.inf
    return data


CELLS = st.one_of(
    st.floats(-1e6, 1e6, width=32), st.sampled_from([math.nan, math.inf, -math.inf, 3e38, -3e38, 1e-40])
)


@settings(max_examples=100, deadline=None)
@given(hnp.arrays(np.float32, hnp.array_shapes(min_dims=2, max_dims=2, max_side=9), elements=CELLS))
def test_matches_numpy_on_the_finite_cells(cells):
    data = MultimodalDataset({"audio": [cells[:1], cells[1:1], cells[1:]]})
    out = Standardiser().fit(data).transform(data).flat("audio").numpy()
    assert np.isfinite(out).all() and out.dtype == np.float32
    for got, column in zip(out.T, cells.T.astype(np.float64), strict=True):
        finite = np.isfinite(column)
        assert not got[~finite].any()
        real = column[finite]
        if len(real) == 0 or real.std() <= np.finfo(np.float32).eps * abs(real.mean()):
            assert not got.any()
        else:
            np.testing.assert_allclose(got[finite], (real - real.mean()) / real.std(), rtol=1e-5, atol=1e-6)


def test_fit_sees_the_training_split_only():
    data = MultimodalData(
        train=dataset([3, 5, 2]),
        valid=dataset([4], seed=1, first_id=10, scale=100),
        test=dataset([6], seed=2, first_id=20, scale=1000),
    )
    standardiser = Standardiser().fit(data.train)
    out = standardiser.transform(data)
    for modality in FEATURES:
        train, test = data.train.flat(modality).double(), data.test.flat(modality).double()
        mean, std = train.mean(0), train.std(0, unbiased=False)
        torch.testing.assert_close(standardiser.mean[modality], mean, rtol=1e-12, atol=0)
        torch.testing.assert_close(out.test.flat(modality), ((test - mean) / std).float(), rtol=1e-6, atol=0)
        assert out.train.flat(modality).mean(0).abs().max() < 1e-6
    assert out.name == data.name and out.test.ids.tolist() == data.test.ids.tolist()
    assert torch.equal(data.train.flat("text"), dataset([3, 5, 2]).flat("text")), "the input stays as it was"


def test_fit_on_a_subset_ignores_the_other_samples():
    whole = dataset([3, 5, 2])
    whole.flat("text")[3:8] = math.nan
    standardiser = Standardiser().fit(whole.subset([0, 2]))
    assert standardiser.nonfinite["text"] == NonFinite(0, 0)


def test_blocks_change_nothing(monkeypatch):
    data = broken([3, 5, 2])
    whole = Standardiser().fit(data).transform(data).flat("audio")
    monkeypatch.setattr(standardise, "BLOCK", 3)
    torch.testing.assert_close(Standardiser().fit(data).transform(data).flat("audio"), whole)


def test_repairs_and_counts_broken_cells():
    data = broken([3, 5])
    assert count_nonfinite(data) == {"text": NonFinite(0, 0), "audio": NonFinite(1, 2)}
    standardiser = Standardiser().fit(data)
    assert standardiser.nonfinite == count_nonfinite(data)
    out = standardiser.transform(data)
    assert count_nonfinite(out)["audio"] == NonFinite(0, 0)
    assert out.flat("audio")[[1, 2, 2], [0, 0, 2]].tolist() == [0, 0, 0]
    assert str(NonFinite(1, 2)) == "1 NaN, 2 inf"


def test_constant_features_become_zero_everywhere():
    train, test = dataset([3, 5]), dataset([4], seed=1)
    train.flat("text")[:, 1] = 0.1
    out = Standardiser().fit(train).transform(test)
    assert not out.flat("text")[:, 1].any() and out.flat("text")[:, 0].all()


def test_large_means_keep_their_digits():
    cells = 1e6 + np.random.default_rng(0).normal(size=(5000, 1))
    data = MultimodalDataset({"audio": [cells]})
    out = Standardiser().fit(data).transform(data).flat("audio")
    assert abs(out.mean()) < 1e-5 and abs(out.std(unbiased=False) - 1) < 1e-5


def test_results_beyond_float32_are_clipped():
    train = MultimodalDataset({"audio": [np.array([[0.0], [1e-20]])]})
    test = MultimodalDataset({"audio": [np.array([[3e38], [-3e38]])]})
    out = Standardiser().fit(train).transform(test).flat("audio").flatten().tolist()
    limit = torch.finfo(torch.float32).max
    assert out == [limit, -limit]


@pytest.mark.parametrize("padding", ["back", "front"])
def test_a_batch_equals_the_data_set_and_padding_stays_zero(padding):
    data = broken([3, 0, 5])
    standardiser = Standardiser().fit(data)
    batch = collate(list(data), padding)
    for modality, value in batch.values.items():
        steps = torch.arange(value.shape[1])
        n = batch.lengths[modality][:, None]
        pad = steps >= n if padding == "back" else steps < value.shape[1] - n
        value[pad] = math.nan
    got = standardiser.transform(batch)
    wanted = collate(list(standardiser.transform(data)), padding)
    for modality in FEATURES:
        assert torch.equal(got.values[modality], wanted.values[modality])
    assert got.padding == padding and torch.equal(got.ids, batch.ids)


def test_state_survives_a_checkpoint(tmp_path):
    data = broken([3, 5])
    standardiser = Standardiser().fit(data)
    torch.save(standardiser.state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    loaded = Standardiser().load_state_dict(state)
    assert loaded.nonfinite == standardiser.nonfinite
    for modality in FEATURES:
        assert torch.equal(loaded.transform(data).flat(modality), standardiser.transform(data).flat(modality))


def test_splits_that_are_one_stay_one():
    train = dataset([3, 5])
    data = MultimodalData(train=train, unlabelled=train)
    out = Standardiser().fit(train).transform(data)
    assert out.unlabelled is out.train and out.pretraining() is out.train


def test_a_modality_unseen_in_training_is_refused_unless_it_is_missing():
    train = MultimodalDataset({"text": [np.empty((0, 2))], "audio": [np.ones((2, 1))]})
    standardiser = Standardiser().fit(train)
    assert len(standardiser.transform(train)) == 1
    other = MultimodalDataset({"text": [np.ones((1, 2))], "audio": [np.ones((2, 1))]})
    with pytest.raises(UserError, match="text cannot be standardised, fit saw no step of it"):
        standardiser.transform(other)


def test_misuse_is_named():
    fitted = Standardiser().fit(dataset([2]))
    with pytest.raises(UserError, match=r"fit .* must come first"):
        Standardiser().transform(dataset([2]))
    with pytest.raises(UserError, match=r"modality must be one of fit's \['text', 'audio'\], got 'visual'"):
        fitted.transform(MultimodalDataset({"visual": [np.ones((1, 1))]}))
    with pytest.raises(UserError, match="text must have 4 features as in fit, got 5"):
        fitted.transform(MultimodalDataset({"text": [np.ones((1, 5))]}))
    with pytest.raises(UserError, match="fit: the training split must hold samples"):
        Standardiser().fit(MultimodalDataset.empty(FEATURES))
    with pytest.raises(TypeError, match=r"data must be a MultimodalBatch.*got dict"):
        fitted.transform({})
    for state in ({"text": {"mean": torch.zeros(2)}}, {"text": 3}, 5):
        with pytest.raises(UserError, match="load_state_dict: state must be a result of state_dict"):
            Standardiser().load_state_dict(state)
    state = fitted.state_dict()
    state["text"]["scale"] = torch.zeros(9)
    with pytest.raises(UserError, match=r"mean and scale of text must be \(F,\), got \(4,\) and \(9,\)"):
        Standardiser().load_state_dict(state)
