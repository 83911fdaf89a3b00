"""The language of specs: numbers and sums, sizes in any order, growth block by block, what is refused."""

import dataclasses
import functools
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jaxtyping import Array

import growjax as gj
from growjax import testing
from growjax.axes import axes_of, partition, put, sizes
from growjax.errors import AxisError, GrowthError
from growjax.gates import Gate, gated
from growjax.inference.spelling import Token, spell
from growjax.maps import apply
from growjax.optim import adamw
from growjax.specs import Dim, Spec, solve_sizes


# Sizes ---------------------------------------------------------------------------------------------

# Every array can be solved only when others have been: a chain of unknowns
CHAIN = [
    ("o", "(heads head_dim) -> embed", (12, 8)),
    ("qkv", "(3 heads head_dim) <- embed", (36, 8)),
    ("scale", "heads", (3,)),
    ("mix", "(rank + 2 * state) <- inner", (22, 10)),
    ("states", "(state head_dim)", (32,)),
    ("in", "(inner + inner) <- embed", (20, 8)),
]
SOLVED = dict(heads=3, head_dim=4, embed=8, rank=6, state=8, inner=10)


@given(st.permutations(CHAIN))
def test_sizes_are_solved_whatever_the_order_of_the_leaves(arrays):
    parsed = [(path, Spec.parse(text), shape) for path, text, shape in arrays]
    assert solve_sizes(parsed, {}) == SOLVED


@given(st.fixed_dictionaries({name: st.integers(1, 5) for name in SOLVED}))
def test_sizes_are_those_that_the_shapes_were_made_of(true):
    arrays = [
        (path, spec, spec.shape(true)) for path, text, _ in CHAIN for spec in [Spec.parse(text)]
    ]
    assert solve_sizes(arrays[::-1], {}) == true


@pytest.mark.parametrize(
    "arrays, known, message",
    [
        ([("a", "(x y)", (6,))], {}, r"a: cannot split a dimension of 6 into \(x y\)"),
        ([("a", "(x y)", (6,))], {"x": 4}, r"a: cannot split a dimension of 6 into \(x y\)"),
        ([("a", "(x + y)", (6,))], {"x": 6}, r"a: cannot split a dimension of 6 into \(x \+ y\)"),
        ([("a", "(x + 2 x)", (6,))], {"x": 3}, r"a: \(x \+ 2 x\) makes 9, but the dimension is 6"),
        ([("a", "x 3", (2, 4))], {}, r"a: \(3\) makes 3, but the dimension is 4"),
        ([("a", "(x + y)", (6,)), ("b", "(x + y)", (7,)), ("c", "x", (2,))], {}, r"b: .* makes 6"),
        ([("a", "x", (2, 3)), ("b", "x y", (5, 2, 3))], {}, "grows under eqx.filter_vmap"),
    ],
)  # fmt: skip
def test_sizes_that_do_not_fit_are_named(arrays, known, message):
    with pytest.raises(AxisError, match=message):
        solve_sizes([(path, Spec.parse(text), shape) for path, text, shape in arrays], known)


def test_a_sum_is_the_specs_of_its_terms():
    spec = Spec.parse("layers: (q group <- + k <- dim + 2 * v <-) embed")
    assert spec.summed == 1 and [len(block.dims) for block in spec.parts] == [4, 4, 4]
    assert [block.dims[1].axis for block in spec.parts] == ["q", "k", "2"]
    assert spec.parts[1].dims[2] == Dim("dim", "consumed")
    assert all(block.dims[-1] == Dim("embed", "consumed") for block in spec.parts)
    assert {dim.axis for dim in spec.dims} == {
        "layers",
        "q",
        "group",
        "k",
        "dim",
        "2",
        "v",
        "embed",
    }


