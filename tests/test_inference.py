"""Axes that are found by tracing: models of other people, annotated by nobody."""

import re
from typing import Any

import equinox as eqx
import jax
import numpy as np
import pytest

import growjax as gj
from growjax.axes import axes_of
from growjax.errors import AxisError
from tests import test_axes, zoo


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


TOKENS = np.arange(10).reshape(2, 5)
RESIDUAL = {
    "blocks.*.norm": "~embed",
    "blocks.*.up": "embed -> mlp",
    "blocks.*.down": "mlp -> embed",
}
WORDS = {"table": "[vocab] -> embed", "norm": "~embed", "head": "embed -> classes"}
ENCODER = {
    "blocks.*.norm?": "~embed",
    "blocks.*.attention": "embed -> heads 3 head_dim",
    "blocks.*.mlp": "embed -> mlp -> embed",
}
LAYERS: dict[str, Any] = {"stacks": {"blocks": "layers"}}
# The model, a batch, what a person would annotate, and an operator for it
ZOO = {
    "tower": (
        zoo.Tower,
        zoo.normal((2, 5, 8)),
        zoo.TOWER | {"into": "8 -> embed"},
        LAYERS,
        dict(mlp=9),
    ),
    "vision transformer": (
        zoo.ViT,
        zoo.normal((2, 3, 4, 4)),
        ENCODER
        | {"patches": "3 -> embed", "token": "1 -> embed", "positions": "5 -> embed"}
        | {"norm": "~embed", "head": "embed -> classes"},
        LAYERS,
        dict(heads=3, mlp=9, head_dim=7),
    ),
    "mixer": (
        zoo.Mixer,
        zoo.normal((2, 5, 3)),
        {
            "into": "3 -> embed",
            "blocks.*.norm?": "~embed",
            "norm": "~embed",
            "head": "embed -> classes",
        }
        | {"blocks.*.tokens": "5 -> tokens -> 5", "blocks.*.channels": "embed -> mlp -> embed"},
        LAYERS,
        dict(tokens=9, mlp=11),
    ),
    "gru": (
        lambda: zoo.Recurrent(eqx.nn.GRUCell),
        TOKENS,
        {"table": "[vocab] -> embed", "cell": "embed -> hidden", "head": "hidden -> classes"},
        {},
        dict(hidden=8, embed=7),
    ),
    "lstm": (
        lambda: zoo.Recurrent(eqx.nn.LSTMCell),
        TOKENS,
        {"table": "[vocab] -> embed", "cell": "embed -> hidden", "head": "hidden -> classes"},
        {},
        dict(hidden=8, embed=7),
    ),
    "mamba": (
        lambda: zoo.Words(zoo.Mamba),
        TOKENS,
        WORDS
        | {
            "blocks.*.norm": "~embed",
            "blocks.*.into.weight": "(2 mlp) <- embed",
            "blocks.*.conv": "mlp",
        }
        | {
            "blocks.*.select.weight": "(rank <- + state <- + <- state) mlp",
            "blocks.*.step": "rank -> mlp",
        }
        | {
            "blocks.*.log_a": "-> mlp state",
            "blocks.*.skip": "mlp",
            "blocks.*.out": "mlp -> embed",
        },
        LAYERS | {"statics": {"blocks.*.rank": "rank", "blocks.*.state": "state"}},
        dict(mlp=8, rank=3, state=5),
    ),
    "experts": (
        lambda: zoo.Words(zoo.SoftMoE),
        TOKENS,
        WORDS
        | {"blocks.*.norm": "~embed", "blocks.*.slots": "embed 3 2 ->"}
        | {
            "blocks.*.experts.layers.0.weight": "3 mlp <- embed",
            "blocks.*.experts.layers.0.bias": "-> 3 mlp",
        }
        | {
            "blocks.*.experts.layers.1.weight": "3 embed <- mlp",
            "blocks.*.experts.layers.1.bias": "-> 3 embed",
        },
        LAYERS,
        dict(mlp=8),
    ),
    "fused": (
        lambda: zoo.Words(zoo.Llama),
        TOKENS,
        WORDS
        | {"blocks.*.norm?": "~embed", "blocks.*.out.weight": "embed <- (kv_heads group 4)"}
        | {"blocks.*.qkv.weight": "(kv_heads group 4 <- + kv_heads 4 <- + kv_heads 4 <-) embed"}
        | {"blocks.*.gate_up.weight": "(2 mlp) <- embed", "blocks.*.down": "mlp -> embed"},
        LAYERS
        | {"statics": {"blocks.*.n_heads": "kv_heads group", "blocks.*.n_kv_heads": "kv_heads"}},
        dict(kv_heads=3, mlp=8),
    ),
    "tied": (
        zoo.Tied,
        TOKENS,
        RESIDUAL
        | {
            "shared.pytree.0": "[vocab] -> embed",
            "positions": "[positions] -> embed",
            "norm": "~embed ->",
        },
        LAYERS,
        dict(mlp=9),
    ),
}


