"""Command-line flags, and what is wrong with them in plain words."""

from __future__ import annotations

import argparse
from typing import NoReturn

from mmfast.errors import UserError


class Parser(argparse.ArgumentParser):
    """argparse whose errors are a :class:`UserError` instead of usage and exit."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see {self.prog} --help)")
