"""What a user sees of the package: names, laziness, extras, argument orders and types."""

import ast
import importlib
import inspect
import pkgutil
import re
import subprocess
import sys
import textwrap
import tomllib
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import pytest

import growjax
import growjax as gj
from growjax.errors import GrowjaxError
from growjax.extras import EXTRAS, load, require
from tests.rooms import LEVEL, ROOT


PROJECT = tomllib.loads((ROOT.parent / "pyproject.toml").read_text())["project"]
INIT = ast.parse((ROOT / "__init__.py").read_text())
TRAIN = [package for package, extra in EXTRAS.items() if extra == "train"]
# Entry points; everything else is one dot deep
COMMANDS = {"demo", "cli", "__main__", "extras"}


def child(code: str, *, without: list[str] = []) -> subprocess.CompletedProcess:  # noqa: B006
    """Run code in a process of its own, in which some packages cannot be imported."""
    blocked = f"import sys; sys.modules.update(dict.fromkeys({without!r}))\n"
    return subprocess.run(
        [sys.executable, "-c", blocked + textwrap.dedent(code)],
        capture_output=True,
        text=True,
        cwd=ROOT.parent,
    )


def imported_names(nodes: list[ast.stmt]) -> set[str]:
    return {str(a.asname) for n in nodes if isinstance(n, ast.ImportFrom) for a in n.names}


def packages() -> list[Path]:
    return [path.parent for path in ROOT.rglob("__init__.py")]


def public_modules() -> list[Any]:
    """Every module of growjax that a user may import here, but for the command line."""
    names = [m.name for m in pkgutil.walk_packages(growjax.__path__, "growjax.")]
    # The harness is an extra of its own, which the tests do not install
    left_out = ("growjax.__main__", "growjax.cli", "growjax.evals.harness")
    return [importlib.import_module(name) for name in names if not name.startswith(left_out)]


# Rooms, one dot deep -----------------------------------------------------------------------------


def test_every_room_is_an_attribute_before_it_is_imported():
    rooms = sorted(set(LEVEL) - COMMANDS)
    code = f"""
        import types
        import growjax as gj
        for room in {rooms!r}:
            assert room in dir(gj), f"dir(growjax) does not list {{room}}"
            assert isinstance(getattr(gj, room), types.ModuleType), f"gj.{{room}} is no module"
        assert gj.Plan is gj.train.Plan is gj.plan.Plan and gj.Stage is gj.train.Stage
        assert {{"Plan", "Stage", "msg"}} <= set(dir(gj))
        """
    done = child(code)
    assert done.returncode == 0, done.stderr


def test_what_is_loaded_late_is_what_a_type_checker_sees():
    (block,) = [node for node in INIT.body if isinstance(node, ast.If)]
    assert ast.unparse(block.test) == "TYPE_CHECKING"
    seen = imported_names(block.body)
    assert seen == {*growjax._LAZY, *growjax._PLANS}
    eager = imported_names(INIT.body)
    assert set(LEVEL) - COMMANDS <= seen | eager
    assert not seen & eager


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = gj.nothing  # type: ignore[attr-defined]


def test_no_sub_module_is_hidden_by_another_name():
    """`import growjax.x.y` gives the module, whatever `growjax.x` exports."""
    hidden = []
    for package in packages():
        tree = ast.parse((package / "__init__.py").read_text())
        names = imported_names([n for n in ast.walk(tree) if isinstance(n, ast.stmt)])
        for module in [p.stem for p in package.glob("*.py")] + [p.name for p in package.iterdir()]:
            prefix = ".".join(["growjax", *package.relative_to(ROOT).parts])
            if module in names and f"from {prefix} import {module}" not in ast.unparse(tree):
                hidden.append(f"{prefix}.{module}")
    assert not hidden


# What a bare installation can do -----------------------------------------------------------------


