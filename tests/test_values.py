"""Values as plain dicts: own classes beside growjax's, what a file may name, faults with their paths."""

import dataclasses
import inspect
import json
import math
import os
import sys
import time
import tracemalloc
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import hypothesis.strategies as st
import jax.numpy as jnp
import pytest
from hypothesis import given

import growjax as gj
from growjax import values
from growjax.budget import Clock
from growjax.data import Causal
from growjax.errors import FormatError, GrowthError, PlanError
from growjax.growth import Operator
from growjax.plan.files import load_plan, save_plan
from growjax.plan.optimizer import Optimizer
from growjax.plan.plan import Plan
from growjax.plan.schedule import Rate, Schedule
from growjax.plan.stages import Stage
from growjax.values import from_dict, names, to_dict
from growjax.values.codec import write_text
from tests import own


SMALL = gj.models.GPTConfig(
    layers=2, embed=16, heads=2, head_dim=8, mlp=16, vocab=384, positions=16
)


def plan(*stages, **changes) -> Plan:
    defaults: dict[str, Any] = dict(model=SMALL, batch=4, objective=Causal(8), rate=Schedule(2e-3))
    return Plan("tiny", stages=stages or (Stage(tokens=64),), **{**defaults, **changes})


def there_and_back(value, expected: Any = Any, **options):
    return from_dict(json.loads(json.dumps(to_dict(value), allow_nan=False)), expected, **options)


# Own classes ---------------------------------------------------------------------------------------


def test_classes_of_one_bare_name_never_meet():
    ours, theirs = gj.stack(layers=4), own.Stack(2)
    assert to_dict(ours)["is"] == "growjax:Stack" and to_dict(theirs)["is"] == "tests.own:Stack"
    chained = there_and_back(gj.chain(theirs, ours), Operator)
    assert chained.operators == (theirs, ours)
    assert there_and_back(own.Causal(8)) == own.Causal(8) != there_and_back(Causal(8))

    @gj.register
    @dataclasses.dataclass(frozen=True)
    class Plan:
        name: str

    assert to_dict(plan())["is"] == "growjax:Plan" != to_dict(Plan("theirs"))["is"]
    assert there_and_back(Plan("theirs")) == Plan("theirs") and there_and_back(plan()) == plan()


def test_a_plan_of_own_values_survives_json(tmp_path):
    before = plan(
        Stage(tokens=64, objective=own.Causal(8)),
        Stage(tokens=64, grow=gj.chain(own.Stack(2), gj.msg(mlp=32, init=own.twos)), ramp=2),
        Stage(tokens=64, subnet=own.EveryOther()),
        clock=own.Rows(),
        data=own.Counting(),
    )
    save_plan(before, tmp_path / "plan.json")
    after = load_plan(tmp_path / "plan.json")
    assert after == before and to_dict(after) == to_dict(before)
    assert after.cost == before.cost == sum(span.steps for span in before.spans) * 4


class Widths(NamedTuple):
    low: int
    high: int


def test_what_no_import_leads_to_needs_one_line():
    @dataclasses.dataclass(frozen=True)
    class Local:  # pyright: ignore[reportRedeclaration]
        widths: Widths
        notes: dict[str, tuple[int, ...]]

    value = Local(Widths(1, 2), {"a": (1, 2), "b": ()})
    with pytest.raises(FormatError, match="no import leads to this class.*gj.register"):
        to_dict(value)
    gj.register(Local)
    with pytest.raises(FormatError, match="widths: .*test_values:Widths: it extends nothing"):
        to_dict(value)
    gj.register(name="lab:Widths")(Widths)
    assert to_dict(value)["widths"] == {"is": "lab:Widths", "low": 1, "high": 2}
    assert there_and_back(value) == value and type(there_and_back(value).widths) is Widths

    @gj.register
    @dataclasses.dataclass(frozen=True)
    class Local:
        widths: Widths

    with pytest.raises(FormatError, match="defined again"):
        to_dict(value)


def test_formats_are_told_apart():
    @gj.register(format=2)
    @dataclasses.dataclass(frozen=True)
    class Twice:
        n: int

    saved = to_dict(Twice(3))
    assert saved["is"].endswith("Twice@2") and from_dict(saved) == Twice(3)
    for number, message in [("", "of format 1, and format 2 is read"), ("@3", "of format 3, and")]:
        with pytest.raises(FormatError, match=message):
            from_dict({**saved, "is": saved["is"].removesuffix("@2") + number})
    with pytest.raises(FormatError, match="reserved for growjax"):
        gj.register(name="growjax:Mine")
    with pytest.raises(FormatError, match="expected one like my_pkg.ops:Widen"):
        gj.register(name="mine")


