"""Names: specs as they are read, tables as they are built, and everything wrong said at once."""

from collections import namedtuple
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import Array

import growjax as gj
from growjax import testing
from growjax.axes import axes_of, get, put, sizes
from growjax.errors import AxisError, GateError, GrowthError
from growjax.gates import Gate
from growjax.models import BERT, GPT, T5, BERTConfig, GPTConfig, Llama, LlamaConfig, T5Config
from growjax.specs import Dim, Spec


SIZES: dict[str, Any] = dict(embed=8, heads=4, head_dim=2, mlp=6, vocab=11)
GIVEN = {
    "GPT": (GPT, GPTConfig(layers=3, positions=9, kv_heads=2, **SIZES)),
    "Llama": (Llama, LlamaConfig(layers=3, kv_heads=2, **SIZES)),
    "BERT": (BERT, BERTConfig(layers=3, positions=9, **SIZES)),
    "T5": (T5, T5Config(encoder_layers=2, decoder_layers=3, buckets=8, **SIZES)),
}


def shapes(name: str) -> Any:
    """A model of which only the shapes exist."""
    model, config = GIVEN[name]
    return eqx.filter_eval_shape(model, config, key=jax.random.key(0))


# Specs ---------------------------------------------------------------------------------------

C, P, E, L, S = "consumed", "produced", "elementwise", "lookup", "stack"


@pytest.mark.parametrize(
    "text, roles",
    [
        ("embed -> mlp", [("embed", C), ("mlp", P)]),
        ("mlp <- embed", [("mlp", P), ("embed", C)]),
        ("-> mlp", [("mlp", P)]),
        ("embed ->", [("embed", C)]),
        ("embed->kv_heads  group", [("embed", C), ("kv_heads", P), ("group", P)]),
        ("embed -> kv_heads <- head_dim", [("embed", C), ("kv_heads", P), ("head_dim", C)]),
        ("mlp <- embed -> heads", [("mlp", P), ("embed", C), ("heads", P)]),
        ("embed -> embed", [("embed", C), ("embed", P)]),
        ("embed", [("embed", E)]),
        ("[vocab] -> embed", [("vocab", L), ("embed", P)]),
        ("layers: -> mlp", [("layers", S), ("mlp", P)]),
        ("layers experts: embed", [("layers", S), ("experts", S), ("embed", E)]),
        ("", []),
    ],
)
def test_arrows_point_from_consumed_to_produced(text, roles):
    spec = Spec.parse(text)
    assert [(dim.axis, dim.role) for dim in spec.dims] == roles
    assert spec.groups == (1,) * len(roles) and spec.means == ()


def test_a_tilde_marks_the_axis_that_a_norm_averages_over():
    assert Spec.parse("-> ~embed").dims == (Dim("embed", "produced", normalised=True),)
    assert Spec.parse("layers: ~embed mlp").dims[1:] == (Dim("embed", E, True), Dim("mlp", E))


def test_angles_name_a_mean_square_and_are_no_dimension():
    assert Spec.parse("<embed>") == Spec((), (), ("embed",))
    assert Spec.parse("layers: <embed>") == Spec((Dim("layers", S),), (1,), ("embed",))


def test_round_brackets_put_two_axes_into_one_dimension():
    spec = Spec.parse("layers: embed -> (heads head_dim)")
    assert spec.groups == (1, 1, 2)
    assert [dim.role for dim in spec.dims] == [S, C, P, P]
    mixed = Spec.parse("(heads head_dim) <- embed")
    assert mixed.groups == (2, 1) and [dim.role for dim in mixed.dims] == [P, P, C]


