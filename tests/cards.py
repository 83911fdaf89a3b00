"""A card for every operator and sub-network, drawn and written from the classes themselves.

`python -m tests.cards` writes `docs/cards.md` and `docs/figures/cards/`. It measures new examples on a
small model, and with `--measure` all of them, into `docs/figures/cards/measured.json`.
`tests/test_cards.py` fails while a class, its card or its maps differ from these files.
"""

import functools
import inspect
import itertools
import json
import sys
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax

import growjax as gj
from growjax import fitting, growth, testing
from growjax.algebra import MEAN, AxisMap, is_matrix
from growjax.axes import axes_of, get
from growjax.certificate.part import Part
from growjax.cost import parameters
from growjax.data import Causal
from growjax.errors import GrowjaxError, StateError
from growjax.growth import Chain, Fit, Operator, parse
from growjax.growth.fits import Filled
from growjax.plan.steps import step_flops
from growjax.subnet import Coins, Subnet


DOCS = Path(gj.__file__).parent.parent / "docs"
PAGE, FIGURES = DOCS / "cards.md", DOCS / "figures" / "cards"
MEASURED = FIGURES / "measured.json"

_HEAD = """\
# Cards

<!-- Written by `python -m tests.cards`; edit the `card` and the docstring of a class instead. -->

A card for every operator and sub-network. The map is that of the example: below, the old coordinates;
above, the new ones, each in the colour and with the number of the one that it copies. A dashed one is
drawn anew, a small bar is a closed gate, a pale one is left out. `python -m tests.cards --measure`
measured cost, moments and behaviour, on a small model with random weights in float64: they show
exactness and which entries learn, and say nothing of training; [a contest](choosing.md) does. `gj.cite`
prints the papers of a plan.
"""


def subclasses(base: type) -> list[type]:
    """The classes of growjax itself that extend a base at any depth, and that users make."""
    below = [c for child in base.__subclasses__() for c in (child, *subclasses(child))]
    return [c for c in below if c.__module__.startswith("growjax.") and c not in (Chain, Part)]


def methods() -> list[type]:
    """Every operator and every sub-network, by the name of its function."""
    classes = [*subclasses(Operator), *subclasses(Subnet)]
    concrete = [c for c in classes if not inspect.isabstract(c) and c is not Filled]
    return sorted(concrete, key=lambda c: (issubclass(c, Subnet), name_of(c)))


def name_of(method: type) -> str:
    """The name of the function that makes an instance."""
    return method.card.example.partition("(")[0] or method.__name__


def example_of(method: type) -> Any:
    """The example of a card, as a value."""
    if issubclass(method, Operator):
        return parse(method.card.example)
    return eval(method.card.example, {name_of(method): getattr(gj, name_of(method))})


def function_of(method: type) -> tuple[str, Any]:
    """The public function of a method, with its name from `gj` on."""
    name = name_of(method)
    return (f"gj.{name}", getattr(gj, name)) if hasattr(gj, name) else _in_growth(name)


def _in_growth(name: str) -> tuple[str, Any]:
    return f"gj.growth.{name}", getattr(growth, name)


# The model of the sub-networks
_WHOLE = testing.Architecture("GPT", (("layers", 4), ("tied", False)))


def subject(method: type) -> testing.Architecture:
    """The first of the small models that the example fits and does something to."""
    if issubclass(method, Subnet):
        return _WHOLE
    for architecture in testing.ARCHITECTURES:
        try:
            model = shapes_of(architecture)
            if example_of(method).maps(axes_of(model)):
                eqx.filter_eval_shape(example_of(method), model, key=jax.random.key(0))
                return architecture
        except GrowjaxError:
            pass
    raise AssertionError(f"{method.card.example} fits none of the models of growjax.testing")


def shapes_of(architecture: testing.Architecture) -> Any:
    """The shapes of a model."""
    return eqx.filter_eval_shape(lambda: testing.drawn(architecture))


# Measuring -----------------------------------------------------------------------------------