@pytest.mark.parametrize(
    "text, message",
    [
        ("(a + b) -> (c + d)", "only one dimension of an array may be a sum"),
        ("(a + )", r"cannot read '\)'"),
        ("a + b", r"cannot read '\+'"),
        ("a * b", r"cannot read '\*'"),
        ("(a *)", r"cannot read '\*'"),
        ("(a * * b)", r"cannot read '\*'"),
        ("()", r"cannot read '\)'"),
        ("0 a", "cannot read '0'"),
        ("[3]", r"cannot read '\[3\]'"),
        ("~3", "cannot read '~3'"),
    ],
)
def test_a_sum_or_number_that_cannot_be_read_says_where(text, message):
    with pytest.raises(AxisError, match=message):
        Spec.parse(text)


# Growth, block by block ----------------------------------------------------------------------------


class Fused(eqx.Module):
    """Grouped queries whose projections are one matrix and one bias."""

    qkv: Array = gj.param(
        "(kv_heads group head_dim <- + kv_heads <- head_dim + kv_heads head_dim <-) embed"
    )
    bias: Array = gj.param(
        "(-> kv_heads group head_dim + kv_heads <- head_dim + -> kv_heads head_dim)"
    )
    o: Array = gj.param("(kv_heads group head_dim) -> embed")
    queries: Array = gj.param("kv_heads group head_dim")
    gate: Gate | None = gj.gate("kv_heads")

    def __call__(self, x):
        heads, group, dim = self.queries.shape
        flat = x @ self.qkv.T + self.bias
        q, k, v = jnp.split(flat, [heads * group * dim, heads * (group + 1) * dim], axis=-1)
        q = q.reshape(-1, heads, group, dim) * self.queries
        k, v = (gated(h.reshape(-1, heads, dim), self.gate, -2) for h in (k, v))
        weights = jax.nn.softmax(jnp.einsum("tkgd,skd->kgts", q, k), -1)
        return jnp.einsum("kgts,skd->tkgd", weights, v).reshape(len(x), -1) @ self.o


class Scan(eqx.Module):
    """The projections of a selective state space: what steps, enters and leaves, in one matrix."""

    mix: Array = gj.param("(rank <- + state <- + <- state) inner")
    step: Array = gj.param("inner <- rank")
    into: Array = gj.param("(2 * inner) <- embed")
    out: Array = gj.param("inner -> embed")
    decay: Array = gj.param("(inner state)")

    def __call__(self, x):
        rank, inner = self.step.T.shape
        h, z = jnp.split(x @ self.into.T, 2, -1)
        state = self.decay.size // inner
        r, b, c = jnp.split(h @ self.mix.T, [rank, rank + state], -1)
        decay = jnp.tanh(self.decay.reshape(inner, state))
        y = jnp.einsum("tn,tn,in->ti", b, c, decay) * (r @ self.step.T)
        return (jnp.tanh(z) * y) @ self.out


def fused() -> Any:
    """Grouped queries with two groups of two; every number random."""
    return filled(Fused, dict(kv_heads=2, group=2, head_dim=2, embed=3))


def scan() -> Any:
    return filled(Scan, dict(rank=2, state=3, inner=4, embed=3))


def filled(cls, true):
    fields = [f for f in dataclasses.fields(cls) if f.metadata["growjax"].kind == "param"]
    with jax.enable_x64(True):
        arrays = [jnp.zeros(Spec.parse(f.metadata["growjax"].spec).shape(true)) for f in fields]
        return testing.randomise(cls(*arrays))


X = np.random.default_rng(0).normal(size=(2, 4, 3))
CASES = [
    (fused, gj.copy(kv_heads=5, head_dim=4, shares="random")),
    (fused, gj.copy(group=3, kv_heads=4)),
    (fused, gj.zeros(group=3)),
    (fused, gj.chain(gj.zeros(kv_heads=3, head_dim=3), gj.copy(kv_heads=4))),
    (fused, gj.msg(kv_heads=3)),
    (scan, gj.copy(inner=7, rank=3, shares="random")),
    (scan, gj.copy(state=6)),
    (scan, gj.chain(gj.zeros(inner=5, rank=4), gj.copy(inner=10))),
]


@pytest.mark.parametrize("make, op", CASES, ids=lambda x: getattr(x, "__name__", str(x)))
def test_growth_of_fused_leaves_keeps_its_promise(make, op):
    with jax.enable_x64(True):
        testing.assert_contract(op, make(), jnp.asarray(X))