def roles(table):
    """Every leaf's axes: what is written as produced may be elementwise, which is the same for copies."""

    def of(dim):
        role = "produced" if dim.role == "elementwise" else dim.role
        return dim.axis, "" if dim.literal else role, dim.normalised

    return {
        path: [[of(dim) for dim in term] for terms in slot.spec.terms for term in terms]
        for path, slot in table.items()
        if slot.arrays()
    }


@pytest.fixture(scope="module")
def inferred():
    """What is inferred of every model, once."""
    with jax.enable_x64(True):
        return {name: gj.infer(zoo.build(make), batch) for name, (make, batch, *_) in ZOO.items()}


@pytest.mark.parametrize("name", sorted(ZOO))
def test_what_is_inferred_is_what_a_person_would_annotate(name, inferred):
    make, batch, specs, options, _ = ZOO[name]
    by_hand = gj.annotate(zoo.build(make), specs, **options, example=batch)
    assert roles(axes_of(inferred[name])) == roles(axes_of(by_hand))
    assert gj.sizes(inferred[name]) == gj.sizes(by_hand)


@pytest.mark.parametrize("name", sorted(ZOO))
def test_what_is_printed_makes_the_same_annotation(name, inferred):
    printed = eval(str(inferred[name]), {"gj": gj, "model": zoo.build(ZOO[name][0])})
    assert roles(axes_of(printed)) == roles(axes_of(inferred[name]))
    assert printed.statics == inferred[name].statics
    assert axes_of(printed).closings.items() <= axes_of(inferred[name]).closings.items()


@pytest.mark.parametrize("name", sorted(ZOO))
def test_a_model_that_nobody_annotated_grows_exactly(name, inferred):
    *_, batch, _, options, sizes = (None, *ZOO[name])
    small = inferred[name]
    op = gj.copy(**sizes, shares="random")
    if "embed" in gj.sizes(small) and "embed" not in sizes:
        op = gj.chain(op, gj.copy(embed=2 * gj.sizes(small)["embed"]))
    if options and name != "mixer":  # a branch over tokens does not end in the stream
        op = gj.chain(op, gj.stack(layers=2 * gj.sizes(small)["layers"], branch="zero"))

    @eqx.filter_jit
    def outputs(model):
        return jax.vmap(model)(batch), jax.vmap(op(model))(batch)

    before, after = outputs(small)
    np.testing.assert_allclose(after, before, rtol=1e-11, atol=1e-11)
    big = eqx.filter_eval_shape(op, small).model
    if options and name != "mixer":
        assert len(big.blocks) == 2 * len(small.model.blocks)


def test_an_inferred_model_has_the_gates_that_are_asked_for(inferred):
    make, batch, *_ = ZOO["tower"]
    small = gj.infer(zoo.build(make), batch, gates=["mlp", "layers"])
    assert list(small.gates) == ["mlp", "layers"] and "gates=[" in str(small)
    assert small.specs == inferred["tower"].specs and small.notes == inferred["tower"].notes
    big = gj.grow(gj.msg(mlp=9, layers=3), small, key=jax.random.key(0))
    np.testing.assert_allclose(jax.vmap(big)(batch), jax.vmap(small)(batch), rtol=1e-11, atol=1e-11)
    with pytest.raises(AxisError, match="gates: .*'width'"):
        gj.infer(zoo.build(make), batch, gates=["width"])


