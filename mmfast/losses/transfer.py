"""Probabilistic knowledge transfer between modalities: functions and modules."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import permutations
from typing import Any

import torch
from torch import Tensor, nn

from mmfast.checks import check_bool, check_number, told
from mmfast.errors import UserError
from mmfast.losses.similarity import choice
from mmfast.ops.barlow_twins.checks import check_views
from mmfast.ops.similarity.checks import check_weights
from mmfast.ops.similarity.pkt import pkt as _pkt
from mmfast.ops.similarity.shared import Sharing

Pair = tuple[str, str]

SCALES = ("entry_mean", "row_sum")
ORIENTATIONS = ("student", "teacher")

# Which of two published definitions of the directed loss: the document's, or that of the code released with it.
DIRECTED_PKT_PRESETS: dict[str, dict[str, Any]] = {
    "document": {"level": "instance", "teacher_grad": False},
    "released": {"level": "batch", "teacher_grad": True},
}
LEVELS = ("instance", "batch")


def pkt(
    views: Mapping[str, Tensor],
    weights: Mapping[Pair, Tensor] | None = None,
    *,
    pairs: Iterable[Pair] | None = None,
    scale: str = "entry_mean",
    exclude_self: bool = False,
    eps: float = 1e-8,
    teacher_grad: bool = True,
    stats: str | None = "global",
    grad_convention: str = "true",
    group: Any = None,
) -> Tensor:
    r"""Probabilistic knowledge transfer (PKT) between modalities (Passalis & Tefas, ECCV 2018).

    The students' samples are to have the neighbours that the teachers' have. For embeddings of one modality with
    rows :math:`h_i`:

    .. math::
        u_i = \frac{h_i}{|h_i| + \epsilon}, \qquad K_{ij} = \frac{u_i \cdot u_j + 1}{2}, \qquad
        P_{ij} = \frac{K_{ij}}{\sum_l K_{il}}

    and the loss is the sum over directed pairs of a teacher T and a student S of

    .. math::
        \frac{1}{B^2} \sum_i g_i \sum_j P^T_{ij} \log \frac{P^T_{ij} + \epsilon}{P^S_{ij} + \epsilon}

    Nothing of size B x B is stored, and nearly equal modalities lose no precision (the sum is computed as a Bregman
    divergence). Runs are bit-for-bit repeatable.

    Args:
        views: (B, D_m) of each of two or more modalities, B >= 2; D_m may differ. One device, one dtype: float32,
            float64, bfloat16 or float16; half types are computed in float32, whatever autocast says. Flatten
            sequences before. A row of norm below 1e-12 has scores 0 and gets no gradient.
        weights: g, a floating (B,) for each pair (teacher, student), finite and >= 0; None for 1. They are not
            differentiated, so they must not require a gradient.
        pairs: the pairs (teacher, student), each once; None for all M (M - 1).
        scale: "entry_mean", as above; "row_sum", B times that, which does not shrink as batches grow.
        exclude_self: leave a row out of its own neighbours: K_ii = 0.
        eps: finite and above 0. Passalis' code has 1e-7.
        teacher_grad: False keeps the gradient from the teachers' side of each pair.
        stats, grad_convention, group: see :func:`mmfast.functional.nt_xent`.

    Returns:
        A scalar, float64 for float64 embeddings, else float32. Gradients have the dtype of the embeddings and are
        not differentiable again.

    Raises:
        ValueError: fewer than two views, shapes or devices that do not match, B < 2, pairs that are unknown or
            named twice, weights that do not fit the pairs or require a gradient, an unknown scale, eps out of range.
            On the CPU also NaN or infinite embeddings, and weights that are not finite and >= 0; on GPUs, which
            nobody waits for, these are not looked for, and NaN makes the loss NaN.
        TypeError: unequal or unsupported dtypes, tensors that are sparse or nested, options of another type.
    """
    sharing = Sharing("pkt", stats, grad_convention, group)

    def checked():
        seen = _checked_views("pkt", views)
        chosen = _checked_pairs("pkt", pairs, seen)
        options = _checked_options("pkt", scale, exclude_self, eps, teacher_grad)
        named = {}
        if weights is not None:
            _check_mapping("pkt", "weights", weights)
            wrong = [p for p in weights if p not in chosen] or [p for p in chosen if p not in weights]
            if wrong:
                raise UserError(
                    f"pkt: weights must have one tensor for each pair (teacher, student), got "
                    f"{'none for' if wrong[0] in chosen else 'one for'} {wrong[0]!r}"
                )
            for teacher, student in chosen:
                name = f"weights[{teacher!r}, {student!r}]"
                named[name] = check_weights("pkt", name, weights[teacher, student], _first(seen))
        return seen, chosen, options, named

    own, chosen, options, named = sharing.checked(checked)
    seen, named = _gathered(sharing, own, named, {"pairs": chosen, "options": options})
    return sharing.named(own, None, lambda: _loss("pkt", seen, chosen, named, options))


def directed_pkt(
    views: Mapping[str, Tensor],
    confidence: Mapping[str, Tensor],
    *,
    preset: str = "document",
    orientation: str = "student",
    level: str | None = None,
    teacher_grad: bool | None = None,
    scale: str = "entry_mean",
    exclude_self: bool = False,
    eps: float = 1e-8,
    stats: str | None = "global",
    grad_convention: str = "true",
    group: Any = None,
) -> Tensor:
    r"""The :func:`pkt` of all pairs, each sample directed and weighted by what is known of its modalities.

    Of two modalities m and n of sample i, m is the student (``orientation="student"``) where :math:`w_{m,i} >
    w_{n,i}`, and the weight is :math:`g_i = w_{m,i}` there, else 0; where they are equal neither learns.

    ==========  ==========  ============  ==================================================================
    preset      level       teacher_grad  contribution of a pair
    ==========  ==========  ============  ==================================================================
    document    instance    False         mean of g_i D_i: each sample's divergence by its own weight
    released    batch       True          mean of g_i times mean of D_i, as in the code that was released
    ==========  ==========  ============  ==================================================================

    Args:
        views: as in :func:`pkt`.
        confidence: w, a floating (B,) for each of the views, finite and >= 0. Not differentiated, so it must not
            require a gradient.
        preset: the name of a published definition.
        orientation: "student" where a larger w says that a modality is to learn (a confidence network's estimate
            that it is misaligned); "teacher" where it says that it is to teach (importance by cross-entropy).
        level, teacher_grad: the preset's if None.
        scale, exclude_self, eps, stats, grad_convention, group: as in :func:`pkt`.

    Returns, raises: as :func:`pkt`.
    """
    op, sharing = "directed_pkt", Sharing("directed_pkt", stats, grad_convention, group)

    def checked():
        seen = _checked_views(op, views)
        resolved = _resolved(op, preset, orientation, level, teacher_grad)
        options = _checked_options(op, scale, exclude_self, eps, resolved["teacher_grad"])
        _check_mapping(op, "confidence", confidence)
        wrong = [m for m in confidence if m not in seen] or [m for m in seen if m not in confidence]
        if wrong:
            raise UserError(
                f"{op}: confidence must have one tensor for each view, got "
                f"{'none for' if wrong[0] in seen else 'one for'} {wrong[0]!r}"
            )
        levels = {m: check_weights(op, f"confidence[{m!r}]", confidence[m], _first(seen)) for m in seen}
        return seen, resolved["level"], options, levels

    own, of, options, levels = sharing.checked(checked)
    facts = {"options": options, "level": of, "orientation": orientation}
    seen, levels = _gathered(sharing, own, levels, facts)
    pairs, named = [], {}
    for larger, smaller in permutations(seen, 2):
        w, other = levels[larger], levels[smaller]
        # What is added shows NaN, which a comparison hides.
        g = torch.where(w > other, w, 0) + 0 * other
        if of == "batch":
            g = g.mean().expand(len(g))
        pairs.append((smaller, larger) if orientation == "student" else (larger, smaller))
        named[f"confidence[{larger!r}] above [{smaller!r}]"] = g
    return sharing.named(own, None, lambda: _loss(op, seen, pairs, named, options))


class PKTLoss(nn.Module):
    """Probabilistic knowledge transfer between modalities, defined in :func:`mmfast.functional.pkt`.

    >>> loss = PKTLoss([("text", "audio"), ("text", "visual")])  # text teaches both
    >>> loss({"text": h_t, "audio": h_a, "visual": h_v}).backward()
    """

    def __init__(
        self,
        pairs: Iterable[Pair] | None = None,
        *,
        scale: str = "entry_mean",
        exclude_self: bool = False,
        eps: float = 1e-8,
        teacher_grad: bool = True,
        stats: str | None = "global",
        grad_convention: str = "true",
        group: Any = None,
    ):
        super().__init__()
        Sharing("pkt", stats, grad_convention, group)
        self.stats, self.grad_convention, self.group = stats, grad_convention, group
        self.pairs = None if pairs is None else _checked_pairs("pkt", pairs, None)
        self.scale, self.exclude_self, self.eps, self.teacher_grad = _checked_options(
            "pkt", scale, exclude_self, eps, teacher_grad
        )

    def forward(self, views: Mapping[str, Tensor], weights: Mapping[Pair, Tensor] | None = None) -> Tensor:
        return pkt(
            views,
            weights,
            pairs=self.pairs,
            scale=self.scale,
            exclude_self=self.exclude_self,
            eps=self.eps,
            teacher_grad=self.teacher_grad,
            stats=self.stats,
            grad_convention=self.grad_convention,
            group=self.group,
        )

    def extra_repr(self) -> str:
        return _options_of(self, "pairs", "scale", "exclude_self", "eps", "teacher_grad")


class DirectedPKTLoss(nn.Module):
    """PKT with samples directed and weighted by confidence, defined in :func:`mmfast.functional.directed_pkt`.

    >>> loss = DirectedPKTLoss(preset="document")
    >>> loss({"text": h_t, "audio": h_a}, {"text": w_t, "audio": w_a}).backward()
    """

    def __init__(
        self,
        *,
        preset: str = "document",
        orientation: str = "student",
        level: str | None = None,
        teacher_grad: bool | None = None,
        scale: str = "entry_mean",
        exclude_self: bool = False,
        eps: float = 1e-8,
        stats: str | None = "global",
        grad_convention: str = "true",
        group: Any = None,
    ):
        super().__init__()
        Sharing("directed_pkt", stats, grad_convention, group)
        self.stats, self.grad_convention, self.group = stats, grad_convention, group
        resolved = _resolved("directed_pkt", preset, orientation, level, teacher_grad)
        self.preset, self.orientation, self.level = preset, orientation, resolved["level"]
        self.scale, self.exclude_self, self.eps, self.teacher_grad = _checked_options(
            "directed_pkt", scale, exclude_self, eps, resolved["teacher_grad"]
        )

    def forward(self, views: Mapping[str, Tensor], confidence: Mapping[str, Tensor]) -> Tensor:
        return directed_pkt(
            views,
            confidence,
            preset=self.preset,
            orientation=self.orientation,
            level=self.level,
            teacher_grad=self.teacher_grad,
            scale=self.scale,
            exclude_self=self.exclude_self,
            eps=self.eps,
            stats=self.stats,
            grad_convention=self.grad_convention,
            group=self.group,
        )

    def extra_repr(self) -> str:
        return _options_of(
            self, "preset", "orientation", "level", "teacher_grad", "scale", "exclude_self", "eps"
        )


def _options_of(module: nn.Module, *names: str) -> str:
    return ", ".join(f"{name}={getattr(module, name)!r}" for name in names)


def _first(views: Mapping[str, Tensor]) -> tuple[str, Tensor]:
    return next(iter(views.items()))


def _gathered(sharing: Sharing, views, vectors, facts) -> tuple[dict, dict]:
    facts = facts | {"views": [*views], "weights": [*vectors]}
    rows, found = sharing.gather([*views.values()], [*vectors.values()], facts)
    return dict(zip(views, rows, strict=True)), dict(zip(vectors, found, strict=True))


def _loss(op, views, pairs, weights, options) -> Tensor:
    scale, exclude_self, eps, teacher_grad = options
    name, z = _first(views)
    if len(z) < 2:
        raise UserError(
            f"{op}: {name} must have at least 2 rows (a contrast needs two), got {tuple(z.shape)}"
        )
    names = list(views)
    teachers, students = ([names.index(pair[role]) for pair in pairs] for role in (0, 1))
    return _pkt(
        list(views.values()),
        list(weights.values()),
        (op, *names, *weights),
        tuple(teachers),
        tuple(students),
        eps,
        scale == "row_sum",
        exclude_self,
        teacher_grad,
    )


def _check_mapping(op: str, name: str, value: Any) -> None:
    if not isinstance(value, Mapping):
        raise TypeError(f"{op}: {name} must be a mapping, got {told(value)}")


def _checked_views(op: str, views: Any) -> dict[str, Tensor]:
    _check_mapping(op, "views", views)
    if len(views) < 2:
        raise UserError(f"{op}: views must have at least 2 modalities, got {len(views)}")
    for name in views:
        if not isinstance(name, str):
            raise TypeError(f"{op}: views must have names that are strings, got {told(name)}")
    check_views(views, rows=0, op=op)
    return dict(views)


def _checked_pairs(op: str, pairs: Any, views: Mapping[str, Tensor] | None) -> tuple[Pair, ...]:
    """``pairs`` of distinct names, each once; of ``views``, if these are known."""
    if pairs is None:
        return tuple(permutations(views, 2))
    rule = f"{op}: pairs must be pairs (teacher, student) of two names"
    if isinstance(pairs, str) or not isinstance(pairs, Iterable):
        raise TypeError(f"{rule}, got {told(pairs)}")
    found = []
    for pair in pairs:
        if isinstance(pair, str) or not isinstance(pair, (tuple, list)) or len(pair) != 2:
            raise TypeError(f"{rule}, got {told(pair)}")
        teacher, student = pair
        for name in pair:
            if not isinstance(name, str):
                raise TypeError(f"{rule}, got {told(name)}")
            if views is not None and name not in views:
                raise UserError(f"{op}: pairs must be of {', '.join(views)}, got {name!r}")
        if teacher == student:
            raise UserError(f"{op}: pairs must have a teacher other than the student, got {teacher!r} twice")
        if (teacher, student) in found:
            raise UserError(f"{op}: pairs must differ, got {(teacher, student)!r} twice")
        found.append((teacher, student))
    if not found:
        raise UserError(f"{op}: pairs must be at least one, got none")
    return tuple(found)


def _checked_options(op, scale, exclude_self, eps, teacher_grad) -> tuple[str, bool, float, bool]:
    choice(op, "scale", scale, SCALES)
    exclude_self = check_bool(op, "exclude_self", exclude_self)
    eps = check_number(op, "eps", eps, 0, ends="(]")
    return scale, exclude_self, eps, check_bool(op, "teacher_grad", teacher_grad)


def _resolved(op, preset, orientation, level, teacher_grad) -> dict[str, Any]:
    choice(op, "preset", preset, DIRECTED_PKT_PRESETS)
    choice(op, "orientation", orientation, ORIENTATIONS)
    resolved = dict(DIRECTED_PKT_PRESETS[preset])
    if level is not None:
        choice(op, "level", level, LEVELS)
        resolved["level"] = level
    if teacher_grad is not None:
        resolved["teacher_grad"] = check_bool(op, "teacher_grad", teacher_grad)
    return resolved
