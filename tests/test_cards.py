"""Cards: every method has one that fits its class, and `gj.cite` cites exactly what a plan uses."""

import inspect
import json
import re
from typing import ClassVar, Literal

import equinox as eqx
import numpy as np
import pytest

import growjax as gj
from growjax import values
from growjax.budget.clock import RTX3090_BERT
from growjax.cards import Card, Paper
from growjax.data import Causal
from growjax.errors import FormatError
from growjax.growth import Chain, Operator, parse
from growjax.growth.depth import Order
from growjax.models import GPTConfig
from growjax.optim.transfer import Transfer
from growjax.plan import Optimizer, Plan, Probe, Schedule, Stage
from growjax.select import RhoLoss, SelectiveBackprop
from growjax.subnet import PathSchedule
from tests import cards
from tests.exports import EXPORTS, families_of


METHODS = cards.methods()
CITED = [*METHODS, PathSchedule, Optimizer, Schedule, RhoLoss, SelectiveBackprop, Transfer, Stage]
CITED += [type(RTX3090_BERT), Probe]
API = (cards.DOCS / "api.md").read_text()
PAPERS = list(dict.fromkeys(paper for c in CITED for paper in c.card.every()))
CONFIG = GPTConfig(layers=2, embed=8, heads=2, head_dim=4, mlp=8, vocab=16, positions=8)


def cited(value) -> set[str]:
    """The arXiv numbers, or else the titles, of what a value cites."""
    text = gj.cite(value)
    entries = text.split("\n\n") if text else []
    return {
        re.findall(r"(?:eprint|title) = \{+(.+?)\}+,", entry)[-1 if "eprint" in entry else 0]
        for entry in entries
    }


def test_there_are_operators_and_subnets():
    assert len(METHODS) >= 20 and {type(gj.msg(mlp=9)), gj.subnet.Loop} <= set(METHODS)


@pytest.mark.parametrize("method", METHODS, ids=lambda c: c.__name__)
def test_every_method_has_a_card_of_its_own(method):
    assert "card" in vars(method), f"give {method.__name__} a `card`, as its neighbours have"
    card = method.card
    assert card.use.endswith(".") and card.traps and all(t.endswith(".") for t in card.traps)
    example = cards.example_of(method)
    assert type(example) is method
    if issubclass(method, Operator):
        assert parse(repr(example)) == example
    # Its function is public, and the card leads to its entry
    name, function = cards.function_of(method)
    assert callable(function) and f"::: {name.replace('gj.', 'growjax.', 1)}\n" in API


def test_the_cards_are_up_to_date():
    """`python -m tests.cards` writes them."""
    numbers = json.loads(cards.MEASURED.read_text())
    assert list(numbers) == [method.__name__ for method in METHODS], "run python -m tests.cards"
    for method in METHODS:
        assert numbers[method.__name__]["example"] == method.card.example, (
            "run python -m tests.cards"
        )
    written = cards.files(numbers)
    for path, text in written.items():
        assert path.read_text() == text, f"{path.name}: run python -m tests.cards"
    assert {*cards.FIGURES.glob("*.svg")} == {*written} - {cards.PAGE}


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS, ids=lambda c: c.__name__)
def test_what_the_cards_have_measured_still_holds(method):
    assert cards.measured(method) == json.loads(cards.MEASURED.read_text())[method.__name__]


@pytest.mark.parametrize("cls", CITED, ids=lambda c: c.__name__)
def test_papers_of_a_field_are_those_of_values_that_it_can_have(cls):
    for name, cases in cls.card.by.items():
        assert name in cls.__annotations__ or isinstance(vars(cls)[name], property)
        hint = (
            Order | Literal["solar", "list"] if name == "pattern" else cls.__annotations__.get(name)
        )
        for case in cases if isinstance(cases, dict) else ():
            assert hint is not None and values.fits(hint, case), f"{name}: {case!r}"