def test_blocks_that_do_not_act_through_the_stream_are_said_to_stay_open(inferred):
    """Mixing tokens ends in no array that produces the stream, so zeros there do not close it."""
    (note,) = [note for note in inferred["mixer"].notes if "branch='zero'" in note]
    assert note.startswith("layers:") and "blocks.*.tokens.layers.1.weight" in note
    assert "channels" not in note and "blocks.*.norm2" not in note
    others = [name for name in inferred if name != "mixer"]
    assert not any("branch='zero'" in note for name in others for note in inferred[name].notes)


# More than one model ---------------------------------------------------------------------------


def test_a_scanned_stack_is_an_axis_and_constants_that_follow_a_size_fix_it():
    model = test_axes.plain()
    small = gj.infer(model, np.zeros((2, 5), int))
    by_hand = {
        "blocks.attention.query_proj.weight": "layers: (heads 3) <- embed",
        "blocks.attention.key_proj.weight": "layers: (heads 3) <- embed",
    }
    by_hand |= {path: spec for path, spec in test_axes.SPECS.items() if path not in by_hand}
    by_hand = gj.annotate(model, by_hand, ignore=["heat"], statics={"*.num_heads": "heads"})
    mine = roles(axes_of(small))
    del mine["heat"]
    assert mine == roles(axes_of(by_hand))
    (why,) = [note for note in small.notes if "query_proj" in note]
    assert why.startswith("3 in blocks.attention.query_proj.weight, blocks.attention.key_proj")
    assert "a constant that follows its size" in why


def test_running_statistics_are_found_with_their_channels():
    model, state = eqx.nn.make_with_state(zoo.BatchNormed)(2)
    batch = zoo.normal((2, 3, 7))
    small = gj.infer(model, batch, state=state)
    specs = zoo.BATCH_NORMED | {"into": "3 -> channels"}
    by_hand = gj.annotate(model, specs, stacks={"blocks": "layers"}, state=state, example=batch)
    rename = {"mlp": "hidden"}

    def renamed(table):
        return {
            path: [[(rename.get(axis, axis), *rest) for axis, *rest in term] for term in terms]
            for path, terms in table.items()
            if "batch_counter" not in path
        }

    assert renamed(roles(axes_of(small))) == renamed(roles(axes_of(by_hand)))
    kinds = {slot.path: slot.kind for slot in axes_of(small).values()}
    assert kinds["into_norm.batch_state_index.init.0"] == "buffer"
    assert eqx.tree_equal(small.model, model)


def test_a_tied_head_without_a_norm_is_refused_growth_and_told_why():
    small = gj.infer(zoo.build(lambda: zoo.Tied(norm=False)), TOKENS)
    assert gj.sizes(small) == dict(vocab=11, positions=9, layers=2, mlp=6)
    (why,) = [note for note in small.notes if note.startswith("8 in ")]
    assert "the program sums over it (dot_general near shared.pytree.0.weight), and no array" in why


class Bare(eqx.Module):
    """A norm without parameters, in a layer or written out."""

    up: eqx.nn.Linear
    norm: eqx.nn.LayerNorm | None
    down: eqx.nn.Linear

    def __init__(self, layer):
        self.up, self.down = (eqx.nn.Linear(a, b, key=zoo.KEY) for a, b in ((4, 6), (6, 5)))
        self.norm = eqx.nn.LayerNorm(6, use_weight=False, use_bias=False) if layer else None

    def __call__(self, x):
        x = self.up(x)
        x = (x - x.mean()) / x.std() if self.norm is None else self.norm(x)
        return self.down(x)


def test_a_norm_without_parameters_is_declared_where_its_gain_would_be():
    model, batch = zoo.build(lambda: Bare(layer=True)), zoo.normal((2, 4))
    small = gj.infer(model, batch)
    assert ("norm.weight", "~up") in [(pattern, spec.spec) for pattern, spec in small.specs]
    assert dict(small.statics) == {"norm.shape": ("up",)}
    assert any("norm.weight is taken to be a norm over it" in note for note in small.notes)
    big = gj.copy(up=12)(small)
    np.testing.assert_allclose(jax.vmap(big)(batch), jax.vmap(small)(batch), rtol=1e-12)
    with pytest.raises(gj.errors.GrowthError, match="norm.weight"):
        gj.copy(up=9)(small)


