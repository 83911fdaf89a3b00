"""The shape of the package: rooms that import downwards only, and a core that knows no model."""

import ast
import dataclasses
import importlib
import inspect
import subprocess
import sys
import typing
from pathlib import Path

import equinox as eqx
import pytest

import growjax
from growjax import algebra, axes, gates, growth, maps, models, nn, subnet
from growjax.growth import operator
from tests import rooms
from tests.rooms import CORE, FRONT, LEVEL, READERS, ROOT


FILES = sorted(ROOT.rglob("*.py"))
TESTS = sorted(Path(__file__).parent.rglob("*.py"))


def room(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imports(path: Path) -> set[str]:
    """Every module that a file imports, anywhere in it, by its whole name."""
    modules = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: relative import"
            # `from growjax import maps` imports a room, not a name of the top level
            modules |= {f"{node.module}.{alias.name}" for alias in node.names}
    return modules


def rooms_of(path: Path) -> set[str]:
    rooms = {name.split(".")[1] for name in imports(path) if name.startswith("growjax.")}
    return rooms - {"__version__"}


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


SOURCES = [path for path in FILES if path != ROOT / "__init__.py"]


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_a_room_imports_only_from_rooms_below(path):
    mine = room(path)
    assert mine in LEVEL, f"give {mine} its place in tests/rooms.py"
    others = rooms_of(path) - {mine}
    assert others <= set(LEVEL), f"these are no rooms: {others - set(LEVEL)}"
    assert {other for other in others if LEVEL[other] >= LEVEL[mine]} == set()


@pytest.mark.parametrize("path", [p for p in SOURCES if room(p) in CORE], ids=name)
def test_growth_needs_jax_and_equinox_alone(path):
    outside = {whole.split(".")[0] for whole in imports(path)} - set(sys.stdlib_module_names)
    assert outside <= {"growjax", "jax", "equinox", "numpy", "jaxtyping"}
    assert rooms_of(path) <= CORE


def test_only_the_front_ends_import_training_and_reports():
    others = [p for p in SOURCES if room(p) not in FRONT]
    assert {name(p) for p in others if rooms_of(p) & FRONT} == set()


def test_the_architecture_page_is_up_to_date():
    """`python -m tests.rooms` writes it."""
    assert rooms.PAGE.read_text() == rooms.page()
    assert {room(p) for p in SOURCES} == set(LEVEL)
    lost = [room for room in LEVEL if not rooms.purpose(room).rstrip().endswith((".", ":"))]
    assert not lost, f"the docstring of {', '.join(lost)} does not begin with a sentence"


def test_the_top_level_loads_no_front_end():
    """They bring heavy dependencies: `growjax.__getattr__` loads them when they are used."""
    tree = ast.parse((ROOT / "__init__.py").read_text())
    loaded = [node for node in tree.body if isinstance(node, ast.ImportFrom)]
    rooms = {f"{node.module}.{alias.name}".split(".")[1] for node in loaded for alias in node.names}
    assert "growth" in rooms and rooms.isdisjoint(FRONT | {"testing", "data"})


def test_importing_growjax_loads_no_heavy_or_development_package():
    code = "import sys, growjax; print(*sorted({m.split('.')[0] for m in sys.modules}))"
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT.parent
    )
    heavy = "optax orbax grain matplotlib tyro rich hypothesis chex safetensors torch pandas"
    assert "growjax" in loaded.stdout.split()
    assert set(loaded.stdout.split()) & set(heavy.split()) == set()


def test_there_is_no_drawer_for_odds_and_ends():
    assert [name(p) for p in FILES if p.stem.strip("_") in ("utils", "util", "helpers")] == []


@pytest.mark.parametrize("path", [*FILES, *TESTS], ids=lambda p: f"{p.parent.name}/{p.name}")
def test_no_file_is_longer_than_500_lines(path):
    assert len(path.read_text().splitlines()) <= 500


# The core knows no model ---------------------------------------------------------------------


def members(*modules) -> set[type]:
    return {c for m in modules for c in vars(m).values() if inspect.isclass(c)}


def field_names(classes, static: bool = True) -> set[str]:
    fields = [f for c in classes if dataclasses.is_dataclass(c) for f in dataclasses.fields(c)]
    return {f.name for f in fields if static or not f.metadata.get("static")}


def model_modules() -> list[type]:
    classes = set()
    for path in SOURCES:
        if room(path) in ("nn", "models"):
            dotted = ".".join(["growjax", *path.relative_to(ROOT).with_suffix("").parts])
            classes |= members(importlib.import_module(dotted.removesuffix(".__init__")))
    return [c for c in classes if issubclass(c, eqx.Module) and c is not gates.Gate]


def leaf_names() -> set[str]:
    """What leaves and parts of models are called, but for words that the core has for its own."""
    own = field_names(members(algebra, axes, gates, maps, growth, subnet, operator))
    own |= set(typing.get_args(axes.Kind)) | set(typing.get_args(algebra.Side))
    own |= set(typing.get_args(axes.Role))
    return field_names(model_modules(), static=False) - own


def spoken(path: Path) -> set[str]:
    """Every attribute, and every word of a string that is one dotted path."""
    words = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute):
            words.add(node.attr)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            if " " not in node.value and "\n" not in node.value:
                words |= set(node.value.split("."))
    return words


def test_the_names_that_growth_may_not_know_are_found():
    names = leaf_names()
    assert {"up", "down", "q", "k_bias", "table", "freqs", "head", "gate_group"} <= names
    assert {"attention", "mlp_norm", "blocks", "pooler", "encoder"} <= names
    assert nn.MLP in model_modules() and models.T5 in model_modules()


@pytest.mark.parametrize("path", [p for p in SOURCES if room(p) in CORE - READERS], ids=name)
def test_growth_knows_no_leaf_by_its_name(path):
    assert spoken(path) & leaf_names() == set()


# The surface ---------------------------------------------------------------------------------

WRITTEN = [
    str(alias.asname)
    for node in ast.parse((ROOT / "__init__.py").read_text()).body
    if isinstance(node, ast.ImportFrom) and str(node.module).startswith("growjax")
    for alias in node.names
]
PUBLIC = {name: getattr(growjax, name) for name in WRITTEN}


def test_the_top_level_is_small():
    assert "None" not in WRITTEN and sorted(WRITTEN) == sorted(set(WRITTEN))
    # An operator is one name here, so their number grows with the catalogue
    assert len(set(WRITTEN) - set(LEVEL)) <= 60


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_every_public_name_is_documented(name):
    thing = PUBLIC[name]
    if name != "NONE":
        text = inspect.getdoc(thing) or ""
        assert len(text) > 20 and text.splitlines()[0].rstrip()[-1] in ".:?"
