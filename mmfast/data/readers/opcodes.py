"""What a pickle would do, told from its opcodes before any of them is carried out."""

from __future__ import annotations

import mmap
import re
from dataclasses import dataclass

import numpy as np

NESTING = 64
OPCODES = 50_000_000
MEMO = 10_000_000
DIGITS = 1024  # bytes of one whole number, and of a line that holds a name
NODES = 1000  # of a key of a dictionary: tuples are hashed whole, each time anew
SLACK = 64 << 20


class Refused(ValueError):
    """Why a pickle is not read: the rest of a sentence that begins with its file."""


def damaged(reason) -> Refused:
    return Refused(f"the pickle is truncated or damaged ({reason})")


def budget(size: int) -> int:
    """Bytes of memory that the content of a file of `size` bytes may take."""
    return 3 * size + SLACK


@dataclass(frozen=True)
class Scan:
    """What one pickle among the bytes of a file takes: where it ends, its opcodes, and bytes of memory at most."""

    end: int
    opcodes: int
    memory: int


# An object on the stack is one number: how many objects it would be written out in full (times 128), and how
# deep they nest. Only tuples and frozen sets are hashed, and those cannot change once they are there.
_LEAF = 128
_UNKNOWN = 0
_DEPTH = 127

# What an opcode does: pushes something of a fixed size, of a counted length, up to the end of a line, ...
_PUSH, _COUNTED, _LINE, _PUT, _GET, _TUPLE, _MARKED, _ITEM, _CALL, _OTHER = range(10)
_SLOT = 9  # a place in a list, with the room that lists keep
# opcode -> kind, then what the branch of the kind says.
_TABLE: dict[int, tuple[int, int, int]] = {}


def _rows(kind: int, rows: dict[bytes, tuple[int, int]]) -> None:
    _TABLE.update({code[0]: (kind, *row) for code, row in rows.items()})


# Width with the opcode, memory. A float is charged what the budget grants its nine bytes, though it takes 32: lists
# of numbers are no attack.
_rows(
    _PUSH,
    {
        b"N": (1, _SLOT),
        b"\x88": (1, _SLOT),
        b"\x89": (1, _SLOT),
        b")": (1, _SLOT),
        b"K": (2, _SLOT),
        b"M": (3, 32 + _SLOT),
        b"J": (5, 32 + _SLOT),
        b"G": (9, 27 - _SLOT),
        b"]": (1, 72 + _SLOT),
        b"}": (1, 240 + _SLOT),
        b"\x8f": (1, 240 + _SLOT),
    },
)
# Bytes of the length, whether it is text.
_rows(
    _COUNTED,
    {
        b"T": (4, 0),
        b"U": (1, 0),
        b"X": (4, 1),
        b"\x8c": (1, 1),
        b"\x8d": (8, 1),
        b"B": (4, 0),
        b"C": (1, 0),
        b"\x8e": (8, 0),
        b"\x96": (8, 0),
        b"\x8a": (1, 2),
        b"\x8b": (4, 2),
    },
)
# Lines, whether they are text of any length.
_rows(
    _LINE, {b"I": (1, 0), b"L": (1, 0), b"F": (1, 0), b"S": (1, 1), b"V": (1, 1), b"c": (2, 0), b"i": (2, 0)}
)
# Bytes of the index, 0 for a line.
_rows(_PUT, {b"q": (1, 0), b"r": (4, 0), b"p": (0, 0), b"\x94": (0, 1)})
_rows(_GET, {b"h": (1, 0), b"j": (4, 0), b"g": (0, 0)})
# Items, 0 for those since the mark.
_rows(_TUPLE, {b"t": (0, 0), b"\x85": (1, 0), b"\x86": (2, 0), b"\x87": (3, 0), b"\x91": (0, 1)})
# Into what is below the mark or new, step of the keys (0: there are none).
_rows(_MARKED, {b"e": (0, 0), b"u": (0, 2), b"\x90": (0, 1), b"l": (1, 0), b"d": (1, 2), b"o": (1, 0)})
_rows(_ITEM, {b"a": (1, 0), b"s": (2, 1)})
# What is taken from the stack for what is left there, memory of it.
_rows(
    _CALL,
    {
        b"R": (2, 160),
        b"b": (1, 64),
        b"\x81": (2, 160),
        b"\x92": (3, 160),
        b"\x93": (2, 64),
        b"Q": (1, 160),
    },
)
_rows(_OTHER, dict.fromkeys((b"(", b".", b"0", b"1", b"2", b"\x80", b"\x95"), (0, 0)))

