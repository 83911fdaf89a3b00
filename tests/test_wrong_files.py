"""Plans and lineages that are wrong, one way each: always one typed error that says where, quickly."""

import copy
import enum
import time
import tracemalloc
from typing import Any

import pytest

import growjax as gj
from growjax.axes import sizes
from growjax.data import Causal
from growjax.errors import CheckpointError, PlanError
from growjax.plan import Plan, Schedule, Stage
from growjax.runs.lineage import model_of, operators_of, optimizer_of
from growjax.values import from_dict, to_dict


SMALL = gj.models.GPTConfig(
    layers=2, embed=16, heads=2, head_dim=8, mlp=16, vocab=384, positions=16
)
GROWN = gj.chain(gj.msg(mlp=32), gj.stack(layers=4))
PLAN = Plan(
    "tiny",
    SMALL,
    (Stage(tokens=64, subnet=gj.random_path(2)), Stage(tokens=64, grow=GROWN, ramp=2)),
    batch=4,
    objective=Causal(8),
    rate=Schedule(2e-3),
)


class Gone(enum.Enum):
    """In place of a value: the field is left out. Its name is the same in every process of the tests."""

    GONE = "gone"


GONE = Gone.GONE
DEEP: Any = []
for _ in range(500):
    DEEP = [DEEP]


def harmed(saved: Any, where: str, value: Any) -> Any:
    """The data with one place changed, or gone."""
    saved = copy.deepcopy(saved)
    *above, last = (int(step) if step.isdigit() else step for step in where.split("."))
    place = saved
    for step in above:
        place = place[step]
    if value is GONE:
        del place[last]
    else:
        place[last] = value
    return saved


