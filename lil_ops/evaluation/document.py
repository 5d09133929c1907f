"""A document of headings, paragraphs, tables and figures, as Markdown and as one HTML page that needs no other file."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff; max-width: 84rem; margin: 2rem auto;
  padding: 0 1rem; }
h1, h2, h3 { line-height: 1.25; } h2 { margin-top: 2.5rem; border-bottom: 1px solid #ddd; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .7rem; text-align: right; border-bottom: 1px solid #e5e5e5; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
th { border-bottom: 2px solid #999; vertical-align: bottom; white-space: normal; min-width: 3.5rem; }
figure { margin: 1.5rem 0; } figure img { max-width: 100%; } figcaption { color: #555; font-size: 13px; }
"""


@dataclass(frozen=True)
class Heading:
    level: int
    text: str


@dataclass(frozen=True)
class Paragraph:
    text: str


@dataclass(frozen=True)
class Table:
    headings: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Figure:
    """``name``: of its .png and .svg, beside the document."""

    name: str
    caption: str


@dataclass
class Document:
    title: str
    blocks: list = field(default_factory=list)

    def add(self, *blocks) -> None:
        self.blocks += blocks

    def markdown(self) -> str:
        return "\n\n".join([f"# {self.title}", *map(_markdown, self.blocks)]) + "\n"

    def html(self, folder: Path) -> str:
        """With the figures, of which ``folder`` has the files, in it."""
        title = html.escape(self.title)
        body = "\n".join(_html(block, folder) for block in self.blocks)
        return (
            '<!doctype html>\n<html lang="en">\n<head><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            f"<title>{title}</title>\n<style>{STYLE}</style></head>\n<body>\n<h1>{title}</h1>\n{body}\n</body>\n</html>\n"
        )


def _markdown(block) -> str:
    match block:
        case Heading(level, text):
            return f"{'#' * level} {text}"
        case Paragraph(text):
            return text
        case Figure(name, caption):
            return f"![{caption}]({name}.png)\n\n*{caption}*"
        case Table(headings, rows):
            lines = [[cell.replace("|", "\\|") for cell in row] for row in (headings, *rows)]
            rule = "| --- |" + " ---: |" * (len(headings) - 1)
            first, *others = (f"| {' | '.join(line)} |" for line in lines)
            return "\n".join([first, rule, *others])


def _html(block, folder: Path) -> str:
    match block:
        case Heading(level, text):
            return f"<h{level}>{html.escape(text)}</h{level}>"
        case Paragraph(text):
            return f"<p>{html.escape(text)}</p>"
        case Figure(name, caption):
            picture = base64.b64encode((folder / f"{name}.svg").read_bytes()).decode()
            caption = html.escape(caption)
            return (
                f'<figure><img alt="{caption}" src="data:image/svg+xml;base64,{picture}">'
                f"<figcaption>{caption}</figcaption></figure>"
            )
        case Table(headings, rows):

            def line(cells: Sequence[str], tag: str) -> str:
                return f"<tr>{''.join(f'<{tag}>{html.escape(cell)}</{tag}>' for cell in cells)}</tr>"

            body = "\n".join(line(row, "td") for row in rows)
            return (
                f'<div class="wide"><table>\n<thead>{line(headings, "th")}</thead>\n<tbody>{body}</tbody></table></div>'
            )
