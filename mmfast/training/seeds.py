"""Seeds of everything random in a run, derived from one number."""

from __future__ import annotations

import hashlib

from mmfast.checks import check_seed


def derive(seed: int, purpose: str, *index: int) -> int:
    """A seed in [0, 2^63) for one purpose (and step, epoch, fold), a pure function of its arguments.

    ``seed`` may have any 64 bits.

    Because no random state lives on between steps, a run that is interrupted and resumed repeats the draws of one
    that was not.
    """
    text = ":".join([purpose, *map(str, (check_seed(purpose, "seed", seed), *index))])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1