# What stands elsewhere than in the pickle, and may be anything.
_OUTSIDE = {
    **dict.fromkeys(b"\x82\x83\x84", "the number of an extension"),
    **dict.fromkeys(b"\x97\x98", "a buffer beside the file"),
    b"P"[0]: "a persistent id",
}

# Text of which a character is beyond Latin-1 takes up to four bytes for each.
_WIDE = re.compile(rb"[\xc4-\xff]")
_WIDE_ESCAPE = re.compile(rb"\\u(?!00)|\\U(?!000000)")


def scan(data: bytes | mmap.mmap, start: int = 0) -> Scan:
    """Walk over the opcodes of the pickle at `start`, building nothing.

    Raises:
        Refused: unknown opcodes, lengths beyond the end, a pickle without an end, or one that would nest too deep,
            take too much memory or too long.
    """
    try:
        return _scan(data, start)
    except IndexError:
        raise damaged("it ends too early") from None


def _scan(data, start: int) -> Scan:
    size = len(data)
    limit = budget(size - start)
    bytes_of = np.frombuffer(data, np.uint8)
    position, framed, opcodes, memory, largest, known = start, start, 0, 0, 0, 0
    stack: list[int] = []
    marks: list[int] = []
    memo: list[int] = []
    same: dict[int, int] = {}
    while True:
        code = data[position]
        if code not in _TABLE:
            what = _OUTSIDE.get(code, f"an unknown opcode {code:#04x}")
            raise damaged(f"{what} at byte {position}")
        kind, first, second = _TABLE[code]
        opcodes += 1
        position += 1
        if kind == _PUSH:
            following = position - 1 + 2 * first
            if following < size and data[following - first] == code == data[following]:
                run = _run(bytes_of, position - 1, first)
                opcodes += run - 1
                memory += run * second
                position += run * first - 1
                stack.extend([_LEAF] * run)
            else:
                memory += second
                position += first - 1
                stack.append(_LEAF)
        elif kind == _PUT:
            index, position = (known, position) if second else _index(data, position, first)
            # What is remembered is numbered one after another, and numbers left out were opcodes once.
            if not 0 <= index <= min(opcodes, MEMO):
                raise damaged(f"memo {index} of {opcodes} opcodes")
            if index >= len(memo):
                memory += 16 * (index + 1 - len(memo))
                memo.extend([_UNKNOWN] * (index + 1 - len(memo)))
            known += memo[index] == _UNKNOWN
            memo[index] = stack[-1]
        elif kind == _GET:
            index, position = _index(data, position, first)
            if memo[index] == _UNKNOWN:
                raise damaged(f"memo {index} is empty")
            stack.append(memo[index])
            memory += _SLOT
        elif kind == _COUNTED:
            length = int.from_bytes(data[position : position + first], "little")
            position += first
            if length > size - position:
                raise damaged(f"{length:,} bytes announced, {size - position:,} left")
            if second == 2 and length > DIGITS:
                raise damaged(f"a whole number of {length:,} bytes")
            wide = second == 1 and (length < 64 or _WIDE.search(data, position, position + length))
            memory += 64 + (4 * length if wide else length)
            position += length
            stack.append(_LEAF)
        elif kind == _TUPLE:
            base = len(stack) - first if first else marks.pop()
            items = stack[base:]
            if len(items) < first:
                raise IndexError
            if second:
                _check_keys(items)
            nodes = min(sum(item >> 7 for item in items) + 1, NODES + 1)
            value = nodes * 128 + _deeper(0, items)
            stack[base:] = [same.setdefault(value, value)]
            memory += (240 + 64 * len(items) if second else 56 + 8 * len(items)) + _SLOT
        elif kind == _CALL:
            del stack[-first:]
            memory += second + _SLOT
            if code == b"b"[0]:
                continue
            stack.append(_LEAF)
        elif kind == _LINE:
            for _ in range(first):
                end = data.find(b"\n", position)
                if end < 0:
                    raise IndexError
                length = end - position
                if not second and length > DIGITS:
                    raise damaged(f"a line of {length:,} bytes")
                wide = code == b"V"[0] and _WIDE_ESCAPE.search(data, position, end)
                memory += 64 + (4 * length if wide else length)
                position = end + 1
            if code == b"i"[0]:
                del stack[marks.pop() :]
            stack.append(_LEAF)
        elif kind == _ITEM:
            items = stack[-first:]
            if second:
                _check_keys(items[:1])
            del stack[-first:]
            stack[-1] = _LEAF + _deeper(stack[-1] & _DEPTH, items)
            memory += 80 if second else 2 * _SLOT
        elif kind == _MARKED:
            base = marks.pop()
            items = stack[base:]
            del stack[base:]
            if second:
                _check_keys(items[::second])
            if first:
                stack.append(_LEAF)
            stack[-1] = _LEAF + _deeper(stack[-1] & _DEPTH, items)
            memory += 240 * first + (80 if second else _SLOT) * len(items)
        elif code == b"("[0]:
            marks.append(len(stack))
            if len(marks) > NESTING:
                raise _too_deep()
        elif code == b"0"[0]:
            # As the unpickler does: a mark on the top goes before what is below it.
            if marks and marks[-1] == len(stack):
                marks.pop()
            else:
                stack.pop()
        elif code == b"1"[0]:
            del stack[marks.pop() :]
        elif code == b"2"[0]:
            stack.append(stack[-1])
            memory += _SLOT
        elif code == b"\x95"[0]:
            length = int.from_bytes(data[position : position + 8], "little")
            position += 8
            if position < framed or length > size - position:
                raise damaged(f"a frame of {length:,} bytes where {size - position:,} are left")
            framed = position + length
            memory += length
        elif code == b"\x80"[0]:
            if data[position] > 5:
                raise damaged(f"protocol {data[position]}")
            position += 1
        else:
            if not stack:
                raise IndexError
            return Scan(position, opcodes, memory + largest)
        if len(stack) * 2 * _SLOT > largest:
            largest = len(stack) * 2 * _SLOT
        if memory + largest > limit:
            raise Refused(
                f"its content must fit into {limit:,} bytes, three times the file, got a pickle that would take more"
            )
        if opcodes > OPCODES:
            raise Refused(f"the pickle must have at most {OPCODES:,} opcodes, got more")


