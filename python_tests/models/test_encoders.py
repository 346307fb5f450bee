"""What every encoder promises, over a table of them: published ones, and one such as a user would write."""

from __future__ import annotations

import copy
import math
from typing import Any, NamedTuple

import pytest
import torch
from encoder_help import CLOSE, FEATURES, LENGTHS, UNALIGNED, padded, sequences
from torch import nn

from mmfast.errors import UserError
from mmfast.models import Encoder, LinearHead, M3Encoder, Steps


class Means(Encoder):
    """Means over time of one layer a modality, concatenated; modalities need not be aligned."""

    def __init__(self, features: dict[str, int], width: int = 4):
        super().__init__(features)
        self.layers = nn.ModuleDict({name: nn.Linear(size, width) for name, size in features.items()})
        self.out_features = width * len(features)

    def encode(self, values, lengths, padding="back"):
        steps = self.steps(values, lengths, padding)
        return {name: Steps(self.layers[name](x).tanh(), n) for name, (x, n) in steps.items()}

    def fuse(self, representations, without=()):
        return torch.cat([*self.vectors(self.leave_out(representations, without)).values()], dim=1)


class Row(NamedTuple):
    """An encoder of the table; ``whole_graph``: whether ``torch.compile`` takes it without a break."""

    kind: type[Encoder]
    options: dict[str, Any]
    whole_graph: bool = False

    @property
    def lengths(self) -> dict[str, list[int]]:
        return LENGTHS if self.kind.aligned else UNALIGNED


M3 = {"hidden": 6, "dropout": 0.0}
# torch.compile breaks the graph at every LSTM, which is oneDNN's or cuDNN's.
ENCODERS = {
    "M3": Row(M3Encoder, M3),
    "M3 without self-attention": Row(M3Encoder, M3 | {"attention": False}),
    "M3 with a fusion of two directions": Row(M3Encoder, M3 | {"bidirectional": "fusion"}),
    "M3 of two directions": Row(M3Encoder, M3 | {"bidirectional": True}),
    "M3 with sums": Row(M3Encoder, M3 | {"pooling": "sum"}),
    "M3 of last steps": Row(M3Encoder, M3 | {"pooling": "last", "bidirectional": True}),
    "a user's": Row(Means, {}, whole_graph=True),
}
COUNT = len(LENGTHS["text"])


