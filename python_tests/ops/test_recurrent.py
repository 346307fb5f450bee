"""The recurrent engine against torch's own layers, sample by sample, in fp64."""

import itertools
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from mmfast import backends
from mmfast.errors import UserError
from mmfast.ops.recurrent import Stream, recurrent

pytestmark = pytest.mark.usefixtures("poisoned_memory", "native")

CELLS = pytest.mark.parametrize("cell", ["lstm", "gru"])
LAYERS = {"lstm": nn.LSTM, "gru": nn.GRU}
# B, L, F, H
SHAPES = [
    (1, 1, 1, 1),
    (2, 3, 2, 3),
    (5, 7, 3, 4),
    (6, 2, 17, 5),
    (7, 9, 5, 16),
    (13, 4, 1, 17),
    (30, 12, 6, 31),
    (95, 20, 10, 100),
    (3, 300, 2, 8),
]


def case(cell, shape, dtype=torch.float64, reverse=False, initial=False, bias=True, seed=0):
    """A torch layer, and a stream of it with random lengths, of which one is 0 and one L where there are so many."""
    samples, steps, features, units = shape
    torch.manual_seed(seed)
    layer = LAYERS[cell](features, units, batch_first=True, bias=bias).to(dtype)
    lengths = torch.randint(0, steps + 1, (samples,))
    lengths[:1] = steps
    lengths[1:2] = 0
    x = torch.randn(samples, steps, features, dtype=dtype, requires_grad=True)
    states = tuple(
        torch.randn(samples, units, dtype=dtype, requires_grad=True)
        if initial and (k == 0 or cell == "lstm")
        else None
        for k in range(2)
    )
    biases = (layer.bias_ih_l0, layer.bias_hh_l0) if bias else (None, None)
    weights = layer.weight_ih_l0, layer.weight_hh_l0
    return layer, Stream(x, lengths, weights, biases, reverse, states)


def oracle(cell, layer, stream):
    """Outputs and final states by torch's layer on each sample alone, cut to its length."""
    x, lengths = stream.x, stream.lengths
    found = []
    for b in range(len(x)):
        n = int(lengths[b])
        begin = [
            x.new_zeros(1, 1, layer.hidden_size) if s is None else s[b].view(1, 1, -1) for s in stream.initial
        ]
        if n == 0:
            found.append((x.new_zeros(1, x.shape[1], layer.hidden_size), *(s[0] for s in begin)))
            continue
        real = x[b : b + 1, :n]
        real = real.flip(1) if stream.reverse else real
        y, final = layer(real, tuple(begin) if cell == "lstm" else begin[0])
        final = final if cell == "lstm" else (final,)
        y = y.flip(1) if stream.reverse else y
        found.append((F.pad(y, (0, 0, 0, x.shape[1] - n)), *(s[0] for s in final)))
    parts = [torch.cat(part) for part in zip(*found, strict=False)]
    return parts if cell == "lstm" else parts[:2]


def total(results, upstream):
    return sum((x.to(u.dtype) * u).sum() for x, u in zip(results, upstream, strict=True))


def near(found, wanted, tolerance):
    # Of single numbers some are what is left of larger ones.
    assert (found.double() - wanted.double()).norm() <= tolerance * (wanted.double().norm() + 0.03)


@CELLS
@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_values_and_gradients(cell, reverse, dtype, every_isa):
    for isa in every_isa():
        for shape, initial in itertools.product(SHAPES, (False, True)):
            if isa != backends._C.isas()[-1] and shape[0] * shape[1] > 500:
                continue
            layer, stream = case(cell, shape, dtype, reverse, initial, bias=not initial)
            ((y, finals),) = recurrent([stream], cell)
            wanted = [stream.x, *layer.parameters(), *(s for s in stream.initial if s is not None)]
            exact_layer = LAYERS[cell](*shape[2:], batch_first=True, bias=not initial).double()
            exact_layer.load_state_dict(layer.state_dict())
            given = [None if s is None else s.detach().double().requires_grad_() for s in stream.initial]
            exact_stream = stream._replace(
                x=stream.x.detach().double().requires_grad_(), initial=tuple(given)
            )
            exact = oracle(cell, exact_layer, exact_stream)
            upstream = [torch.randn_like(x) for x in exact]
            values, gradients = (1e-13, 1e-12) if dtype == torch.float64 else (1e-6, 2e-6)
            for x, e in zip((y, *finals), exact, strict=True):
                near(x, e, values)
            grads = torch.autograd.grad(total((y, *finals), upstream), wanted)
            leaves = [exact_stream.x, *exact_layer.parameters(), *(s for s in given if s is not None)]
            truth = torch.autograd.grad(total(exact, upstream), leaves, allow_unused=True)
            for grad, e in zip(grads, truth, strict=True):
                near(grad, torch.zeros_like(grad) if e is None else e, gradients)


