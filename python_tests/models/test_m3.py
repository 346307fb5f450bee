"""M3 encoder, projector and head against per-sample definitions, and under every kind of padding."""

import copy
import math
from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from mmfast.errors import UserError
from mmfast.models import M3Encoder, Projector, RegressionHead, parameter_count
from mmfast.models.layers import attention
from mmfast.models.layers.attention import Attention, SymmetricAttention
from mmfast.models.layers.lengths import real_steps
from mmfast.models.layers.masking import ModalityMasking
from mmfast.models.layers.recurrent import MaskedLSTM

MOSEI = {"text": 300, "audio": 74, "visual": 35}
SMALL = {"text": 5, "audio": 4, "visual": 3}
# Missing modalities, length 1, the full length, and nothing at all.
LENGTHS = {
    "text": [7, 3, 1, 0, 4, 0, 5],
    "audio": [7, 3, 1, 6, 0, 0, 5],
    "visual": [7, 3, 1, 6, 4, 0, 0],
}
VARIANTS = [
    {},
    {"attention": False},
    {"bidirectional": "fusion"},
    {"bidirectional": True},
    {"pooling": "sum"},
    {"pooling": "last"},
    {"bidirectional": True, "pooling": "last"},
]
# fp64 throughout: differently shaped matrix products differ by a few ulp of 2e-16, sums of 7 steps by more.
CLOSE = {"rtol": 1e-10, "atol": 1e-12}


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


