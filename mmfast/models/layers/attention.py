"""Single-head attention of M3: no biases, no output projection, no layer norm, no positions."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from mmfast.checks import check_dropout
from mmfast.models.layers.lengths import real_steps

# Scores of one sample, Lq x Lk, up to which they are kept for the backward pass: more are worked out once more there,
# so many at a time. The peak of a step of 2 x 5000 was 0.98 GiB so, 1.38 with 2^17 and 1.42 with 2^21 (hidden 100).
KEPT_SCORES, BLOCK_SCORES = 2**17, 2**19


def attend(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor, dropout: float = 0.0) -> Tensor:
    """softmax(Q K^T / sqrt(d)) V over the keys that ``mask`` (B, Lk) admits, with dropout on the weights.

    Shapes (B, Lq, d), (B, Lk, d), (B, Lk, d) -> (B, Lq, d). Memory is linear in the steps: above ``KEPT_SCORES`` the
    queries are taken in blocks whose scores are dropped after the forward pass. ``scaled_dot_product_attention``
    keeps them all with dropout on CPUs, and on GPUs for types and sizes that its fused kernels do not take.
    """

    def block(q: Tensor) -> Tensor:
        x = (q[:, None], keys[:, None], values[:, None])
        return F.scaled_dot_product_attention(*x, attn_mask=mask[:, None, None], dropout_p=dropout)[:, 0]

    steps = queries.shape[1]
    scores = steps * keys.shape[1]
    fused = queries.device.type == "cpu" and dropout == 0
    if scores <= KEPT_SCORES or fused or not torch.is_grad_enabled():
        return block(queries)
    parts = queries.split(math.ceil(steps / math.ceil(scores / BLOCK_SCORES)), dim=1)
    return torch.cat([checkpoint(block, part, use_reentrant=False) for part in parts], dim=1)


class Attention(nn.Module):
    """softmax(Q K^T / sqrt(d)) V with three bias-free projections, Xavier-uniform (Georgiou et al. 2021).

    Args:
        size: d, the size of inputs, projections and output.
        dropout: probability of dropout on the attention weights.

    Call: ``queries`` (B, Lq, d) and ``keys`` (B, Lk, d), back-padded and finite, with their lengths (B,) ->
    (B, Lq, d). Values are projected from ``keys``. Padded keys get no weight. The output is zero, with finite
    gradients, at padded queries and wherever there is no key at all.
    """

    def __init__(self, size: int, *, dropout: float = 0.0):
        super().__init__()
        self.dropout = check_dropout("Attention", dropout)
        self.query = nn.Linear(size, size, bias=False)
        self.key = nn.Linear(size, size, bias=False)
        self.value = nn.Linear(size, size, bias=False)
        for projection in (self.query, self.key, self.value):
            nn.init.xavier_uniform_(projection.weight)

    def forward(self, queries: Tensor, keys: Tensor, query_lengths: Tensor, key_lengths: Tensor) -> Tensor:
        # (x Wq^T)(y Wk^T)^T = x (Wq^T Wk) y^T: one projection of the batch where there would be two.
        projected = F.linear(queries, self.key.weight.T @ self.query.weight)
        # No softmax may run over nothing: a sample without keys attends to its padding and is zeroed below.
        missing = key_lengths == 0
        mask = real_steps(key_lengths, keys.shape[1]) | missing[:, None]
        dropout = self.dropout if self.training else 0.0
        output = attend(projected, keys, self.value(keys), mask, dropout)
        kept = real_steps(query_lengths.masked_fill(missing, 0), queries.shape[1])
        return output.masked_fill(~kept[..., None], 0)


class SymmetricAttention(nn.Module):
    """m_xy = a_xy + a_yx, a_xy = Attention(queries y, keys x) + y, a_yx = Attention(queries x, keys y) + x.

    The residual is the query's. Where a sample lacks x, both attention terms are zero and m_xy = y.
    Shapes and arguments as in :class:`Attention`; ``x`` and ``y`` share one time axis.
    """

    def __init__(self, size: int, *, dropout: float = 0.0):
        super().__init__()
        self.xy = Attention(size, dropout=dropout)
        self.yx = Attention(size, dropout=dropout)

    def forward(self, x: Tensor, y: Tensor, x_lengths: Tensor, y_lengths: Tensor) -> Tensor:
        return self.xy(y, x, y_lengths, x_lengths) + y + self.yx(x, y, x_lengths, y_lengths) + x