@pytest.mark.parametrize(
    "text, message",
    [
        ("a -> b -> c", "'b' lies between arrows that make it both consumed and produced"),
        ("a <- b <- c", "'b' lies between arrows that make it both"),
        ("(a b", "a bracket is not closed"),
        ("a) b", r"cannot read '\)'"),
        ("((a b) c)", r"cannot read '\('"),
        ("1x", "cannot read '1x'"),
        ("a, b", "cannot read ','"),
        ("[a", r"cannot read '\['"),
        ("~[a]", "cannot read '~'"),
        ("a - > b", "cannot read '-'"),
        ("a < b", "cannot read '<'"),
        ("<a", "cannot read '<'"),
        ("a: b: c", "cannot read 'a:'"),
        ("lay-ers: a", "cannot read 'lay-ers'"),
    ],
)
def test_a_spec_that_cannot_be_read_says_where(text, message):
    with pytest.raises(AxisError, match=message) as caught:
        Spec.parse(text)
    assert repr(text) in str(caught.value)


# Tables --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, expected",
    [
        ("GPT", dict(layers=3, positions=9, kv_heads=2, group=2)),
        ("Llama", dict(layers=3, kv_heads=2, group=2)),
        ("BERT", dict(layers=3, positions=9, kv_heads=4, group=1, token_types=2, nsp=2)),
        ("T5", dict(encoder_layers=2, decoder_layers=3, kv_heads=4, group=1, buckets=8)),
    ],
)
def test_sizes_are_read_off_the_arrays(name, expected):
    assert sizes(shapes(name)) == dict(embed=8, head_dim=2, mlp=6, vocab=11) | expected


@pytest.mark.parametrize("name", GIVEN)
def test_every_array_of_a_model_is_declared_and_nothing_else_is(name):
    model = shapes(name)
    declared = [leaf for slot in axes_of(model).values() for leaf in slot.arrays()]
    assert sorted(map(id, declared)) == sorted(map(id, jax.tree.leaves(model)))


def test_the_table_says_the_role_of_every_axis_of_a_leaf():
    table = axes_of(shapes("Llama"))
    q, k = table["blocks.block.attention.q"], table["blocks.block.attention.k"]
    assert [d.role for d in q.dims] == [S, C, P, P, P]
    assert [d.role for d in k.dims] == [S, C, P, C]  # keys meet the queries' head_dim
    assert table["embedding.table"].dims == (Dim("vocab", L), Dim("embed", P))
    assert table["rotary.freqs"].kind == "buffer"
    assert table.is_stream("embed") and not table.is_stream("mlp")
    assert {s.path for s in table.having("mlp")} == {
        f"blocks.block.mlp.{name}" for name in ("up", "up_bias", "glu", "down", "gate")
    }
    assert "down" in repr(table) and "mlp=6:consumed" in repr(table)


def test_the_norm_before_a_tied_head_consumes_and_a_post_norm_produces():
    roles = {name: axes_of(shapes(name)) for name in GIVEN}
    assert roles["GPT"]["norm.weight"].dims == (Dim("embed", C, True),)
    assert roles["Llama"]["norm.weight"].dims == (Dim("embed", E, True),)
    assert roles["BERT"]["blocks.block.mlp_norm.weight"].dims[1] == Dim("embed", P, True)
    assert roles["T5"]["decoder_norm.weight"].dims == (Dim("embed", C, True),)
    assert roles["T5"]["encoder_norm.weight"].dims == (Dim("embed", E, True),)
    assert roles["BERT"]["mlm.norm.weight"].dims == (Dim("embed", C, True),)
    assert roles["T5"]["decoder_norm.eps"].spec.means == ("embed",)
    assert roles["BERT"]["embedding_norm.eps"].spec.means == ()  # a moved mean cannot be mended


def test_a_template_is_filled_in_from_the_module():
    table = axes_of(shapes("T5"))
    assert table["encoder.block.mlp.up"].dims[0] == Dim("encoder_layers", S)
    assert table["decoder.block.mlp.up"].dims[0] == Dim("decoder_layers", S)
    assert axes_of(shapes("BERT"))["token_type.table"].dims[0] == Dim("token_types", L)


def ones(*shape: int, dtype: Any = np.float32) -> Any:
    return np.ones(shape, dtype)


class Loose(eqx.Module):
    a: Array
    b: dict
    c: list
    d: Array = gj.param("-> mlp")