def sequences(lengths, features=SMALL, seed=1):
    """Unpadded data: a list of (n, F) per modality."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: [torch.randn(n, features[name], generator=generator, dtype=torch.float64) for n in ns]
        for name, ns in lengths.items()
    }


def padded(data, padding="back", extra=0, fill=0.0):
    """Values and lengths; every modality is padded to its own longest sample plus ``extra`` steps."""
    values, lengths = {}, {}
    for name, samples in data.items():
        n = [len(s) for s in samples]
        steps = max(n) + extra
        x = torch.full((len(samples), steps, samples[0].shape[1]), fill, dtype=samples[0].dtype)
        for b, s in enumerate(samples):
            x[b, slice(0, len(s)) if padding == "back" else slice(steps - len(s), steps)] = s
        values[name], lengths[name] = x, torch.tensor(n)
    return values, lengths


def attend(layer, queries, keys):
    """softmax(Q K^T / sqrt d) V of one sample, written out."""
    if len(queries) == 0 or len(keys) == 0:
        return queries.new_zeros(queries.shape)
    q, k, v = queries @ layer.query.weight.T, keys @ layer.key.weight.T, keys @ layer.value.weight.T
    return torch.softmax(q @ k.T / math.sqrt(q.shape[1]), dim=1) @ v


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


@pytest.mark.parametrize("options", VARIANTS)
@pytest.mark.parametrize("padding", ["back", "front"])
def test_padding_is_never_read(options, padding):
    """Amount, side and content (NaN) of the padding change neither values nor gradients."""
    model, data = encoder(**options), sequences(LENGTHS)
    reference = model(*padded(data))
    reference.square().sum().backward()
    grads = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()

    values, lengths = padded(data, padding, extra=3, fill=math.nan)
    for x in values.values():
        x.requires_grad_()
    got = model(values, lengths, padding=padding)
    torch.testing.assert_close(got, reference, **CLOSE)
    got.square().sum().backward()
    for p, grad in zip(model.parameters(), grads, strict=True):
        torch.testing.assert_close(p.grad, grad, **CLOSE)
    for name, x in values.items():
        assert x.grad.isfinite().all()
        assert (x.grad[values[name].isnan()] == 0).all()


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


@pytest.mark.parametrize("options", VARIANTS)
def test_a_sample_does_not_depend_on_the_others(options):
    model, data = encoder(**options), sequences(LENGTHS)
    whole = model(*padded(data))
    for b in range(7):
        alone = model(*padded({name: samples[b : b + 1] for name, samples in data.items()}))
        torch.testing.assert_close(alone[0], whole[b], **CLOSE)
    data["audio"][0][2, 1] = math.nan
    spoilt = model(*padded(data))
    assert spoilt[0].isnan().any()
    torch.testing.assert_close(spoilt[1:], whole[1:], **CLOSE)


def test_float32_agrees_with_float64():
    """oneDNN's LSTM serves float32 only: it must compute the same function."""
    data = sequences(LENGTHS)
    exact = encoder(hidden=100)
    values, lengths = padded(data)
    got = copy.deepcopy(exact).float()({k: v.float() for k, v in values.items()}, lengths)
    torch.testing.assert_close(got.double(), exact(values, lengths), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", VARIANTS)
def test_batch_without_any_data_gives_zeros_and_finite_gradients(options):
    model = encoder(**options)
    values = {name: torch.zeros(2, 0, size, dtype=torch.float64) for name, size in SMALL.items()}
    lengths = {name: torch.zeros(2, dtype=torch.int64) for name in SMALL}
    for padding in ("back", "front"):
        out = model(values, lengths, padding=padding)
        assert (out == 0).all() and out.shape == (2, model.out_features)
    out.sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_every_parameter_gets_a_gradient_although_a_modality_is_missing_everywhere():
    """Distributed training must not wait for gradients that never come."""
    lengths = LENGTHS | {"text": [0] * 7}
    model = encoder()
    model(*padded(sequences(lengths))).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert all((p.grad == 0).all() for p in model.recurrent["text"].parameters())


@pytest.mark.parametrize("count", [1, 2, 4])
def test_any_number_of_modalities(count):
    features = {f"m{i}": i + 2 for i in range(count)}
    model = encoder(features, hidden=4)
    assert len(model.pairs) == math.comb(count, 2) and len(model.triples) == math.comb(count, 3)
    data = sequences({name: [3, 5, 1] for name in features}, features)
    torch.testing.assert_close(model(*padded(data)), definitions(model, data), **CLOSE)


def test_lengths_of_32_bits_and_other_key_orders_are_fine():
    model, data = encoder(), sequences(LENGTHS)
    values, lengths = padded(data)
    reordered = {name: values[name] for name in ("visual", "text", "audio")}
    got = model(reordered, {name: n.int() for name, n in lengths.items()})
    assert torch.equal(got, model(values, lengths))


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


def test_strict_state_dict_round_trip():
    values, lengths = padded(sequences(LENGTHS))
    source, target = encoder(seed=0), encoder(seed=5)
    assert not torch.equal(source(values, lengths), target(values, lengths))
    target.load_state_dict(source.state_dict(), strict=True)
    assert torch.equal(source(values, lengths), target(values, lengths))
    assert {
        "recurrent.text.lstm.weight_ih_l0",
        "pairs.text-audio.xy.query.weight",
    } <= source.state_dict().keys()


def test_compiled_encoder_agrees():
    """LSTMs break the graph; what lies between must trace, with masks and without looking at lengths."""
    model = encoder(bidirectional="fusion")
    values, lengths = padded(sequences(LENGTHS), "front", extra=2)
    torch.testing.assert_close(
        torch.compile(model, backend="aot_eager")(values, lengths, padding="front"),
        model(values, lengths, padding="front"),
        **CLOSE,
    )


def test_autocast_is_close_and_finite():
    model = encoder(dtype=torch.float32, hidden=16)
    values, lengths = padded(sequences(LENGTHS))
    values = {name: x.float() for name, x in values.items()}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(values, lengths)
    # bfloat16 keeps 8 bits: 2^-8 relative to the largest of sums over up to 7 steps.
    exact = model(values, lengths)
    assert (out.float() - exact).abs().max() < 0.03 * exact.abs().max()
    out.float().sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_encoder_and_head_learn_labels():
    torch.manual_seed(0)
    values, lengths = padded(sequences({name: [4, 6, 2, 5, 3, 6, 1, 4] for name in SMALL}))
    values = {name: x.float() for name, x in values.items()}
    labels = torch.linspace(-3, 3, 8)
    model = encoder(dtype=torch.float32, hidden=16, dropout=0.1)
    head = RegressionHead(model.out_features)
    optimiser = torch.optim.Adam([*model.parameters(), *head.parameters()], lr=1e-2)
    for _ in range(60):
        optimiser.zero_grad()
        loss = (head(model(values, lengths)) - labels).abs().mean()
        loss.backward()
        optimiser.step()
    assert (head(model.eval()(values, lengths)) - labels).abs().mean() < 0.4  # 1.71 for a constant


BAD_CALLS = {
    "must have the modalities text, audio, visual, got text, audio": lambda v, n: v.pop("visual"),
    "got text, audio, visual, video": lambda v, n: v.update(video=v["visual"]),
    "lengths must have the modalities text, audio, visual, got audio, visual": lambda v, n: n.pop("text"),
    r"values of audio must have the shape \(B, L, 4\), got \(7, 4\)": lambda v, n: v.update(
        audio=v["audio"][:, 0]
    ),
    r"values of text must have the shape \(B, L, 5\), got \(7, 7, 4\)": lambda v, n: v.update(
        text=v["text"][..., 1:]
    ),
    "values of audio must have the batch size of text, 7, got 6": lambda v, n: v.update(audio=v["audio"][1:]),
    "values of visual must have the dtype of text, torch.float64, got torch.float32": (
        lambda v, n: v.update(visual=v["visual"].float())
    ),
    "the encoder's dtype, torch.float64, got torch.float32": lambda v, n: v.update(
        {k: x.float() for k, x in v.items()}
    ),
    "the encoder's dtype, torch.float64, got torch.int64": lambda v, n: v.update(
        {k: x.long() for k, x in v.items()}
    ),
    "values of text must be a tensor, got list": lambda v, n: v.update(text=v["text"].tolist()),
    "lengths of audio must be int64 or int32, got torch.float32": lambda v, n: n.update(
        audio=n["audio"].float()
    ),
    r"lengths of audio must have the shape \(7,\), got \(6,\)": lambda v, n: n.update(audio=n["audio"][1:]),
    r"lengths of text must lie in \[0, 7\], got 8 for sample 1": lambda v, n: n["text"].__setitem__(1, 8),
    r"lengths of visual must lie in \[0, 7\], got -1 for sample 6": lambda v, n: n["visual"].__setitem__(
        6, -1
    ),
    "got text 3, audio 2, visual 3 for sample 1; align": lambda v, n: n["audio"].__setitem__(1, 2),
    "the batch is empty": lambda v, n: (
        v.update({k: x[:0] for k, x in v.items()}),
        n.update({k: x[:0] for k, x in n.items()}),
    ),
}


@pytest.mark.parametrize("message", BAD_CALLS)
def test_bad_input_is_one_sentence(message):
    values, lengths = padded(sequences(LENGTHS))
    BAD_CALLS[message](values, lengths)
    with pytest.raises((UserError, TypeError), match=message) as caught:
        encoder()(values, lengths)
    assert str(caught.value).startswith("M3Encoder: ")
    assert "\n" not in str(caught.value)


def test_bad_containers_and_padding():
    values, lengths = padded(sequences(LENGTHS))
    with pytest.raises(TypeError, match="values must be a dict modality -> tensor, got Tensor"):
        encoder()(values["text"], lengths)
    with pytest.raises(UserError, match="padding must be 'back' or 'front', got 'left'"):
        encoder()(values, lengths, padding="left")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"features": {}}, "at least one modality"),
        ({"features": {"text": 0}}, "features of text must be at least 1, got 0"),
        ({"features": {"a.b": 3}}, "modality 'a.b' must be an identifier"),
        ({"features": {"values": 3}}, "modality 'values' must be an identifier"),
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


