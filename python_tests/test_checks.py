"""Numbers, whole numbers and switches: what passes, and what is refused by name."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch

from mmfast.checks import check_bool, check_integer, check_number
from mmfast.errors import UserError

NUMBERS = [0.5, 1, 0, np.float32(0.5), np.float64(0.25), np.float16(0.5), np.int64(1), Fraction(1, 3)]


@pytest.mark.parametrize("value", NUMBERS, ids=repr)
def test_any_real_number_is_one(value):
    number = check_number("op", "x", value, 0, 1)
    assert type(number) is float and number == float(value)


@pytest.mark.parametrize("value", [3, np.int32(3), np.uint64(3)], ids=repr)
def test_any_integer_is_one(value):
    assert type(check_integer("op", "n", value, 1)) is int


@pytest.mark.parametrize("value", [True, False, np.True_, np.False_], ids=repr)
def test_bools_are_bools(value):
    assert check_bool("op", "flag", value) is bool(value)


REFUSED = [
    (check_number, ("0.1",), TypeError, "op: x must be a number, got '0.1'"),
    (check_number, (True,), TypeError, "op: x must be a number, got True"),
    (check_number, (np.True_,), TypeError, f"op: x must be a number, got {np.True_!r}"),
    (check_number, (None,), TypeError, "op: x must be a number, got None"),
    (check_number, (1j,), TypeError, "op: x must be a number, got 1j"),
    (check_number, ([0.5],), TypeError, "op: x must be a number, got list"),
    (check_number, (np.array(0.5),), TypeError, "op: x must be a number, got ndarray"),
    (check_number, (torch.tensor(0.5),), TypeError, "op: x must be a number, got Tensor"),
    (check_number, (torch.nn.Parameter(torch.tensor(0.5)),), TypeError, "op: x must be a number, got Parameter"),
    (check_number, ("1" * 500,), TypeError, "op: x must be a number, got str"),
    (check_number, (math.nan,), UserError, "op: x must be finite, got nan"),
    (check_number, (np.float32("nan"), 0, 1), UserError, "op: x must be in [0, 1], got nan"),
    (check_number, (math.inf, 0), UserError, "op: x must be finite and at least 0, got inf"),
    (check_number, (10**400, 0), UserError, "op: x must be finite and at least 0, got inf"),
    (check_number, (2, 0, 1), UserError, "op: x must be in [0, 1], got 2"),
    (check_number, (1 + 1e-9, 0, 1), UserError, "op: x must be in [0, 1], got 1.000000001"),
    (check_integer, (2**63, 0, 2**63 - 1), UserError,
     "op: x must be in [0, 9223372036854775807], got 9223372036854775808"),
    (check_number, (1.5, -math.inf, 1), UserError, "op: x must be finite and at most 1, got 1.5"),
    (check_number, (1.0, 0, 1, "[)"), UserError, "op: x must be in [0, 1), got 1.0"),
    (check_number, (0, 0, 1, "(]"), UserError, "op: x must be in (0, 1], got 0"),
    (check_number, (0, 0, math.inf, "(]"), UserError, "op: x must be finite and above 0, got 0"),
    (check_number, (0, -math.inf, 0, "[)"), UserError, "op: x must be finite and below 0, got 0"),
    (check_integer, (2.0,), TypeError, "op: x must be an integer, got 2.0"),
    (check_integer, (True,), TypeError, "op: x must be an integer, got True"),
    (check_integer, ("2",), TypeError, "op: x must be an integer, got '2'"),
    (check_integer, (0, 1), UserError, "op: x must be at least 1, got 0"),
    (check_integer, (9, 1, 8), UserError, "op: x must be in [1, 8], got 9"),
    (check_bool, ("no",), TypeError, "op: x must be True or False, got 'no'"),
    (check_bool, (1,), TypeError, "op: x must be True or False, got 1"),
    (check_bool, (0.025,), TypeError, "op: x must be True or False, got 0.025"),
    (check_bool, (None,), TypeError, "op: x must be True or False, got None"),
    (check_bool, (torch.tensor(True),), TypeError, "op: x must be True or False, got Tensor"),
]  # fmt: skip


@pytest.mark.parametrize(("check", "arguments", "error", "message"), REFUSED, ids=[x[3] for x in REFUSED])
def test_the_rest_is_refused_by_name(check, arguments, error, message):
    with pytest.raises(error) as caught:
        check("op", "x", *arguments)
    assert str(caught.value) == message
