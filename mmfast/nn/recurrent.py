"""LSTM and GRU over back-padded sequences of true lengths, in the place of torch's and of packed sequences."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from mmfast.checks import told
from mmfast.errors import UserError
from mmfast.ops.recurrent import Stream, recurrent, served

_ARGUMENTS = """

    Args:
        input_size: F.
        hidden_size: H.
        num_layers, bias, batch_first, dropout, bidirectional, device, dtype: as torch's. Parameters have torch's
            names, shapes, order and initialisation, so that state dicts go both ways.

    Call: ``layer(x, lengths=None, hx=None)`` with x (B, L, F), or (L, B, F) without ``batch_first``, back-padded, and
    ``lengths`` (B,) int64 or int32 in [0, L], or None for L. Padding is never read, NaN or not, and costs nothing.
"""


class _Recurrent(nn.RNNBase):
    """What both layers do. Not torch's own layers, which Dynamo refuses, but what they are made of."""

    _cell = "lstm"

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        *,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device=None,
        dtype=None,
    ):
        super().__init__(
            self._cell.upper(),
            input_size,
            hidden_size,
            num_layers,
            bias=bias,
            batch_first=batch_first,
            dropout=dropout,
            bidirectional=bidirectional,
            device=device,
            dtype=dtype,
        )

    def forward(self, x: Tensor, lengths: Tensor | None = None, hx=None):
        name = type(self).__name__
        x, lengths = self._checked(name, x, lengths)
        initial = self._checked_states(name, x, hx)
        if served(x.device) and not torch.is_autocast_enabled(x.device.type):
            output, finals = self._by_the_engine(x, lengths, initial)
        else:
            output, finals = self._packed(x, lengths, initial)
        output = output if self.batch_first else output.transpose(0, 1)
        return output, finals if self._cell == "lstm" else finals[0]

    def _checked(self, name: str, x, lengths) -> tuple[Tensor, Tensor]:
        """x (B, L, F) and lengths (B,) int64."""
        if isinstance(x, PackedSequence):
            raise UserError(f"{name}: x must be a padded tensor, with lengths; got a PackedSequence")
        if not isinstance(x, Tensor) or x.dim() != 3 or x.shape[2] != self.input_size:
            shape = tuple(x.shape) if isinstance(x, Tensor) else told(x)
            layout = "(B, L, F)" if self.batch_first else "(L, B, F)"
            raise UserError(f"{name}: x must have the shape {layout} with F = {self.input_size}, got {shape}")
        x = x if self.batch_first else x.transpose(0, 1)
        if lengths is None:
            return x, torch.full((len(x),), x.shape[1], dtype=torch.int64, device=x.device)
        if not isinstance(lengths, Tensor) or lengths.dtype not in (torch.int64, torch.int32):
            kind = lengths.dtype if isinstance(lengths, Tensor) else type(lengths).__name__
            raise TypeError(f"{name}: lengths must be an int64 or int32 tensor, got {kind}")
        if lengths.shape != (len(x),):
            raise UserError(f"{name}: lengths must have the shape ({len(x)},), got {tuple(lengths.shape)}")
        return x, lengths.to(x.device, torch.int64)

    def _checked_states(self, name: str, x: Tensor, hx) -> list[Tensor] | None:
        """h, and c of an LSTM, (layers x directions, B, H) each."""
        if hx is None:
            return None
        states = list(hx) if self._cell == "lstm" else [hx]
        wanted = (self.num_layers * (1 + self.bidirectional), len(x), self.hidden_size)
        for state in states:
            if tuple(state.shape) != wanted:
                raise UserError(f"{name}: hx must have the shape {wanted}, got {tuple(state.shape)}")
        return states

    def _by_the_engine(self, x, lengths, initial) -> tuple[Tensor, tuple[Tensor, ...]]:
        directions, finals = 1 + self.bidirectional, []
        for layer in range(self.num_layers):
            if layer and self.dropout and self.training:
                x = nn.functional.dropout(x, self.dropout)
            streams = []
            for direction in range(directions):
                suffix = f"l{layer}" + "_reverse" * direction
                w, b = (
                    tuple(getattr(self, f"{kind}_{of}_{suffix}", None) for of in ("ih", "hh"))
                    for kind in ("weight", "bias")
                )
                at = layer * directions + direction
                states = (None, None) if initial is None else tuple(state[at] for state in initial)
                states = states if len(states) == 2 else (*states, None)
                streams.append(Stream(x, lengths, w, b, bool(direction), states))
            found = recurrent(streams, self._cell)
            x = found[0][0] if directions == 1 else torch.cat([y for y, _ in found], 2)
            finals += [states for _, states in found]
        return x, tuple(torch.stack(states).to(x.dtype) for states in zip(*finals, strict=True))

    def _packed(self, x, lengths, initial) -> tuple[Tensor, tuple[Tensor, ...]]:
        """By torch's packed sequences, which know no length 0, and wait for lengths on a device."""
        empty, steps = lengths == 0, x.shape[1]
        if steps == 0 or not len(x):
            return self._without_steps(x, initial)
        # What is never read by the engine must not be NaN here.
        x = x.masked_fill(empty[:, None, None], 0)
        packed = pack_padded_sequence(x, lengths.clamp(min=1).cpu(), batch_first=True, enforce_sorted=False)
        states = 2 if self._cell == "lstm" else 1
        shape = self.num_layers * (1 + self.bidirectional), len(x), self.hidden_size
        begin = initial or [x.new_zeros(shape) for _ in range(states)]
        by_length = [state.index_select(1, packed.sorted_indices) for state in begin]
        function = torch._VF.lstm if states == 2 else torch._VF.gru
        data, *finals = function(
            packed.data,
            packed.batch_sizes,
            by_length if states == 2 else by_length[0],
            self._flat_weights,
            self.bias,
            self.num_layers,
            self.dropout,
            self.training,
            self.bidirectional,
        )
        found = PackedSequence(data, packed.batch_sizes, packed.sorted_indices, packed.unsorted_indices)
        output, _ = pad_packed_sequence(found, batch_first=True, total_length=steps)
        finals = [state.index_select(1, packed.unsorted_indices) for state in finals]
        finals = tuple(torch.where(empty[:, None], b, f) for b, f in zip(begin, finals, strict=True))
        return output.masked_fill(empty[:, None, None], 0), finals

    def _without_steps(self, x, initial):
        directions = 1 + self.bidirectional
        zeros = x.new_zeros(self.num_layers * directions, len(x), self.hidden_size)
        states = initial or [zeros] * (2 if self._cell == "lstm" else 1)
        return x.new_zeros(len(x), x.shape[1], directions * self.hidden_size), tuple(states)


class LSTM(_Recurrent):
    __doc__ = (
        """``torch.nn.LSTM`` with true lengths (Hochreiter & Schmidhuber 1997; torch's equations)."""
        + _ARGUMENTS
        + """
    Returns:
        output (B, L, directions x H), zero at padded steps, and (h_n, c_n), each (layers x directions, B, H), after
        each sample's own last step; length 0 gives the initial state.

    Raises:
        UserError: for shapes, lengths outside [0, L] and packed sequences.

    >>> layer = LSTM(300, 100, batch_first=True, bidirectional=True)
    >>> output, (h_n, c_n) = layer(x, lengths)

    On a CPU the engine runs; on other devices, and under autocast, torch's packed sequences. Gradients can not be
    differentiated again.
    """
    )


class GRU(_Recurrent):
    __doc__ = (
        """``torch.nn.GRU`` with true lengths (Cho et al. 2014; torch's equations)."""
        + _ARGUMENTS
        + """
    Returns:
        output and h_n, as :class:`LSTM`, which says the rest.
    """
    )
    _cell = "gru"