@pytest.mark.parametrize(
    "rule", [optax.scale_by_adam(), adamw(1e-3, weight_decay=0.1)], ids=["adam", "ages"]
)
@pytest.mark.parametrize("make, op", [CASES[0], CASES[5]], ids=["fused", "scan"])
def test_moments_of_fused_leaves_are_those_of_the_grown_model(make, op, rule):
    with jax.enable_x64(True):
        testing.assert_carries(op, make(), jnp.asarray(X), rule)


def test_the_blocks_of_a_fused_leaf_grow_as_leaves_of_their_own():
    """Against the rule written out: cut by hand, gather, share, paste."""
    model, source = fused(), np.arange(5) % 2
    after = gj.AxisMap("kv_heads", source)
    after = apply(after, model, None)
    blocks = np.split(np.asarray(model.qkv), [8, 12])
    split = [b.reshape(2, *shape, 3) for b, shape in zip(blocks, [(2, 2), (2,), (2,)], strict=True)]
    grown = np.concatenate([b[source].reshape(-1, 3) for b in split])
    np.testing.assert_array_equal(after.qkv, grown)
    assert sizes(after) == dict(sizes(model), kv_heads=5)


def test_fresh_entries_of_one_block_are_not_those_of_another():
    def bits(key, shape, dtype):
        return jnp.full(shape, jax.random.bits(key) >> 8, dtype)

    with jax.enable_x64(True):
        after = gj.zeros(kv_heads=3, init=bits)(fused(), key=jax.random.key(0))
        table = axes_of(after)
        slot = table["qkv"]
        drawn = [
            np.unique(part.split(piece, table.sizes)[-1])
            for part, piece in zip(slot.parts, slot.cut(after.qkv, table.sizes), strict=True)
        ]
    assert len({float(v) for block in drawn for v in block}) == 3


def test_a_certificate_counts_the_blocks_of_a_fused_leaf():
    with jax.enable_x64(True):
        equal, unequal = (
            gj.certify(gj.copy(kv_heads=4, shares=shares), fused(), jnp.asarray(X))
            for shares in ("equal", "random")
        )
    assert equal.passed and equal.locked == {"kv_heads": 2} and unequal.locked == {"kv_heads": 0}
    # But for a key's bias, whose gradient is zero up to rounding
    assert equal.dead["kv_heads"][0] < 0.05


def test_what_is_trained_does_not_care_for_blocks():
    model = fused()
    trained, rest = partition(model)
    assert trained.qkv.shape == model.qkv.shape and rest.qkv is None
    assert eqx.tree_equal(eqx.combine(trained, rest), model)


def test_heads_are_interleaved_with_a_number():
    """As in GPT-NeoX: every head's query, key and value stand together."""

    class Interleaved(eqx.Module):
        qkv: Array = gj.param("(heads 3 head_dim) <- embed")
        bias: Array = gj.param("-> (heads 3 head_dim)")
        o: Array = gj.param("heads head_dim -> embed")

        def __call__(self, x):
            heads, dim, _ = self.o.shape
            q, k, v = jnp.moveaxis((x @ self.qkv.T + self.bias).reshape(-1, heads, 3, dim), 2, 0)
            weights = jax.nn.softmax(jnp.einsum("thd,shd->hts", q, k), -1)
            return jnp.einsum("hts,shd,hde->te", weights, v, self.o)

    model = filled(Interleaved, dict(heads=2, head_dim=2, embed=3))
    assert sizes(model) == dict(heads=2, head_dim=2, embed=3)
    assert axes_of(model)["bias"].init == "zeros" and axes_of(model)["qkv"].init == "normal"
    with jax.enable_x64(True):
        testing.assert_contract(gj.copy(heads=5, shares="random"), model, jnp.asarray(X))
        testing.assert_carries(gj.copy(heads=3), model, jnp.asarray(X), adamw(1e-3))


# Shares that nobody takes --------------------------------------------------------------------------


