"""``torch.ops.mmfast`` exists wherever both mmfast and torch are imported, in either order.

Programs that ``torch.export`` saved ask torch for operations by name and import nothing, so importing mmfast has to
be enough to run them; and yet importing mmfast does not import torch.
"""

from __future__ import annotations

import sys
from importlib.abc import MetaPathFinder


def with_torch() -> None:
    """Register the operations, now if torch is there, else at the end of its import."""
    if "torch" in sys.modules:
        _register()
    else:
        sys.meta_path.insert(0, _TorchFinder())


def _register() -> None:
    import mmfast.ops  # noqa: F401 - registers by being imported


class _TorchFinder(MetaPathFinder):
    """Finds torch as the other finders do, and has it followed by the registration."""

    def find_spec(self, name, path=None, target=None):
        if name != "torch":
            return None
        found = (finder.find_spec(name, path, target) for finder in sys.meta_path if finder is not self)
        spec = next(filter(None, found), None)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_register(module) -> None:
                execute(module)
                if self in sys.meta_path:
                    sys.meta_path.remove(self)
                    _register()

            spec.loader.exec_module = execute_and_register
        return spec
