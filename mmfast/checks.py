"""Arguments that are numbers, whole numbers or switches: what they must be, said in one way."""

from __future__ import annotations

import math
import numbers
from typing import Any

import numpy as np

from mmfast.errors import UserError


def check_number(
    op: str, name: str, value: Any, low: float = -math.inf, high: float = math.inf, ends: str = "[]"
) -> float:
    """``value`` as a float: any real number but a bool, finite and in [low, high].

    ``ends``: "(" or ")" in the place of a bracket leaves that end out.

    Raises:
        TypeError: no number; strings and tensors are none.
        UserError: NaN, infinite, or out of range.
    """
    number = value
    if type(value) is not float:
        _check_kind(op, name, value, numbers.Real, "a number")
        try:
            number = float(value)
        except OverflowError:
            number = value = math.inf if value > 0 else -math.inf
    inside = low <= number <= high and not (
        (number == low and ends[0] == "(") or (number == high and ends[1] == ")")
    )
    # Compiled for any number, it may be a symbol, which has no math.isfinite.
    if not (inside and -math.inf < number < math.inf):
        raise UserError(f"{op}: {name} must be {_range(low, high, ends)}, got {value}")
    return number


def check_dropout(op: str, value: Any) -> float:
    """``value`` as the probability of dropout, in [0, 1)."""
    return check_number(op, "dropout", value, 0, 1, ends="[)")


def check_integer(op: str, name: str, value: Any, low: float = -math.inf, high: float = math.inf) -> int:
    """``value`` as an int: any integer but a bool, in [low, high].

    Raises:
        TypeError: no integer; 2.0 is none.
        UserError: out of range.
    """
    if type(value) is not int:
        _check_kind(op, name, value, numbers.Integral, "an integer")
        value = int(value)
    if not low <= value <= high:
        raise UserError(f"{op}: {name} must be {_range(low, high, '[]', '')}, got {value}")
    return value


def check_seed(op: str, name: str, value: Any) -> int:
    """``value`` as a seed in [-2^63, 2^63): any integer of 64 bits, signed or not, wraps as in ``torch.manual_seed``.

    Raises:
        TypeError: no integer; 1.9, "1" and True are none.
        UserError: more than 64 bits.
    """
    if type(value) is not int:
        value = check_integer(op, name, value)
    if not -(2**63) <= value < 2**64:
        raise UserError(f"{op}: {name} must have 64 bits at most, got {value}")
    return value if value < 2**63 else value - 2**64


def numpy_generator(op: str, seed: Any) -> np.random.Generator:
    """NumPy's generator of any seed that :func:`check_seed` takes; NumPy itself takes no negative ones."""
    return np.random.default_rng(check_seed(op, "seed", seed) % 2**64)


def check_bool(op: str, name: str, value: Any) -> bool:
    """``value`` as a bool: True or False, NumPy's among them.

    Raises:
        TypeError: anything else; 0, 1 and strings.
    """
    if type(value) is not bool:
        if not isinstance(value, np.bool_):
            raise TypeError(f"{op}: {name} must be True or False, got {told(value)}")
        value = bool(value)
    return value


def told(value: Any) -> str:
    """An argument in an error: what it is where that is short, else its type."""
    short = value is None or isinstance(value, (str, bytes, bool, numbers.Number, np.generic))
    text = repr(value) if short else ""
    return text if 0 < len(text) <= 60 else type(value).__name__


def _check_kind(op: str, name: str, value: Any, kind: type, words: str) -> None:
    if not isinstance(value, kind) or isinstance(value, bool):
        raise TypeError(f"{op}: {name} must be {words}, got {told(value)}")


def _range(low: float, high: float, ends: str, finite: str = "finite") -> str:
    least, most = (f"{x:g}" if isinstance(x, float) else str(x) for x in (low, high))
    if math.isinf(low) and math.isinf(high):
        return finite
    if math.isinf(low) or math.isinf(high):
        above, below = "above" if ends[0] == "(" else "at least", "below" if ends[1] == ")" else "at most"
        bound = f"{above} {least}" if math.isinf(high) else f"{below} {most}"
        return f"{finite} and {bound}" if finite else bound
    return f"in {ends[0]}{least}, {most}{ends[1]}"
