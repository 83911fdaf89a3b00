"""Draw the two pictures of `docs/concepts.md`: `python docs/figures/methods.py`.

Text is drawn as paths and the card has its own light ground, so that both files look the same in
every browser and on every theme. The output is reproducible byte for byte.
"""

from pathlib import Path

import matplotlib


matplotlib.use("svg")

import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.colors import to_rgb  # noqa: E402
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle  # noqa: E402


HERE = Path(__file__).parent
INK, QUIET, CARD, LINE, GATE = "#20262e", "#5b6672", "#fafbfc", "#c9d1d9", "#2f3b52"
# One colour for each old coordinate; what comes from it wears it.
TINTS = ["#8ecae6", "#a7d8a0", "#ffd27d", "#f4a9a0", "#c7b6e8", "#9fd9cf"]
BOX = 0.74
MONO = "DejaVu Sans Mono"
NONE = -1

plt.rcParams.update(
    {
        "font.family": "DejaVu Sans",
        "svg.fonttype": "path",
        "svg.hashsalt": "growjax",
        "hatch.linewidth": 0.9,
        "mathtext.fontset": "dejavusans",
    }
)


def canvas(width: float, height: float):
    """Axes in units of one box, on a light card with rounded corners."""
    figure = plt.figure(figsize=(width * 0.385, height * 0.385))
    figure.patch.set_alpha(0)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, width), ylim=(0, height), aspect="equal")
    axes.axis("off")
    axes.add_patch(
        FancyBboxPatch(
            (0.15, 0.15),
            width - 0.3,
            height - 0.3,
            boxstyle="round,pad=0,rounding_size=0.35",
            facecolor=CARD,
            edgecolor=LINE,
            linewidth=1,
        )
    )
    return figure, axes


def save(figure, name: str) -> None:
    figure.savefig(HERE / name, metadata={"Date": None}, transparent=True)
    plt.close(figure)


def write(axes, x, y, text, *, size=9.5, color=INK, **kwargs):
    axes.text(
        x, y, text, **{"fontsize": size, "color": color, "ha": "center", "va": "center"} | kwargs
    )


def box(axes, x, y, label, *, tint="#ffffff", hatch=False, faded=False):
    """One coordinate."""
    axes.add_patch(
        FancyBboxPatch(
            (x - BOX / 2, y - BOX / 2),
            BOX,
            BOX,
            boxstyle="round,pad=0,rounding_size=0.1",
            facecolor="#ffffff" if hatch or faded else tint,
            edgecolor=QUIET if hatch else LINE if faded else INK,
            linewidth=1,
            linestyle="--" if faded else "-",
            hatch="////" if hatch else None,
        )
    )
    if label:
        write(axes, x, y, label, color="#9aa4ae" if faded else INK)


def shade(axes, x, y, width, height, *, opens):
    """The level of a gate: full, or every level from 0 to 1."""
    steps = 14 if opens else 1
    for k in range(steps):  # each over the rest of the last one: no seams
        colour = tuple(1 + (k + 1) / steps * (c - 1) for c in to_rgb(GATE))
        start = k * width / steps
        axes.add_patch(
            Rectangle((x + start, y), width - start, height, facecolor=colour, linewidth=0)
        )
    axes.add_patch(Rectangle((x, y), width, height, fill=False, edgecolor=INK, lw=0.8))


def arrow(axes, start, end):
    axes.add_patch(
        FancyArrowPatch(
            start,
            end,
            arrowstyle="-|>",
            mutation_scale=9,
            color=QUIET,
            linewidth=1.1,
            shrinkA=0,
            shrinkB=0,
        )
    )


def panel(axes, left, bottom, title, call, note, source, old, *, shares=None, gate=False):
    """A map: new coordinates above, old ones below, an arrow from each new one's source."""
    low, high = bottom + 1.0, bottom + 3.35

    tops, roots = ([left + 2.4 + 1.05 * i for i in range(n)] for n in (len(source), old))
    write(axes, left, bottom + 5.75, title, size=12, ha="left", weight="bold")
    write(
        axes, left, bottom + 5.17, call, size=9.5, ha="left", family="DejaVu Sans Mono", color=QUIET
    )
    write(axes, left, high, "new", ha="left", color=QUIET)
    write(axes, left, low, "old", ha="left", color=QUIET)
    for i, x in enumerate(roots):
        box(axes, x, low, str(i), tint=TINTS[i], faded=i not in source)
    for i, (x, s) in enumerate(zip(tops, source, strict=True)):
        box(axes, x, high, "" if s == NONE else str(s), tint=TINTS[s], hatch=s == NONE)
        if s != NONE:
            arrow(axes, (roots[s], low + BOX / 2 + 0.07), (x, high - BOX / 2 - 0.07))
        if shares:
            write(axes, x, high + 0.72, shares[i], size=10)
        if gate:
            shade(axes, x - BOX / 2, high + 0.56, BOX, 0.28, opens=s == NONE)
            write(axes, x, high + 1.16, "0 to 1" if s == NONE else "1", size=8)
    if shares:
        write(axes, left, high + 0.72, "share", ha="left", color=QUIET)
    if gate:
        write(axes, left, high + 0.7, "gate", ha="left", color=QUIET)
    write(axes, left, bottom + 0.05, note, size=9, ha="left", color=QUIET)