def test_operators_need_no_extra():
    code = """
        import equinox as eqx, jax, jax.numpy as jnp, optax
        import growjax as gj

        class MLP(eqx.Module):
            up: jax.Array = gj.param("embed -> mlp")
            down: jax.Array = gj.param("mlp -> out")
            gate: gj.Gate | None = gj.gate("mlp")
            def __call__(self, x):
                return gj.gated(jnp.tanh(x @ self.up), self.gate) @ self.down

        class Tower(eqx.Module):
            block: MLP = gj.stacked("layers")
            def __call__(self, x):
                x = x.astype(self.block.up.dtype)
                return jax.lax.scan(lambda x, block: (x + block(x), None), x, self.block)[0]

        def tower(key):
            a, b = jax.random.split(key)
            return MLP(jax.random.normal(a, (4, 6)), jax.random.normal(b, (6, 4)))

        key = jax.random.key(0)
        small = Tower(jax.vmap(tower)(jax.random.split(key, 2)))
        op = gj.chain(gj.copy(mlp=12), gj.stack(layers=3))
        tx = optax.adam(1e-3)
        state = tx.init(gj.partition(small)[0])
        state = gj.carry(op, state, small, optimizer=tx, key=key)
        big = gj.grow(op, small, key=key)
        assert jax.tree.structure(tx.init(gj.partition(big)[0])) == jax.tree.structure(state)
        assert gj.certify(gj.copy(mlp=12), small, jnp.ones((2, 4)), key=key).passed
        path = gj.random_path(2)(big, key=key)
        assert gj.sizes(path)["layers"] == 2 and gj.sizes(big)["layers"] == 3
        for room in "annotation axes certificate cost errors gates maps models nn optim subnet".split():
            getattr(gj, room)
        """
    done = child(code, without=list(EXTRAS))
    assert done.returncode == 0, done.stderr


def test_a_room_that_needs_an_extra_says_so_in_one_line():
    code = """
        import importlib
        from growjax.errors import ExtraError
        for room in "data plan runs forecast train evals report testing".split():
            try:
                importlib.import_module(f"growjax.{room}")
            except ExtraError as error:
                print(error)
            else:
                raise SystemExit(f"{room} was imported")
        """
    done = child(code, without=list(EXTRAS))
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 8
    assert all(re.fullmatch(r".* needs .*: pip install 'growjax\[\w+\]'", x) for x in lines), lines
    done = child("import runpy; runpy.run_module('growjax', run_name='__main__')", without=TRAIN)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.splitlines() == [
        "growjax: the command line needs tyro, rich: pip install 'growjax[train]'"
    ]


def test_every_missing_package_is_named_at_once(monkeypatch):
    for package in ("grain", "tokenizers"):
        monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=r"^x needs grain, tokenizers: .*\[data,train\]'$"):
        require("x", "grain", "tokenizers", "rich")
    with pytest.raises(GrowjaxError, match=r"^this needs tokenizers: .*\[data\]'$"):
        load("tokenizers", "this")
    assert load("rich.console", "this").Console


def test_every_package_outside_the_base_has_an_extra():
    """What growjax imports at all is a dependency, or an extra names it, and pyproject.toml agrees."""
    base = {re.split(r"\W", line)[0] for line in PROJECT["dependencies"]}
    assert base == set("einops equinox jax jaxtyping numpy optax".split())
    outside = set()
    for path in ROOT.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                outside |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                outside.add(str(node.module).split(".")[0])
    outside -= {*sys.stdlib_module_names, "growjax", *base}
    optional = {"tensorboardX", "wandb"}  # trackers, each an extra of its own name
    assert outside <= {*EXTRAS, *optional}
    distributions = {"orbax": "orbax-checkpoint", "sklearn": "scikit-learn", "lm_eval": "lm-eval"}
    for package, extra in EXTRAS.items():
        wanted = distributions.get(package, package)
        lines = PROJECT["optional-dependencies"][extra]
        assert any(line.startswith(wanted) for line in lines), f"{wanted} is not in {extra}"


# Version and types -------------------------------------------------------------------------------