OPERATORS = "stages.1.grow.operators"
STAGE = to_dict(Stage(tokens=64))
WRONG = [
    ("name", None, "name: expected a text of at most 200 printable characters, got None"),
    ("name", ["a"], "name: expected a text of at most 200 printable characters, got ('a',)"),
    ("rate", None, "rate: expected a learning rate such as Schedule(2e-3), got None"),
    (
        "data",
        5,
        "data: expected a source such as Text('books') or prepare(texts, ...)[0].prepared or a Blend or "
        "None, got 5",
    ),
    ("layout", "x", "layout: expected a Layout, got 'x'"),
    ("stages", "ab", "stages: expected a tuple of a Stage, got 'ab'"),
    ("stages", [], "stages: expected at least one"),
    ("stages.0", 7, "stages[0]: expected a Stage, got 7"),
    ("stages.0", {"is": "growjax:Schedule", "peak": 1}, "stages[0]: expected a Stage, and it is"),
    ("optimizer", None, "optimizer: expected an optimizer such as Optimizer(b2=0.95), got None"),
    ("tokenizer", {"a": 1}, "tokenizer: expected the path of a file or folder, got {'a': 1}"),
    ("tokenizer", "a\0b", "tokenizer: expected the path of a file or folder, got 'a\\x00b'"),
    (
        "stages.0.flops",
        float("inf"),
        "stages[0].flops: expected a positive number or None, got inf",
    ),
    ("stages.0.tokens", 1e15, "more than 10,000,000 steps"),
    ("stages.0.tokens", 2**62, "more than 10,000,000 steps"),
    ("stages.0.tokens", "64", "stages[0].tokens: expected a positive number or None, got '64'"),
    ("stages.0.tokens", None, "expected one of tokens, flops, seconds and share, got none"),
    ("stages.0.subnet.length", 0, "stages[0].subnet.length: expected a positive number, got 0"),
    ("stages.0.subnet.keep", 5, "stages[0].subnet.keep: expected a tuple of an integer, got 5"),
    ("stages.0.subnet.scale", "cube", "stages[0].subnet.scale: expected one of 'none', 'sqrt_gap'"),
    ("batch", 0, "batch: expected a positive integer, got 0"),
    ("batch", 2**40, "batch: expected an integer of at most 2**24, got 1099511627776"),
    ("batch", 10**400, "batch: expected a positive integer, got an integer of 1329 bits"),
    ("batch", True, "batch: expected a positive integer, got True"),
    ("batch", GONE, "Plan lacks batch"),
    ("speed", 1, "Plan has no 'speed'; it has name, model"),
    ("seed", -1, "seed: expected an integer of 0 or more, below 2**31, got -1"),
    ("accumulate", 3, "4 sequences cannot be computed in 3 equal parts"),
    ("objective.length", 2**30, "objective.length: expected an integer of at most 2**24"),
    ("objective.is", "growjax:Vocabulary", "objective: expected an objective such as Causal(128)"),
    (
        "objective.is",
        "growjax:Causal@7",
        "objective: 'growjax:Causal@7': of format 7, and format 1",
    ),
    ("objective", {}, "objective: expected an objective such as Causal(128), got {}"),
    ("model.layers", "2", "model.layers: expected 0 or more layers, got '2'"),
    ("model.heads", [2], "model: GPTConfig is not a model:"),
    ("model.dtype", "int8", "model.dtype: expected a floating-point type"),
    ("model.is", "LlamaConfig", "model: 'LlamaConfig' is a name of growjax 0.1"),
    ("model.is", "os:system", "model: os:system is nothing that a file may hold"),
    ("model.is", "nowhere_pkg.models:Config", "model: nowhere_pkg.models:Config: the package"),
    ("model.is", 3, "model: 'is': expected the name of a class, got 3"),
    (
        "model",
        {"is": "growjax:Model", "factory": "os:system"},
        "model.factory: expected a function",
    ),
    ("loss", "os:system", "loss: expected a function, got 'os:system'"),
    ("loss.name", "os:system", "loss: os:system: the package 'os' is not allowed"),
    ("loss.name", "growjax:cross", "loss: growjax:cross: the package 'growjax' is not allowed"),
    ("loss.more", 1, "loss: a function has a name, an import path, and nothing else"),
    ("clock", {"is": "growjax:MeasuredClock", "name": "m", "entries": "ab"}, "entries: expected"),
    ("clock", {"is": "growjax:DepthClock", "name": "m"}, "DepthClock lacks seconds, rows, forward"),
    ("optimizer.b1", 1, "optimizer.b1: expected a rate from 0 to below 1, got 1"),
    ("optimizer.clip", "1", "optimizer.clip: expected a positive norm or None, got '1'"),
    (f"{OPERATORS}.0.sizes", [["mlp", 2**50]], "mlp: expected an integer of at most 2**24"),
    (f"{OPERATORS}.0.sizes", [["mlp"]], "operators[0]"),
    (f"{OPERATORS}.0.sizes", 5, "operators[0].sizes: expected"),
    (f"{OPERATORS}.1.sizes", [["width", 4]], "unknown axis 'width'"),
    (f"{OPERATORS}.1.order", "topp", "operators[1].order: expected one of 'top', 'repeat'"),
    (f"{OPERATORS}.1", DEEP, "more than 64 values in one another"),
    (
        OPERATORS,
        {"is": "growjax:Chain", "operators": []},
        "operators: expected a tuple of an operator",
    ),
    ("stages.1.grow", "msg(mlp=32)", "stages[1].grow: expected an operator such as"),
    ("stages.1.ramp", 1e300, "stages[1].ramp: expected a number of steps, got 1e+300"),
    (f"{OPERATORS}.0.sizes", [["mlp", 24], ["mlp", 32]], "mlp: given more than once"),
    (f"{OPERATORS}.0.sizes", [["mlp", 2**24 + 1]], "mlp: expected an integer of at most 2**24"),
    (
        OPERATORS,
        [to_dict(gj.msg(mlp=32))] * 300,
        "operators: expected at most 256 in a chain, got 300",
    ),
    ("stages", [STAGE] * 1001, "stages: expected at most 1,000, got 1,001"),
    ("model.layers", 2**31 - 1, "model.layers: expected an integer of at most 2**24"),
    ("model.embed", 2**31 - 1, "model.embed: expected an integer of at most 2**24"),
    ("model.is", "growjax.models.gpt:GPTConfig", "its name in files is growjax:GPTConfig"),
    ("is", "growjax:Plan@", "'growjax:Plan@': of format , and format 1 is read"),
    ("name", "a\nb", "name: expected a text of at most 200 printable characters, got 'a\\nb'"),
    ("name", "\ud800", "name: expected a text of at most 200 printable characters"),
    ("stages.0.name", "x" * 201, "stages[0].name: expected a text of at most 200 printable"),
    ("start", {"is": "growjax:Start", "folder": ""}, "start.folder: expected the name of a folder"),
    (
        "start",
        {"is": "growjax:Start", "folder": "a\0"},
        "start.folder: expected the name of a folder",
    ),
    ("fork", {"is": "growjax:Fork", "run": "a\0"}, "fork.run: expected the name of a folder"),
    ("fork", {"is": "growjax:Fork", "run": "a" * 256}, "fork.run: expected the name of a folder"),
    (
        "data",
        {"is": "growjax:Text", "path": "a\0"},
        "data.path: expected the path of a file or folder",
    ),
    ("data", {"is": "growjax:Text", "path": "a", "glob": "/*"}, "data.glob: expected a pattern"),
    ("fork", {"is": "growjax:Fork", "run": "\ud800"}, "fork.run: expected the name of a folder"),
    (
        "fork",
        {"is": "growjax:Fork", "run": "a", "step": -1},
        "fork.step: expected a number of steps",
    ),
    ("fork", "a@3", "fork: expected a Fork or None, got 'a@3'"),
]


