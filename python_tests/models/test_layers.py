"""What encoders are made of: recurrent layers, attention, modality masking."""

import math

import pytest
import torch
from encoder_help import CLOSE, attend
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from mmfast.errors import UserError
from mmfast.models.layers import attention, recurrent
from mmfast.models.layers.attention import Attention, SymmetricAttention
from mmfast.models.layers.lengths import real_steps
from mmfast.models.layers.masking import ModalityMasking
from mmfast.models.layers.recurrent import MaskedLSTM


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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_cpu_without_a_half_lstm_runs_it_in_the_precision_of_its_weights(dtype, monkeypatch):
    monkeypatch.setattr(recurrent, "_RUNS_ON_CPU", {dtype: False})
    lstm = MaskedLSTM(5, 6, merge="cat")
    x, lengths = torch.randn(3, 4, 5), torch.tensor([4, 0, 2])
    expected = lstm(x.to(dtype).float(), lengths)
    with torch.autocast("cpu", dtype=dtype):
        out = lstm(x.to(dtype), lengths)
    assert torch.equal(out, expected)
    out.sum().backward()
    assert all(p.grad.isfinite().all() for p in lstm.parameters())