@pytest.mark.parametrize("merge", [None, "sum", "cat"])
def test_lstm_equals_packed_lstm(merge):
    """The oracle is torch's own packed, bidirectional LSTM with the same weights."""
    torch.manual_seed(0)
    layer = MaskedLSTM(5, 4, merge=merge).double()
    oracle = nn.LSTM(5, 4, batch_first=True, bidirectional=merge is not None).double()
    weights = layer.lstm.state_dict()
    if merge:
        weights |= {f"{name}_reverse": w for name, w in layer.reverse.state_dict().items()}
    oracle.load_state_dict(weights)
    x, lengths = torch.randn(4, 6, 5, dtype=torch.float64), torch.tensor([6, 1, 4, 5])

    packed, (final, _) = oracle(pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False))
    expected = pad_packed_sequence(packed, batch_first=True)[0]
    if merge == "sum":
        expected = expected[..., :4] + expected[..., 4:]
    got = layer(x, lengths)
    assert got.shape[-1] == layer.out_features
    torch.testing.assert_close(got, expected, **CLOSE)
    if merge == "sum":
        with pytest.raises(UserError, match="got 'sum'"):
            layer.last(got, lengths)
    else:
        torch.testing.assert_close(layer.last(got, lengths), torch.cat([*final], dim=1), **CLOSE)


