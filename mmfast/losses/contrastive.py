"""Contrastive losses: each row against the others, its positives against its negatives, by their similarities."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mmfast.checks import check_bool
from mmfast.errors import UserError
from mmfast.losses.queue import NO_QUEUE, EmbeddingQueue, check_queue, memory
from mmfast.losses.similarity import Call, SimilarityLoss, Variant, among_themselves, choice
from mmfast.ops.similarity.checks import check_rows
from mmfast.ops.similarity.rows import joined
from mmfast.ops.similarity.shared import Sharing

# "ser" and "pml": each positive against the negatives alone.
NT_XENT_VARIANTS = {
    "simclr": Variant("out"),
    "ser": Variant("negatives"),
    "pml": Variant("negatives", "pairs"),
    "dcl": Variant("decoupled"),
}
SUP_CON_VARIANTS = {
    "out": Variant("out"),
    "in": Variant("in"),
    "solo": Variant("sum"),
    "hobbit": Variant("out", "all", 0.07),
}


def check_two_views(op: str, names: tuple[str, str], z_a: Any, z_b: Any) -> None:
    first, second = names
    check_rows(op, first, z_a)
    if len(check_rows(op, second, z_b, (first, z_a))) != len(z_a):
        raise UserError(f"{op}: {second} must have the {len(z_a)} rows of {first}, got {tuple(z_b.shape)}")


def _twice(x: Tensor | None) -> Tensor | None:
    return None if x is None else torch.cat((x, x))


def _nt_xent(
    z_a,
    z_b,
    temperature,
    labels,
    ids,
    valid,
    weights,
    normalise,
    variant,
    reduction,
    over,
    sharing,
    feeding=NO_QUEUE,
    op="nt_xent",
    names=("z_a", "z_b"),
):
    """op, names: who asks, and what the views are called there, in errors."""
    sharing = Sharing(op, *sharing)

    def checked():
        chosen = choice(op, "variant", variant, NT_XENT_VARIANTS)
        call = Call(op, reduction, over or chosen.over, sharing)
        cosine = check_bool(op, "normalise", normalise)
        rows = names[0], check_rows(op, names[0], z_a)
        if z_b is not None:
            check_two_views(op, names, z_a, z_b)
        z = z_a if z_b is None else joined(z_a, z_b)
        vectors = call.vectors(rows, labels, ids, valid, weights)
        call.of({name: x for name, x in zip(names, (z_a, z_b), strict=True) if x is not None}, valid)
        kept = memory(op, feeding, rows, labels is not None or ids is not None)
        if z_b is not None:
            # An id says that two rows are views of one sample: of whole numbers that no other process has.
            if ids is None and labels is None:
                vectors[1] = _positions(sharing, len(z_a), z.device)
            elif ids is not None and labels is not None:
                raise UserError(f"{op}: ids must be None for two views with labels, got both")
            vectors = [_twice(x) for x in vectors]
            kept = kept and kept._replace(mask=_twice(kept.mask))
        elif labels is None and ids is None:
            raise UserError(f"{op}: labels must be given for one view (or ids, or {names[1]}), got None")
        return call, z, vectors, call.scale(temperature, rows), chosen, cosine, kept

    return among_themselves(*sharing.checked(checked))


def _positions(sharing: Sharing, rows: int, device: torch.device) -> Tensor:
    place = torch.arange(rows, device=device)
    if sharing.group is None:
        return place
    return place + (torch.distributed.get_rank(sharing.group) << 40)


def nt_xent(
    z_a: Tensor,
    z_b: Tensor | None = None,
    temperature: float | Tensor = 0.5,
    *,
    labels: Tensor | None = None,
    ids: Tensor | None = None,
    valid: Tensor | None = None,
    weights: Tensor | None = None,
    normalise: bool = True,
    variant: str = "simclr",
    reduction: str = "mean",
    over: str | None = None,
    stats: str | None = "global",
    grad_convention: str = "true",
    group: Any = None,
) -> Tensor:
    r"""Normalised temperature-scaled cross entropy (Chen et al., ICML 2020, eq. 1), with labels or without.

    .. math::
        \ell_i = \log \sum_{j \in A_i} e^{s_{ij} / \tau} - \frac{1}{|P_i|} \sum_{p \in P_i} s_{ip} / \tau

    for cosines s of the rows of both views together, A_i all of them but i, P_i the positives: the other view of i
    or, with ``labels``, the rows of its label. A row without positives is a candidate of others, but has no loss.

    ========  ===========================================================  ===============
    variant   a positive stands against                                    the mean is of
    ========  ===========================================================  ===============
    simclr    all others (= lightly, solo-learn)                           rows
    ser       the negatives alone: -log(e^p / (e^p + sum of negatives))    rows
    pml       the same (= pytorch-metric-learning)                         pairs
    dcl       the negatives, its own logit left out (Yeh et al. 2022,      rows
              eq. 6; = lightly 1.6)
    ========  ===========================================================  ===============

    With one positive a row all but the last are equal. No temperature is too small: nothing overflows, and a loss
    near zero is as exact as a large one. Memory is that of the embeddings, not of B x B scores.

    Args:
        z_a, z_b: (B, D) float32, float64, bfloat16 or float16 (computed in float32), of one device. Without ``z_b``
            the rows of ``z_a`` are told apart by ``labels`` or ``ids``.
        temperature: above 0; a number, or a scalar tensor that gets its gradient.
        labels: (B,) integers or bools: rows of equal ones are positives of each other.
        ids: (B,) integers: whose view a row is. Without labels, rows of equal ids are positives; with them,
            neither positives nor negatives (duplicates of one sample).
        valid: (B,) bool: rows of False are not read, and nobody's candidates.
        weights: (B,) of the rows' losses, >= 0, not differentiated.
        normalise: False takes the rows as they are: inner products for cosines.
        reduction: "mean", "sum", or "none": (B,) or (2 B,) losses of the rows.
        over: what the mean is over: "anchors" (rows with a positive, by weight), "all" (valid rows) or "pairs" (each
            pair of anchor and positive counts once); the variant's if None.
        stats: with several processes "global": the loss of the rows of all, which each process computes whole;
            None: each process for itself.
        grad_convention: "true": what DistributedDataParallel, which averages, turns into the gradient of the loss;
            "legacy": that over the number of processes.
        group: the process group; None for the default one.

    Returns:
        A scalar (or, for "none", losses of rows), float64 for float64 embeddings, else float32; 0 if no row counts.
        The gradient is not differentiable again. That of a row shorter than 1e-12 is zero, and so are its scores.

    Raises:
        ValueError: shapes or devices that do not match, fewer than 2 rows, options that are none; on the CPU also
            rows with NaN or infinity, or so long that inner products overflow, a temperature that is not above 0,
            negative weights.
        TypeError: other dtypes, options of another type.
    """
    sharing = stats, grad_convention, group
    return _nt_xent(
        z_a, z_b, temperature, labels, ids, valid, weights, normalise, variant, reduction, over, sharing
    )[0]


def _sup_con(
    z,
    labels,
    temperature,
    ids,
    valid,
    weights,
    normalise,
    variant,
    reduction,
    over,
    sharing,
    feeding=NO_QUEUE,
):
    op, sharing = "sup_con", Sharing("sup_con", *sharing)

    def checked():
        chosen = choice(op, "variant", variant, SUP_CON_VARIANTS)
        call = Call(op, reduction, over or chosen.over, sharing)
        cosine = check_bool(op, "normalise", normalise)
        rows, views, first = z, 1, z
        if isinstance(z, Tensor) and z.dim() == 3:
            rows, views, first = z.flatten(0, 1), z.shape[1], z[:, 0]
        check_rows(op, "z", rows)
        vectors = call.of({"z": z}, valid).vectors(("z", first), labels, ids, valid, weights)
        kept = memory(op, feeding, ("z", first), labels is not None or ids is not None)
        if labels is None:
            if ids is None and views == 1:
                raise UserError(f"{op}: labels must be given for one view (or ids, or z (B, V, D)), got None")
            if ids is None:
                vectors[1] = _positions(sharing, len(first), z.device)
        elif ids is not None and views > 1:
            raise UserError(f"{op}: ids must be None for several views with labels, got both")
        if views > 1:
            vectors = [None if x is None else x.repeat_interleave(views) for x in vectors]
            if kept is not None and kept.mask is not None:
                kept = kept._replace(mask=kept.mask.repeat_interleave(views))
        return call, rows, vectors, call.scale(temperature, ("z", rows)), chosen, cosine, kept

    return among_themselves(*sharing.checked(checked))


def sup_con(
    z: Tensor,
    labels: Tensor | None = None,
    temperature: float | Tensor = 0.1,
    *,
    ids: Tensor | None = None,
    valid: Tensor | None = None,
    weights: Tensor | None = None,
    normalise: bool = True,
    variant: str = "out",
    reduction: str = "mean",
    over: str | None = None,
    stats: str | None = "global",
    grad_convention: str = "true",
    group: Any = None,
) -> Tensor:
    r"""Supervised contrastive loss (Khosla et al., NeurIPS 2020, eq. 2 and 3).

    ``out``, eq. 2, is that of :func:`nt_xent` with labels; the others put the mean over the positives elsewhere:

    =======  ====================================================  ======================================
    variant  of a row, with L(X) = log of the sum of e^(s/tau)     and
    =======  ====================================================  ======================================
    out      L(A) - mean of s/tau over P
    in       L(A) - L(P) + log |P|                                 at most ``out``
    solo     L(A) - L(P)                                           solo-learn's; the gradient is that of ``in``
    hobbit   as ``out``                                            times temperature / 0.07, rows without
                                                                   positives count with 0 (SupContrast)
    =======  ====================================================  ======================================

    Args:
        z: (B, D), or (B, V, D) for V views of each sample, which are positives of each other; without labels no
            others are.
        labels: (B,) integers.
        temperature, ids, valid, weights, normalise, reduction, over, stats, grad_convention, group: see
            :func:`nt_xent`. ``weights`` and the others are those of the B samples.

    Returns:
        As :func:`nt_xent`; for "none" the losses of the rows (B V,), views of one sample one after another.

    Raises:
        As :func:`nt_xent`.
    """
    sharing = stats, grad_convention, group
    return _sup_con(
        z, labels, temperature, ids, valid, weights, normalise, variant, reduction, over, sharing
    )[0]


class NTXentLoss(SimilarityLoss):
    """NT-Xent (Chen et al., ICML 2020) of two views or labelled rows, defined in :func:`mmfast.functional.nt_xent`.

    >>> loss = NTXentLoss()
    >>> loss(z_a, z_b).backward()
    >>> loss(z, labels=labels).backward()
    >>> loss.last.anchors
    >>> loss.last.accuracy  # of the scores, computed when it is read

    A ``torch.nn.Parameter`` for the temperature is learnt. With a ``queue`` its rows are candidates, too; of the
    batch it takes those of ``enqueue_mask`` (B,), or all.
    """

    def __init__(
        self,
        temperature: float | Tensor = 0.5,
        *,
        normalise: bool = True,
        variant: str = "simclr",
        reduction: str = "mean",
        over: str | None = None,
        queue: EmbeddingQueue | None = None,
        stats: str | None = "global",
        grad_convention: str = "true",
        group: Any = None,
    ):
        super().__init__()
        chosen = choice("nt_xent", "variant", variant, NT_XENT_VARIANTS)
        self._take(
            temperature=temperature, normalise=normalise, variant=variant, reduction=reduction, over=over
        )
        self._take_sharing("nt_xent", reduction, over or chosen.over, stats, grad_convention, group)
        self.queue = check_queue("nt_xent", queue)

    def forward(
        self,
        z_a: Tensor,
        z_b: Tensor | None = None,
        *,
        labels: Tensor | None = None,
        ids: Tensor | None = None,
        valid: Tensor | None = None,
        weights: Tensor | None = None,
        enqueue_mask: Tensor | None = None,
    ) -> Tensor:
        options = self.normalise, self.variant, self.reduction, self.over, self._sharing()
        feeding = self.queue, enqueue_mask, self.training
        return self._kept(
            _nt_xent(z_a, z_b, self.temperature, labels, ids, valid, weights, *options, feeding)
        )


class SupConLoss(SimilarityLoss):
    """Supervised contrastive loss (Khosla et al., NeurIPS 2020), defined in :func:`mmfast.functional.sup_con`.

    >>> loss = SupConLoss()
    >>> loss(z, labels).backward()  # z (B, D), or (B, V, D) for V views

    With a ``queue`` its rows are candidates, too; of the batch it takes those of ``enqueue_mask`` (B,), or all.
    """

    def __init__(
        self,
        temperature: float | Tensor = 0.1,
        *,
        normalise: bool = True,
        variant: str = "out",
        reduction: str = "mean",
        over: str | None = None,
        queue: EmbeddingQueue | None = None,
        stats: str | None = "global",
        grad_convention: str = "true",
        group: Any = None,
    ):
        super().__init__()
        chosen = choice("sup_con", "variant", variant, SUP_CON_VARIANTS)
        self._take(
            temperature=temperature, normalise=normalise, variant=variant, reduction=reduction, over=over
        )
        self._take_sharing("sup_con", reduction, over or chosen.over, stats, grad_convention, group)
        self.queue = check_queue("sup_con", queue)

    def forward(
        self,
        z: Tensor,
        labels: Tensor | None = None,
        *,
        ids: Tensor | None = None,
        valid: Tensor | None = None,
        weights: Tensor | None = None,
        enqueue_mask: Tensor | None = None,
    ) -> Tensor:
        options = self.normalise, self.variant, self.reduction, self.over, self._sharing()
        feeding = self.queue, enqueue_mask, self.training
        return self._kept(_sup_con(z, labels, self.temperature, ids, valid, weights, *options, feeding))