def measured(method: type) -> dict[str, Any]:
    """The numbers of a card: sizes, FLOPs and, of an operator, its certificate and its moments."""
    value, architecture, key = example_of(method), subject(method), jax.random.key(0)
    with jax.enable_x64(True):
        model = architecture.model()
        if isinstance(value, Fit):
            value = fitted(value, model, architecture.batch(), key)
        numbers: dict[str, Any] = {"example": method.card.example, "model": str(architecture)}
        objective = Causal(testing.LENGTH)
        if isinstance(value, Subnet):
            if not (isinstance(value, Coins) and value.tosses):
                flops = [step_flops(model, objective, 1, part) for part in (None, value)]
                numbers["flops"] = round(flops[1] / flops[0], 2)
            return numbers
        after = eqx.filter_eval_shape(lambda m: value(m, key=key), model)
        numbers["flops"] = round(
            step_flops(after, objective, 1) / step_flops(model, objective, 1), 2
        )
        numbers["parameters"] = round(parameters(after) / parameters(model), 2)
        record = gj.certify(value, model, architecture.batch(), key=key)
        relative, limit = record.forward[-1].relative, record.forward[-1].limit
        numbers["outputs"] = 0.0 if relative <= limit else float(f"{relative:.1e}")
        numbers["dead"] = {axis: list(map(_two, shares)) for axis, shares in record.dead.items()}
        numbers["locked"] = record.locked
        numbers["moments"] = _moments(value, model, key)
    return numbers


def fitted(op: Fit, model: Any, batch: Any, key: Any) -> Operator:
    """An operator with numbers, from one batch again and again."""

    def loss(model, batch):
        return jnp.mean(jnp.sin(jax.vmap(model)(batch)))

    return fitting.fit(op, model, itertools.repeat(batch), loss, key=key).operator


def _two(number: float) -> float:
    return float(f"{number:.2g}")


def _moments(op: Operator, model: Any, key: Any) -> dict[str, Any]:
    """The factors of Adam's moments, of old entries and of new ones; or why they are refused."""
    tx, params = optax.scale_by_adam(), gj.partition(model)[0]
    state: Any = tx.init(params)
    ones = jax.tree.map(jnp.ones_like, params)
    state = state._replace(mu=ones, nu=ones)
    try:
        carried = gj.carry(op, state, model, optimizer=tx, key=key)
    except StateError as error:
        return {"refused": str(error).splitlines()[-1].rpartition("follows gradients: ")[2]}
    masks = gj.new(op, model)
    table, factors = axes_of(carried.mu), {}
    for name, part in (("old", False), ("new", True)):
        for moment in ("mu", "nu"):
            entries = [
                np.asarray(get(getattr(carried, moment), slot.steps))[
                    np.asarray(get(masks, slot.steps)) == part
                ]
                for slot in table.of_kind("param")
                if slot.arrays()
            ]
            flat = np.concatenate(entries)
            if flat.size:
                factors[f"{name} {moment}"] = [_two(flat.min()), _two(flat.max())]
    return factors


# Drawing -------------------------------------------------------------------------------------

TINTS = ("#8ecae6", "#a7d8a0", "#ffd27d", "#f4a9a0", "#c7b6e8", "#9fd9cf")
BOX, GAP, LEFT, ROW = 26, 4, 92, 74
_STYLE = """\
<style>
text { font: 12px ui-monospace, monospace; fill: #20262e; }
.ink { fill: #20262e; } .side { fill: #5b6672; } .line { stroke: #8b949e; } .gate { fill: #2f3b52; }
.new { fill: none; stroke: #5b6672; stroke-dasharray: 3 2; } .off { opacity: 0.25; }
@media (prefers-color-scheme: dark) {
  .side, .out { fill: #c9d1d9; } .line, .new { stroke: #8b949e; } .gate { fill: #c9d1d9; }
}
</style>
"""


@functools.cache
def figure(method: type, on: str) -> str:
    """The maps of the example on a model, a row of boxes each, as an SVG for light and for dark pages.

    Empty where no axis of the model changes.
    """
    (architecture,) = [each for each in (*testing.ARCHITECTURES, _WHOLE) if str(each) == on]
    value, table = example_of(method), axes_of(shapes_of(architecture))
    if isinstance(value, Subnet):
        with jax.enable_x64(False):
            moves = value.maps(table, key=jax.random.key(3), step=1000)
    else:
        moves = value.maps(table)
    moves = [move for move in moves if move.born or move.axis in table.sizes]
    if not moves:
        return ""
    rows, width = [], 0
    for number, move in enumerate(moves):
        old = 1 if move.born else table.size(move.axis)
        drawn, columns = _row(move, old, number * ROW)
        rows += drawn
        width = max(width, columns)
    size = (LEFT + width * (BOX + GAP) + 8, len(moves) * ROW + 8)
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{size[0]}" height="{size[1]}" '
        f'viewBox="0 0 {size[0]} {size[1]}" role="img" aria-label="{method.card.example}">\n'
    )
    return head + _STYLE + "\n".join(rows) + "\n</svg>\n"


