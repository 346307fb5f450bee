"""A document of headings, text, tables and figures, as Markdown and as one HTML file."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate


@dataclass(frozen=True)
class Heading:
    text: str
    level: int = 2

    def markdown(self) -> str:
        return f"{'#' * self.level} {self.text}"

    def html(self) -> str:
        return f"<h{self.level}>{html.escape(self.text)}</h{self.level}>"


@dataclass(frozen=True)
class Text:
    text: str
    style: str = ""

    def markdown(self) -> str:
        return f"**{self.text}**" if self.style else self.text

    def html(self) -> str:
        return f"<p{f' class={self.style!r}' if self.style else ''}>{html.escape(self.text)}</p>"


@dataclass(frozen=True)
class Facts:
    """Names and what is to be known of each."""

    rows: Sequence[tuple[str, str]]

    def markdown(self) -> str:
        return "\n".join(f"- **{name}**: {text}" for name, text in self.rows)

    def html(self) -> str:
        rows = (f"<dt>{html.escape(name)}</dt><dd>{html.escape(text)}</dd>" for name, text in self.rows)
        return f"<dl>{''.join(rows)}</dl>"


@dataclass(frozen=True)
class Code:
    text: str

    def markdown(self) -> str:
        return f"```yaml\n{self.text.rstrip()}\n```"

    def html(self) -> str:
        return f"<pre>{html.escape(self.text.rstrip())}</pre>"


@dataclass(frozen=True)
class Table:
    """The first column names the row; all others are numbers."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""

    def markdown(self) -> str:
        lines = [self.header, ["---"] + ["---:"] * (len(self.header) - 1), *self.rows]
        table = "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines)
        return f"{table}\n\n{self.caption}" if self.caption else table

    def html(self) -> str:
        def row(cells: Sequence[str], tag: str) -> str:
            return f"<tr>{''.join(f'<{tag}>{html.escape(cell)}</{tag}>' for cell in cells)}</tr>"

        body = "".join(row(cells, "td") for cells in self.rows)
        caption = f"<figcaption>{html.escape(self.caption)}</figcaption>" if self.caption else ""
        head = row(self.header, "th")
        return f"<figure><table><thead>{head}</thead><tbody>{body}</tbody></table>{caption}</figure>"

    def text(self, width: int = 80) -> str:
        """Aligned columns for a terminal, as many of them as fit its width."""
        lines = [self.header, *self.rows]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        ends = accumulate(widths, lambda end, column: end + 2 + column)
        fitting = sum(end <= width for end in ends)
        lines, widths = [line[:fitting] for line in lines], widths[:fitting]
        return "\n".join(
            "  ".join(
                cell.rjust(width) if i else cell.ljust(width)
                for i, (cell, width) in enumerate(zip(line, widths, strict=True))
            )
            for line in lines
        )


@dataclass(frozen=True)
class Figure:
    """A PNG; ``name`` is its file beside the Markdown."""

    name: str
    png: bytes
    caption: str

    def markdown(self) -> str:
        return f"![{self.caption}]({self.name})\n\n{self.caption}"

    def html(self) -> str:
        data = base64.b64encode(self.png).decode()
        caption = html.escape(self.caption)
        image = f'<img src="data:image/png;base64,{data}" alt="{caption}">'
        return f"<figure>{image}<figcaption>{caption}</figcaption></figure>"


Block = Heading | Text | Facts | Code | Table | Figure

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1c2430; max-width: 68rem; margin: 2rem auto; padding: 0 1.5rem; }
h1 { font-size: 1.7rem; } h2 { font-size: 1.25rem; margin-top: 2.4rem; border-bottom: 1px solid #d7dce3; }
figure { margin: 1.2rem 0; overflow-x: auto; } figcaption { color: #5a6675; font-size: .9em; margin-top: .4rem; }
img { max-width: 100%; height: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .93em; }
th, td { padding: .3rem .8rem; text-align: right; white-space: nowrap; border-bottom: 1px solid #e6e9ee; }
th { border-bottom: 2px solid #98a3b3; } th:first-child, td:first-child { text-align: left; padding-left: 0; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1.2rem; }
dt { color: #5a6675; } dd { margin: 0; overflow-wrap: anywhere; }
.verdict { font-size: 1.1em; border-left: 4px solid #0072B2; padding-left: .8rem; }
pre { background: #f4f6f8; padding: .9rem 1.1rem; font-size: .85em; line-height: 1.4; overflow-x: auto; }
"""


def to_markdown(blocks: Sequence[Block]) -> str:
    """Figures are links to files of their names."""
    return "\n\n".join(block.markdown() for block in blocks) + "\n"


def to_html(title: str, blocks: Sequence[Block]) -> str:
    """One file that needs no other: figures and style are inside."""
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{html.escape(title)}</title>\n'
        f'<meta name="viewport" content="width=device-width">\n<style>{STYLE}</style>\n</head>\n<body>\n'
        + "\n".join(block.html() for block in blocks)
        + "\n</body>\n</html>\n"
    )