@CELLS
@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
def test_the_reference(cell, reverse):
    for shape, initial in itertools.product(SHAPES[:7], (False, True)):
        layer, stream = case(cell, shape, reverse=reverse, initial=initial, bias=not initial)
        wanted = [stream.x, *layer.parameters(), *(s for s in stream.initial if s is not None)]
        results = []
        for name in ("cpu", "reference"):
            with backends.backend(name):
                ((y, finals),) = recurrent([stream], cell)
            upstream = [torch.cos(torch.arange(x.numel()).view(x.shape) + 0.0) for x in (y, *finals)]
            grads = torch.autograd.grad(total((y, *finals), upstream), wanted, allow_unused=True)
            results.append((y, *finals, *grads))
        for x, e in zip(*results, strict=True):
            near(x, torch.zeros_like(x) if e is None else e, 1e-12)


@CELLS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_inputs_are_computed_in_single_precision(cell, dtype):
    layer, stream = case(cell, (9, 8, 5, 19), torch.float32, initial=True)
    half = stream._replace(x=stream.x.detach().to(dtype).requires_grad_())
    ((y, finals),) = recurrent([half], cell)
    wide = stream._replace(x=half.x.detach().float().requires_grad_())
    ((exact, exact_finals),) = recurrent([wide], cell)
    assert y.dtype == dtype and finals[0].dtype == torch.float32
    assert torch.equal(y, exact.to(dtype)) and torch.equal(finals[0], exact_finals[0])
    upstream = torch.randn_like(exact).to(dtype)
    grads = torch.autograd.grad(y, [half.x, *layer.parameters()], upstream)
    truth = torch.autograd.grad(exact, [wide.x, *layer.parameters()], upstream.float())
    assert torch.equal(grads[0], truth[0].to(dtype))
    assert all(torch.equal(x, e) for x, e in zip(grads[1:], truth[1:], strict=True))


@CELLS
def test_several_streams_in_one_call(cell):
    """Of other widths and lengths, and both directions of one input."""
    _, first = case(cell, (8, 9, 3, 6))
    second = case(cell, (8, 4, 11, 6), seed=1)[1]
    back = case(cell, (8, 9, 3, 6), reverse=True, seed=2)[1]._replace(x=first.x, lengths=first.lengths)
    together = recurrent([first, second, back], cell)
    alone = [recurrent([stream], cell)[0] for stream in (first, second, back)]
    for (y, finals), (e, exact) in zip(together, alone, strict=True):
        assert torch.equal(y, e) and all(torch.equal(x, w) for x, w in zip(finals, exact, strict=True))
    wanted = [first.x, second.x, *first.weights, *back.weights]
    grads = torch.autograd.grad(
        sum((k + 1) * y.sum() for k, (y, _) in enumerate(together)), wanted, retain_graph=True
    )
    truth = torch.autograd.grad(
        sum((k + 1) * y.sum() for k, (y, _) in enumerate(alone)), wanted, retain_graph=True
    )
    for grad, e in zip(grads, truth, strict=True):
        torch.testing.assert_close(grad, e, rtol=1e-12, atol=1e-13)
    # Of one stream alone.
    grads = torch.autograd.grad(together[0][1][0].sum(), wanted, materialize_grads=True)
    truth = torch.autograd.grad(alone[0][1][0].sum(), wanted, materialize_grads=True)
    for grad, e in zip(grads, truth, strict=True):
        torch.testing.assert_close(grad, e, rtol=1e-12, atol=1e-13)


@CELLS
def test_threads_and_the_rest_of_the_batch_change_no_bit(cell, every_isa):
    before = torch.get_num_threads()
    try:
        for _ in every_isa():
            layer, stream = case(cell, (130, 6, 7, 21), torch.float32, initial=True)
            results = []
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                ((y, finals),) = recurrent([stream], cell)
                wanted = [stream.x, *layer.parameters(), stream.initial[0]]
                grads = torch.autograd.grad(total((y, *finals), (torch.ones_like(y), *finals)), wanted)
                results.append((y, *finals, *grads))
            for result in results[1:]:
                assert all(torch.equal(x, e) for x, e in zip(result, results[0], strict=True))
            rows = torch.tensor([77, 3, 0, 129, 1])
            part = Stream(
                stream.x.detach()[rows],
                stream.lengths[rows],
                stream.weights,
                stream.biases,
                False,
                tuple(None if s is None else s[rows] for s in stream.initial),
            )
            assert torch.equal(recurrent([part], cell)[0][0], results[0][0][rows])
    finally:
        torch.set_num_threads(before)