def _row(move: AxisMap, old: int, top: int) -> tuple[list[str], int]:
    """One map: new coordinates above, old ones below, a line from each source to its copy."""
    source = np.asarray(move.source)
    source = source[0] if source.ndim > 1 else source
    active = np.ones(len(source), bool) if move.active is None else np.asarray(move.active)
    above, below = top + 8, top + 44
    out = [
        f'<text class="side" x="4" y="{above + 17}">{move.axis}</text>',
        f'<text class="side" x="4" y="{below + 17}">{old} &#8594; {len(source)}</text>',
    ]
    matrix = move.produced if is_matrix(move.produced) else None
    for i, index in enumerate(source.tolist()):
        sources = [(index, 1.0)] if index >= 0 else []
        if matrix is not None:
            row = np.asarray(matrix)[i]
            sources = [(j, abs(x)) for j, x in enumerate(row) if abs(x) > 1e-9]
        elif index == MEAN:
            sources = [(j, 1 / old) for j in range(old)]
        for j, weight in sources:
            x = [LEFT + k * (BOX + GAP) + BOX / 2 for k in (i, j)]
            faint = f"{max(0.15, min(1.0, weight)):.2f}"
            out.append(
                f'<line class="line" x1="{x[0]:g}" y1="{above + BOX}" x2="{x[1]:g}" y2="{below}" '
                f'stroke-opacity="{faint}"/>'
            )
        gate = move.gated and bool(np.asarray(move.is_new())[i])
        label = "m" if index == MEAN else index if index >= 0 else ""
        out += _box(i, above, index, label, off=not active[i], gate=gate)
    for j in range(old):
        unused = matrix is None and MEAN not in source and j not in source[active]
        out += _box(j, below, j, j, off=bool(unused))
    return out, max(old, len(source))


def _box(i: int, y: int, index: int, label: Any, *, off: bool, gate: bool = False) -> list[str]:
    x = LEFT + i * (BOX + GAP)
    look = f'fill="{TINTS[index % len(TINTS)]}"' if index >= 0 else 'class="new"'
    faded = ' class="off"' if off else ""
    ink = "ink" if index >= 0 else "out"
    out = [f'<g{faded}><rect x="{x}" y="{y}" width="{BOX}" height="{BOX}" rx="5" {look}/>']
    out.append(
        f'<text class="{ink}" x="{x + BOX / 2:g}" y="{y + 17}" text-anchor="middle">{label}</text></g>'
    )
    if gate:
        out.append(
            f'<rect class="gate" x="{x + 3}" y="{y - 6}" width="{BOX - 6}" height="3" rx="1"/>'
        )
    return out


# Writing -------------------------------------------------------------------------------------


def page(numbers: dict[str, Any]) -> str:
    """The text of `docs/cards.md`."""
    return _HEAD + "".join(section(method, numbers[method.__name__]) for method in methods())


def section(method: type, numbers: dict[str, Any]) -> str:
    """One card."""
    name, function = function_of(method)
    first = (inspect.getdoc(function) or "").partition("\n\n")[0].replace("\n", " ")
    rows = [
        ("when", method.card.use),
        ("exactness", _exactness(method)),
        ("cost", _cost(method, numbers)),
        ("moments", _moments_text(numbers)),
        ("measured", _measured_text(numbers)),
        ("traps", "<br>".join(method.card.traps)),
        ("papers", "<br>".join(_papers(method))),
    ]
    text = f"\n## `{name}`\n\n{first} ([API](api.md#{_anchor(method)}))\n\n"
    if figure(method, numbers["model"]):
        text += f"![The map of {method.card.example}](figures/cards/{name_of(method)}.svg)\n\n"
    text += f"`{method.card.example}` on {numbers['model']}\n\n| | |\n|---|---|\n"
    return text + "".join(f"| {head} | {body} |\n" for head, body in rows if body)