def test_the_version_stands_once():
    assert re.fullmatch(r"\d+\.\d+\.\d+(\.?\w+)?", gj.__version__)
    assert "version" not in PROJECT and PROJECT["dynamic"] == ["version"]
    changes, citation = (ROOT.parent / name for name in ("CHANGELOG.md", "CITATION.cff"))
    released = re.findall(r"^## (\S+)$", changes.read_text(), re.MULTILINE)
    assert released[:2] == ["Unreleased", gj.__version__]
    assert f"\nversion: {gj.__version__}\n" in citation.read_text()
    done = subprocess.run(
        [sys.executable, "-m", "growjax", "--version"],
        capture_output=True,
        text=True,
        cwd=ROOT.parent,
    )
    assert (done.stdout, done.returncode) == (f"growjax {gj.__version__}\n", 0)


def test_type_checkers_may_read_the_package():
    assert (ROOT / "py.typed").exists()


@pytest.mark.parametrize(
    "function",
    [gj.grow, gj.ramp, gj.settle, gj.Operator.__call__, gj.Subnet.__call__],
    ids=lambda f: f.__qualname__,
)
def test_a_model_comes_back_with_its_own_type(function):
    signature = inspect.signature(function)
    assert signature.return_annotation is signature.parameters["model"].annotation
    assert signature.return_annotation.__class__.__name__ == "TypeVar"


# Arguments ---------------------------------------------------------------------------------------


def public_functions() -> dict[str, Any]:
    """Functions and methods of all modules under their dotted names, private ones left out."""
    functions = {}
    for module in public_modules():
        for name, thing in vars(module).items():
            if name.startswith("_") or getattr(thing, "__module__", None) != module.__name__:
                continue
            if inspect.isfunction(thing):
                functions[f"{module.__name__}.{name}"] = thing
            elif inspect.isclass(thing):
                for method, f in vars(thing).items():
                    if inspect.isfunction(f) and (method == "__call__" or method[0] != "_"):
                        functions[f"{module.__name__}.{name}.{method}"] = f
    return functions


# A key is what these are about, or the order is that of JAX's initialisers: (key, shape, dtype)
KEY_FIRST = {"growjax.maps.fold_in_name", "growjax.nn.linear.normal"}
# Called inside growjax alone, or by it: a config or a factory in a plan is `build(key)`
INTERNAL = {"growjax.maps.apply"}


def test_a_key_is_given_by_its_name():
    positional = []
    for name, function in public_functions().items():
        key = inspect.signature(function).parameters.get("key")
        if name.rpartition(".")[2] == "build":
            continue
        if key is not None and key.kind is not key.KEYWORD_ONLY and "Key" in str(key.annotation):
            positional.append(name)
    assert set(positional) - KEY_FIRST - INTERNAL == set()


def test_an_operator_comes_before_what_it_acts_on():
    wrong = []
    for name, function in public_functions().items():
        order = [n for n in inspect.signature(function).parameters if n not in ("self", "cls")]
        objects = [order.index(n) for n in ("model", "state", "path") if n in order]
        if "op" in order and objects and order.index("op") > min(objects):
            wrong.append(f"{name}({', '.join(order)})")
    assert wrong == []


# Models of one's own -----------------------------------------------------------------------------


class Layer(eqx.Module):
    weight: jax.Array = gj.param("embed -> embed")


class Tower(eqx.Module):
    block: Layer = gj.stacked("layers")
    scale: jax.Array | None = gj.branch("layers")
    on: jax.Array | None = gj.active("layers")


def test_a_stack_of_ones_own_has_its_axes():
    model = Tower(Layer(jax.numpy.zeros((3, 2, 2))))
    table = gj.axes_of(model)
    assert gj.sizes(model) == {"layers": 3, "embed": 2}
    assert [dim.role for dim in table["block.weight"].dims] == ["stack", "consumed", "produced"]
    assert (table["scale"].kind, table["on"].kind) == ("branch", "active")
    assert model.scale is None and model.on is None
    skipping = gj.random_path(2, mode="bernoulli")(model, key=gj.step_key(0, 0))
    assert skipping.on is not None and skipping.on.shape == (3,)
