"""Recurrent layers over back-padded sequences of true lengths, several streams in one call, on the CPU.

Only real cells are computed: rows are sorted by length, and padding is neither read nor counted. What a sample gets
depends neither on the other samples, nor on the number of threads. Elsewhere the form of reference.py serves.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from mmfast import backends
from mmfast.errors import UserError
from mmfast.ops.barlow_twins.checks import compute_dtype
from mmfast.ops.recurrent import reference
from mmfast.ops.recurrent.kernels import CELLS, run, width

OP = "recurrent"
MOST_STREAMS = 32


class Stream(NamedTuple):
    """One direction of one layer over one input."""

    x: Tensor
    """(B, L, F), back-padded; padding is never read"""
    lengths: Tensor
    """(B,) int64 in [0, L]"""
    weights: tuple[Tensor, Tensor]
    """(4 H, F) and (4 H, H) of an LSTM, 3 H of a GRU, as torch has them"""
    biases: tuple[Tensor | None, Tensor | None] = (None, None)
    """(4 H,) each"""
    reverse: bool = False
    """from the last real step to the first"""
    initial: tuple[Tensor | None, Tensor | None] = (None, None)
    """(B, H) h and c, or zeros; of a GRU h alone"""


class _Settings(NamedTuple):
    cell: str
    inputs: tuple[int, ...]
    """stream -> its place among the distinct inputs, and lengths"""
    reverse: tuple[bool, ...]


def served(device: torch.device) -> bool:
    """Whether the engine serves tensors on ``device``; else, or where another backend is asked for, torch does."""
    return backends.asked() in (None, "cpu") and not backends.why_not("cpu", device, OP)


def _check_lengths(xs, lengths) -> None:
    """Here and not before the op, so that compiled calls have it, too: the kernels rely on it."""
    for x, n in zip(xs, lengths, strict=True):
        steps = x.shape[1]
        if not n.numel():
            continue
        least, most = n.aminmax()
        if least < 0 or most > steps:
            wrong = int(least) if least < 0 else int(most)
            raise UserError(f"{OP}: lengths must lie in [0, {steps}], got {wrong}")


def _dense(x: Tensor) -> Tensor:
    """With the numbers of a step beside each other."""
    return x if x.stride(-1) == 1 or (x.shape[-1] == 1 and x.is_contiguous()) else x.contiguous()


def _of_streams(xs, lengths, inputs, weights, biases, initial, reverse, compute):
    """FIELDS of each stream, as tensors whose addresses are meant, and numbers."""
    count = len(reverse)
    weights = [w.detach().to(compute).contiguous() for w in weights]
    biases, initial = (
        [None if t is None else t.to(compute).contiguous() for t in ts] for ts in (biases, initial)
    )
    xs = [_dense(x) for x in xs]
    found = []
    for s in range(count):
        x = xs[inputs[s]]
        found.append(
            {
                "x": x,
                "x_sample": x.stride(0),
                "x_step": x.stride(1),
                "steps": x.shape[1],
                "features": x.shape[2],
                "lengths": lengths[inputs[s]],
                "reverse": int(reverse[s]),
                "w_ih": weights[2 * s],
                "w_hh": weights[2 * s + 1],
                "b_ih": biases[2 * s],
                "b_hh": biases[2 * s + 1],
                "h_0": initial[s],
                "c_0": initial[count + s] if len(initial) == 2 * count else None,
            }
        )
    return found


def _forward(xs, lengths, inputs, weights, biases, initial, reverse, cell):
    _check_lengths(xs, lengths)
    first, units = xs[0], weights[1].shape[1]
    compute, samples = compute_dtype(first), first.shape[0]
    streams = _of_streams(xs, lengths, inputs, weights, biases, initial, reverse, compute)
    columns, lstm = width(compute, units), cell == "lstm"
    results: list[list[Tensor]] = [[] for _ in range(5)]
    for s, stream in enumerate(streams):
        x = xs[inputs[s]]
        cells = samples * x.shape[1]
        y = x.new_empty(samples, x.shape[1], units)
        finals = [
            first.new_zeros((samples, units), dtype=compute) if stream[name] is None else stream[name].clone()
            for name in (("h_0", "c_0") if lstm else ("h_0",))
        ]
        gates, states = (first.new_empty((cells, n), dtype=compute) for n in (4 * columns, columns))
        stream |= {"y": y, "y_sample": y.stride(0), "y_step": y.stride(1), "gates": gates, "states": states}
        stream |= {"h_n": finals[0], "c_n": finals[1] if lstm else None}
        for to, x in zip(results, (y, finals[0], finals[1] if lstm else None, gates, states), strict=True):
            to += [] if x is None else [x]
    run("recurrent_forward", cell, first.dtype, samples, units, streams)
    return [x for of_kind in results for x in of_kind]


def _forward_fake(xs, lengths, inputs, weights, biases, initial, reverse, cell):
    units, compute = weights[1].shape[1], compute_dtype(xs[0])
    columns, samples = width(compute, units), xs[0].shape[0]
    steps = [xs[i].shape[1] for i in inputs]
    finals = 2 if cell == "lstm" else 1
    return (
        [xs[0].new_empty(samples, n, units) for n in steps]
        + [xs[0].new_empty((samples, units), dtype=compute) for _ in range(finals * len(inputs))]
        + [xs[0].new_empty((samples * n, 4 * columns), dtype=compute) for n in steps]
        + [xs[0].new_empty((samples * n, columns), dtype=compute) for n in steps]
    )


def _backward(upstream, xs, lengths, inputs, weights, biases, initial, gates, states, reverse, cell, needs):
    first, count, units = xs[0], len(reverse), weights[1].shape[1]
    compute, samples = compute_dtype(first), first.shape[0]
    streams = _of_streams(xs, lengths, inputs, weights, biases, initial, reverse, compute)
    dys, finals = upstream[:count], upstream[count:]
    finals = [None if x is None else x.to(compute).contiguous() for x in finals]
    # Of x by stream, of which an input may have several; then of what else there is.
    of_x = iter(needs[: len(xs)])
    wanted = dict(enumerate(of_x))
    rest = needs[len(xs) :]
    dx = [first.new_empty(xs[i].shape) if wanted[i] else None for i in inputs]
    others = [*weights, *biases, *initial]
    made = [
        None if x is None or not need else first.new_empty(x.shape, dtype=compute)
        for x, need in zip(others, rest, strict=True)
    ]
    for x, of_initial in zip(made[4 * count :], (finals + [None] * 2 * count), strict=False):
        if x is not None:
            # A sample of length 0 ends as it begins.
            x.zero_() if of_initial is None else x.copy_(of_initial)
    kept = []
    for s, stream in enumerate(streams):
        dy = dys[s]
        if dy is not None:
            dy = _dense(dy.to(first.dtype))
            stream |= {"dy": dy, "dy_sample": dy.stride(0), "dy_step": dy.stride(1)}
            kept.append(dy)
        if dx[s] is not None:
            stream |= {"dx": dx[s], "dx_sample": dx[s].stride(0), "dx_step": dx[s].stride(1)}
        stream |= {"gates": gates[s], "states": states[s], "dh_n": finals[s]}
        stream |= {"dw_ih": made[2 * s], "dw_hh": made[2 * s + 1]}
        stream |= {"db_ih": made[2 * count + 2 * s], "db_hh": made[2 * count + 2 * s + 1]}
        stream["dh_0"] = made[4 * count + s]
        if cell == "lstm":
            stream |= {"dc_n": finals[count + s], "dc_0": made[5 * count + s]}
    run("recurrent_backward", cell, first.dtype, samples, units, streams)
    sums: list[Tensor | None] = [None] * len(xs)
    for s, i in enumerate(inputs):
        sums[i] = dx[s] if sums[i] is None else sums[i].add_(dx[s])
    nothing = first.new_empty
    return [
        *(nothing(0) if x is None else x for x in sums),
        *(nothing(0) if x is None else x.to(o.dtype) for x, o in zip(made, others, strict=True)),
    ]


def _backward_fake(
    upstream, xs, lengths, inputs, weights, biases, initial, gates, states, reverse, cell, needs
):
    given = [*xs, *weights, *biases, *initial]
    return [
        xs[0].new_empty(0) if x is None or not need else x.new_empty(x.shape)
        for x, need in zip(given, needs, strict=True)
    ]


_library = torch.library.Library("mmfast", "FRAGMENT")
_inputs = "Tensor[] xs, Tensor[] lengths, int[] inputs, Tensor[] weights, Tensor?[] biases, Tensor?[] initial"
_ops = {
    f"recurrent_forward({_inputs}, bool[] reverse, str cell) -> Tensor[]": (_forward, _forward_fake),
    f"recurrent_backward(Tensor?[] upstream, {_inputs}, Tensor[] gates, Tensor[] states, bool[] reverse, str cell, "
    "bool[] needs) -> Tensor[]": (_backward, _backward_fake),
}
for _schema, (_kernel, _fake) in _ops.items():
    _name = _library.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(_name, _kernel, "CPU")
    torch.library.register_fake(f"mmfast::{_name}", _fake, lib=_library)

_forward_op = torch.ops.mmfast.recurrent_forward.default
_backward_op = torch.ops.mmfast.recurrent_backward.default

DIFFERENTIATED_AGAIN = (
    "recurrent: the gradient must not be differentiated again (double backward, forward mode or torch.func); "
    "mmfast.ops.recurrent.reference can be"
)


class _FinalGradient(torch.autograd.Function):
    """The gradient where autograd records it (``create_graph=True``): right, but without a derivative."""

    @staticmethod
    def forward(ctx, function, *tensors):
        return tuple(function(*tensors))

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError(DIFFERENTIATED_AGAIN)


class _Recurrent(torch.autograd.Function):
    @staticmethod
    def forward(ctx, settings, counts, *tensors):
        cell, inputs, reverse = settings
        xs, lengths, weights, biases, initial = _split(tensors, counts)
        found = _forward_op(xs, lengths, inputs, weights, biases, initial, reverse, cell)
        kept = 2 * len(reverse)
        results, saved = found[:-kept], found[-kept:]
        ctx.settings, ctx.counts = settings, counts
        ctx.save_for_backward(*tensors, *saved)
        ctx.set_materialize_grads(False)
        return tuple(results)

    @staticmethod
    def backward(ctx, *upstream):
        cell, inputs, reverse = ctx.settings
        count, outputs = len(reverse), len(upstream)
        if all(x is None for x in upstream):
            return (None,) * (2 + sum(ctx.counts))
        needs = list(ctx.needs_input_grad[2:])
        start, lengths = ctx.counts[:2]
        wanted = needs[:start] + needs[start + lengths :]

        def gradient(*given):
            tensors, saved = given[outputs : -2 * count], given[-2 * count :]
            xs, lengths, weights, biases, initial = _split(tensors, ctx.counts)
            rest = (saved[:count], saved[count:], reverse, cell, wanted)
            return _backward_op(given[:outputs], xs, lengths, inputs, weights, biases, initial, *rest)

        given = (*upstream, *ctx.saved_tensors)
        final = torch.is_grad_enabled()
        found = _FinalGradient.apply(gradient, *given) if final else gradient(*given)
        found = [x if need else None for x, need in zip(found, wanted, strict=True)]
        return None, None, *found[:start], *(None,) * lengths, *found[start:]


def _split(tensors: Sequence, counts: Sequence[int]) -> list[list]:
    parts, at = [], 0
    for n in counts:
        parts.append(list(tensors[at : at + n]))
        at += n
    return parts


def recurrent(streams: Sequence[Stream], cell: str = "lstm") -> list[tuple[Tensor, tuple[Tensor, ...]]]:
    r"""Outputs (B, L, H) and final states (B, H) of each stream: h and c of an LSTM, h of a GRU.

    .. math::
        (i, f, g, o) = W_{ih} x_t + W_{hh} h_{t-1} + b, \quad c_t = \sigma(f) c_{t-1} + \sigma(i) \tanh(g), \quad
        h_t = \sigma(o) \tanh(c_t)

    and of a GRU

    .. math::
        n = \tanh(W_n x_t + b_n + \sigma(r) (U_n h_{t-1} + d_n)), \quad h_t = (1 - \sigma(z)) n + \sigma(z) h_{t-1}

    Outputs are zero at padded steps; final states are those after a sample's own last step, and what it began with
    for length 0. All streams have B and H in common, and one dtype of x: fp32, fp64, bf16 or fp16, of which halves
    are computed in fp32. Final states are of the type of the computation.

    Raises:
        UserError: for lengths outside [0, L], as all that follows relies on them; on a CPU.
    """
    if cell not in CELLS:
        raise UserError(f"{OP}: cell must be one of {', '.join(CELLS)}, got {cell!r}")
    if not streams:
        return []
    if not served(streams[0].x.device):
        return reference.recurrent(streams, cell)
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        raise RuntimeError(DIFFERENTIATED_AGAIN)
    if len(streams) > MOST_STREAMS:
        return recurrent(streams[:MOST_STREAMS], cell) + recurrent(streams[MOST_STREAMS:], cell)
    places: dict[tuple[int, int], int] = {}
    inputs = []
    for stream in streams:
        inputs.append(places.setdefault((id(stream.x), id(stream.lengths)), len(places)))
    firsts = [inputs.index(i) for i in range(len(places))]
    xs = [streams[s].x for s in firsts]
    lengths = [streams[s].lengths.to(torch.int64).contiguous() for s in firsts]
    weights = [w for stream in streams for w in stream.weights]
    biases = [b for stream in streams for b in stream.biases]
    initial = [
        h for k in range(2 if cell == "lstm" else 1) for h in (stream.initial[k] for stream in streams)
    ]
    settings = _Settings(cell, tuple(inputs), tuple(stream.reverse for stream in streams))
    counts = tuple(map(len, (xs, lengths, weights, biases, initial)))
    found = _Recurrent.apply(settings, counts, *xs, *lengths, *weights, *biases, *initial)
    count = len(streams)
    return [(found[s], tuple(found[count + s :: count])) for s in range(count)]
