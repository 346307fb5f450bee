"""mmfast.nn.LSTM and GRU are torch's, with lengths."""

import math

import pytest
import torch
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import mmfast.nn
from mmfast import backend
from mmfast.errors import UserError

NAMES = pytest.mark.parametrize("name", ["LSTM", "GRU"])


def both(name, *arguments, **options):
    """Ours and torch's, with the same parameters."""
    torch.manual_seed(0)
    ours = getattr(mmfast.nn, name)(*arguments, **options)
    theirs = getattr(torch.nn, name)(*arguments, **options)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    assert [n for n, _ in ours.named_parameters()] == [n for n, _ in theirs.named_parameters()]
    return ours, theirs


def close(found, wanted):
    torch.testing.assert_close(found, wanted, rtol=2e-5, atol=2e-6)


@NAMES
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_packed_sequences_by_torch(name, batch_first, bidirectional, bias):
    options = {"batch_first": batch_first, "bidirectional": bidirectional, "bias": bias}
    ours, theirs = both(name, 5, 7, 2, **options)
    lengths = torch.tensor([6, 2, 4, 1])
    x = torch.randn(4, 6, 5) if batch_first else torch.randn(6, 4, 5)
    hx = [torch.randn(2 * (1 + bidirectional), 4, 7) for _ in range(2)]
    for begin in (None, tuple(hx) if name == "LSTM" else hx[0]):
        output, final = ours(x, lengths, begin)
        packed = pack_padded_sequence(x, lengths, batch_first=batch_first, enforce_sorted=False)
        found, wanted_final = theirs(packed, begin)
        wanted, _ = pad_packed_sequence(found, batch_first=batch_first)
        close(output, wanted)
        close(final, wanted_final)
        upstream = torch.randn_like(output)
        for model, result in ((ours, output), (theirs, wanted)):
            model.zero_grad()
            (result * upstream).sum().backward()
        for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
            close(p.grad, q.grad)


@NAMES
def test_without_lengths_it_is_the_layer_of_torch(name):
    ours, theirs = both(name, 5, 7)
    x = torch.randn(6, 4, 5)
    for found, wanted in zip(ours(x), theirs(x), strict=True):
        close(found, wanted)


@NAMES
@pytest.mark.parametrize("served", ["cpu", "reference"])
def test_length_zero_and_padding(name, served, native):
    ours, _ = both(name, 5, 7, batch_first=True, bidirectional=True)
    lengths = torch.tensor([3, 0, 2], dtype=torch.int32)
    x = torch.randn(3, 4, 5)
    begin = [torch.randn(2, 3, 7) for _ in range(2)]
    hx = tuple(begin) if name == "LSTM" else begin[0]
    with backend(served):
        output, final = ours(x, lengths, hx)
        spoiled = x.masked_fill(~(torch.arange(4) < lengths[:, None])[..., None], math.nan)
        again, _ = ours(spoiled, lengths, hx)
        assert torch.equal(output, again) and not output[1].any() and not output[0, 3:].any()
        finals = final if name == "LSTM" else (final,)
        assert all(torch.equal(state[:, 1], h[:, 1]) for state, h in zip(finals, begin, strict=False))
        for shape in ((3, 0, 5), (0, 4, 5)):
            nothing, _ = ours(torch.empty(shape), torch.zeros(shape[0], dtype=torch.long))
            assert nothing.shape == (*shape[:2], 14)


@NAMES
def test_dropout_between_layers_while_training(name):
    ours, _ = both(name, 5, 7, 2, dropout=0.5)
    x = torch.randn(6, 4, 5)
    assert not torch.equal(ours(x)[0], ours(x)[0])
    ours.eval()
    assert torch.equal(ours(x)[0], ours(x)[0])


@NAMES
def test_autocast_and_compilation(name):
    ours, _ = both(name, 5, 7, batch_first=True)
    x, lengths = torch.randn(3, 4, 5), torch.tensor([4, 1, 2])
    with torch.autocast("cpu", torch.bfloat16):
        close(ours(x, lengths)[0].float().mean(), ours(x, lengths)[0].float().mean())
    found = torch.compile(ours, fullgraph=True, backend="aot_eager")(x, lengths)[0]
    close(found, ours(x, lengths)[0])


@NAMES
def test_refusals(name):
    layer, x = getattr(mmfast.nn, name)(5, 7, batch_first=True), torch.randn(3, 4, 5)
    packed = pack_padded_sequence(x, torch.tensor([4, 2, 1]), batch_first=True)
    for arguments, sentence in (
        ((packed,), "x must be a padded tensor, with lengths; got a PackedSequence"),
        ((x[0],), r"x must have the shape \(B, L, F\) with F = 5, got \(4, 5\)"),
        ((x[..., :4],), r"x must have the shape \(B, L, F\) with F = 5, got \(3, 4, 4\)"),
        ((x, torch.ones(2).long()), r"lengths must have the shape \(3,\), got \(2,\)"),
        (
            (x, torch.tensor([1, 5, 1])),
            r"lengths must lie in \[0, 4\], got 5",
        ),
    ):
        with pytest.raises(UserError, match=sentence):
            layer(*arguments)
    with pytest.raises(
        TypeError, match=f"{name}: lengths must be an int64 or int32 tensor, got torch.float32"
    ):
        layer(x, torch.ones(3))
    state = torch.zeros(1, 2, 7)
    with pytest.raises(UserError, match=rf"{name}: hx must have the shape \(1, 3, 7\), got \(1, 2, 7\)"):
        layer(x, hx=(state, state) if name == "LSTM" else state)
    with pytest.raises(TypeError):
        getattr(mmfast.nn, name)(5, 7, proj_size=3)
