"""The random stream: known answers, independence of coordinates, and the distributions made of it."""

import math

import pytest
import torch
from scipy import stats

from mmfast.ops import random
from mmfast.ops.augment.plan import NOISE, RESAMPLE, Step, chains

# Random123's known-answer vectors for philox4x32-10: counter, key, result.
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def signed(low, high):
    """Two 32-bit words as one int64."""
    return torch.tensor([low | high << 32], dtype=torch.uint64).view(torch.int64)


@pytest.mark.parametrize("counter, key, result", KNOWN_ANSWERS)
def test_philox_known_answers(counter, key, result):
    block, id_low, id_high, tag = counter
    words = random.philox(signed(*key), signed(id_low, id_high), tag, torch.tensor([block]))
    assert words[0].tolist() == list(result)


def native_features(native, seed, ids, features, threshold):
    """Which of the words of a feature stream are below a threshold, from the C++ kernel."""
    from mmfast.ops.augment import augment_draw

    steps = chains([[[Step(RESAMPLE, 1.0, "sample", threshold)]]])
    return augment_draw(seed, ids, [None], steps, len(ids), [(1, features)])[:, 1 : 1 + (features + 31) // 32]


def test_kernel_words_match_the_reference_in_every_bit(native, every_isa):
    # Thresholds of 1/2, 1/4, ... compare the leading bits of 300 words of 50 samples.
    seed, ids = torch.tensor([-(2**62) - 12345]), torch.randint(-(2**63), 2**63 - 1, (50,))
    words = random.words(seed, ids, random.stream_tag(0, 0, 0, random.FEATURE), 300)
    for _isa in every_isa():
        for bit in range(1, 12):
            packed = native_features(native, seed, ids, 300, 2.0**-bit)
            flags = packed[:, :, None] >> torch.arange(32) & 1
            assert torch.equal(flags.flatten(1)[:, :300].bool(), words < 2 ** (32 - bit))


def test_coordinates_and_tags_are_independent_of_the_count():
    seed, ids = torch.tensor([7]), torch.arange(3)
    long = random.words(seed, ids, 5, 101)
    for count in (1, 2, 3, 4, 5, 100):
        assert torch.equal(random.words(seed, ids, 5, count), long[:, :count])
    assert not (random.words(seed, ids, 6, 101) == long).any()


def test_streams_of_different_purposes_share_no_counter():
    tags = {
        random.stream_tag(view, modality, step, purpose)
        for view in range(2)
        for modality in (0, 1, 2, random.ALL_MODALITIES)
        for step in (0, 1, 255)
        for purpose in range(6)
    }
    assert len(tags) == 2 * 4 * 3 * 6


def test_uniforms_are_uniform():
    # Kolmogorov-Smirnov at a fixed seed; a right generator fails with probability 1e-4.
    u = random.uniform(random.words(torch.tensor([1]), torch.arange(100), 0, 1000)).flatten()
    assert u.min() >= 0 and u.max() < 1
    assert stats.kstest(u.numpy(), "uniform").pvalue > 1e-4


def noise_of(native_z_shape, seed=3):
    from mmfast.ops.augment import augment_apply, augment_draw

    batch, steps, features = native_z_shape
    table = chains([[[Step(NOISE, 1.0, "sample", 0.0, 1.0)]]])
    seed = torch.tensor([seed])
    plan = augment_draw(seed, None, [None], table, batch, [(steps, features)])
    x = torch.zeros(native_z_shape)
    return augment_apply([x], [None], seed, None, plan, table, False)[0][0]


def test_kernel_normals_are_within_a_few_ulp_of_the_exact_transform(native, every_isa):
    exact = random.normals(
        torch.tensor([3]), torch.arange(20), random.stream_tag(0, 0, 0, random.NOISE), 50 * 77
    )
    for _isa in every_isa():
        z = noise_of((20, 50, 77)).flatten(1).double()
        ulp = torch.finfo(torch.float32).eps * exact.abs()
        # cos and sin near their zeros are exact to the ulp of the angle, hence the absolute term.
        assert ((z - exact).abs() <= 4 * ulp + 1e-9).all()


def test_kernel_normals_are_normal(native):
    # n = 400,000: standard errors of the four moments are sqrt(1, 2, 6, 24) / sqrt(n); 5 of them are allowed
    # (a right generator fails with probability below 3e-6), and the same for lag-1 correlations.
    z = noise_of((40, 100, 100)).double().flatten()
    n = z.numel()
    moments = {
        1: (z.mean(), 0, 1),
        2: ((z**2).mean(), 1, 2),
        3: ((z**3).mean(), 0, 15),
        4: ((z**4).mean(), 3, 96),
    }
    for order, (value, expected, variance) in moments.items():
        assert abs(value - expected) < 5 * math.sqrt(variance / n), order
    assert abs((z[1:] * z[:-1]).mean()) < 5 / math.sqrt(n)
    assert stats.kstest(z[:50_000].numpy(), "norm").pvalue > 1e-4
