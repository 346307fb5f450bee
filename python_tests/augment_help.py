"""Specifications of augmentation for the tests of all its kernels."""

import math

import torch
from hypothesis import strategies as st

from mmfast.ops.augment.plan import (
    APPLY_NAMES,
    MASK_FEATURES,
    MASK_STEPS,
    NOISE,
    RESAMPLE,
    Step,
    chains,
    layout,
    unpack_bits,
)


@st.composite
def steps(draw):
    kind = draw(st.sampled_from([RESAMPLE, MASK_STEPS, MASK_FEATURES, NOISE]))
    return Step(
        kind,
        p=draw(st.sampled_from([0.3, 0.7, 1.0])),
        apply=draw(st.sampled_from(APPLY_NAMES)),
        amount=draw(st.sampled_from([0.0, 0.15, 0.5, 1.0])),
        spread=draw(st.sampled_from([0.0, 0.01, 0.3])),
        gate=draw(st.sampled_from([0.0, 0.4, 1.0])) if kind == RESAMPLE else 1.0,
        flags=draw(st.integers(0, 3 if kind == RESAMPLE else 1)),
    )


@st.composite
def calls(draw):
    """A random specification: batch, modalities, lengths, padding side and chains of one or two views."""
    batch = draw(st.integers(1, 6))
    shapes = draw(st.lists(st.tuples(st.integers(0, 40), st.integers(1, 70)), min_size=1, max_size=3))
    views = draw(
        st.lists(
            st.lists(st.lists(steps(), min_size=len(shapes), max_size=len(shapes)), max_size=3),
            min_size=1,
            max_size=2,
        )
    )
    # All modalities of one step are of one kind.
    views = [[[s._replace(kind=row[0].kind) for s in row] for row in view] for view in views]
    generator = torch.Generator(torch.get_default_device()).manual_seed(draw(st.integers(0, 2**32)))
    lengths = [
        torch.randint(0, length + 1, (batch,), generator=generator) if draw(st.booleans()) else None
        for length, _ in shapes
    ]
    ids = torch.randint(-(2**63), 2**63 - 1, (batch,), generator=generator) if draw(st.booleans()) else None
    seed = torch.randint(-(2**63), 2**63 - 1, (1,), generator=generator)
    return batch, shapes, views, lengths, ids, seed, draw(st.booleans()), generator


def check_exact_counts(draw, kind, sizes, shares):
    """round(q n), half up; a mask leaves one of n > 0 unless q = 1, a resample step may take all features."""
    table = chains([[[Step(kind, 1.0, "sample", q, flags=1)] * len(sizes)] for q in shares])
    shapes = [(n, 3) if kind == MASK_STEPS else (2, n) for n in sizes]
    plan = draw(torch.tensor([3]), None, [None] * len(sizes), table, 2, shapes)
    for field in layout(table.steps_per_view, table.rows, shapes):
        q, n = shares[field.view], sizes[field.modality]
        expected = math.floor(q * n + 0.5)
        if kind != RESAMPLE and q < 1:
            expected = min(expected, max(n - 1, 0))
        selected = {RESAMPLE: "features", MASK_STEPS: "masked_steps", MASK_FEATURES: "masked_features"}[kind]
        assert unpack_bits(plan[:, field.columns[selected]], n).sum(1).tolist() == [expected] * 2, (q, n)