@CELLS
def test_padding_is_never_read_and_nan_stays_in_its_sample(cell):
    _layer, stream = case(cell, (9, 6, 4, 18), torch.float32)
    ((y, _),) = recurrent([stream], cell)
    real = torch.arange(6) < stream.lengths[:, None]
    spoiled = stream.x.detach().masked_fill(~real[..., None], math.nan).requires_grad_()
    ((other, _),) = recurrent([stream._replace(x=spoiled)], cell)
    assert torch.equal(y, other) and (y[~real] == 0).all()
    (dx,) = torch.autograd.grad(other.sum(), spoiled)
    assert (dx[~real] == 0).all() and torch.equal(dx, torch.autograd.grad(y.sum(), stream.x)[0])
    bad = stream.x.detach().clone()
    bad[0, 2, 1] = math.nan
    ((seen, _),) = recurrent([stream._replace(x=bad)], cell)
    assert seen[0, 2:].isnan().all() and torch.equal(seen[1:], y[1:]) and torch.equal(seen[0, :2], y[0, :2])


@CELLS
def test_layouts_of_inputs_and_gradients(cell):
    _, stream = case(cell, (6, 5, 4, 3))
    ((y, _),) = recurrent([stream], cell)
    upstream = torch.randn_like(y)
    (expected,) = torch.autograd.grad(y, stream.x, upstream)
    large = torch.full((12, 9, 8), math.nan, dtype=torch.float64)
    large[3:9, 2:7, 1:5] = stream.x.detach()
    swapped = stream.x.detach().transpose(0, 1).contiguous().transpose(0, 1)
    columns = stream.x.detach().transpose(1, 2).contiguous().transpose(1, 2)
    for x in (large[3:9, 2:7, 1:5], swapped, columns):
        x = x.requires_grad_() if x.is_leaf else x.detach().requires_grad_()
        ((other, _),) = recurrent([stream._replace(x=x)], cell)
        assert torch.equal(other, y)
        for given in (upstream, upstream.transpose(1, 2).contiguous().transpose(1, 2)):
            assert torch.equal(torch.autograd.grad(other, x, given, retain_graph=True)[0], expected)
    # Over time and samples the same; an upstream gradient without memory of its own.
    still = torch.randn(1, 1, 4, dtype=torch.float64)
    wide, dense = (
        recurrent([stream._replace(x=x.requires_grad_())], cell)[0][0]
        for x in (still.expand(6, 5, 4), still.expand(6, 5, 4).contiguous())
    )
    assert torch.equal(wide, dense)
    other.sum().backward()


@CELLS
def test_only_what_is_wanted(cell):
    layer, stream = case(cell, (6, 5, 4, 3), initial=True)
    everything = [stream.x, *layer.parameters(), *(s for s in stream.initial if s is not None)]
    results = [*recurrent([stream], cell)[0][1], recurrent([stream], cell)[0][0]]
    truth = [torch.autograd.grad(x.sum(), everything, retain_graph=True) for x in results]
    for k, leaf in enumerate(everything):
        for other in everything:
            other.requires_grad_(other is leaf)
        again = [*recurrent([stream], cell)[0][1], recurrent([stream], cell)[0][0]]
        for x, e in zip(again, truth, strict=True):
            (grad,) = torch.autograd.grad(x.sum(), leaf, retain_graph=True)
            torch.testing.assert_close(grad, e[k], rtol=1e-12, atol=1e-13)


@CELLS
def test_nothing_to_do(cell):
    for shape in ((4, 0, 3, 5), (0, 4, 3, 5), (4, 3, 3, 5)):
        layer, stream = case(cell, shape, initial=True)
        stream = stream._replace(lengths=torch.zeros_like(stream.lengths))
        ((y, finals),) = recurrent([stream], cell)
        assert y.shape == (*shape[:2], 5) and not y.any()
        for final, begin in zip(finals, stream.initial, strict=False):
            assert torch.equal(final, begin)
        grads = torch.autograd.grad(
            y.sum() + 2 * finals[0].sum(), [stream.x, *layer.parameters(), stream.initial[0]]
        )
        assert not any(grad.any() for grad in grads[:-1])
        assert (grads[-1] == 2).all()