class Tied(eqx.Module):
    """A head tied to the embedding, behind a norm that is said to stand beside the axis."""

    table: Array = gj.param("[vocab] -> embed")
    gain: Array = gj.param("~embed")

    def __call__(self, tokens):
        x = self.table[tokens]
        x = x / jnp.sqrt(jnp.mean(x * x, -1, keepdims=True)) * self.gain
        return x @ self.table.T


class Reads(Tied):
    gain: Array = gj.param("~embed ->")


@pytest.mark.parametrize("op", [gj.copy(embed=6), gj.copy(embed=6, shares="random")], ids=str)
def test_an_axis_that_nothing_consumes_is_not_copied(op):
    true = dict(vocab=5, embed=3)
    message = r"axis 'embed': no leaf can take its shares.*table, gain.*'embed ->'"
    with jax.enable_x64(True):
        for grow in (op, functools.partial(gj.grow, op)):
            with pytest.raises(GrowthError, match=message):
                grow(filled(Tied, true))
    with jax.enable_x64(True):
        testing.assert_contract(op, filled(Reads, true), jnp.asarray([[0, 3], [1, 4]]))


def test_shared_weights_of_equinox_are_not_copied():
    class Language(eqx.Module):
        shared: eqx.nn.Shared

        def __init__(self, key):
            table, head = (
                eqx.nn.Embedding(5, 3, key=key),
                eqx.nn.Linear(3, 5, use_bias=False, key=key),
            )
            both = (table, head)
            self.shared = eqx.nn.Shared(
                both, where=lambda b: b[1].weight, get=lambda b: b[0].weight
            )

        def __call__(self, tokens):
            table, head = self.shared()
            return jax.vmap(lambda t: head(table(t)))(tokens)

    model = Language(jax.random.key(0))
    model = gj.annotate(model, {"shared.pytree.0.weight": "[vocab] -> embed"})
    with pytest.raises(
        GrowthError, match=r"axis 'embed': no leaf can take .*shared\.pytree\.0\.weight"
    ):
        gj.grow(gj.copy(embed=6), model)


@pytest.mark.parametrize("op", [gj.copy(out=6), gj.zeros(out=6)], ids=str)
def test_an_output_is_neither_copied_nor_closed(op):
    head = gj.annotate({"head": jnp.ones((2, 3))}, {"head": "embed -> out"})
    with pytest.raises(GrowthError, match=r"axis 'out': no leaf .*head.*is an output"):
        op(head, key=jax.random.key(0))


def test_a_stack_without_producers_of_its_stream_is_not_closed():
    blocks = gj.annotate({"up": jnp.ones((2, 3, 4))}, {"up": "layers: embed -> mlp"})
    with pytest.raises(GrowthError, match="axis 'layers': no leaf .* none has embed produced"):
        gj.stack(layers=4, branch="zero")(blocks)
    gj.stack(layers=4)(blocks)


# Norms without a gain ------------------------------------------------------------------------------


class Bare(eqx.Module):
    """A LayerNorm without gain and bias in front of a matrix."""

    table: Array = gj.param("[vocab] -> embed")
    down: Array = gj.param("embed -> out")
    statistics: None = gj.axes.norm("embed")

    def __call__(self, tokens):
        x = self.table[tokens]
        x = x - x.mean(-1, keepdims=True)
        return x / jnp.sqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6) @ self.down


class Net(eqx.Module):
    """The same in somebody's own layers."""

    table: eqx.nn.Embedding
    norm: eqx.nn.LayerNorm
    down: eqx.nn.Linear

    def __init__(self, key):
        self.table = eqx.nn.Embedding(5, 4, key=key)
        self.norm = eqx.nn.LayerNorm(4, use_weight=False, use_bias=False)
        self.down = eqx.nn.Linear(4, 2, use_bias=False, key=key)

    def __call__(self, tokens):
        return jax.vmap(lambda t: self.down(self.norm(self.table(t))))(tokens)


def bare():
    return filled(Bare, dict(vocab=5, embed=4, out=2))


def annotated(**norm):
    specs = {"table.weight": "[vocab] -> embed", "down.weight": "out <- embed", **norm}
    return gj.annotate(Net(jax.random.key(0)), specs, statics={"norm.shape": ("embed",)})


