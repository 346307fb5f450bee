"""Every name that the documentation uses, and every name that a module offers, can be imported from there."""

from __future__ import annotations

import importlib
import pkgutil
import re
from pathlib import Path

import pytest

import mmfast

TOP = Path(__file__).resolve().parents[1]
PAGES = [TOP / "README.md", *sorted((TOP / "docs").glob("*.md"))]
STATEMENT = re.compile(r"\bfrom (mmfast[\w.]*) import (\([^)]*\)|[\w, ]+)")
DOTTED = re.compile(r"(?<![\w/.\-])mmfast((?:\.[A-Za-z_]\w*)+)")
# Promised whether or not a page has an example of them.
PROMISED = (
    "BARLOW_TWINS_VARIANTS",
    "BarlowTwinsComponents",
    "barlow_twins",
    "barlow_twins_components",
    "clip",
    "directed_pkt",
    "effective_rank",
    "info_nce",
    "multi_view_barlow_twins",
    "n_pair",
    "nt_xent",
    "pairwise_hinge",
    "pkt",
    "siglip",
    "smooth_triplet",
    "soft_nearest_neighbour",
    "sup_con",
    "triplet_margin",
    "vicreg",
)


def documented() -> list[str]:
    """Dotted names without ``mmfast.``, from import statements, from text and from signatures."""
    names = {f"functional.{name}" for name in PROMISED} | {"ops.barlow_twins.reference"}
    for page in PAGES:
        text = page.read_text()
        for module, imported in STATEMENT.findall(text):
            for name in re.split(r"[\s,]+", imported.strip("() \n")):
                names.add(f"{module}.{name}".partition(".")[2])
        names |= {found.lstrip(".") for found in DOTTED.findall(text)}
    return sorted(names)


def offered() -> list[str]:
    """Modules with an ``__all__``."""
    found = ["mmfast"]
    for module in pkgutil.walk_packages(mmfast.__path__, "mmfast."):
        path = TOP / module.name.replace(".", "/")
        sources = [path.with_suffix(".py"), path / "__init__.py"]
        if any("__all__ = " in source.read_text() for source in sources if source.exists()):
            found.append(module.name)
    return found


def found(dotted: str):
    """What ``mmfast.DOTTED`` is: attributes of the longest part that is a module."""
    parts = ["mmfast", *dotted.split(".")]
    for cut in range(len(parts), 0, -1):
        try:
            value = importlib.import_module(".".join(parts[:cut]))
        except ModuleNotFoundError as error:
            if not ".".join(parts).startswith(error.name or ""):
                raise
            continue
        for name in parts[cut:]:
            value = getattr(value, name)
        return value
    raise AssertionError(dotted)


@pytest.mark.parametrize("name", documented())
def test_documented_names_are_there(name):
    assert found(name) is not None


@pytest.mark.parametrize("module", offered())
def test_offered_names_are_there(module):
    loaded = importlib.import_module(module)
    assert len(set(loaded.__all__)) == len(loaded.__all__)
    for name in loaded.__all__:
        assert hasattr(loaded, name), f"{module}.{name}"


def test_the_documentation_names_something():
    assert {"BarlowTwinsLoss", "functional.effective_rank", "ops.barlow_twins.reference"} <= set(documented())
    assert {"mmfast", "mmfast.data", "mmfast.functional", "mmfast.losses", "mmfast.models"} <= set(offered())
