"""A recurrent layer that never lets padding touch a result."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mmfast.errors import UserError
from mmfast.models.layers.lengths import take_steps, zero_padding
from mmfast.ops.recurrent import Stream, recurrent, served

# Autocast asks oneDNN for an LSTM of a half type, which raises on CPUs that have none.
_RUNS_ON_CPU = {
    torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported(),
    torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported(),
}


class MaskedLSTM(nn.Module):
    """One LSTM layer over back-padded sequences of true lengths, zero initial state.

    Args:
        in_features: F.
        hidden: H.
        dropout: probability of dropout on the output sequence.
        merge: ``None`` for one direction; ``"sum"`` or ``"cat"`` joins the outputs of two directions.

    Call: ``x`` (B, L, F), back-padded and finite, and ``lengths`` (B,) -> (B, L, out_features), zero at
    padded steps. ``out_features`` is H, or 2H for ``"cat"``.

    On a CPU the engine of ``mmfast.ops.recurrent`` computes real steps alone. Elsewhere, and where autocast has half
    LSTMs, torch's dense kernels run: padding comes after the data, so a forward LSTM reaches it too late to matter,
    and the backward direction runs forward over the sequence reversed within its own length; no lengths are needed on
    the host. Under autocast a CPU without an LSTM of the half type computes in the precision of the weights.
    """

    def __init__(self, in_features: int, hidden: int, *, dropout: float = 0.0, merge: str | None = None):
        super().__init__()
        if merge not in (None, "sum", "cat"):
            raise UserError(f"MaskedLSTM: merge must be None, 'sum' or 'cat', got {merge!r}")
        self.out_features = 2 * hidden if merge == "cat" else hidden
        self.merge = merge
        self.lstm = nn.LSTM(in_features, hidden, batch_first=True)
        self.reverse = nn.LSTM(in_features, hidden, batch_first=True) if merge else None
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        return together([self], [(x, lengths)])[0]

    def directions(self) -> list[nn.LSTM]:
        return [self.lstm] if self.reverse is None else [self.lstm, self.reverse]

    def joined(self, outputs: Sequence[Tensor]) -> Tensor:
        """What the directions gave, as ``merge`` wants it, after dropout."""
        if len(outputs) == 1:
            output = outputs[0]
        else:
            output = outputs[0] + outputs[1] if self.merge == "sum" else torch.cat(tuple(outputs), dim=2)
        return self.dropout(output)

    def last(self, output: Tensor, lengths: Tensor) -> Tensor:
        """(B, out_features): each direction's output after its last real step; zero for a sample of length 0.

        That is step ``length - 1`` of the forward half and step 0 of the backward half. Not for
        ``merge="sum"``, whose halves can no longer be told apart.
        """
        if self.merge == "sum":
            raise UserError("MaskedLSTM.last: merge must be None or 'cat', got 'sum'")
        hidden = self.lstm.hidden_size
        last = take_steps(output, (lengths - 1).clamp(min=0)[:, None])[:, 0]
        return last if self.merge is None else torch.cat((last[:, :hidden], output[:, 0, hidden:]), dim=1)


def together(layers: Sequence[MaskedLSTM], inputs: Sequence[tuple[Tensor, Tensor]]) -> list[Tensor]:
    """What each layer makes of its (x, lengths): on a CPU in one call of the engine."""
    if not served(inputs[0][0].device) or _half_on_cpu(inputs[0][0]):
        return [layer.joined(_dense(layer, x, n)) for layer, (x, n) in zip(layers, inputs, strict=True)]
    streams = []
    for layer, (x, n) in zip(layers, inputs, strict=True):
        for reverse, lstm in enumerate(layer.directions()):
            weights, biases = (lstm.weight_ih_l0, lstm.weight_hh_l0), (lstm.bias_ih_l0, lstm.bias_hh_l0)
            streams.append(Stream(x.to(lstm.weight_ih_l0.dtype), n, weights, biases, bool(reverse)))
    outputs = iter([y for y, _ in recurrent(streams)])
    return [layer.joined([next(outputs) for _ in layer.directions()]) for layer in layers]


def _dense(layer: MaskedLSTM, x: Tensor, lengths: Tensor) -> list[Tensor]:
    outputs = [zero_padding(_outputs(layer.lstm, x), lengths)]
    if layer.reverse is not None:
        backward = reversed_steps(_outputs(layer.reverse, reversed_steps(x, lengths)), lengths)
        outputs.append(zero_padding(backward, lengths))
    return outputs


def _half_on_cpu(x: Tensor) -> bool:
    """Whether autocast has a CPU that can run an LSTM of a half type."""
    return x.is_cpu and torch.is_autocast_enabled("cpu") and _RUNS_ON_CPU[torch.get_autocast_dtype("cpu")]


def _outputs(lstm: nn.LSTM, x: Tensor) -> Tensor:
    if x.is_cpu and torch.is_autocast_enabled("cpu") and not _half_on_cpu(x):
        with torch.autocast("cpu", enabled=False):
            return lstm(x.to(lstm.weight_ih_l0.dtype))[0]
    return lstm(x)[0]


def reversed_steps(x: Tensor, lengths: Tensor) -> Tensor:
    """``x`` (B, L, F) with every sample's real steps in reverse order and its padded steps in place."""
    step = torch.arange(x.shape[1], device=x.device)
    mirrored = lengths[:, None] - 1 - step
    return take_steps(x, torch.where(mirrored < 0, step, mirrored))