def test_lstm_of_length_zero_is_zero():
    layer = MaskedLSTM(5, 4, merge="cat")
    x, lengths = torch.randn(2, 3, 5), torch.tensor([0, 3])
    out = layer(x, lengths)
    assert (out[0] == 0).all() and (layer.last(out, lengths)[0] == 0).all()
    with pytest.raises(UserError, match="merge must be"):
        MaskedLSTM(5, 4, merge="concat")


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_attention_without_keys_or_queries_is_zero_with_finite_gradients(dtype, dropout):
    torch.manual_seed(0)
    layer = Attention(8, dropout=dropout).to(dtype)
    queries = torch.randn(4, 5, 8, dtype=dtype, requires_grad=True)
    keys = torch.randn(4, 3, 8, dtype=dtype, requires_grad=True)
    n_queries, n_keys = torch.tensor([5, 2, 0, 4]), torch.tensor([3, 0, 2, 1])
    out = layer(queries, keys, n_queries, n_keys)
    out.square().sum().backward()
    for tensor in (queries.grad, keys.grad, *(p.grad for p in layer.parameters())):
        assert tensor.isfinite().all()
    assert (out[1] == 0).all() and (out[2] == 0).all() and (out[3, 4:] == 0).all() and (out[0] != 0).any()
    assert (keys.grad[1] == 0).all() and (keys.grad[2] == 0).all() and (keys.grad[3, 1:] == 0).all()
    if dropout == 0:
        # The padded keys of sample 3 carry no weight: one key is left, so its value is the output.
        torch.testing.assert_close(out[3, :4], layer.value(keys[3, :1]).expand(4, 8), rtol=1e-5, atol=1e-6)


def test_attention_is_the_formula_with_the_scale_of_its_size():
    torch.manual_seed(0)
    layer = Attention(7).double()
    queries, keys = torch.randn(1, 5, 7, dtype=torch.float64), torch.randn(1, 4, 7, dtype=torch.float64)
    got = layer(queries, keys, torch.tensor([5]), torch.tensor([4]))
    torch.testing.assert_close(got[0], attend(layer, queries[0], keys[0]), **CLOSE)
    assert not any(name.endswith("bias") for name, _ in layer.named_parameters())


def attention_of_blocks(monkeypatch, dropout):
    """Queries, keys, values and lengths of attention that takes its seven queries in blocks of at most two."""
    monkeypatch.setattr(attention, "KEPT_SCORES", 12)
    monkeypatch.setattr(attention, "BLOCK_SCORES", 12)
    generator = torch.Generator().manual_seed(5)
    x = [torch.randn(3, steps, 4, generator=generator, dtype=torch.float64) for steps in (7, 6, 6)]
    mask = real_steps(torch.tensor([6, 1, 3]), 6)
    return [t.requires_grad_() for t in x], lambda *x: attention.attend(*x, mask, dropout)


def test_attention_in_blocks_is_the_formula_with_its_gradients(monkeypatch):
    x, blocks = attention_of_blocks(monkeypatch, 1e-300)  # drops nothing, yet is dropout
    _, whole = attention_of_blocks(monkeypatch, 0.0)
    weight = torch.randn(3, 7, 4, dtype=torch.float64)
    torch.testing.assert_close(blocks(*x), whole(*x))
    torch.testing.assert_close(
        torch.autograd.grad(blocks(*x), x, weight), torch.autograd.grad(whole(*x), x, weight)
    )