@pytest.fixture(params=ENCODERS)
def row(request) -> Row:
    return ENCODERS[request.param]


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """These tensors are too small to share; on a busy machine threads would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make(row: Row, features=FEATURES, seed: int = 0, **options) -> Encoder:
    torch.manual_seed(seed)
    return row.kind(features, **row.options | options).double()


def gradients(encoder: Encoder, fused: torch.Tensor) -> dict[str, torch.Tensor]:
    encoder.zero_grad()
    fused.square().sum().backward()
    return {name: p.grad.clone() for name, p in encoder.named_parameters()}


def test_fused_vectors_have_the_size_that_the_encoder_says(row):
    for features in ({"text": 5}, FEATURES, FEATURES | {"video": 2}):
        encoder = make(row, features)
        assert encoder.features == features
        fused = encoder(*padded(sequences({name: [3, 1] for name in features}, features)))
        assert fused.shape == (2, encoder.out_features) and fused.dtype == torch.float64


@pytest.mark.parametrize("padding", ["back", "front"])
def test_padding_is_never_read(row, padding):
    """Amount, side and content (NaN) of the padding change neither values nor gradients."""
    encoder, data = make(row), sequences(row.lengths)
    reference = encoder(*padded(data))
    expected = gradients(encoder, reference)

    values, lengths = padded(data, padding, extra=3, fill=math.nan)
    for x in values.values():
        x.requires_grad_()
    got = encoder(values, lengths, padding=padding)
    torch.testing.assert_close(got, reference, **CLOSE)
    torch.testing.assert_close(gradients(encoder, got), expected, **CLOSE)
    for name, x in values.items():
        assert x.grad.isfinite().all()
        assert (x.grad[values[name].isnan()] == 0).all()


def test_a_sample_does_not_depend_on_the_others(row):
    encoder, data = make(row).eval(), sequences(row.lengths)
    whole = encoder(*padded(data))
    for b in range(COUNT):
        alone = encoder(*padded({name: samples[b : b + 1] for name, samples in data.items()}))
        torch.testing.assert_close(alone[0], whole[b], **CLOSE)
    data["audio"][0][1, 1] = math.nan
    spoilt = encoder(*padded(data))
    assert spoilt[0].isnan().any()
    torch.testing.assert_close(spoilt[1:], whole[1:], **CLOSE)


def test_batch_without_any_data_gives_zeros_and_finite_gradients(row):
    encoder = make(row)
    values = {name: torch.zeros(2, 0, size, dtype=torch.float64) for name, size in FEATURES.items()}
    lengths = {name: torch.zeros(2, dtype=torch.int64) for name in FEATURES}
    for padding in ("back", "front"):
        out = encoder(values, lengths, padding=padding)
        assert (out == 0).all() and out.shape == (2, encoder.out_features)
    assert all(grad.isfinite().all() for grad in gradients(encoder, out).values())


@pytest.mark.parametrize("without", [(), ("text",), ("audio", "visual")])
def test_a_modality_left_out_is_a_missing_one(row, without):
    encoder, data = make(row), sequences(row.lengths)
    lacking = {m: [x[:0] if m in without else x for x in samples] for m, samples in data.items()}
    missing = encoder(*padded(lacking))
    representations = encoder.encode(*padded(data))
    left_out = encoder.fuse(representations, without)
    torch.testing.assert_close(left_out, missing, **CLOSE)
    assert torch.equal(left_out, encoder(*padded(data))) == (not without)
    # Zero and not absent, also where a modality is missing everywhere: processes add what others have.
    for fused in (left_out, missing):
        assert all(grad.isfinite().all() for grad in gradients(encoder, fused).values())
    for wrong, error in (("text", TypeError), (("video",), UserError)):
        with pytest.raises(error, match="without must be"):
            encoder.fuse(representations, wrong)


def test_vectors_are_means_over_real_steps_and_zero_where_there_are_none(row):
    encoder = make(row)
    values, lengths = padded(sequences(row.lengths))
    representations = encoder.encode(values, lengths)
    for modality, vectors in encoder.vectors(representations).items():
        for b, n in enumerate(lengths[modality].tolist()):
            x = representations[modality].values[b, :n]
            torch.testing.assert_close(vectors[b], x.mean(0) if n else x.new_zeros(x.shape[1]), **CLOSE)
    assert encoder.auxiliary(representations) == {}


def test_lengths_of_32_bits_and_other_key_orders_are_fine(row):
    encoder = make(row)
    values, lengths = padded(sequences(row.lengths))
    reordered = {name: values[name] for name in ("visual", "text", "audio")}
    got = encoder(reordered, {name: n.int() for name, n in lengths.items()})
    assert torch.equal(got, encoder(values, lengths))


def test_strict_state_dict_round_trip(row):
    batch = padded(sequences(row.lengths))
    source, target = make(row, seed=0), make(row, seed=5)
    assert not torch.equal(source(*batch), target(*batch))
    target.load_state_dict(source.state_dict(), strict=True)
    assert torch.equal(source(*batch), target(*batch))


@pytest.mark.parametrize("name", ["M3 with a fusion of two directions", "a user's"])
def test_compiled_encoder_agrees(name):
    """What lies between the breaks must trace, with masks and without looking at lengths."""
    row = ENCODERS[name]
    encoder = make(row)
    values, lengths = padded(sequences(row.lengths), "front", extra=2)
    compiled = torch.compile(encoder, backend="aot_eager", fullgraph=row.whole_graph)
    got, expected = (f(values, lengths, padding="front") for f in (compiled, encoder))
    torch.testing.assert_close(got, expected, **CLOSE)
    torch.testing.assert_close(gradients(encoder, got), gradients(encoder, expected), **CLOSE)


def test_autocast_is_close_and_finite(row):
    encoder = make(row)
    values, lengths = padded(sequences(row.lengths))
    exact = encoder(values, lengths)
    encoder = copy.deepcopy(encoder).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = encoder({name: x.float() for name, x in values.items()}, lengths)
    # bfloat16 keeps 8 bits: 2^-8 relative to the largest of sums over up to 8 steps.
    assert (out - exact).abs().max() < 0.03 * exact.abs().max()
    assert all(grad.isfinite().all() for grad in gradients(encoder, out.float()).values())


def test_encoder_and_head_learn_labels(row):
    lengths = {name: [4, 6, 2, 5, 3, 6, 1, 4] for name in FEATURES}
    values, lengths = padded(sequences(lengths))
    labels = torch.linspace(-3, 3, 8, dtype=torch.float64)
    encoder = make(row, **({"hidden": 16} if "hidden" in row.options else {"width": 16}))
    head = LinearHead(encoder.out_features, 1).double()
    optimiser = torch.optim.Adam([*encoder.parameters(), *head.parameters()], lr=1e-2)
    for _ in range(60):
        optimiser.zero_grad()
        (head(encoder(values, lengths))[:, 0] - labels).abs().mean().backward()
        optimiser.step()
    assert (head(encoder.eval()(values, lengths))[:, 0] - labels).abs().mean() < 0.4  # 1.71 for a constant


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
    "the batch is empty": lambda v, n: (
        v.update({k: x[:0] for k, x in v.items()}),
        n.update({k: x[:0] for k, x in n.items()}),
    ),
}


@pytest.mark.parametrize("message", BAD_CALLS)
@pytest.mark.parametrize("name", ["M3", "a user's"])
def test_bad_input_is_one_sentence(name, message):
    row = ENCODERS[name]
    values, lengths = padded(sequences(LENGTHS))
    BAD_CALLS[message](values, lengths)
    with pytest.raises((UserError, TypeError), match=message) as caught:
        make(row)(values, lengths)
    assert str(caught.value).startswith(f"{row.kind.__name__}: ")
    assert "\n" not in str(caught.value)


def test_bad_containers_and_padding(row):
    values, lengths = padded(sequences(row.lengths))
    with pytest.raises(TypeError, match="values must be a dict modality -> tensor, got Tensor"):
        make(row)(values["text"], lengths)
    with pytest.raises(UserError, match="padding must be 'back' or 'front', got 'left'"):
        make(row)(values, lengths, padding="left")


def test_only_encoders_that_need_aligned_modalities_refuse_others(row):
    encoder, batch = make(row), padded(sequences(UNALIGNED))
    if encoder.aligned:
        with pytest.raises(UserError, match="got text 7, audio 2, visual 8 for sample 0; align the mod"):
            encoder(*batch)
    else:
        assert encoder(*batch).isfinite().all()


@pytest.mark.parametrize(
    ("features", "message"),
    [
        ({}, "at least one modality"),
        ({"text": 0}, "features of text must be at least 1, got 0"),
        ({"a.b": 3}, r"modality 'a\.b' must be an identifier"),
        ({"values": 3}, "modality 'values' must be an identifier"),
    ],
)
def test_features_that_no_encoder_takes_are_one_sentence(row, features, message):
    with pytest.raises(UserError, match=message):
        make(row, features)


def test_a_number_of_modalities_that_does_not_fit_is_refused():
    class Pair(Means):
        modalities = (2, 2)

    assert Pair({"text": 5, "audio": 4}).out_features == 8
    for features in (FEATURES, {"text": 5}):
        with pytest.raises(UserError, match="Pair: features must name 2 modalities, got text"):
            Pair(features)


def test_a_representation_of_another_kind_has_vectors_of_its_own():
    class Flat(Means):
        def encode(self, values, lengths, padding="back"):
            return self.vectors(super().encode(values, lengths, padding))

    class Odd(Means):
        def encode(self, values, lengths, padding="back"):
            return dict.fromkeys(self.features, "words")

    batch = padded(sequences(UNALIGNED))
    plain, flat = (make(Row(kind, {})) for kind in (Means, Flat))
    for without in ((), ("audio",)):
        got, expected = (e.fuse(e.encode(*batch), without) for e in (flat, plain))
        torch.testing.assert_close(got, expected, **CLOSE)
    odd = make(Row(Odd, {}))
    with pytest.raises(TypeError, match=r"Odd: the representation of text must be Steps .* got 'words'"):
        odd.vectors({"text": "words"})
    with pytest.raises(TypeError, match=r"Odd: only representations of tensors .* got 'words'"):
        odd.leave_out(odd.encode(*batch), ("text",))
