"""M3 against its per-sample definition; what it has in common with others is in test_encoders."""

import copy
import math
from itertools import combinations

import pytest
import torch
from encoder_help import CLOSE, LENGTHS, attend, padded, sequences
from encoder_help import FEATURES as SMALL
from hypothesis import given, settings
from hypothesis import strategies as st

from mmfast.errors import UserError
from mmfast.models import M3Encoder, RegressionHead, parameter_count

MOSEI = {"text": 300, "audio": 74, "visual": 35}


VARIANTS = [
    {},
    {"attention": False},
    {"bidirectional": "fusion"},
    {"bidirectional": True},
    {"pooling": "sum"},
    {"pooling": "last"},
    {"bidirectional": True, "pooling": "last"},
]


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """These tensors are too small to share; on a busy machine threads would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def encoder(features=SMALL, hidden=6, dropout=0.0, dtype=torch.float64, seed=0, **options):
    torch.manual_seed(seed)
    return M3Encoder(features, hidden=hidden, dropout=dropout, **options).to(dtype)


def recur(layer, x):
    if len(x) == 0:
        return x.new_zeros(0, layer.out_features)
    forward = layer.lstm(x[None])[0][0]
    if layer.reverse is None:
        return forward
    backward = layer.reverse(x.flip(0)[None])[0][0].flip(0)
    return forward + backward if layer.merge == "sum" else torch.cat((forward, backward), dim=1)


def definition(model, sample):
    """The fused vector of one sample: modality -> (n, F), unpadded; spec order T, A, V, TA, TV, AV, TAV."""
    steps = max(len(x) for x in sample.values())
    if steps == 0:
        return next(model.parameters()).new_zeros(model.out_features)
    m = {name: recur(model.recurrent[name], x) for name, x in sample.items()}
    for name in model.attention:
        m[name] = attend(model.attention[name], m[name], m[name])
    full = {name: x if len(x) else x.new_zeros(steps, x.shape[1]) for name, x in m.items()}
    pairs = {}
    for x, y in combinations(m, 2):
        layer = model.pairs[f"{x}-{y}"]
        pairs[x, y] = full[x] + full[y]
        if len(m[x]) and len(m[y]):
            pairs[x, y] = pairs[x, y] + attend(layer.xy, m[y], m[x]) + attend(layer.yx, m[x], m[y])
    triples = []
    for x, y, z in combinations(m, 3):
        empty = len(m[x]) == 0 or max(len(m[y]), len(m[z])) == 0
        term = attend(model.triples[f"{x}-{y}-{z}"], pairs[y, z], m[x])
        triples.append(torch.zeros_like(full[x]) if empty else term)
    fused = recur(model.fusion, torch.cat([*full.values(), *pairs.values(), *triples], dim=1))
    if model.pooling == "last":
        hidden = model.fusion.lstm.hidden_size
        return torch.cat((fused[-1, :hidden], fused[0, hidden:]))
    fused = attend(model.fusion_attention, fused, fused)
    return fused.sum(0) if model.pooling == "sum" else fused.mean(0)


def definitions(model, data):
    count = len(next(iter(data.values())))
    return torch.stack([definition(model, {k: v[b] for k, v in data.items()}) for b in range(count)])


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, 936_901),
        ({"bidirectional": "fusion", "attention": False}, 1_257_801),
        ({"bidirectional": "fusion"}, 1_347_801),
        ({"bidirectional": True}, 1_633_801),
        ({"pooling": "last"}, 936_901 - 30_000),
    ],
)
def test_parameter_counts_are_the_documented_ones(options, expected):
    model = M3Encoder(MOSEI, **options)
    assert model.out_features == (200 if options.get("bidirectional") else 100)
    assert parameter_count(model) + parameter_count(RegressionHead(model.out_features)) == expected


@pytest.mark.parametrize("options", VARIANTS)
def test_encoder_is_the_definition_in_value_and_gradient(options):
    model, data = encoder(**options), sequences(LENGTHS)
    values, lengths = padded(data)
    weight = torch.randn(7, model.out_features, dtype=torch.float64)

    expected = definitions(model, data)
    expected_grads = torch.autograd.grad((expected * weight).sum(), [*model.parameters()], allow_unused=True)
    got = model(values, lengths)
    torch.testing.assert_close(got, expected, **CLOSE)
    (got * weight).sum().backward()
    for (name, p), grad in zip(model.named_parameters(), expected_grads, strict=True):
        torch.testing.assert_close(p.grad, grad, **CLOSE, msg=lambda text, name=name: f"{name}: {text}")


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 7)), min_size=1, max_size=5), st.integers(0, 3))
def test_front_equals_back_for_any_lengths(samples, extra):
    """Each sample draws its length and (bits) which modalities it has."""
    lengths = {name: [n if has >> m & 1 else 0 for n, has in samples] for m, name in enumerate(SMALL)}
    model, data = encoder(hidden=3, bidirectional="fusion"), sequences(lengths)
    back = model(*padded(data, extra=extra, fill=math.nan))
    front = model(*padded(data, "front", extra=extra, fill=math.nan), padding="front")
    torch.testing.assert_close(front, back, **CLOSE)
    torch.testing.assert_close(back, definitions(model, data), **CLOSE)


def test_float32_agrees_with_float64():
    """oneDNN's LSTM serves float32 only: it must compute the same function."""
    data = sequences(LENGTHS)
    exact = encoder(hidden=100)
    values, lengths = padded(data)
    got = copy.deepcopy(exact).float()({k: v.float() for k, v in values.items()}, lengths)
    torch.testing.assert_close(got.double(), exact(values, lengths), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("count", [1, 2, 4])
def test_any_number_of_modalities(count):
    features = {f"m{i}": i + 2 for i in range(count)}
    model = encoder(features, hidden=4)
    assert len(model.pairs) == math.comb(count, 2) and len(model.triples) == math.comb(count, 3)
    data = sequences({name: [3, 5, 1] for name in features}, features)
    torch.testing.assert_close(model(*padded(data)), definitions(model, data), **CLOSE)


def test_dropout_acts_in_training_mode_only():
    values, lengths = padded(sequences(LENGTHS))
    plain, dropped = encoder(), encoder(dropout=0.5)
    assert not torch.equal(dropped(values, lengths), dropped(values, lengths))
    dropped.eval()
    torch.testing.assert_close(dropped(values, lengths), plain(values, lengths), **CLOSE)


def test_masking_option_reaches_the_encoder():
    values, lengths = padded(sequences(LENGTHS))
    plain = encoder()(values, lengths)
    masked = encoder(masking=1.0, masking_weights={"text": 1.0, "audio": 0.0, "visual": 0.0})
    changed = (masked(values, lengths) != plain).any(dim=1).tolist()
    # Samples with text and at least one more modality; the sample of length 5 has text and audio.
    assert changed == [True, True, True, False, True, False, True]
    torch.testing.assert_close(masked.eval()(values, lengths), plain, **CLOSE)


def test_memory_of_training_is_linear_in_the_steps():
    encoder = M3Encoder({"text": 4, "audio": 3, "visual": 2}, hidden=4).train()

    def kept(steps):
        storages = {}

        def keep(t):
            storages[t.untyped_storage().data_ptr()] = t.untyped_storage()
            return t

        values = {name: torch.zeros(1, steps, size) for name, size in encoder.features.items()}
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            encoder(values, {name: torch.tensor([steps]) for name in values})
        return sum(storage.nbytes() for storage in storages.values())

    assert kept(1600) < 2.2 * kept(800)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"hidden": 0}, "hidden must be at least 1, got 0"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
        ({"bidirectional": "both"}, r"one of \[False, 'fusion', True\], got 'both'"),
        ({"pooling": "max"}, r"one of \['mean', 'sum', 'last'\], got 'max'"),
        ({"masking": 1.5}, r"p must be in \[0, 1\], got 1.5"),
        ({"masking": 0.2, "masking_mode": "soft"}, r"one of \['step', 'sequence'\], got 'soft'"),
        (
            {"masking": 0.2, "masking_weights": {"text": 1.0}},
            "weights must have the modalities text, audio, visual",
        ),
        ({"masking": 0.2, "masking_weights": {"text": 0, "audio": 0, "visual": 0}}, "must not be all zero"),
        ({"masking": 0.2, "features": {"text": 3}}, "fewer than two modalities"),
    ],
)
def test_bad_configuration_is_one_sentence(arguments, message):
    with pytest.raises(UserError, match=message):
        M3Encoder(**{"features": SMALL} | arguments)