def test_attention_in_blocks_differentiates_the_dropout_that_was_drawn(monkeypatch):
    x, blocks = attention_of_blocks(monkeypatch, 0.5)
    output = blocks(*x)
    weight = torch.randn_like(output)
    (gradient,) = torch.autograd.grad(output, x[2], weight)
    # Linear in the values: <weight, A values> = <A' weight, values> for one and the same A.
    torch.testing.assert_close((gradient * x[2]).sum(), (weight * output).sum())
    assert (output == 0).any()


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


def test_attention_starts_xavier_uniform():
    torch.manual_seed(0)
    bound = math.sqrt(6 / 200)
    for p in Attention(100).parameters():
        assert p.abs().max() <= bound
        # A uniform variable has variance bound^2 / 3; its estimate from 10,000 draws is within 5 %.
        assert abs(p.var().item() / (bound**2 / 3) - 1) < 0.05


def test_symmetric_attention_keeps_the_residual_of_the_query_side():
    torch.manual_seed(0)
    layer = SymmetricAttention(6).double()
    x, y, n = torch.randn(1, 4, 6).double(), torch.randn(1, 4, 6).double(), torch.tensor([4])
    expected = attend(layer.xy, y[0], x[0]) + y[0] + attend(layer.yx, x[0], y[0]) + x[0]
    torch.testing.assert_close(layer(x, y, n, n)[0], expected, **CLOSE)
    torch.testing.assert_close(layer(torch.zeros_like(x), y, n * 0, n), y, **CLOSE)


def masked_choice(masking, lengths, steps=6):
    """(B, L) index of the modality that masking zeroed, -1 where none; checks that nothing else changed."""
    values = [torch.full((len(lengths[0]), steps, 2), m + 1.0) for m in range(len(lengths))]
    out = torch.stack(masking(values, lengths))
    gone = (out == 0).all(dim=-1)
    assert torch.equal(out, torch.stack(values).masked_fill(gone[..., None], 0))
    assert (gone.sum(dim=0) <= 1).all()
    return torch.where(gone.any(dim=0), gone.int().argmax(dim=0), -1)


@pytest.mark.parametrize("mode", ["step", "sequence"])
def test_masking_takes_one_modality_by_its_weight(mode):
    torch.manual_seed(0)
    masking = ModalityMasking(["t", "a", "v"], 1.0, mode=mode, weights={"t": 0.6, "a": 0.2, "v": 0.2})
    choice = masked_choice(masking, [torch.full((3000,), 6)] * 3)
    assert (choice >= 0).all()
    draws = choice if mode == "step" else choice[:, :1]
    if mode == "sequence":
        assert (choice == draws).all()
    else:
        assert (choice != choice[:, :1]).any()
    share = torch.bincount(draws.flatten(), minlength=3) / draws.numel()
    # Standard error of a share of 3,000 draws is at most 0.009: four of them.
    torch.testing.assert_close(share, torch.tensor([0.6, 0.2, 0.2]), rtol=0, atol=0.036)


def test_masking_draws_only_modalities_that_the_sample_has():
    torch.manual_seed(0)
    has = torch.tensor([[1, 1, 1], [0, 1, 1], [1, 0, 1], [1, 0, 0], [0, 0, 0]]).repeat(400, 1) * 6
    choice = masked_choice(ModalityMasking(["t", "a", "v"], 1.0), [*has.T]).view(400, 5, 6)
    assert (choice[:, 1] >= 1).all()
    assert set(choice[:, 2].unique().tolist()) == {0, 2}
    assert (choice[:, 3:] == -1).all()
    share = (choice[:, 1] == 1).float().mean()
    assert abs(share - 0.5) < 0.04  # 2,400 draws, standard error 0.01


def test_masking_tosses_one_coin_per_forward_pass():
    torch.manual_seed(0)
    masking = ModalityMasking(["t", "a"], 0.25)
    lengths = [torch.full((8,), 6)] * 2
    fired = [(masked_choice(masking, lengths) >= 0).float().mean().item() for _ in range(400)]
    assert set(fired) == {0.0, 1.0}
    assert abs(sum(fired) / 400 - 0.25) < 0.087  # four standard errors


