"""How much a file may grow in memory when it is read."""

from __future__ import annotations

from pathlib import Path

from mmfast.errors import UserError

# Padding and silence deflate to a thousandth, so small files are let off: what a bomb may cost is stated instead.
ALWAYS = 512 * 2**20
TIMES = 32


class Allowance:
    """What may be read of one file: 512 MiB, or 32 times its size where that is more, in all arrays together.

    Deflated zeros, sparse data sets and archives of sane data stay far below, while what a bomb claims is refused
    before memory is taken.
    """

    def __init__(self, path: Path, size: int) -> None:
        self.path = path
        self.size = size
        self.limit = max(ALWAYS, TIMES * size)
        self._taken = 0

    def take(self, key: str, amount: int) -> None:
        """Count an array of `amount` bytes.

        Raises:
            UserError: it is too much, alone or with what was read before.
        """
        self._taken += amount
        if self._taken > self.limit:
            raise UserError(
                f"{self.path}: {key} must hold at most {in_words(self.limit)} with all arrays before it "
                f"({in_words(ALWAYS)}, or {TIMES} times the file), got {in_words(self._taken)} "
                f"in a file of {in_words(self.size)}"
            )


def in_words(amount: int) -> str:
    """An amount of bytes for people."""
    value, units = float(amount), ["bytes", "KiB", "MiB", "GiB", "TiB"]
    while value >= 1024 and len(units) > 1:
        value /= 1024
        del units[0]
    return f"{value:,.0f} {units[0]}" if units[0] == "bytes" else f"{value:,.1f} {units[0]}"
