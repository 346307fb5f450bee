"""The house: imports point down only, and a file has one idea."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# From the top floor down. A module may import what is on its own floor and below; what is not named is in the cellar.
FLOORS = (
    ("__main__",),
    ("cli",),
    ("studies",),
    ("training",),
    ("adapters", "plots"),
    ("losses", "functional"),
    ("transforms", "plan"),
    ("nn",),
    ("models",),
    ("tasks",),
    ("data",),
    ("ops",),
    ("triton",),
)
CELLAR = (
    "backends",
    "checks",
    "class_metrics",
    "cuda_runtime",
    "errors",
    "files",
    "metrics",
    "registration",
    "split_spec",
    "version",
    "wording",
)
# (top of who, whom) -> why it may look up all the same.
EXCEPTIONS = {
    ("registration", "ops"): "has the operations registered once torch is there",
    ("triton", "ops.augment.plan"): "the layout of a plan is written down once in Python",
    ("triton", "ops.random"): "and so are the purposes of random words",
}

# Files of more lines than this hold two ideas, unless the reason is here.
MOST_LINES = 450
LONG: dict[str, str] = {}


def modules() -> dict[str, Path]:
    """Name without ``mmfast.`` -> file; the package itself is ``""``."""
    found = {}
    for path in sorted((ROOT / "mmfast").rglob("*.py")):
        parts = path.relative_to(ROOT / "mmfast").with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def imports(tree: ast.AST) -> Iterator[str]:
    """Modules of the package that a module imports, wherever in it, by their names without ``mmfast.``."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            raise AssertionError(f"line {node.lineno}: imports are absolute")
        else:
            continue
        for name in found:
            top, _, rest = name.partition(".")
            if top != "mmfast":
                continue
            while rest and rest not in MODULES:
                rest = rest.rpartition(".")[0]
            if name != "mmfast._C":  # compiled, and below all
                yield rest


def floor(module: str) -> int:
    top = module.partition(".")[0]
    for height, names in zip(range(len(FLOORS), 0, -1), FLOORS, strict=True):
        if top in names:
            return height
    assert top in CELLAR, f"mmfast.{module} is on no floor of this table"
    return 0


@pytest.mark.parametrize("module", [name for name in MODULES if name])
def test_imports_point_down(module):
    for imported in imports(ast.parse(MODULES[module].read_text())):
        assert imported, f"mmfast.{module} imports the package, which has the names of all floors"
        if (module.partition(".")[0], imported) not in EXCEPTIONS:
            assert floor(imported) <= floor(module), f"mmfast.{module} imports mmfast.{imported}, above it"


def test_the_command_line_is_imported_by_nobody():
    above = {"__main__", "cli"}
    for module, path in MODULES.items():
        if module.partition(".")[0] not in above:
            assert not any(name.partition(".")[0] in above for name in imports(ast.parse(path.read_text())))


def test_every_floor_and_every_exception_is_there():
    tops = {name.partition(".")[0] for name in MODULES if name}
    assert set(CELLAR) <= tops and {name for names in FLOORS for name in names} - {"nn"} <= tops
    for who, whom in EXCEPTIONS:
        paths = [path for name, path in MODULES.items() if name.partition(".")[0] == who]
        assert any(whom in imports(ast.parse(path.read_text())) for path in paths)


def test_files_have_one_idea():
    kinds, folders = (".py", ".h", ".cpp", ".cu", ".sh"), ("mmfast", "csrc", "python_tests", "benchmarks")
    paths = [path for folder in folders for path in (ROOT / folder).rglob("*") if path.suffix in kinds]
    lines = {str(path.relative_to(ROOT)): path.read_text().count("\n") for path in paths}
    too_long = {name: count for name, count in lines.items() if count > MOST_LINES and name not in LONG}
    assert not too_long, f"split by idea, or say in LONG what the one idea is: {too_long}"
