"""LSTM and GRU over sequences of true lengths in plain PyTorch, step by step: what the engine computes.

Slow, and differentiable as often as one likes; serves devices that the engine does not.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mmfast.ops.barlow_twins.checks import compute_dtype


def recurrent(streams: Sequence, cell: str) -> list[tuple[Tensor, tuple[Tensor, ...]]]:
    """As :func:`mmfast.ops.recurrent.op.recurrent`, which says what is given and returned."""
    return [_scan(stream, cell) for stream in streams]


def _scan(stream, cell: str) -> tuple[Tensor, tuple[Tensor, ...]]:
    x, lengths = stream.x, stream.lengths
    samples, steps, _ = x.shape
    compute = compute_dtype(x)
    w_ih, w_hh = (w.to(compute) for w in stream.weights)
    b_ih, b_hh = (None if b is None else b.to(compute) for b in stream.biases)
    real = torch.arange(steps, device=x.device) < lengths[:, None]
    # Where the p-th step of the scan is; padded steps stay in their places.
    place = torch.arange(steps, device=x.device).expand(samples, steps)
    if stream.reverse:
        place = torch.where(real, lengths[:, None] - 1 - place, place)
    x = x.masked_fill(~real[..., None], 0).to(compute)
    x = x.gather(1, place[..., None].expand(x.shape))
    count = 2 if cell == "lstm" else 1
    state = tuple(
        x.new_zeros(samples, w_hh.shape[1]) if s is None else s.to(compute) for s in stream.initial[:count]
    )
    outputs = []
    for p in range(steps):
        of_input = torch.nn.functional.linear(x[:, p], w_ih, b_ih)
        of_state = torch.nn.functional.linear(state[0], w_hh, b_hh)
        after = (_lstm if cell == "lstm" else _gru)(of_input, of_state, state)
        alive = real[:, p, None]
        state = tuple(torch.where(alive, new, old) for new, old in zip(after, state, strict=True))
        outputs.append(state[0].masked_fill(~alive, 0))
    if not outputs:
        return x.new_zeros(samples, 0, w_hh.shape[1]).to(stream.x.dtype), state
    y = torch.stack(outputs, 1)
    return y.gather(1, place[..., None].expand(y.shape)).to(stream.x.dtype), state


def _lstm(of_input: Tensor, of_state: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    i, f, g, o = (of_input + of_state).chunk(4, 1)
    c = f.sigmoid() * state[1] + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c


def _gru(of_input: Tensor, of_state: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor]:
    (r, z, n), (s, t, m) = of_input.chunk(3, 1), of_state.chunk(3, 1)
    z = (z + t).sigmoid()
    return ((1 - z) * (n + (r + s).sigmoid() * m).tanh() + z * state[0],)
