"""A page of headings, text, tables and pictures, written as Markdown and as HTML from the same parts."""

import html
from collections.abc import Sequence
from dataclasses import dataclass, field

_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2em auto; max-width: 75em; padding: 0 1em; }
table { border-collapse: collapse; font-size: 13px; margin: 1em 0; display: block; overflow-x: auto; }
th, td { border-bottom: 1px solid #ddd; padding: 2px 8px; text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
th { border-bottom: 2px solid #888; vertical-align: bottom; }
img { max-width: 100%; }
"""


@dataclass
class Page:
    """Parts are added in order. Texts are plain: what Markdown or HTML would read as markup is escaped."""

    title: str
    _parts: list[tuple] = field(default_factory=list)

    def heading(self, text: str, level: int = 2) -> None:
        self._parts.append(("heading", text, level))

    def text(self, text: str) -> None:
        self._parts.append(("text", text))

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Raises ValueError for a row that has not a cell for every column."""
        if any(len(row) != len(columns) for row in rows):
            raise ValueError("a row has not as many cells as there are columns")
        self._parts.append(("table", list(columns), [list(row) for row in rows]))

    def picture(self, path: str, says: str) -> None:
        """``path``: relative to the page."""
        self._parts.append(("picture", path, says))

    def markdown(self) -> str:
        lines = [f"# {_marked(self.title)}", ""]
        for kind, *part in self._parts:
            if kind == "heading":
                lines += [f"{'#' * part[1]} {_marked(part[0])}", ""]
            elif kind == "text":
                lines += [_marked(part[0]), ""]
            elif kind == "picture":
                lines += [f"![{_marked(part[1])}]({part[0].replace(' ', '%20')})", ""]
            else:
                columns, rows = part
                aligned = [":--", *["--:"] * (len(columns) - 1)]
                lines += [f"| {' | '.join(map(_marked, columns))} |", f"| {' | '.join(aligned)} |"]
                lines += [f"| {' | '.join(map(_marked, row))} |" for row in rows]
                lines.append("")
        return "\n".join(lines)

    def html(self) -> str:
        body = [f"<h1>{html.escape(self.title)}</h1>"]
        for kind, *part in self._parts:
            if kind == "heading":
                body.append(f"<h{part[1]}>{html.escape(part[0])}</h{part[1]}>")
            elif kind == "text":
                body.append(f"<p>{html.escape(part[0])}</p>")
            elif kind == "picture":
                said = html.escape(part[1], quote=True)
                body.append(f'<p><img src="{html.escape(part[0], quote=True)}" alt="{said}"></p>')
            else:
                columns, rows = part
                head = "".join(f"<th>{html.escape(one)}</th>" for one in columns)
                cells = ("".join(f"<td>{html.escape(one)}</td>" for one in row) for row in rows)
                body.append(f"<table><tr>{head}</tr>{''.join(f'<tr>{row}</tr>' for row in cells)}</table>")
        title = html.escape(self.title)
        head = f'<meta charset="utf-8"><title>{title}</title><style>{_STYLE}</style>'
        return (
            f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>\n'
            + "\n".join(body)
            + "\n</body></html>\n"
        )


def _marked(text: str) -> str:
    """Without what a table or Markdown would read as its own; a method's underscores stay as they are."""
    escaped = " ".join(text.split()).replace("\\", "\\\\").replace("|", "\\|")
    for mark in "*`<":
        escaped = escaped.replace(mark, f"\\{mark}")
    return escaped.replace("](", "]\\(")  # brackets alone are no link
