import numpy as np
import pytest
import torch
from scipy import signal

from mmfast.data.resample import resample, resampled
from mmfast.data.spectrogram import frames, spectrogram


def direct(sound: np.ndarray) -> np.ndarray:
    """The definition, sum by sum."""
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(400) / 400)
    # 400 of 512 points: the window stands in their middle, and so does the frame's sample.
    padded = np.pad(sound.astype(np.float64), 256)
    rows = []
    for t in range(1 + len(sound) // 160):
        frame = padded[160 * t + 56 : 160 * t + 456] * window
        angle = -2j * np.pi * np.outer(np.arange(257), np.arange(56, 456)) / 512
        rows.append(np.log(np.abs(np.exp(angle) @ frame) + 1e-8))
    return np.stack(rows)


@pytest.mark.parametrize("length", [1, 159, 160, 401, 2000])
def test_spectrogram_is_the_definition(length):
    sound = np.random.default_rng(length).uniform(-1, 1, length).astype(np.float32)
    got = spectrogram(torch.from_numpy(sound))
    assert got.shape == (frames(length), 257) and got.dtype == torch.float32 and got.is_contiguous()
    # Where hardly anything is left of a magnitude, its logarithm is that of rounding.
    np.testing.assert_allclose(np.exp(got.numpy()), np.exp(direct(sound)), atol=2e-5)
    np.testing.assert_allclose(got.numpy(), direct(sound), atol=5e-2)


def test_a_tone_stands_at_its_frequency_and_silence_at_the_floor():
    tone = torch.sin(2 * torch.pi * 1000 * torch.arange(16_000) / 16_000)
    got = spectrogram(tone)
    assert got.shape == (101, 257) and got[50].argmax() == 1000 * 512 // 16_000
    assert torch.equal(spectrogram(torch.zeros(320)), torch.full((3, 257), 1e-8).log())
    assert spectrogram(torch.zeros(0)).shape == (frames(0), 257) == (0, 257)


@pytest.mark.parametrize(
    ("rate", "wanted"), [(48_000, 16_000), (44_100, 16_000), (8_000, 16_000), (16_000, 11_025)]
)
@pytest.mark.parametrize("length", [1, 5, 3001])
def test_resampling_is_that_of_scipy(rate, wanted, length):
    sound = np.random.default_rng(length).standard_normal(length)
    got = resample(sound, rate, wanted)
    assert got.dtype == np.float32 and len(got) == resampled(length, rate, wanted)
    np.testing.assert_allclose(got, signal.resample_poly(sound, wanted, rate), atol=1e-6)


def test_resampling_keeps_tones_and_leaves_out_what_the_lower_rate_cannot_hold():
    time = np.arange(44_100) / 44_100
    low, high = (resample(np.sin(2 * np.pi * f * time), 44_100, 16_000) for f in (1000, 12_000))
    inside = slice(100, -100)
    wanted = np.sin(2 * np.pi * 1000 * np.arange(16_000) / 16_000)
    assert np.abs(low - wanted)[inside].max() < 2e-3 and np.abs(high)[inside].max() < 2e-3


def test_rates_without_a_common_factor_need_no_large_table():
    sound = np.random.default_rng(0).standard_normal(300)
    np.testing.assert_allclose(
        resample(sound, 44_101, 16_000), signal.resample_poly(sound, 16_000, 44_101), atol=1e-6
    )
    assert len(resample(np.zeros(0), 48_000, 16_000)) == 0