@pytest.mark.parametrize("method", METHODS, ids=lambda c: c.__name__)
def test_papers_are_given_by_arguments_of_the_function(method):
    """A reader can write what a card says: `for order='top'`, not the property that tells it."""
    arguments = inspect.signature(cards.function_of(method)[1]).parameters
    for line in cards._papers(method):
        (given,) = re.findall(r", for `(.*)`$", line) or [""]
        for part in filter(None, given.split(", ")):
            assert re.split(r"\W", part)[0] in {*arguments, "layers"}, part


def test_every_operator_says_what_becomes_of_it_in_a_hugging_face_folder():
    """A new operator has rows in `tests/exports.py`: the families that are written, and refusals."""
    operators = [m for m in METHODS if issubclass(m, Operator)]
    assert {cards.name_of(m) for m in operators} == EXPORTS.keys()
    for method in operators:
        rows = EXPORTS[cards.name_of(method)]
        assert all(cards.name_of(method) in row.op for row in rows)
        assert any(families_of(row) for row in rows)
        parsed = [parse(row.op) for row in rows]
        assert any(
            isinstance(op.operators[-1] if isinstance(op, Chain) else op, method) for op in parsed
        )


def test_papers_can_be_told_apart_and_are_well_formed():
    assert len({paper.key for paper in PAPERS}) == len(PAPERS)
    assert len({paper.title for paper in PAPERS}) == len(PAPERS)
    for paper in PAPERS:
        entry = paper.bibtex()
        assert entry.count("{") == entry.count("}") and 2015 <= paper.year <= 2026
        assert re.fullmatch(r"[a-z]+\d{4}[a-z0-9]+", paper.key)
        assert paper.venue or paper.arxiv or paper.url
        assert re.fullmatch(r"(\d{4}\.\d{5})?", paper.arxiv), paper.title
        assert all(
            "," in author or author in ("others", f"{{{paper.first}}}")
            for author in paper.authors.split(" and ")
        )


def test_a_plan_cites_exactly_what_it_uses():
    def plan(**options):
        stages = options.pop("stages", (Stage(tokens=320),))
        given = {"rate": Schedule(1e-3, "constant"), "optimizer": Optimizer("sgd"), **options}
        return Plan("p", CONFIG, stages, batch=4, objective=Causal(8), **given)

    def grown(op, **options):
        return plan(stages=(Stage(tokens=320), Stage(tokens=320, grow=op, **options)))

    assert cited(plan()) == set() and gj.cite(plan()) == ""
    assert cited(plan(optimizer=Optimizer("lion"))) == {"2302.06675"}
    assert cited(plan(optimizer=Optimizer(scale_by_parameter=True))) == {"1711.05101", "2309.02373"}
    assert cited(plan(optimizer=Optimizer("sophia"))) == {"2305.14342"}
    assert len(cited(plan(optimizer=Optimizer("muon")))) == 2
    assert cited(plan(rate=Schedule(1e-3, "wsd"))) == {"2404.06395"}
    assert cited(plan(stages=(Stage(tokens=320, select=RhoLoss()),))) == {"2206.07137"}
    assert cited(grown(gj.msg(mlp=16), ramp=2)) == {"2305.02869"}
    both = gj.chain(gj.stack(layers=3, order="middle"), gj.zeros(mlp=16))
    assert cited(grown(both)) == {"2409.19044", "2308.06103"}
    assert cited(plan(stages=(Stage(tokens=320, subnet=gj.random_path(2)),))) == {"2402.05913"}
    schedule = gj.path_schedule((2,), layers=2, steps=3)
    assert cited(plan(stages=(Stage(subnet=schedule),))) == {"2402.05913"}
    lion = {"optimizer": Optimizer("lion"), "transfer": Transfer(CONFIG)}
    assert cited(plan(**lion)) == {"2302.06675", "2203.03466", "2505.01618"}
    assert cited(plan(**lion | {"transfer": Transfer(CONFIG, depth=False)})) == {
        "2302.06675",
        "2203.03466",
    }
    assert cited((RTX3090_BERT, Stage(tokens=1, rewind="slope"))) == {"2307.06440", "2305.02869"}


