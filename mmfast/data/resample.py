"""Sounds at another sampling rate."""

from __future__ import annotations

from functools import lru_cache
from math import gcd

import numpy as np

# Zero crossings of the sinc on each side, and the Kaiser window's beta: those of scipy.signal.resample_poly.
CROSSINGS, BETA = 10, 5.0


def resampled(length: int, rate: int, wanted: int) -> int:
    """How many samples :func:`resample` makes of so many."""
    return -(-length * wanted // rate)


def resample(sound: np.ndarray, rate: int, wanted: int) -> np.ndarray:
    """A sound (n,) of ``rate`` Hz at ``wanted`` Hz: (ceil(n * wanted / rate),) float32, band-limited.

    A polyphase filter with linear phase and no delay: a sinc that cuts off at half of the lower rate, in a Kaiser
    window of ten zero crossings on each side, computed in float64; silence is taken to surround the sound. The same
    numbers as ``scipy.signal.resample_poly``. NaN and infinity spread as far as the filter reaches.
    """
    up, down = wanted // gcd(rate, wanted), rate // gcd(rate, wanted)
    if up == down:
        return np.asarray(sound, np.float32)
    taps, half = _filter(up, down)
    out = np.empty(resampled(len(sound), rate, wanted), np.float32)
    if not len(out):
        return out
    # Output k lies `ahead` / up behind input c; tap i weighs input c + i.
    reach = half // up + 1
    i = np.arange(-reach, reach + 1)
    windows = np.lib.stride_tricks.sliding_window_view(np.pad(np.float64(sound), reach), len(i))
    with np.errstate(invalid="ignore", over="ignore"):
        for phase in range(min(up, len(out))):
            c, ahead = divmod(phase * down, up)
            at = half + ahead - i * up
            weights = np.where((at >= 0) & (at < len(taps)), taps[at.clip(0, len(taps) - 1)], 0)
            out[phase::up] = windows[c::down] @ weights
    return out


@lru_cache(maxsize=4)
def _filter(up: int, down: int) -> tuple[np.ndarray, int]:
    """The low-pass filter at ``up`` times the first rate, and the place of its middle."""
    slow = max(up, down)
    half = CROSSINGS * slow
    taps = np.sinc(np.arange(-half, half + 1) / slow) * np.kaiser(2 * half + 1, BETA)
    return taps * (up / taps.sum()), half
