"""The rooms of growjax in their one-way order, and the words that are its own.

`tests/test_rooms.py` holds the imports to the order, and `python -m tests.rooms` writes
`docs/architecture.md` from both lists; what a room does is the first line of its docstring.
"""

import ast
from pathlib import Path

import growjax


ROOT = Path(growjax.__file__).parent
PAGE = ROOT.parent / "docs" / "architecture.md"

# Lowest first. A room may import from the lines above its own, and from itself.
LEVELS = [
    "errors",
    "cards values extras draws",
    "specs trees deferred",
    "axes",
    "trace",
    "gates",
    "algebra",
    "maps",
    "annotation nn",
    "models",
    "growth subnet",
    "optim parallel cost data",
    "certificate budget select state fitting",
    "testing hf inference",
    "plan",
    "programs advise",
    "runs",
    "forecast",
    "train",
    "evals report",
    "demo",
    "cli",
    "__main__",
]
LEVEL = {room: level for level, rooms in enumerate(LEVELS) for room in rooms.split()}

# Operators work in a notebook without a trainer: these need jax and equinox alone
CORE = set(
    (
        "errors cards values specs trees deferred axes trace annotation gates algebra maps growth subnet"
    ).split()
)
# Those of them that read models of others, and know the layers of `eqx.nn`
READERS = {"annotation", "trace"}

# Rooms that only the rooms of this list import
FRONT = set("hf plan advise programs runs forecast train evals report demo cli __main__".split())

GLOSSARY = {
    "arm": "one way to train in a comparison: a plan, run with several seeds",
    "axis": "a named dimension of a model's arrays, such as `embed`, `mlp`, `heads` or `layers`",
    "age": "how many updates a coordinate has had since it was born; Adam's bias correction uses it",
    "budget": "the cost that a run may spend, in the units of its clock",
    "carry": "to move optimizer state through an operator, so that training goes on without a jump",
    "certificate": "a record of the effects of an operator on one model and one batch: outputs, "
    "gradients and which new coordinates learn",
    "clock": "a price list: the cost of each operation of a run, in FLOPs or in measured nanoseconds",
    "consumed": "the role of an axis that an array sums over; copies share its weights",
    "control": "the run from scratch, of the final size, at the same cost",
    "coordinate": "one index of an axis: one hidden unit, one head, one layer",
    "crossing": "the record of one growth in a run: held-out loss before and after, and the certificate",
    "feed": "the source of a run's batches: a stream for each stage, from any step on",
    "fresh": "of a coordinate: it has no source in the old model and is drawn",
    "gate": "a vector over an axis that multiplies its coordinates; new ones start closed, at 0",
    "journal": "the file of a run that holds its records, a line each",
    "lineage": "the history of a checkpoint: plan, seed, parent, steps, tokens, cost and certificates",
    "map": "for each new index of an axis, the old index that it copies, and its share",
    "operator": "a value that turns a model's parameters into larger ones: one map for each grown axis",
    "plan": "a whole training run as data: model, stages, data, optimizer and schedule",
    "produced": "the role of an axis that an array writes; copies are plain copies",
    "ramp": "to open gates from 0 to 1 over some steps",
    "record": "the report of a run about one event: a step, a growth, a checkpoint, the end",
    "room": "a module or package of growjax with a place in the order above",
    "seal": "a checksum over a lineage's own text, by which an edited one is noticed",
    "settle": "to drop gates that are all at 1; the model is an ordinary larger one from then on",
    "share": "the multiplier of a copied coordinate, taken by the arrays that consume the axis",
    "span": "a stage with its steps, tokens, FLOPs and costs worked out",
    "stage": "a stretch of a plan with one size of model and one way to train it",
    "stream": "the residual stream: the axis `embed`, which every block reads and adds to",
    "subnet": "a value that trains part of a model for one step: a path of layers, some heads and units",
    "transition": "growth inside a run: compile ahead, grow, certify, save, resume training",
    "work": "the choices of one step that decide its program: the part that it trains, and its extras",
}

_HEAD = """\
# Architecture

<!-- Written by `python -m tests.rooms`; edit tests/rooms.py or the docstring of a room instead. -->

growjax is a list of rooms. A room is a module or a package, and it imports only from rooms on lines above
its own. `tests/test_rooms.py` reads the imports of every file and fails otherwise, so a room can be
understood, tested and used without anything further down. Rooms on one line do not import each other.

{core} need JAX and Equinox alone: an operator works in a
notebook without a trainer. They do not depend on a model: its own class declares the names of its axes.
(`annotation` and `trace` read models of others, and know `eqx.nn`.) The command line and the
rooms that run plans need `pip install 'growjax[train]'`; `import growjax` loads a room when it is first
used.

| | room | what it does |
|---|---|---|
"""

_WORDS = """
## Words

These words have one meaning in code, messages and pages; [Concepts](concepts.md) explains the ideas.

| word | meaning |
|---|---|
"""


def purpose(room: str) -> str:
    """The first line of a room's docstring."""
    path = ROOT / f"{room}.py"
    path = path if path.exists() else ROOT / room / "__init__.py"
    return (ast.get_docstring(ast.parse(path.read_text())) or "").partition("\n")[0]


def page() -> str:
    """The text of `docs/architecture.md`."""
    core = [f"`{room}`" for room in LEVEL if room in CORE]
    text = _HEAD.format(core=f"{', '.join(core[:-1])} and {core[-1]}")
    for number, rooms in enumerate(LEVELS, 1):
        for room in rooms.split():
            text += f"| {number} | `{room}` | {purpose(room)} |\n"
    text += _WORDS
    for word in sorted(GLOSSARY):
        text += f"| *{word}* | {GLOSSARY[word]} |\n"
    return text


if __name__ == "__main__":
    PAGE.write_text(page())
