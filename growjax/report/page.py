"""One self-contained HTML page: the answer, figures as inline SVG and tables, with nothing to fetch."""

import dataclasses
import html
import io
import itertools
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from growjax.report.figures import COLOURS, style
from growjax.values.codec import write_text


@dataclasses.dataclass(frozen=True)
class Plot:
    """A figure with its heading and a caption of a sentence."""

    title: str
    figure: Figure
    caption: str


@dataclasses.dataclass(frozen=True)
class Table:
    """Rows of text under column heads. The first column is the row's name; the others are numbers."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""


@dataclasses.dataclass(frozen=True)
class Section:
    """A part of a page: a heading, sentences, and figures and tables in their order.

    A section that is `folded` shows its heading alone until somebody opens it.
    """

    title: str
    blocks: Sequence[Plot | Table]
    answer: Sequence[str] = ()
    folded: bool = False


def write_page(
    path: str | Path,
    title: str,
    plots: Sequence[Plot] = (),
    tables: Sequence[Table] = (),
    notes: Sequence[str] = (),
    *,
    answer: Sequence[str] = (),
    sections: Sequence[Section] = (),
) -> Path:
    """Write the page and return its path: the answer, figures, tables, sections, and notes as a list.

    **Arguments**

    - `answer`: sentences, which a reader who goes no further has read.
    - `tables`: those of more than 12 rows are folded.
    - `notes`: how each number was made; folded.

    **Example**

        with style():
            figure, axes = canvas()
            axes.plot(x, y)
        plot = Plot("Loss", figure, "Lower is better.")
        write_page("report.html", "Growth", [plot], answer=["Growing is better by 0.11."])
    """
    numbers = itertools.count()
    body = [f"<h1>{html.escape(title)}</h1>", *_answer(answer)]
    body += [_block(block, numbers) for block in (*plots, *tables)]
    body += [_section(section, numbers) for section in sections]
    if notes:
        items = "".join(f"<li>{html.escape(note)}</li>" for note in notes)
        body.append(_fold("How each number was made", f"<ul>{items}</ul>"))
    write_text(
        path,
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{html.escape(title)}</title><style>{_css()}</style></head>"
        f"<body><main>{''.join(body)}</main></body></html>\n",
    )
    return Path(path)


# A table of more rows is folded
_LONG = 12


def _answer(sentences: Sequence[str]) -> Iterator[str]:
    for sentence in sentences:
        yield f"<p class=answer>{html.escape(sentence)}</p>"


def _section(section: Section, numbers: Iterator[int]) -> str:
    blocks = "".join(_block(block, numbers) for block in section.blocks)
    body = "".join(_answer(section.answer)) + blocks
    if section.folded:
        return _fold(section.title, body)
    return f"<section><h2>{html.escape(section.title)}</h2>{body}</section>"


def _fold(title: str, body: str) -> str:
    return f"<details><summary>{html.escape(title)}</summary>{body}</details>"


def _block(block: Plot | Table, numbers: Iterator[int]) -> str:
    return _plot(block, next(numbers)) if isinstance(block, Plot) else _table(block)


def _table(table: Table) -> str:
    """On a narrow screen every row is a card, and each cell says its column's head before it."""
    heads = [html.escape(str(head)) for head in table.columns]
    rows = []
    for row in table.rows:
        cells = [
            f'<td data-head="{html.escape(str(head), quote=True)}">{html.escape(str(cell))}</td>'
            for head, cell in zip(table.columns, row, strict=True)
        ]
        rows.append(f"<tr>{''.join(cells)}</tr>")
    caption = f"<p>{html.escape(table.caption)}</p>" if table.caption else ""
    body = (
        f"<table><thead><tr>{''.join(f'<th>{head}</th>' for head in heads)}</tr></thead>"
        f"<tbody>{''.join(rows)}</tbody></table>{caption}"
    )
    if len(table.rows) > _LONG:
        return _fold(f"{table.title} ({len(table.rows)} rows)", body)
    return f"<h3>{html.escape(table.title)}</h3>{body}"


def _plot(plot: Plot, n: int) -> str:
    out = io.StringIO()
    with style():
        plot.figure.savefig(out, format="svg", metadata={"Date": None}, transparent=True)
    svg = out.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    # Matplotlib numbers its parts alike in every figure; the page needs ids that are unique.
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>p{n}-", svg)
    label = html.escape(f"{plot.title}. {plot.caption}", quote=True)
    svg = re.sub(
        r'<svg (.*?) width="[^"]*"', rf'<svg role="img" aria-label="{label}" \1', svg, count=1
    )
    svg = re.sub(r'(<svg [^>]*?) height="[^"]*"', r"\1", svg, count=1)
    for name, (light, _) in COLOURS.items():
        svg = svg.replace(light, f"var(--{name})")
    caption = html.escape(plot.caption)
    return (
        f"<h3>{html.escape(plot.title)}</h3>"
        f"<figure><div>{svg}</div><figcaption>{caption}</figcaption></figure>"
    )


def _css() -> str:
    light = "".join(f"--{name}:{light};" for name, (light, _) in COLOURS.items())
    dark = "".join(f"--{name}:{dark};" for name, (_, dark) in COLOURS.items())
    return (
        f":root{{{light}}}@media(prefers-color-scheme:dark){{:root{{{dark}}}}}"
        "body{background:var(--paper);color:var(--ink);margin:0;"
        "font:16px/1.5 system-ui,-apple-system,'Segoe UI',sans-serif}"
        "main{max-width:70rem;margin:0 auto;padding:1.5rem 1rem 4rem}"
        "h1{font-size:1.6rem;line-height:1.25}h2{font-size:1.35rem;margin:2.8rem 0 .6rem;"
        "border-top:1px solid var(--line);padding-top:1.2rem}h3{font-size:1.05rem;margin:1.8rem 0 .5rem}"
        "p,figcaption,li{color:var(--soft);font-size:.92rem;max-width:54rem}"
        ".answer{color:var(--ink);font-size:1.08rem}figure{margin:0;max-width:44rem}"
        "summary{cursor:pointer;font-weight:600;margin:1rem 0;font-size:1.05rem}"
        "svg{display:block;width:100%;height:auto}"
        "svg text{font-family:system-ui,-apple-system,'Segoe UI',sans-serif!important}"
        "table{border-collapse:collapse;width:100%;font-size:.9rem}"
        "th,td{padding:.35rem .5rem;text-align:right;border-bottom:1px solid var(--line);"
        "font-variant-numeric:tabular-nums;vertical-align:baseline;overflow-wrap:break-word}"
        "th{font-weight:600;vertical-align:bottom;overflow-wrap:normal}"
        "th:first-child,td:first-child{text-align:left;padding-left:0}td:first-child{font-weight:600}"
        # On a narrow screen: cards instead of columns
        "@media(max-width:50rem){"
        "thead{display:none}table,tbody,tr,td{display:block}"
        "tr{border-bottom:1px solid var(--line);padding:.5rem 0}"
        "td{display:flex;justify-content:space-between;gap:1rem;border:0;padding:.1rem 0}"
        "td::before{content:attr(data-head);color:var(--soft);text-align:left}"
        "td:first-child::before{content:none}}"
    )