def test_every_undeclared_array_is_named_in_one_error():
    with pytest.raises(AxisError, match="param/buffer") as caught:
        axes_of(Loose(ones(2), {"x": ones(3, 1)}, [1.0, ones(4)], ones(5)))
    for line in ("a: shape (2,)", "b.x: shape (3, 1)", "c.1: shape (4,)"):
        assert line in str(caught.value)
    assert "d:" not in str(caught.value)


class Wrong(eqx.Module):
    a: Array = gj.param("embed -> mlp")
    b: Array = gj.param("-> mlp")
    c: Array = gj.param("(heads head_dim) -> embed")
    d: Array = gj.param("heads")
    e: Array = gj.param("head_dim")
    f: Array = gj.param("[vocab] -> embed")


def test_every_rank_and_size_that_disagrees_is_named_in_one_error():
    shape = [(2, 3), (4,), (12, 5), (2,), (3,), (2,)]
    with pytest.raises(AxisError) as caught:
        axes_of(Wrong(*[ones(*s) for s in shape]))
    for line in (
        "axis 'mlp' has several sizes: 3 at a, 4 at b",
        "axis 'embed' has several sizes: 2 at a, 5 at c",
        "f: declared with 2 dimensions (vocab embed), but its shape is (2,)",
        "c: (heads head_dim) makes 6, but the dimension is 12",
    ):
        assert line in str(caught.value)


class Folded(eqx.Module):
    a: Array = gj.param("(heads head_dim) -> embed")
    b: Array | None = gj.param("heads")


def test_a_shared_dimension_is_split_by_the_sizes_that_are_known():
    assert sizes(Folded(ones(6, 2), ones(3))) == dict(heads=3, head_dim=2, embed=2)
    for heads in (None, ones(4)):
        with pytest.raises(AxisError, match="a: cannot split a dimension of 6"):
            sizes(Folded(ones(6, 2), heads))
    numbers: Any = np.arange(12.0).reshape(6, 2)
    slot = axes_of(folded := Folded(numbers, ones(3)))["a"]
    apart = slot.split(folded.a, dict(heads=3, head_dim=2, embed=2))
    assert apart.shape == (3, 2, 2) and np.array_equal(slot.join(apart), folded.a)


def test_an_unknown_axis_is_answered_with_the_known_ones():
    with pytest.raises(AxisError, match="unknown axis 'heads'.*kv_heads=2, group=2"):
        axes_of(shapes("GPT")).size("heads")


# Trained and not -----------------------------------------------------------------------------


class Small(eqx.Module):
    up: Array = gj.param("embed -> mlp")
    count: Array = gj.param("mlp")
    freqs: Array = gj.buffer("mlp")
    gate: Gate | None = gj.gate("mlp")


def small(gate=None):
    return Small(ones(2, 3), ones(3, dtype=np.int32), ones(3), gate)


def test_only_floating_params_are_trained_and_combine_is_the_inverse():
    gate = Gate(ones(3), ~ones(3, dtype=bool))
    trained, rest = gj.partition(small(gate))
    assert [leaf.shape for leaf in jax.tree.leaves(trained)] == [(2, 3)]
    assert rest.up is None and rest.count is not None and eqx.tree_equal(rest.gate, gate)
    assert eqx.tree_equal(eqx.combine(trained, rest), small(gate))


def test_a_gate_leaves_no_trace_in_what_is_trained():
    gate = Gate(ones(3), ~ones(3, dtype=bool))
    opened, settled = gj.partition(small(gate))[0], gj.partition(small())[0]
    assert jax.tree.structure(opened) == jax.tree.structure(settled)


@pytest.mark.parametrize("name", GIVEN)
def test_a_model_is_partitioned_as_its_constructor_made_it(name):
    """Fields that a constructor leaves at their default must not confuse the tree."""
    trained, rest = gj.partition(model := shapes(name))
    table = axes_of(model)
    for tree, slots in [(trained, table.of_kind("param")), (rest, table.of_kind("buffer"))]:
        assert len(jax.tree.leaves(tree)) == sum(len(slot.arrays()) for slot in slots)


