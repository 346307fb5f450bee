"""The M3 encoder: recurrent encoders, symmetric cross-attention, recurrent fusion."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from functools import reduce
from itertools import combinations
from typing import Literal

import torch
from torch import Tensor, nn

from mmfast.checks import check_bool, check_dropout, check_integer
from mmfast.errors import UserError
from mmfast.models.encoders.base import Encoder, Steps
from mmfast.models.layers.attention import Attention, SymmetricAttention
from mmfast.models.layers.masking import ModalityMasking
from mmfast.models.layers.recurrent import MaskedLSTM, together

# bidirectional -> (merge of the modality encoders, merge of the fusion LSTM)
DIRECTIONS = {False: (None, None), "fusion": (None, "cat"), True: ("sum", "cat")}
POOLING = ("mean", "sum", "last")


class M3Encoder(Encoder):
    """M3 (Georgiou et al. 2021): modality -> (B, L, F_m) to one fused vector (B, ``out_features``).

    1. Per modality: LSTM F -> H, dropout, self-attention (single head, no residual).
    2. Modality masking, in training mode, where asked for.
    3. For every pair (x, y): symmetric cross-attention m_xy = a_xy + a_yx with the queries' residuals.
    4. For every triple (x, y, z): attention with keys and values m_x and queries m_yz, no residual.
    5. Concatenation of all of them on features; LSTM -> H, dropout; self-attention; pooling over real steps.

    With text, audio and visual, in this order, 3 and 4 give TA, TV, AV and TAV, and 5 starts from 7H.
    Any number of modalities works in the same way. The order of ``features`` is the order of concatenation,
    and a triple's first modality gives its keys.

    Lengths are true everywhere: a sample's result depends neither on padding (its amount, side or content,
    NaN included) nor on the other samples. All modalities that a sample has must be aligned, that is of one
    length; length 0 says that the sample lacks the modality. Attention over a missing modality or by one is
    zero, so m_xy = y where x is missing, and a sample without any modality gets a fused vector of zeros.
    Gradients stay finite. :meth:`encode` is 1 and 2, :meth:`fuse` the rest; a modality that is left out there is
    missing in every sample, so that its attentions are zero, too, and not averages of zeros.

    Args:
        features: modality -> F. Names are Python identifiers.
        hidden: H, the size of every representation.
        dropout: on LSTM outputs and on attention weights.
        bidirectional: ``False``: one direction everywhere. ``"fusion"``: two directions, concatenated, in the
            fusion LSTM alone. ``True``: also in the modality encoders, summed there: M3 as published.
        attention: self-attention of the modality encoders (the fusion keeps its own).
        pooling: ``"mean"`` over real steps, whose scale does not grow with the length (the later slp library).
            ``"sum"`` over real steps: M3, which padded all sequences to one length. ``"last"``: no
            self-attention in the fusion; each direction's LSTM output after its last real step (M3's recurrent
            layer without attention).
        masking, masking_mode, masking_weights: p, mode and weights of
            :class:`~mmfast.models.layers.masking.ModalityMasking`; 0 switches it off.

    Parameters with F 300/74/35, H 100 and a linear head: 936,901; 1,347,801 for ``"fusion"`` (1,257,801 with
    ``attention=False``); 1,633,801 for ``bidirectional=True``.
    """

    aligned = True

    def __init__(
        self,
        features: dict[str, int],
        hidden: int = 100,
        *,
        dropout: float = 0.2,
        bidirectional: Literal["fusion"] | bool = False,
        attention: bool = True,
        pooling: Literal["mean", "sum", "last"] = "mean",
        masking: float = 0.0,
        masking_mode: Literal["step", "sequence"] = "step",
        masking_weights: dict[str, float] | None = None,
    ):
        super().__init__(features)
        hidden = check_integer("M3Encoder", "hidden", hidden, 1)
        dropout = check_dropout("M3Encoder", dropout)
        attention = check_bool("M3Encoder", "attention", attention)
        if bidirectional != "fusion" and not isinstance(bidirectional, bool):
            raise UserError(f"M3Encoder: bidirectional must be one of {[*DIRECTIONS]}, got {bidirectional!r}")
        if pooling not in POOLING:
            raise UserError(f"M3Encoder: pooling must be one of {[*POOLING]}, got {pooling!r}")
        encoder_merge, fusion_merge = DIRECTIONS[bidirectional]
        self.pooling = pooling

        self.recurrent = nn.ModuleDict(
            {
                name: MaskedLSTM(size, hidden, dropout=dropout, merge=encoder_merge)
                for name, size in features.items()
            }
        )
        self.attention = nn.ModuleDict(
            {name: Attention(hidden, dropout=dropout) for name in features if attention}
        )
        self.masking = ModalityMasking(tuple(features), masking, mode=masking_mode, weights=masking_weights)
        self.pairs = nn.ModuleDict(
            {
                "-".join(pair): SymmetricAttention(hidden, dropout=dropout)
                for pair in combinations(features, 2)
            }
        )
        self.triples = nn.ModuleDict(
            {"-".join(triple): Attention(hidden, dropout=dropout) for triple in combinations(features, 3)}
        )
        parts = len(features) + len(self.pairs) + len(self.triples)
        self.fusion = MaskedLSTM(parts * hidden, hidden, dropout=dropout, merge=fusion_merge)
        self.out_features = self.fusion.out_features
        self.fusion_attention = None if pooling == "last" else Attention(self.out_features, dropout=dropout)

    def encode(
        self, values: Mapping[str, Tensor], lengths: Mapping[str, Tensor], padding: str = "back"
    ) -> dict[str, Steps]:
        """Modality -> steps of size ``hidden`` on one time axis; arguments and errors as of :meth:`Encoder.steps`."""
        steps = self.steps(values, lengths, padding)
        layers = [self.recurrent[name] for name in steps]
        encoded = dict(zip(steps, together(layers, list(steps.values())), strict=True))
        for name, layer in self.attention.items():
            n = steps[name].lengths
            encoded[name] = layer(encoded[name], encoded[name], n, n)
        n = [lengths for _, lengths in steps.values()]
        masked = self.masking(list(encoded.values()), n)
        return dict(zip(encoded, map(Steps, masked, n), strict=True))

    def fuse(self, representations: Mapping[str, Steps], without: Collection[str] = ()) -> Tensor:
        """Fused vectors (B, ``out_features``) of what :meth:`encode` returned."""
        kept = self.leave_out(representations, without)
        m = {name: x for name, (x, _) in kept.items()}
        n = {name: lengths for name, (_, lengths) in kept.items()}
        return self._pool(*self._fuse(m, n))

    def _fuse(self, m: dict[str, Tensor], n: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """All uni-, bi- and trimodal terms through the fusion LSTM: (B, L, out_features) and lengths (B,)."""
        pairs, pair_lengths = {}, {}
        for a, b in combinations(m, 2):
            pairs[a, b] = self.pairs[f"{a}-{b}"](m[a], m[b], n[a], n[b])
            pair_lengths[a, b] = torch.maximum(n[a], n[b])
        triples = [
            self.triples[f"{a}-{b}-{c}"](pairs[b, c], m[a], pair_lengths[b, c], n[a])
            for a, b, c in combinations(m, 3)
        ]
        union = reduce(torch.maximum, n.values())
        terms = torch.cat([*m.values(), *pairs.values(), *triples], dim=2)
        return self.fusion(terms, union), union

    def _pool(self, fused: Tensor, lengths: Tensor) -> Tensor:
        if self.fusion_attention is None:
            return self.fusion.last(fused, lengths)
        total = self.fusion_attention(fused, fused, lengths, lengths).sum(dim=1)
        return total if self.pooling == "sum" else total / lengths.clamp(min=1)[:, None]
