"""Every case that takes turns has one, always the same, and a run can be told which."""

from pathlib import Path
from types import SimpleNamespace

import conftest
import hypothesis.strategies as st
import pytest
import rotation
from hypothesis import given


def case(name, *arguments, marked=True):
    marker = SimpleNamespace(args=arguments) if marked else None
    path = Path("anywhere") / "test_x.py"
    return SimpleNamespace(name=name, path=path, get_closest_marker=lambda name: marker)


CASES = [case(f"test_many[{i}]") for i in range(40)]
CASES += [case(f"test_few[{i}]", i) for i in range(4)] + [case("test_always", marked=False)]


@pytest.fixture
def run(monkeypatch):
    """(names of cases that a run with ``MMFAST_ROTATION=value`` has, what it says at the end)."""

    def run(value):
        monkeypatch.setenv("MMFAST_ROTATION", value)
        items, lines, deselected = list(CASES), [], []
        hook = SimpleNamespace(pytest_deselected=lambda items: deselected.extend(items))
        config = SimpleNamespace(hook=hook)
        conftest.pytest_collection_modifyitems(config, items)
        conftest.pytest_terminal_summary(SimpleNamespace(write_line=lines.append), config)
        assert len(items) + len(deselected) == len(CASES)
        return {item.name for item in items}, lines

    return run


def test_every_case_has_its_turn(run):
    slices = [run(str(number))[0] for number in range(4)]
    everything = {item.name for item in CASES}
    assert set.union(*slices) == everything == run("all")[0]
    assert all(
        sum(name in part for part in slices) == (4 if name == "test_always" else 1) for name in everything
    )
    assert all(f"test_few[{i}]" in slices[i] and 5 < len(slices[i]) < 20 for i in range(4))
    assert run("6") == run("2") and run("") == run("0")


def test_a_run_says_how_to_repeat_it(run):
    names, (line,) = run("7")
    assert line.startswith(
        f"slice 3 of 4: {len(CASES) - len(names)} cases wait for their turn; MMFAST_ROTATION=3 "
    )
    assert run("all")[1] == []


def test_turns_of_examples(monkeypatch):
    seen = {}
    for value in ("0", "1", "1", "all"):
        monkeypatch.setenv("MMFAST_ROTATION", value)
        drawn = []

        @rotation.examples(80)
        @given(st.integers(0, 10**9))
        def draw(number):
            drawn.append(number)  # noqa: B023 - called here

        draw()
        assert seen.setdefault(value, drawn) == drawn
    assert len(seen["0"]) <= 20 < len(seen["all"]) and seen["0"] != seen["1"]


@pytest.mark.parametrize("value", ["some", "-1", "1.5"])
def test_unknown_turns_are_refused(run, value):
    with pytest.raises(
        pytest.UsageError, match=f"MMFAST_ROTATION must be a whole number or all, got '{value}'"
    ):
        run(value)