@pytest.mark.parametrize(
    "op, papers",
    [
        (gj.copy(mlp=9), {"1511.05641", "2110.07143"}),
        (gj.copy(mlp=9, noise=0.1), {"1511.05641", "2110.07143", "2409.12903"}),
        (gj.copy(mlp=9, scale="rms"), {"1511.05641", "2110.07143", "2602.02472"}),
        (gj.copy(mlp=12, shares="diagonal"), {"1511.05641", "2110.07143", "2203.06211"}),
        (gj.growth.between(layers=3), set()),
        (gj.growth.between(layers=3, fill="lesa"), {"2502.13794"}),
        (gj.growth.transplant(((0,),)), set()),
        (gj.growth.transplant(((0,),), weights=((2.0,),)), {"2506.06607"}),
        (gj.growth.within(gj.zeros(mlp=9), layers=(0,)), {"2603.08647", "2308.06103"}),
        (gj.growth.given((), method="gradmax", mlp=7), {"2201.05125"}),
        (gj.stack(layers=4, order="centre"), {"2512.08819"}),
        (gj.stack(layers=4, order="insert", branch="zero"), {"2401.02415"}),
        (gj.stack(layers=(0, 0, 1)), set()),
        (gj.stack(layers=gj.growth.solar(8, dropped=2)), {"2312.15166"}),
        (gj.msg(layers=4, opens="in turn"), {"2305.02869", "2603.05369"}),
        (
            gj.upcycle(experts=4, granularity=2, drop=0.5),
            {"2212.05055", "2410.07524", "2502.19261"},
        ),
        (gj.experts(4), set()),
        (gj.experts(4, gated=False), {"2604.19835"}),
        (gj.loop(2), {"1807.03819", "2502.17416"}),
        (gj.loop(2, first=1), {"1807.03819", "2502.17416", "2502.05171"}),
    ],
    ids=lambda value: "" if isinstance(value, set) else repr(value),
)
def test_the_fields_of_an_operator_choose_its_papers(op, papers):
    assert cited(op) == papers


class Widen(Operator):
    """An operator of a user, without a card."""

    factor: Literal[2] = eqx.field(static=True, default=2)
    exactness: ClassVar[gj.growth.Exactness] = "approximate"

    def maps(self, axes):
        return [gj.AxisMap("mlp", np.arange(axes.size("mlp")).repeat(self.factor))]


class Cited(Widen):
    """The same with one."""

    card: ClassVar[Card] = Card(papers=(Paper("Wider", "Doe, Jane", 2026, url="a.org"),))


def test_an_operator_of_a_user_needs_no_card():
    assert gj.cite(gj.chain(Widen(), gj.experts(4))) == ""
    text = gj.cite((Cited(), gj.chain(Cited(), Widen())))
    assert text == (
        "% Cited\n@misc{doe2026wider,\n  title = {{Wider}},\n  author = {Doe, Jane},\n  year = {2026},\n"
        "  url = {a.org},\n}"
    )
    two = Cited.card.papers[0], Paper("Other", "Roe, Max", 2025, "ICML")
    card = Card(papers=two[:1], by={"factor": two, "exactness": {"exact": two}})
    assert card.of(Widen()) == two and card.every() == {
        two[0]: "factor, exactness='exact'",
        two[1]: "factor, exactness='exact'",
    }


@pytest.mark.parametrize(
    "papers", [Cited.card.papers[0], ("Wider",), "Wider"], ids=["paper", "title", "text"]
)
def test_papers_of_a_card_are_a_tuple(papers):
    with pytest.raises(FormatError, match="papers: expected a tuple of gj.Paper"):
        Card(papers=papers)
    with pytest.raises(FormatError, match="'factor'.: expected a tuple of gj.Paper"):
        Card(by={"factor": {2: papers}})


@pytest.mark.parametrize(
    "value", ["runs/first", gj.msg, Cited, None], ids=["run", "maker", "class", "none"]
)
def test_only_values_are_cited(value):
    with pytest.raises(FormatError, match="value: expected a plan, an operator, .* got"):
        gj.cite(value)


def test_a_title_in_another_script_has_a_key():
    assert Paper("模型生长", "Doe, Jane", 2026).key == "doe2026"