# Places --------------------------------------------------------------------------------------

Pair = namedtuple("Pair", "left right")


class Tree(eqx.Module):
    list: list
    pair: Pair
    dict: dict
    none: Any
    size: int = eqx.field(static=True)


TREE = Tree([1, (2, 3)], Pair(4, {"x": 5}), {"y": [6]}, None, 7)


@pytest.mark.parametrize(
    "steps, old",
    [
        (("list", 0), 1),
        (("list", 1, 1), 3),
        (("pair", 0), 4),
        (("pair", 1, "x"), 5),
        (("dict", "y", 0), 6),
        (("none",), None),
        (("size",), 7),
    ],
)
def test_put_fills_the_place_that_get_reads_and_no_other(steps, old):
    assert get(TREE, steps) == old
    changed = put(TREE, {steps: "new"})
    assert get(changed, steps) == "new" and get(TREE, steps) == old
    assert eqx.tree_equal(put(changed, {steps: old}), TREE)


def test_put_fills_several_places_at_once_and_keeps_types():
    changed = put(TREE, {("list", 1, 0): 8, ("pair", 1, "x"): 9, ("size",): 0, ("none",): 1})
    assert changed == Tree([1, (8, 3)], Pair(4, {"x": 9}), {"y": [6]}, 1, 0)
    assert type(changed.pair) is Pair and type(changed.list[1]) is tuple
    assert put(TREE, {(): 3}) == 3


# A model that somebody else wrote ------------------------------------------------------------


class PlainBlock(eqx.Module):
    norm1: eqx.nn.LayerNorm
    attention: eqx.nn.MultiheadAttention
    norm2: eqx.nn.LayerNorm
    up: eqx.nn.Linear
    down: eqx.nn.Linear

    def __init__(self, key):
        self.norm1, self.norm2 = eqx.nn.LayerNorm(8), eqx.nn.LayerNorm(8)
        self.attention = eqx.nn.MultiheadAttention(2, 8, qk_size=3, vo_size=3, key=key)
        self.up, self.down = eqx.nn.Linear(8, 6, key=key), eqx.nn.Linear(6, 8, key=key)

    def __call__(self, x):
        h = jax.vmap(self.norm1)(x)
        x = x + self.attention(h, h, h)
        return x + jax.vmap(lambda t: self.down(jnp.tanh(self.up(self.norm2(t)))))(x)


class Plain(eqx.Module):
    table: eqx.nn.Embedding
    blocks: PlainBlock
    norm: eqx.nn.LayerNorm
    head: eqx.nn.Linear
    heat: Array

    def __init__(self, key):
        self.table = eqx.nn.Embedding(11, 8, key=key)
        self.blocks = eqx.filter_vmap(PlainBlock)(jax.random.split(key, 2))
        self.norm, self.head = eqx.nn.LayerNorm(8), eqx.nn.Linear(8, 5, key=key)
        self.heat = jnp.ones(3)

    def __call__(self, tokens):
        arrays, static = eqx.partition(self.blocks, eqx.is_array)
        x = jax.vmap(self.table)(tokens)
        x = jax.lax.scan(lambda x, a: (eqx.combine(a, static)(x), None), x, arrays)[0]
        return jax.vmap(lambda t: self.head(self.norm(t)))(x) * self.heat[0]


SPECS = {
    "table.weight": "[vocab] -> embed",
    "blocks.norm?.weight": "layers: ~embed",
    "blocks.norm?.bias": "layers: embed",
    "blocks.attention.output_proj.weight": "layers: embed <- (heads head_dim)",
    "blocks.attention.*.weight": "layers: (heads head_dim) <- embed",
    "blocks.up.weight": "layers: mlp <- embed",
    "blocks.up.bias": "layers: -> mlp",
    "blocks.down.weight": "layers: embed <- mlp",
    "blocks.down.bias": "layers: -> embed",
    "norm.weight": "~embed",
    "norm.bias": "embed",
    "head.weight": "classes <- embed",
    "head.bias": "-> classes",
}
STATICS = {
    "table.num_embeddings": "vocab",
    "table.embedding_size": "embed",
    "*norm*.shape": ("embed",),
    "*.num_heads": "heads",
    "*.??_size": "head_dim",
    "*.attention.query_size": "embed",
    "*.up.in_features": "embed",
    "*.up.out_features": "mlp",
}