@pytest.mark.parametrize("where, value, message", WRONG, ids=lambda x: str(x)[:40])
def test_a_wrong_plan_is_one_typed_error(where, value, message):
    saved = harmed(to_dict(PLAN), where, value)
    start = time.perf_counter()
    tracemalloc.start()
    with pytest.raises(PlanError) as error:
        from_dict(saved, Plan, error=PlanError)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert message in str(error.value), str(error.value)
    assert len(str(error.value)) < 3000 and peak < 100e6 and time.perf_counter() - start < 30


def test_a_file_of_too_many_values_is_not_read_to_its_end(monkeypatch):
    monkeypatch.setattr("growjax.values.codec._VALUES", 500)
    saved = harmed(to_dict(PLAN), "stages", [STAGE] * 20_000)
    with pytest.raises(PlanError, match="more than 500 values in a file"):
        from_dict(saved, Plan, error=PlanError)


LINEAGE = {
    "model": to_dict(SMALL),
    "optimizer": to_dict(PLAN.optimizer),
    "operators": [to_dict(GROWN)],
    "gated": True,
    "sizes": PLAN.spans[1].sizes,
    "births": PLAN.spans[1].births.runs(),
}


def test_the_lineage_is_right_as_it_stands():
    assert sizes(model_of(LINEAGE)) == LINEAGE["sizes"]
    assert operators_of(LINEAGE) == [GROWN] and optimizer_of(LINEAGE) == PLAN.optimizer


@pytest.mark.parametrize(
    "where, value",
    [
        ("model", {}),
        ("model", to_dict(GROWN)),
        ("model.layers", 0),
        ("model.layers", GONE),
        ("model.is", "GPTConfig"),
        ("model.is", "os:system"),
        ("model.is", "growjax:Plan"),
        ("model", {"is": "growjax:Model", "factory": {"is": "function", "name": "os:getcwd"}}),
        ("operators.0", to_dict(SMALL)),
        ("operators.0", {"op": "MSG", "sizes": [["mlp", 32]]}),
        ("operators.0.operators.0.sizes", [["mlp", 8]]),
        ("operators.0.operators.0.init", "norml"),
        ("operators.0.operators.1.is", "subprocess:Popen"),
        ("operators.0.operators.1.layers", 4),
        ("optimizer", to_dict(SMALL)),
        ("optimizer.name", "adam"),
        ("optimizer.b1", float("nan")),
        ("sizes", {"mlp": 9}),
        ("births.mlp", [[0, 99]]),
    ],
    ids=str,
)
def test_a_wrong_lineage_is_one_typed_error(where, value):
    lineage = harmed(LINEAGE, where, value)
    with pytest.raises(CheckpointError) as error:
        model_of(lineage)
        optimizer_of(lineage)
    assert str(error.value).startswith("lineage: ")