MODELS = {"declared": bare, "annotated": lambda: annotated(**{"norm.weight": "~embed"})}


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_a_norm_without_a_gain_forbids_uneven_copies(make):
    model, tokens = make(), jnp.asarray([[0, 3, 1]])
    with pytest.raises(
        GrowthError, match="embed: copies are uneven .* taken by .*(statistics|norm.weight)"
    ):
        gj.copy(embed=6)(model)
    with pytest.raises(GrowthError, match="zeros on 'embed' .*an RMS norm with a gain"):
        gj.zeros(embed=6)(model, key=jax.random.key(0))
    testing.assert_preserves(gj.copy(embed=8), model, tokens, rtol=1e-4)


def test_a_norm_without_a_gain_that_nobody_declares_is_refused():
    with pytest.raises(AxisError, match="norm: a LayerNorm averages over 'embed'"):
        annotated()


def test_zeros_do_not_mend_an_rms_norm_without_a_gain():
    class RMS(eqx.Module):
        table: Array = gj.param("[vocab] -> embed")
        down: Array = gj.param("embed -> out")
        eps: Array = gj.buffer("<embed>")
        statistics: None = gj.axes.norm("embed")

    model = RMS(jnp.ones((5, 4)), jnp.ones((4, 2)), jnp.asarray(1e-5))
    with pytest.raises(GrowthError, match="an RMS norm with a gain"):
        gj.zeros(embed=6)(model, key=jax.random.key(0))


# Places --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "steps", [("nothing",), ("blocks", "nope"), ("pair", "z"), ("pair", 2), ("one", "x")]
)
def test_a_place_that_is_not_there_is_not_put(steps):
    tree = {"blocks": {"up": 1}, "pair": [1, {"x": 2}], "one": jnp.ones(2)}
    with pytest.raises(
        AxisError, match=rf"these places are not in the \w+:\n  - {'.'.join(map(str, steps))}$"
    ):
        put(tree, {steps: 3, ("blocks", "up"): 2})


def test_all_places_that_are_not_there_are_named_at_once():
    with pytest.raises(AxisError) as caught:
        put(bare(), {("a",): 1, ("table",): 2, ("b", "c"): 3})
    assert str(caught.value) == "these places are not in the Bare:\n  - a\n  - b"


def test_fresh_state_starts_in_the_block_that_it_belongs_to():
    """An average of the weights holds, at fresh coordinates, the fresh weights themselves."""

    def count(key, shape, dtype):
        return jnp.full(shape, jax.random.bits(key) >> 8, dtype)

    op, tx = gj.zeros(kv_heads=3, init=count), optax.contrib.schedule_free_adamw(1e-3)
    with jax.enable_x64(True):
        model, key = fused(), jax.random.key(0)
        grown = partition(op(model, key=key))[0]
        state = gj.carry(op, tx.init(partition(model)[0]), model, optimizer=tx, key=key)
    np.testing.assert_array_equal(state.z.qkv, grown.qkv)


# Written as text ---------------------------------------------------------------------------------

sides = st.sampled_from(["consumed", "produced"])
products = st.lists(sides, min_size=1, max_size=3)


@given(
    st.lists(products, min_size=1, max_size=3),
    st.lists(products, min_size=0, max_size=2),
    st.data(),
)
def test_every_product_and_sum_of_axes_is_spelled_so_that_it_is_read_again(dims, more, data):
    where = data.draw(st.integers(0, len(dims) - 1))
    names = iter("abcdefghijklmnopqrstuvwxyz")
    spelled = [[[Token(next(names), role) for role in term]] for term in dims]
    spelled[where] += [[Token(next(names), role) for role in term] for term in more]
    spec = Spec.parse(spell(spelled))
    read = [[[(d.axis, d.role) for d in term] for term in terms] for terms in spec.terms]
    assert read == [[[(t.text, t.role) for t in term] for term in terms] for terms in spelled]


def test_what_stands_before_a_sum_of_blocks_keeps_its_role():
    made, read = Token("b", "produced"), Token("c", "consumed")
    assert spell([[[Token("a", "produced")]], [[made], [read]]]) == "a (b <- + <- c)"
