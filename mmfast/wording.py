"""Words for refusals that are the same wherever something is chosen by name; torch-free."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


def no_such_flag(word: str, known: Iterable[str]) -> str:
    """The sentence about a flag that does not exist."""
    return f"there is no {word}{guess(word, known)}"


def one_of(choices: Iterable) -> str:
    return f"one of {', '.join(map(str, choices))}"


def guess(word: str, known: Iterable[str]) -> str:
    """``; did you mean ...?`` with the known words that are like it, or nothing.

    Of dotted names the last part alone will do: ``--lr`` is like ``--pretraining.lr`` and ``--supervised.lr``.
    """
    names = {str(name).lstrip("-"): str(name) for name in known if name != word}
    bare = word.lstrip("-").replace("-", "_")
    alike = [name for name in names if "." in name and name.rpartition(".")[2] == bare]
    alike = [names[name] for name in alike or get_close_matches(bare, names, n=1, cutoff=0.6)]
    return f"; did you mean {' or '.join(alike)}?" if alike else ""
