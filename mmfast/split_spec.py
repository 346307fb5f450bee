"""How data are to be divided, in words: what `--split` takes, told apart and refused without importing torch."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Real

from mmfast.errors import UserError

RULE = (
    "shares of train, valid and test that add up to 1 such as 0.7,0.1,0.2, the first above 0 and below 1; a .json or "
    ".csv file of names; kfold:K or kfold:K:FOLD; GROUP or GROUP:VALUE, such as speaker, to leave one out"
)
FILES = (".json", ".csv")


@dataclass(frozen=True)
class Shares:
    """Of train, valid and test, adding up to 1; a share of 0 keeps the split that there is."""

    train: float
    valid: float
    test: float


@dataclass(frozen=True)
class Lists:
    """Names of samples, or of groups such as videos.

    Attributes:
        source: a file, or split -> names.
    """

    source: str | Mapping[str, Sequence[str]]


@dataclass(frozen=True)
class KFold:
    """One fold of k-fold cross-validation, or the protocol of all of them where ``fold`` is None."""

    folds: int
    fold: int | None = None


@dataclass(frozen=True)
class LeaveOut:
    """One value of a group is tested, such as a speaker; each in turn, the protocol, where ``value`` is None."""

    group: str
    value: str | None = None


Spec = Shares | Lists | KFold | LeaveOut


@dataclass(frozen=True)
class Protocol:
    """How samples are cross-validated.

    Attributes:
        spec: what each fold is: k-fold, or leaving out each value of a group.
        seed: of the folds of k-fold.
        group: what k-fold never divides, None for all that samples may share; see `mmfast.data.divide`.
    """

    spec: KFold | LeaveOut
    seed: int = 0
    group: str | None = None

    def words(self) -> list[str | int | None]:
        """What :meth:`of_words` makes the same protocol from: plain values for files and hashes."""
        spec = self.spec
        return [f"kfold:{spec.folds}" if isinstance(spec, KFold) else spec.group, self.seed, self.group]

    @classmethod
    def of_words(cls, words: Sequence) -> Protocol:
        """The protocol of :meth:`words`.

        Raises:
            UserError: other words.
        """
        if len(words) == 3 and isinstance(words[0], str) and type(words[1]) is int:
            spec, seed, group = words
            parsed = parse(spec)
            if is_protocol(parsed) and isinstance(group, str | None):
                return cls(parsed, seed, group)
        raise UserError(
            f"protocol must be kfold:K or a group, with a seed and a group or null, got {list(words)}"
        )


def is_protocol(spec: Spec) -> bool:
    """Whether it asks for several folds."""
    return (isinstance(spec, KFold) and spec.fold is None) or (
        isinstance(spec, LeaveOut) and spec.value is None
    )


def parse(spec: Spec | str | os.PathLike | Sequence[float] | Mapping[str, Sequence[str]]) -> Spec:
    """What is meant by a word, three numbers, a path, or lists of names.

    Raises:
        UserError: none of these.
    """
    if isinstance(spec, Spec):
        return spec
    found = None
    if isinstance(spec, Mapping):
        found = Lists(spec)
    elif isinstance(spec, (str, os.PathLike)):
        found = _of_text(os.fspath(spec))
    elif are_shares(spec):
        found = Shares(*map(float, spec))
    if found is None:
        raise UserError(f"split: must be {RULE}, got {spec!r}")
    return found


def parsable(spec) -> bool:
    """Whether :func:`parse` takes it."""
    try:
        parse(spec)
    except UserError:
        return False
    return True


def are_shares(shares) -> bool:
    """Whether these are three shares of train, valid and test: train above 0, not all in train, 1 in all."""
    numbers = isinstance(shares, Sequence) and len(shares) == 3 and all(isinstance(s, Real) for s in shares)
    return numbers and min(shares) >= 0 < shares[0] < 1 and abs(sum(shares) - 1) < 1e-6


def _of_text(text: str) -> Spec | None:
    if text.lower().endswith(FILES):
        return Lists(text)
    word, colon, rest = text.strip().partition(":")
    if word == "kfold":
        return _of_folds(rest)
    if (numbers := _numbers(text)) is not None:
        return Shares(*numbers) if are_shares(numbers) else None
    if not word or word[0] in "[{" or (colon and not rest):
        return None
    return LeaveOut(word, rest if colon else None)


def _of_folds(text: str) -> KFold | None:
    numbers = [int(part) if part.isdecimal() and len(part) < 10 else -1 for part in text.split(":")]
    if len(numbers) > 2 or numbers[0] < 2 or numbers[-1] < 0:
        return None
    if len(numbers) == 2 and numbers[1] >= numbers[0]:
        return None
    return KFold(*numbers)


def _numbers(text: str) -> list[float] | None:
    try:
        return [float(part) for part in text.strip("[] ").split(",")]
    except ValueError:
        return None