def test_masking_is_reproducible_and_silent_in_evaluation():
    masking, lengths = ModalityMasking(["t", "a", "v"], 1.0), [torch.full((20,), 6)] * 3
    torch.manual_seed(3)
    first = masked_choice(masking, lengths)
    torch.manual_seed(3)
    assert torch.equal(first, masked_choice(masking, lengths))
    assert (masked_choice(masking.eval(), lengths) == -1).all()
    assert "weights" not in masking.state_dict()


def test_masking_leaves_samples_alone_whose_modalities_weigh_nothing():
    masking = ModalityMasking(["t", "a", "v"], 1.0, weights={"t": 1.0, "a": 0.0, "v": 0.0})
    choice = masked_choice(masking, [torch.tensor([6, 0]), torch.tensor([6, 6]), torch.tensor([6, 6])])
    assert (choice[0] == 0).all() and (choice[1] == -1).all()


def test_projector_counts_and_layers():
    assert parameter_count(Projector(100)) == 2_104_000
    assert parameter_count(Projector(200)) == 2_204_000
    projector = Projector(6, (5, 4, 3))
    names = [type(layer).__name__ for layer in projector]
    assert names == ["Linear", "BatchNorm1d", "ReLU", "Linear", "BatchNorm1d", "ReLU", "Linear"]
    assert all(layer.bias is None for layer in projector if isinstance(layer, nn.Linear))
    assert projector.out_features == 3 and Projector(6, (9,)).out_features == 9


def test_projector_is_the_formula():
    torch.manual_seed(0)
    projector, x = Projector(6, (5, 3)).double(), torch.randn(7, 6, dtype=torch.float64)
    h = x @ projector[0].weight.T
    h = (h - h.mean(0)) / torch.sqrt(h.var(0, unbiased=False) + 1e-5)
    torch.testing.assert_close(projector(x), h.relu() @ projector[3].weight.T, **CLOSE)


@pytest.mark.parametrize("make", [lambda: Projector(6, (5, 3)), lambda: RegressionHead(6)])
def test_vector_layers_refuse_other_shapes(make):
    layer = make()
    with pytest.raises(UserError, match=r"must have the shape \(B, 6\), got \(4, 7\)"):
        layer(torch.zeros(4, 7))
    with pytest.raises(UserError, match=r"must have the shape \(B, 6\), got \(2, 4, 6\)"):
        layer(torch.zeros(2, 4, 6))
    with pytest.raises(UserError, match="the batch is empty"):
        layer(torch.zeros(0, 6))


def test_projector_refuses_what_batch_norm_cannot_do():
    projector = Projector(6, (5, 3))
    with pytest.raises(UserError, match="at least two samples in training mode, got 1"):
        projector(torch.zeros(1, 6))
    assert projector.eval()(torch.zeros(1, 6)).shape == (1, 3)
    assert Projector(6, (3,))(torch.zeros(1, 6)).shape == (1, 3)
    for bad, message in (
        ((6, ()), r"widths must be a sequence of one integer or more, got tuple"),
        ((0, (3,)), "in_features must be at least 1, got 0"),
        ((6, (3, 0)), r"widths\[1\] must be at least 1, got 0"),
    ):
        with pytest.raises(UserError, match=message):
            Projector(*bad)


def test_head_is_linear_with_dropout_before_it():
    torch.manual_seed(0)
    head, x = RegressionHead(6, dropout=0.5), torch.randn(5, 6)
    assert head(x).shape == (5,) and not torch.equal(head(x), head(x))
    torch.testing.assert_close(head.eval()(x), x @ head.linear.weight[0] + head.linear.bias)
    assert parameter_count(head) == 7
    for in_features, dropout in ((0, 0.0), (6, 1.0)):
        with pytest.raises(UserError, match="RegressionHead: "):
            RegressionHead(in_features, dropout=dropout)


def test_parameter_count_takes_shared_parameters_once_and_no_buffers():
    layer = nn.Linear(3, 2)
    layer.weight.requires_grad_(False)
    assert parameter_count(nn.Sequential(layer, layer, nn.BatchNorm1d(2))) == 8 + 4