def plain():
    """The plain model with random numbers in float64, without compiling a random generator."""
    rng = np.random.default_rng(0)
    empty = eqx.filter_eval_shape(Plain, jax.random.key(0))
    return jax.tree.map(
        lambda x: jnp.asarray(rng.normal(size=x.shape)) if hasattr(x, "shape") else x, empty
    )


def annotated(model=None):
    model = eqx.filter_eval_shape(Plain, jax.random.key(0)) if model is None else model
    return gj.annotate(model, SPECS, ignore=["heat"], statics=STATICS, residual=["layers"])


def test_an_annotated_model_has_the_same_kind_of_table():
    model = annotated()
    assert sizes(model) == dict(vocab=11, embed=8, layers=2, heads=2, head_dim=3, mlp=6, classes=5)
    table = axes_of(model)
    out = table["blocks.attention.output_proj.weight"]  # the first pattern that matches
    assert [(d.axis, d.role) for d in out.dims[1:]] == [("embed", P), ("heads", C), ("head_dim", C)]
    trained, rest = gj.partition(model)
    assert trained.model.heat is None and rest.model.heat is not None


def test_everything_wrong_with_an_annotation_is_said_at_once():
    wrong = {k: v for k, v in SPECS.items() if not k.startswith("blocks.up")} | {"*.gone": "mlp"}
    with pytest.raises(AxisError) as caught:
        gj.annotate(annotated().model, wrong, ignore=["cold"], statics={"*.width": "mlp"})
    for line in (
        "'*.gone' matches no array",
        "'cold' matches no array",
        "'*.width' matches no field",
        "blocks.up.weight: shape (2, 6, 8) has no spec",
        "blocks.up.bias: shape (2, 6) has no spec",
        "heat: shape (3,) has no spec",
    ):
        assert line in str(caught.value)


def test_growth_rewrites_the_integers_that_repeat_a_size():
    op = gj.chain(gj.copy(embed=16, mlp=9, heads=4), gj.stack(layers=3))
    grown = eqx.filter_eval_shape(op, annotated())
    block = grown.model.blocks
    assert (block.attention.num_heads, block.attention.query_size) == (4, 16)
    assert (block.up.in_features, block.up.out_features) == (16, 9)
    assert block.norm1.shape == block.norm2.shape == grown.model.norm.shape == (16,)
    assert block.up.weight.shape == (3, 9, 16) and grown.model.table.embedding_size == 16


def test_an_annotated_model_grows_exactly_and_its_gradient_with_it():
    op = gj.chain(
        gj.copy(embed=16, mlp=9, heads=4, shares="random"),
        gj.zeros(mlp=10, heads=5),
        gj.stack(layers=4, order="insert", branch="zero"),
    )
    with jax.enable_x64(True):
        model = annotated(plain())
    testing.assert_contract(op, model, jnp.arange(6, dtype=jnp.int32).reshape(2, 3))


def test_an_annotated_model_without_gates_does_not_grow_by_msg():
    with pytest.raises(GateError, match="no gate on axis 'mlp'"):
        gj.msg(mlp=8)(annotated())


def test_zeros_are_refused_where_epsilon_is_not_data():
    with pytest.raises(GrowthError, match=r"- blocks\.norm1\.weight"):
        gj.zeros(embed=12)(annotated())


class Held(eqx.Module):
    pair: Pair


def test_arrays_in_a_namedtuple_are_annotated_and_grown():
    held = Held(Pair(ones(3, 2), ones(3)))
    model = gj.annotate(held, {"pair.left": "mlp -> embed", "pair.right": "-> mlp"})
    assert sizes(eqx.filter_eval_shape(gj.copy(mlp=6), model)) == dict(embed=2, mlp=6)