def _run(bytes_of: np.ndarray, position: int, width: int) -> int:
    """How many opcodes of one kind and width follow each other, 4096 at most."""
    codes = bytes_of[position : position + 4096 * width : width]
    whole = (min(len(bytes_of), position + 4096 * width) - position) // width
    other = np.flatnonzero(codes[:whole] != codes[0])
    return int(other[0]) if len(other) else whole


def _index(data, position: int, width: int) -> tuple[int, int]:
    if width:
        if position + width > len(data):
            raise IndexError
        return int.from_bytes(data[position : position + width], "little"), position + width
    end = data.find(b"\n", position)
    if not 0 <= end - position <= DIGITS:
        raise IndexError
    digits = bytes(data[position:end])
    if not digits.isdigit():
        raise damaged("a memo without a number")
    return int(digits), end + 1


def _deeper(depth: int, items: list[int]) -> int:
    depth = max(depth, 1 + max((item & _DEPTH for item in set(items)), default=0))
    if depth > NESTING:
        raise _too_deep()
    return depth


def _check_keys(items: list[int]) -> None:
    if any(item >> 7 > NODES for item in set(items)):
        raise Refused(f"keys must hold at most {NODES} objects, got a pickle with a larger one")


def _too_deep() -> Refused:
    return Refused(f"the pickle must nest at most {NESTING} deep, got more")