def test_a_norm_that_nothing_can_declare_fixes_its_axis():
    small = gj.infer(zoo.build(lambda: Bare(layer=False)), zoo.normal((2, 4)))
    assert "up" not in gj.sizes(small)
    (why,) = [note for note in small.notes if note.startswith("6 in ")]
    assert "a norm that has no parameters averages over it (near up.weight, up.bias)" in why


class Sized(eqx.Module):
    """A size that is read from a field that is called like another, and one that nobody reads."""

    table: eqx.nn.Linear
    head: eqx.nn.Linear
    width: int = eqx.field(static=True)
    depth: int = eqx.field(static=True)

    def __init__(self):
        self.table, self.head = (eqx.nn.Linear(a, b, key=zoo.KEY) for a, b in ((4, 6), (6, 5)))
        self.width = self.depth = 6

    def __call__(self, x):
        return self.head(self.table(x).reshape(self.width))


def test_a_static_field_that_is_read_follows_its_axis_and_another_of_its_size_does_not():
    small = gj.infer(zoo.build(Sized), zoo.normal((2, 4)))
    assert dict(small.statics) == {"width": "width"}
    big = eqx.filter_eval_shape(gj.copy(width=9), small).model
    assert (big.width, big.depth) == (9, 6)


class Products(eqx.Module):
    """A product over a hidden axis, and numbers of which no gradient is taken."""

    up: eqx.nn.Linear
    scale: Any
    down: eqx.nn.Linear

    def __init__(self):
        self.up, self.down = (eqx.nn.Linear(a, b, key=zoo.KEY) for a, b in ((4, 6), (6, 5)))
        self.scale = np.ones(6)

    def __call__(self, x):
        h = self.up(x) * jax.lax.stop_gradient(self.scale)
        return self.down(h) + jax.numpy.prod(h)


def test_a_product_over_an_axis_fixes_it_and_constants_are_not_trained():
    small = gj.infer(zoo.build(Products), zoo.normal((2, 4)))
    assert "up" not in gj.sizes(small) and small.ignore == ("scale",)
    assert any("takes a prod over it" in note for note in small.notes)


class Scaled(eqx.Module):
    """A constant that follows the size of a hidden axis."""

    up: eqx.nn.Linear
    down: eqx.nn.Linear

    def __init__(self):
        self.up, self.down = (eqx.nn.Linear(a, b, key=zoo.KEY) for a, b in ((4, 6), (6, 5)))

    def __call__(self, x):
        h = jax.numpy.tanh(self.up(x))
        return self.down(h * h.size**-0.5)


def test_an_inferred_model_is_certified_when_asked(monkeypatch):
    """An axis whose copies change the function becomes a number, even if no trace had seen it."""
    model, batch = zoo.build(Scaled), zoo.normal((2, 4))
    assert "up" not in gj.sizes(gj.infer(model, batch))
    monkeypatch.setattr("growjax.inference.sizes.unbalanced", lambda *_: [])
    assert "up" in gj.sizes(gj.infer(model, batch))
    small = gj.infer(model, batch, certified=True)
    assert "up" not in gj.sizes(small)
    assert any(
        "copies change the outputs by" in note and "(certified)" in note for note in small.notes
    )


@pytest.mark.parametrize("name", ["GPT", "Llama"])
def test_what_is_inferred_of_growjax_own_models_is_what_they_declare(name):
    """All roles of all leaves, up to the names of the axes and to what cannot grow."""
    sizes = dict(layers=2, embed=8, heads=4, kv_heads=2, head_dim=4, mlp=12, vocab=20)
    sizes |= {"positions": 9} if name == "GPT" else {}
    config = getattr(gj.models, f"{name}Config")(**sizes)
    model = eqx.filter_eval_shape(lambda: config.build(key=jax.random.key(0)))
    declared, inferred = roles(axes_of(model)), roles(axes_of(gj.infer(model, TOKENS)))
    names: dict[str, set] = {}
    for path, terms in declared.items():
        if path == "rotary.freqs" or path.endswith("eps"):  # for each pair; not trained
            continue
        ours = sum(inferred[path], [])
        for (axis, *mine), (other, *theirs) in zip(sum(terms, []), ours, strict=True):
            if axis == "head_dim":  # shapes in signatures tie the values' width to the queries'
                assert other.isdigit()
                continue
            names.setdefault(axis, set()).add(other)
            assert mine == theirs, (path, axis)
    # A table and a head of its own have two axes of rows, which the declaration calls by one name
    several = {axis: len(others) for axis, others in names.items() if len(others) > 1}
    assert several == ({"vocab": 2} if name == "Llama" else {})
    assert len(set().union(*names.values())) == len(names) + len(several)


