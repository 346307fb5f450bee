"""What all tests share."""

import os
from pathlib import Path

import pytest
import rotation
import torch
from hypothesis import settings

import mmfast.backends

# Triton decides when it is imported whether kernels are compiled or interpreted on CPU tensors.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Shared 2-core machines are slow now and then: examples have no deadline, and a fixed seed makes runs repeat.
settings.register_profile("mmfast", deadline=None, derandomize=True, max_examples=40)
settings.load_profile("mmfast")


def pytest_collection_modifyitems(config, items):
    """Leaves out the marked cases of which it is not the turn."""
    turns = [(item, rotation.mine(rotation.slice_of(item))) for item in items]
    items[:] = [item for item, runs in turns if runs]
    config.left_out = [item for item, runs in turns if not runs]
    config.hook.pytest_deselected(items=config.left_out)


def pytest_terminal_summary(terminalreporter, config):
    if left := len(getattr(config, "left_out", ())):
        number = rotation.chosen()
        terminalreporter.write_line(
            f"slice {number} of {rotation.SLICES}: {left} cases wait for their turn; "
            f"MMFAST_ROTATION={number} repeats this choice, MMFAST_ROTATION=all runs everything"
        )


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


@pytest.fixture
def poisoned_memory():
    """Fills what ``torch.empty`` returns with NaN (integers: the largest value), so that unwritten output shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def backend(request):
    """See targets.BACKENDS; that looks at the variable above."""
    from targets import on

    with on(request.param):
        yield request.param


@pytest.fixture(scope="session")
def native():
    """``mmfast._C``; without a compiler the tests of the kernels themselves have nothing to test."""
    if mmfast.backends._C is None:
        pytest.skip(mmfast.backends.why_not("cpu", "cpu"))
    return mmfast.backends._C


@pytest.fixture
def every_isa(native):
    """A function that yields each usable instruction set after switching to it."""
    before = native.use_isa(native.isas()[-1])

    def switch():
        for name in native.isas():
            native.use_isa(name)
            yield name

    yield switch
    native.use_isa(before)


@pytest.fixture
def shared():
    """The folder of real data sets, which are not part of the project."""
    root = Path(__file__).resolve().parents[1]
    folder = Path(os.environ.get("MMFAST_SHARED", root.parent / "shared"))
    if not (folder / "data").is_dir():
        pytest.skip("no real data here: set MMFAST_SHARED to the folder that holds data/")
    return folder
