"""LSTM and GRU, forward and backward: the engine against torch's layers, padded and packed.

Rows are B 170, L 50, H 100, as a batch of M3 has; "real" has 60 % of the cells, about what buckets of MOSEI have.
The engine is asked for outputs alone, as torch's padded form, which has no states after the last real step.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

from mmfast.ops.recurrent import Stream, recurrent

B, L, H = 170, 50, 100
LAYERS = {"lstm": nn.LSTM, "gru": nn.GRU}
# Widths of the inputs, directions, and whether the inputs get a gradient.
CASES = {
    "M3's encoders": ((300, 74, 35), False, False),
    "text": ((300,), False, False),
    "fusion": ((700,), True, True),
}


def streams_of(layers, xs, lengths) -> list[Stream]:
    found = []
    for layer, x in zip(layers, xs, strict=True):
        for reverse in range(1 + layer.bidirectional):
            names = [
                f"{kind}_{of}_l0" + "_reverse" * reverse for kind in ("weight", "bias") for of in ("ih", "hh")
            ]
            w_ih, w_hh, b_ih, b_hh = (getattr(layer, name) for name in names)
            found.append(Stream(x, lengths, (w_ih, w_hh), (b_ih, b_hh), bool(reverse)))
    return found


@pytest.mark.parametrize("cells", ["real", "all"])
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("cell", LAYERS)
def test_forward_and_backward(cell, name, cells, race, smoke):
    widths, bidirectional, with_dx = CASES[name]
    rows, steps = (8, 6) if smoke else (B, L)
    torch.manual_seed(0)
    layers = [LAYERS[cell](f, H, batch_first=True, bidirectional=bidirectional) for f in widths]
    xs = [torch.randn(rows, steps, f, requires_grad=with_dx) for f in widths]
    lengths = torch.full((rows,), steps)
    if cells == "real":
        lengths = (steps * (0.2 + 0.8 * torch.rand(rows))).long().clamp(1, steps)
    leaves = [*(xs if with_dx else []), *(p for layer in layers for p in layer.parameters())]

    def step(outputs):
        def run():
            for leaf in leaves:
                leaf.grad = None
            sum((y * y).sum() for y in outputs()).backward()

        return run

    def packed(layer, x):
        return layer(pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False))[0].data

    others = {"torch, packed": lambda: [packed(layer, x) for layer, x in zip(layers, xs, strict=True)]}
    if cells == "all" or not bidirectional:  # padding would come first in the other direction
        others["torch, padded"] = lambda: [layer(x)[0] for layer, x in zip(layers, xs, strict=True)]
    real, directions, gates = int(lengths.sum()), 1 + bidirectional, 4 if cell == "lstm" else 3
    products = sum((2 * f if not with_dx else 3 * f) + 3 * H for f in widths)
    race(
        step(lambda: [y for y, _ in recurrent(streams_of(layers, xs, lengths), cell)]),
        {who: step(outputs) for who, outputs in others.items()},
        # Inputs twice, outputs and their gradients, what is kept written and read.
        nbytes=4 * real * (2 * sum(widths) + len(widths) * directions * H * 12),
        flops=2 * real * gates * H * products * directions,
        cell=cell,
        case=name,
        cells=cells,
        share_of_cells=real / (rows * steps),
    )
