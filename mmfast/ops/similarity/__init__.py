"""Losses on the similarities of rows: the op and its reference."""