@CELLS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_saturated_gates(cell, dtype):
    layer, stream = case(cell, (4, 6, 3, 18), dtype)
    for scale in (1e4, -1e4, 1e30):
        x = (stream.x.detach() * scale).requires_grad_()
        ((y, _),) = recurrent([stream._replace(x=x)], cell)
        grads = torch.autograd.grad(y.sum(), [x, *layer.parameters()])
        assert y.isfinite().all() and y.abs().max() <= 1.0
        assert all(grad.isfinite().all() for grad in grads)


@CELLS
def test_a_long_sequence(cell):
    layer, stream = case(cell, (3, 2000, 2, 4))
    ((y, _),) = recurrent([stream], cell)
    near(y, oracle(cell, layer, stream)[0], 1e-12)


@CELLS
def test_gradcheck(cell):
    layer, stream = case(cell, (4, 3, 2, 3), initial=True)
    initial = [s for s in stream.initial if s is not None]

    def function(x, w_ih, w_hh, b_ih, b_hh, *states):
        states = (*states, None)[:2]
        ((y, finals),) = recurrent(
            [Stream(x, stream.lengths, (w_ih, w_hh), (b_ih, b_hh), True, states)], cell
        )
        return (y, *finals)

    assert torch.autograd.gradcheck(function, (stream.x, *layer.parameters(), *initial))


@CELLS
def test_opcheck(cell):
    _, stream = case(cell, (4, 3, 2, 3), torch.float32, initial=True)
    tensors = [x.detach() for x in (*stream.weights, *stream.biases)]
    initial = [s.detach() for s in stream.initial if s is not None]
    given = ([stream.x.detach()], [stream.lengths], [0], tensors[:2], tensors[2:], initial)
    ops = torch.ops.mmfast
    # What lies behind the cells that there are has no value.
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(ops.recurrent_forward, (*given, [False], cell), test_utils=tests)
    found = ops.recurrent_forward(*given, [False], cell)
    results, saved = found[:-2], found[-2:]
    for needs in (True, False):
        upstream = [torch.randn_like(x) for x in results]
        arguments = (upstream, *given, saved[:1], saved[1:], [False], cell, [needs] * (5 + len(initial)))
        torch.library.opcheck(ops.recurrent_backward, arguments, test_utils=tests)


def test_compile_fullgraph():
    _layer, stream = case("lstm", (5, 4, 3, 6), torch.float32)

    def function(x, lengths, w_ih, w_hh):
        ((y, (h, _)),) = recurrent([Stream(x, lengths, (w_ih, w_hh))])
        return y.sum() + (h * h).sum()

    arguments = (stream.x, stream.lengths, *stream.weights)
    expected = torch.autograd.grad(function(*arguments), [stream.x, *stream.weights])
    found = torch.autograd.grad(
        torch.compile(function, fullgraph=True, backend="aot_eager")(*arguments), [stream.x, *stream.weights]
    )
    for x, e in zip(found, expected, strict=True):
        torch.testing.assert_close(x, e)


def test_a_second_derivative_is_refused():
    _layer, stream = case("lstm", (5, 4, 3, 6))
    y = recurrent([stream])[0][0]
    (grad,) = torch.autograd.grad(y.sum(), stream.x, create_graph=True)
    torch.testing.assert_close(grad, torch.autograd.grad(recurrent([stream])[0][0].sum(), stream.x)[0])
    with pytest.raises(RuntimeError, match="recurrent: the gradient must not be differentiated again"):
        grad.sum().backward()
    with pytest.raises(RuntimeError, match="recurrent: the gradient must not"):
        torch.func.vmap(lambda x: recurrent([stream._replace(x=x)])[0][0])(stream.x[None])


def test_lengths_and_cells_are_checked():
    _, stream = case("lstm", (5, 4, 3, 6))
    for wrong in (-1, 5):
        lengths = stream.lengths.clone()
        lengths[3] = wrong
        with pytest.raises(UserError, match=rf"recurrent: lengths must lie in \[0, 4\], got {wrong}"):
            recurrent([stream._replace(lengths=lengths)])
        compiled = torch.compile(lambda n: recurrent([stream._replace(lengths=n)])[0][0], backend="aot_eager")
        with pytest.raises(UserError, match=rf"recurrent: lengths must lie in \[0, 4\], got {wrong}"):
            compiled(lengths)
    with pytest.raises(UserError, match="recurrent: cell must be one of lstm, gru, got 'rnn'"):
        recurrent([stream], "rnn")
