"""Log-spectrograms of speech."""

from __future__ import annotations

import torch
from torch import Tensor

RATE = 16_000
WINDOW, HOP, FFT = 400, 160, 512
BINS = FFT // 2 + 1
FLOOR = 1e-8


def spectrogram(sound: Tensor) -> Tensor:
    """log(|X| + 1e-8) of a sound (n,) of 16,000 Hz: (1 + n // 160, 257) float32; no steps of no sound.

    |X| is the magnitude of the short-time Fourier transform: a Hann window of 400 samples (25 ms, periodic), a frame
    every 160 (10 ms), 512 points, hence 257 frequencies from 0 to 8,000 Hz. Frame t is centred on sample 160 t, and
    silence is taken to surround the sound. Natural logarithm; neither waveform nor result is normalised.
    """
    if not len(sound):
        return torch.empty(0, BINS, device="cpu")
    transform = torch.stft(
        sound.float(),
        FFT,
        HOP,
        WINDOW,
        torch.hann_window(WINDOW, device=sound.device),
        center=True,
        pad_mode="constant",
        return_complex=True,
    )
    return transform.abs().add_(FLOOR).log_().T.contiguous()


def frames(length: int) -> int:
    """How many steps :func:`spectrogram` makes of so many samples."""
    return 1 + length // HOP if length else 0