# What a stranger's file may do ---------------------------------------------------------------------


STRANGE = """
import pathlib, dataclasses
pathlib.Path(__file__).with_name("ran").touch()
import equinox as eqx, growjax as gj

class Widen(gj.Operator):
    factor: int = eqx.field(static=True)
    exactness = "exact"
    def maps(self, axes): return []

def noise(key, shape, dtype): return shape
from os import system
"""


@pytest.fixture
def stranger(tmp_path, monkeypatch):
    (tmp_path / "strange_pkg").mkdir()
    (tmp_path / "strange_pkg" / "ops.py").write_text(STRANGE)
    (tmp_path / "strange_pkg" / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(names, "_allowed", set())
    yield tmp_path / "strange_pkg" / "ran"
    for name in ("strange_pkg", "strange_pkg.ops"):
        sys.modules.pop(name, None)


WIDEN = {"is": "strange_pkg.ops:Widen", "factor": 2}
NOISE = {"is": "growjax:MSG", "sizes": [["mlp", 8]], "init": {"is": "function"}}


@pytest.mark.parametrize(
    "saved", [WIDEN, {**NOISE, "init": {"is": "function", "name": "strange_pkg.ops:noise"}}]
)
def test_a_file_imports_what_is_allowed_and_nothing_else(saved, stranger):
    with pytest.raises(FormatError, match="'strange_pkg' is not allowed.*--allow strange_pkg"):
        from_dict(saved)
    for other in ("strange", "strange_pkg.op", "strange_pkg.ops.more"):
        with pytest.raises(FormatError, match="is not allowed"):
            from_dict(saved, allow=[other])
    assert not stranger.exists()
    read = from_dict(saved, Operator, allow=["strange_pkg"])
    assert stranger.exists() and to_dict(read) == {**to_dict(read), **saved}


def test_an_allowed_package_lends_its_name_to_nothing_else(stranger):
    values.allow("strange_pkg")
    with pytest.raises(FormatError, match="it is of posix, which is not allowed"):
        from_dict({"is": "function", "name": "strange_pkg.ops:system"})
    with pytest.raises(FormatError, match="expected names of packages"):
        values.allow("strange pkg")


@pytest.mark.parametrize(
    "name", ["os:system", "subprocess:run", "builtins:eval", "growjax.growth:grow"]
)
def test_what_is_imported_is_not_called_for_that(name):
    with pytest.raises(
        FormatError, match="is not allowed, and a function that a file names is code"
    ):
        from_dict({"is": "function", "name": name})


@pytest.mark.parametrize(
    "name",
    ["subprocess:Popen", "fractions:Fraction", "tests.own:Plan", "tests.own:twos", "os:path"],
)
def test_only_extensions_of_growjax_are_made(name):
    with pytest.raises(FormatError, match="is nothing that a file may hold"):
        from_dict({"is": name})


def test_a_class_is_made_only_where_it_belongs():
    saved = to_dict(plan())
    saved["clock"], saved["rate"] = to_dict(gj.msg(mlp=8)), to_dict(own.EveryOther())
    with pytest.raises(PlanError) as error:
        from_dict(saved, Plan, error=PlanError)
    assert "clock: expected a clock such as FlopsClock(), and it is a growjax:MSG" in str(
        error.value
    )
    assert "rate: expected a learning rate such as Schedule" in str(error.value)
    with pytest.raises(FormatError, match="expected a clock"):
        from_dict(to_dict(gj.msg(mlp=8)), Clock)


# Faults --------------------------------------------------------------------------------------------


def test_every_fault_is_listed_with_its_path():
    grows = Stage(tokens=64, grow=gj.chain(gj.msg(mlp=32), gj.stack(layers=4)), ramp=2)
    saved = to_dict(plan(Stage(tokens=64), grows))
    saved["model"]["heads"] = "2"
    saved["stages"][0]["tokens"] = -1
    saved["stages"][1]["grow"]["operators"][1]["order"] = "topp"
    saved["stages"][1]["speed"] = 1
    saved["rate"] = {"is": "growjax:Schedule", "warmup": 2}
    saved["optimizer"]["clip"] = math.inf
    saved["seed"] = 10**400
    with pytest.raises(PlanError) as error:
        from_dict(saved, Plan, error=PlanError, source="p.json")
    text = str(error.value)
    assert text.startswith("p.json cannot be read:")
    for fault in [
        "model.heads: expected a positive integer, got '2'",
        "stages[0].tokens: expected a positive number or None, got -1",
        "stages[1].grow.operators[1].order: expected one of",
        "stages[1]: Stage has no 'speed'; it has name, tokens",
        "rate: Schedule lacks peak",
        "rate.warmup: expected a share from 0 to below 1 or a Warmup, got 2",
        "optimizer.clip: expected a positive norm or None, got inf",
        "seed: expected an integer of 0 or more, below 2**31, got an integer of 1329 bits",
    ]:
        assert f"\n  - {fault}" in text
    assert text.count("\n  - ") == 8


@pytest.mark.parametrize(
    "text, message",
    [
        ('{"is": "growjax:Schedule", "peak": 1, "peak": 2}', "'peak' is repeated"),
        ('{"is": "growjax:Schedule", "peak": NaN}', "peak: expected a positive learning rate, got nan"),
        ('{"is": "growjax:Schedule", "peak": 1e999}', "peak: expected a positive learning rate, got inf"),
        ('{"is": "growjax:Schedule", "peak": true}', "peak: expected a positive learning rate, got True"),
        ('{"is": "growjax:Schedule", "peak": ' + "9" * 5000 + "}", "not JSON"),
        ('{"is": "growjax:Chain", "operators": ' + "[" * 200 + "]" * 200 + "}", "more than 64 values"),
        ("[" * 200_000, "not JSON: too deep"),
        ('{"is": ["growjax:Plan"]}', "'is': expected the name of a class, got"),
        ('{"is": "a b:C"}', "expected a name like my_pkg.ops:Widen, got 'a b:C'"),
        ('{"is": "growjax:Nothing"}', "growjax has no 'Nothing'"),
        ('{"is": "tests.own:Gone"}', "cannot be imported: AttributeError"),
        ('{"is": "function"}', "a function has a name, an import path, and nothing else"),
        ('{"is": "function", "name": "f"}', "expected an import path such as my_pkg.models:build"),
        ("\xff", "not JSON"),
        ("{}", "expected a learning rate such as Schedule"),
    ],
)  # fmt: skip
def test_a_malformed_file_is_one_error(text, message, tmp_path):
    (tmp_path / "v.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(PlanError) as error:
        values.read(tmp_path / "v.json", Rate | Operator, error=PlanError)
    assert message in str(error.value) and len(str(error.value)) < 2000


def test_many_faults_are_counted_and_some_are_shown():
    saved = {"is": "growjax:Chain", "operators": [{"is": "growjax:MSG", "sizes": []}] * 10_000}
    with pytest.raises(FormatError) as error:
        from_dict(saved)
    assert str(error.value).endswith("and 9970 more") and len(str(error.value)) < 10_000


def test_what_cannot_be_saved_is_listed_with_its_path():
    bad = plan(
        Stage(
            tokens=64,
            grow=gj.msg(mlp=32, init=lambda key, shape, dtype: jnp.zeros(shape, dtype)),
            ramp=2,
        )
    )
    object.__setattr__(bad, "name", {1: 2})
    object.__setattr__(bad, "tokenizer", object())
    with pytest.raises(FormatError) as error:
        to_dict(bad)
    faults = str(error.value).splitlines()[1:]
    assert [fault.split(": ")[0] for fault in faults] == [
        "  - name",
        "  - stages[0].grow.init",
        "  - tokenizer",
    ]
    loop: list = []
    loop.append(loop)
    with pytest.raises(FormatError, match="more than 64 values in one another"):
        to_dict(loop)
    with pytest.raises(FormatError, match="nan is no number that a file can hold"):
        to_dict((math.nan,))


# Declared ranges -----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Every:
    whole: Annotated[int, values.ranged(1, 4)] = 1
    real: Annotated[float, values.ranged(0, 1, above=True, below=True)] | None = None
    name: Literal["a", "b"] | Annotated[str, values.one_of(("c",))] = "a"
    pair: tuple[int, str] = (1, "x")
    many: tuple[Annotated[float, values.positive()], ...] = ()
    flag: bool = False
    notes: dict[str, int] = dataclasses.field(default_factory=dict)
    op: Operator | None = None

    def __post_init__(self):
        values.check(self, GrowthError)


@pytest.mark.parametrize(
    "field, bad, message",
    [
        ("whole", 0, "a number from 1 to 4, got 0"),
        ("whole", True, "a number from 1 to 4, got True"),
        ("whole", 2.0, "a number from 1 to 4, got 2.0"),
        ("real", 0, "a number above 0 and below 1 or None, got 0"),
        ("real", 1, "a number above 0 and below 1 or None, got 1"),
        ("real", math.nan, "got nan"),
        ("real", 10**400, "got an integer of 1329 bits"),
        ("real", "0.5", "got '0.5'"),
        ("name", "d", "one of 'a', 'b' or one of 'c', got 'd'"),
        ("pair", (1,), "pair: expected a tuple of an integer, a string, got (1,)"),
        ("pair", (1, 2), "pair[1]: expected a string, got 2"),
        ("many", (1.0, -1), "many[1]: expected a positive number, got -1"),
        ("flag", 1, "True or False, got 1"),
        ("notes", {"a": "b"}, "a dict of names, got {'a': 'b'}"),
        ("op", 3, "an operator such as gj.msg(mlp=2048) or None, got 3"),
    ],
)
def test_a_field_out_of_its_range_is_refused(field, bad, message):
    with pytest.raises(GrowthError) as error:
        Every(**{field: bad})
    assert message in str(error.value) and f"- {field}" in str(error.value)


def test_help_prints_ranges_as_words():
    text = str(inspect.signature(Stage))
    assert "Range('a positive number')" in text and "<function" not in text


def test_what_is_in_range_is_taken_and_made_plain():
    import pathlib

    import numpy as np

    made = Every(np.int64(4), np.float32(0.5), "c", [2, "y"], [1, 2.5], op=own.Stack(2))  # type: ignore
    assert made.pair == (2, "y") and made.many == (1, 2.5)
    large = Every(whole=2, many=[2**40, np.int64(2**31), 3], notes={"a": 2**40})  # type: ignore
    assert [type(x) for x in large.many] == [float, float, int], "JAX takes integers as int32"
    assert large.many == (2**40, 2**31, 3) and type(large.notes["a"]) is int
    assert type(gj.copy(mlp=4, noise=2**40).noise) is float, "in operators as well"
    assert plan(tokenizer=pathlib.Path("a/b.json")).tokenizer == "a/b.json"  # type: ignore[arg-type]
    with pytest.raises(GrowthError, match="factor: expected an integer, got '2'"):
        own.Stack("2")  # type: ignore[arg-type]


# Properties ----------------------------------------------------------------------------------------


VALID = to_dict(
    plan(
        Stage(tokens=64, subnet=gj.random_path(2)),
        Stage(tokens=64, grow=gj.chain(gj.msg(mlp=32), gj.stack(layers=4)), ramp=2),
        optimizer=Optimizer("lion", clip=None),
    )
)


def paths(saved, at=()):
    yield at
    for key, inner in (
        saved.items()
        if isinstance(saved, dict)
        else enumerate(saved if isinstance(saved, list) else ())
    ):
        yield from paths(inner, (*at, key))


ODD = [
    *(
        None,
        True,
        -1,
        0,
        10**19,
        2**62,
        1e308,
        0.5,
        math.inf,
        math.nan,
        "",
        "x",
        [],
        {},
        [[]],
        [1, [2]],
    ),
    *(
        {"is": "growjax:Plan"},
        {"is": "growjax:Stack", "sizes": [["layers", 3]]},
        {"is": 3},
        {"a": 1},
    ),
    *(
        {"is": "growjax:FlopsClock"},
        "os:system",
        {"is": "function", "name": "os:system"},
        10**4000,
        2**30,
    ),
]


@given(st.data())
def test_a_harmed_plan_is_a_plan_or_one_typed_error_quickly(data):
    where = data.draw(st.sampled_from(list(paths(VALID))[1:]))
    harmed = json.loads(json.dumps(VALID))
    place = harmed
    for key in where[:-1]:
        place = place[key]
    how = data.draw(st.sampled_from(["replace", "remove", "rename"]))
    if how == "replace" or isinstance(place, list):
        place[where[-1]] = data.draw(st.sampled_from(ODD))
    elif how == "remove":
        del place[where[-1]]
    else:
        place[f"{where[-1]}s"] = place.pop(where[-1])
    start = time.perf_counter()
    try:
        read = from_dict(harmed, Plan, error=PlanError)
    except PlanError:
        pass
    else:
        assert there_and_back(read) == read
    assert time.perf_counter() - start < 10


def test_reading_takes_memory_in_proportion():
    text = json.dumps([to_dict(gj.msg(mlp=8))] * 2000)
    tracemalloc.start()
    from_dict(values.from_json(text))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 60 * len(text)


# Files -------------------------------------------------------------------------------------------


def test_a_file_that_cannot_be_written_stays_as_it_was(tmp_path, monkeypatch):
    file = tmp_path / "new" / "page.html"
    write_text(file, "before")

    def full(self: Path, *_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device", str(self))

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(PlanError, match="page.html: could not be written: No space left on device"):
        write_text(file, "after", error=PlanError)
    assert file.read_text() == "before" and list(file.parent.iterdir()) == [file]


def test_what_is_no_file_is_written_to_and_not_replaced(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDWR | os.O_NONBLOCK)
    try:
        write_text(pipe, "text")
        assert pipe.is_fifo() and os.read(reader, 9) == b"text"
    finally:
        os.close(reader)