# A hand-written annotation against the program --------------------------------------------------


def checked(**changes):
    specs = zoo.TOWER | changes.pop("specs", {})
    specs = {pattern: spec for pattern, spec in specs.items() if spec is not None}
    return gj.annotate(
        zoo.build(zoo.Tower),
        specs,
        stacks={"blocks": "layers"},
        example=zoo.normal((2, 3, 8)),
        **changes,
    )


NORM = {"blocks.*.norm": None, "blocks.*.norm.bias": "embed"}


SUMMED = "the program sums over it"
UP = {"blocks.*.up": None, "blocks.*.up.bias": "-> mlp"}
HEAD = {"head": None, "head.weight": "-> classes embed", "head.bias": "-> classes"}


@pytest.mark.parametrize(
    "specs, messages",
    [
        (
            UP | {"blocks.*.up.weight": "mlp embed ->"},
            ["blocks.0.up.weight: 'mlp' is declared consumed, and the program needs it produced"],
        ),
        (NORM | {"blocks.*.norm.weight": "embed"}, [f"'embed': {SUMMED} (reduce_sum near into"]),
        (HEAD, [f"axis 'embed': {SUMMED} (dot_general near head.weight), but it is neither"]),
        (
            UP | {"blocks.*.up.weight": "wide <- embed"},
            ["blocks.0.down.weight: 'mlp' is the same dimension of the program as 'wide'"],
        ),
        (
            NORM | HEAD | {"blocks.*.norm.weight": "embed"},
            [f"{SUMMED} (reduce_sum near into", f"{SUMMED} (dot_general near head.weight)"],
        ),
    ],
)
def test_what_an_annotation_says_wrongly_is_all_named(specs, messages):
    with pytest.raises(AxisError, match="does not match the model's program") as caught:
        checked(specs=specs)
    for message in messages:
        assert message in str(caught.value)


def test_a_constant_or_a_field_that_follows_a_size_is_found():
    specs = {"table": "4 -> wide", "head": "wide -> 5"}
    with pytest.raises(
        AxisError, match="axis 'wide' cannot grow: the model does not run with more"
    ):
        gj.annotate(zoo.build(Sized), specs, example=zoo.normal((2, 4)))
    gj.annotate(zoo.build(Sized), specs, statics={"width": "wide"}, example=zoo.normal((2, 4)))
    make, batch, specs, options, _ = ZOO["vision transformer"]
    specs = specs | {"blocks.*.attention": "embed -> heads width head_dim"}
    with pytest.raises(
        AxisError, match="'width' cannot grow: a sum or a constant .* write its size, 3"
    ):
        gj.annotate(zoo.build(make), specs, **options, example=batch)


def test_a_gate_on_blocks_that_it_does_not_close_is_refused():
    for name in ("tower", "mixer"):
        make, batch, specs, options, _ = ZOO[name]

        def gated(make=make, specs=specs, options=options, batch=batch):
            return gj.annotate(zoo.build(make), specs, **options, gates=["layers"], example=batch)

        if name == "tower":
            assert gated().gates == {"layers": None}
            continue
        with pytest.raises(AxisError, match=r"are zero: blocks\.\*\.norm1.*tokens.layers.1.weight"):
            gated()


# Specs as text ----------------------------------------------------------------------------------


def test_notes_are_comments_of_what_is_printed(inferred):
    text = str(inferred["vision transformer"])
    assert re.match(r"# axes: .*embed=8.*\n# 3 in blocks", text)