def _anchor(method: type) -> str:
    return function_of(method)[0].replace("gj.", "growjax.", 1)


def _exactness(method: type) -> str:
    if issubclass(method, Subnet):
        return "for one step; the whole model is kept, and what is left out has a gradient of zero"
    value = vars(method)["exactness"]
    if isinstance(value, str):
        return value
    doc = (inspect.getdoc(value) or "").replace("\n", " ")
    return f"{example_of(method).exactness} (by its fields: {doc})"


def _cost(method: type, numbers: dict[str, Any]) -> str:
    if "flops" not in numbers:
        return "a step is charged for the layers that it draws"
    if issubclass(method, Subnet):
        return f"a step has {numbers['flops']:g} times the FLOPs of the whole model's"
    if numbers["parameters"] == numbers["flops"] == 1:
        return "none: as many parameters and FLOPs as before"
    larger, dearer = numbers["parameters"], numbers["flops"]
    return f"{larger:g} times the parameters, {dearer:g} times the FLOPs of a step"


def _moments_text(numbers: dict[str, Any]) -> str:
    moments = numbers.get("moments")
    if moments is None:
        return ""
    if "refused" in moments:
        return f"refused for the arrays that it moves: {moments['refused']}"
    parts = []
    for kind in ("old", "new"):
        if f"{kind} mu" in moments:
            first, second = (_range(moments[f"{kind} {m}"]) for m in ("mu", "nu"))
            parts.append(f"of {kind} entries times {first} (first) and {second} (second)")
    return "Adam's, " + "; ".join(parts)


def _range(pair: list[float]) -> str:
    low, high = pair
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"


def _measured_text(numbers: dict[str, Any]) -> str:
    if "outputs" not in numbers:
        return ""
    moved = numbers["outputs"]
    parts = ["outputs stay, to rounding" if moved == 0 else f"outputs move by {moved:.0%}"]
    for axis, (one, two) in numbers["dead"].items():
        lock = numbers["locked"].get(axis, 0)
        text = (
            f"{axis}: {one:.0%} of new entries without gradient after a step, {two:.0%} after two"
        )
        parts.append(text + (f", {lock} locked to their source" if lock else ""))
    return "; ".join(parts)


# Properties that choose papers, in words of the function's arguments
_ARGUMENTS = {
    "pattern='solar'": "layers=gj.growth.solar(...)",
    "pattern=": "order=",
    "copied": "gated=False",
    "fine": "granularity > 1",
    "core": "first, last",
}


def _papers(method: type) -> list[str]:
    lines = []
    for paper, given in method.card.every().items():
        for name, argument in _ARGUMENTS.items():
            given = given.replace(name, argument)
        others = " et al." if " and " in paper.authors else ""
        link = f"https://arxiv.org/abs/{paper.arxiv}" if paper.arxiv else paper.url
        title = f"[{paper.title}]({link})" if link else paper.title
        where = f", for `{given}`" if given else ""
        lines.append(f"{paper.first}{others} {paper.year}, {title}{where}")
    return lines


def files(numbers: dict[str, Any]) -> dict[Path, str]:
    """Every file that this module writes, with its text."""
    texts = {PAGE: page(numbers)}
    for method in methods():
        drawn = figure(method, numbers[method.__name__]["model"])
        if drawn:
            texts[FIGURES / f"{name_of(method)}.svg"] = drawn
    return texts


if __name__ == "__main__":
    known = json.loads(MEASURED.read_text()) if MEASURED.exists() else {}
    only = "--measure" in sys.argv
    for each in methods():
        stale = known.get(each.__name__, {}).get("example") != each.card.example
        if only or stale:
            known[each.__name__] = measured(each)
            print(each.__name__, known[each.__name__], flush=True)
    known = {each.__name__: known[each.__name__] for each in methods()}
    FIGURES.mkdir(exist_ok=True)
    MEASURED.write_text(json.dumps(known, indent=1) + "\n")
    written = files(known)
    for path in FIGURES.glob("*.svg"):
        if path not in written:
            path.unlink()
    for path, text in written.items():
        path.write_text(text)