def methods() -> None:
    """The four methods as maps."""
    figure, axes = canvas(20.4, 16.2)
    left, right, up, down = 0.9, 10.9, 9.25, 1.95
    panel(
        axes,
        left,
        up,
        "MSG: hide",
        "gj.msg(mlp=6)",
        "Exact: a gate at 0 hides what is new, whatever it holds.",
        [0, 1, 2, 3, NONE, NONE],
        4,
        gate=True,
    )
    panel(
        axes,
        right,
        up,
        "Stacking: repeat layers",
        "gj.stack(layers=6)",
        "Not exact: every layer now acts twice.",
        [0, 1, 2, 0, 1, 2],
        3,
    )
    panel(
        axes,
        left,
        down,
        "Net2Net, HyperCloning: share",
        "gj.copy(mlp=6)",
        "Exact: the shares of one source add up to 1.",
        [0, 1, 2, 3, 0, 1],
        4,
        shares=["½", "½", "1", "1", "½", "½"],
    )
    panel(
        axes,
        right,
        down,
        "RaPTr: select",
        "gj.random_path(4)",
        "Another draw at every step; the whole model is kept.",
        [0, 2, 3, 5],
        6,
    )
    axes.plot([0.9, 19.5], [1.42, 1.42], color=LINE, linewidth=1)
    x, y = 1.27, 0.8
    box(axes, x, y, "2", tint=TINTS[2])
    write(axes, x + 0.6, y, "from old coordinate 2", ha="left", size=9)
    box(axes, x + 6.3, y, "", hatch=True)
    write(axes, x + 6.9, y, "NONE: a fresh coordinate", ha="left", size=9)
    box(axes, x + 13.2, y, "1", faded=True)
    write(axes, x + 13.8, y, "left out of this step", ha="left", size=9)
    save(figure, "methods.svg")


def matrix(axes, x, y, rows, columns, fill):
    """A matrix of cells; `fill(row, column)` gives tint, hatch and label."""
    size = 0.56
    for r in range(rows):
        for c in range(columns):
            tint, hatch, label = fill(r, c)
            corner = (x + c * size, y - (r + 1) * size)
            axes.add_patch(
                Rectangle(
                    corner,
                    size,
                    size,
                    facecolor=tint,
                    edgecolor=QUIET if hatch else INK,
                    linewidth=0.8,
                    hatch="////" if hatch else None,
                )
            )
            if label:
                write(axes, corner[0] + size / 2, corner[1] + size / 2, label, size=8.5)


def mlp() -> None:
    """What three operators do to the two matrices of an MLP, as `mlp` goes from 3 to 5."""
    figure, axes = canvas(21.2, 9.2)
    source = {
        "msg": [0, 1, 2, NONE, NONE],
        "copy": [0, 1, 2, 0, 1],
        "zeros": [0, 1, 2, NONE, NONE],
    }
    share = {"msg": [""] * 5, "copy": ["½", "½", "", "½", "½"], "zeros": ["", "", "", "0", "0"]}
    notes = {
        "msg": "fresh on both sides,\nhidden by a gate",
        "copy": "copied above, shared below:\nthe halves add up",
        "zeros": "fresh above, zero below:\nnothing reads it yet",
    }
    width, rows = 0.56 * 5, 2
    for i, name in enumerate(source):
        x = 4.0 + 6.2 * i

        def cell(k, consumes, name=name):
            s = source[name][k]
            empty = name == "zeros" and consumes and s == NONE
            label = share[name][k] if consumes else ""
            return ("#ffffff" if s == NONE else TINTS[s]), s == NONE and not empty, label

        write(
            axes, x, 8.35, f"gj.{name}(mlp=5)", ha="left", family="DejaVu Sans Mono", weight="bold"
        )
        matrix(axes, x, 7.7, rows, 5, lambda r, c, cell=cell: cell(c, False))
        matrix(axes, x, 5.4, 5, rows, lambda r, c, cell=cell: cell(r, True))
        if name == "msg":
            for k, old in enumerate(source[name]):
                shade(axes, x + 0.56 * k, 6.0, 0.56, 0.26, opens=old == NONE)
            write(axes, x + width + 0.25, 6.13, "gate", ha="left", size=9, color=QUIET)
        write(axes, x, 1.5, notes[name], ha="left", size=9, color=QUIET, linespacing=1.45)
    write(axes, 0.8, 7.4, "up", ha="left", weight="bold")
    write(axes, 0.8, 6.85, "embed -> mlp", ha="left", size=8.5, color=QUIET)
    write(axes, 0.8, 4.35, "down", ha="left", weight="bold")
    write(axes, 0.8, 3.8, "mlp -> embed", ha="left", size=8.5, color=QUIET)
    save(figure, "mlp.svg")


if __name__ == "__main__":
    methods()
    mlp()
