"""Models of no layer and of one, layers that are fresh or run again, and what is too long."""

import functools
import json
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import growjax as gj
from growjax import models, testing
from growjax.axes import axes_of, get, sizes
from growjax.cost import flops
from growjax.errors import AxisError, GateError, GrowthError, SubnetError
from growjax.forecast.dryrun import dry_run
from growjax.growth import sources
from growjax.train import Begin, Options, Step, train
from growjax.values import from_dict, to_dict
from tests.runs import feed, losses, plan, same, steps


KEY = jax.random.key(0)
SIZES: dict[str, Any] = dict(embed=8, heads=2, head_dim=4, mlp=6, vocab=11)
FAMILIES = {
    "GPT": dict(positions=6),
    "Llama": dict(kv_heads=1),
    "BERT": dict(positions=6),
    "T5": {},
}


def config(family: str, layers: int, **options) -> Any:
    stacks = ("encoder_layers", "decoder_layers") if family == "T5" else ("layers",)
    fields = SIZES | FAMILIES[family] | dict.fromkeys(stacks, layers) | options
    return getattr(models, f"{family}Config")(remat="everything", **fields)


@functools.cache
def model(family: str, layers: int, **options) -> Any:
    """A model of the family, every number random: without compiling how it is drawn."""
    shapes = eqx.filter_eval_shape(config(family, layers, **options).build, KEY)
    shapes = testing.randomise(shapes)
    return jax.tree.map(lambda x: x if eqx.is_array(x) else jnp.full(x.shape, 0.1), shapes)


def tokens(family: str, length: int = 5) -> tuple[Any, ...]:
    row = np.arange(length) % 11
    return (row, row[::-1].copy()) if family == "T5" else (row,)


def first(outputs) -> Any:
    return outputs.hidden if hasattr(outputs, "hidden") else outputs


@eqx.filter_jit
def run(model, *args):
    return first(model(*args))


# No layer, and one ---------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_without_layers_is_its_ends(family):
    """The embedding, the last norm and the head; a layer whose branches are zero adds nothing to it."""
    empty = model(family, 0)
    axes = [axis for axis in sizes(empty) if axis.endswith("layers")]
    assert [sizes(empty)[axis] for axis in axes] == [0] * len(axes)
    out = run(empty, *tokens(family))
    assert np.isfinite(out).all()
    two: dict[str, Any] = dict.fromkeys(axes, 2)
    closed = gj.grow(gj.fresh(**two, init="zeros"), empty)
    if family != "BERT":  # post-LN blocks of zeros normalise once more
        np.testing.assert_allclose(run(closed, *tokens(family)), out, rtol=1e-5, atol=1e-6)
    masked = gj.msg(**two, init="born")
    np.testing.assert_array_equal(run(gj.grow(masked, empty, key=KEY), *tokens(family)), out)


@pytest.mark.parametrize("layers", [0, 1])
@pytest.mark.parametrize("family", FAMILIES)
def test_width_grows_exactly_at_any_depth(family, layers):
    small = model(family, layers)
    for op in (gj.copy(mlp=9, heads=4), gj.msg(embed=12, heads=4)):
        big = gj.grow(op, small, key=KEY)
        a, b = (np.asarray(run(m, *tokens(family))) for m in (small, big))
        np.testing.assert_allclose(b[:, : a.shape[1]], a, rtol=2e-4, atol=1e-5)


def test_a_growth_from_nothing_is_certified():
    batch = jnp.asarray(tokens("GPT")[0])[None]
    certificate = gj.certify(gj.fresh(layers=2), model("GPT", 0), batch, key=KEY)
    assert certificate.axes == {"layers": (0, 2)} and certificate.forward[0].relative > 0.01
    assert certificate.dead == {"layers": (pytest.approx(0, abs=0.05), pytest.approx(0, abs=0.05))}
    masked = gj.certify(gj.msg(layers=2, init="born"), model("GPT", 0), batch, key=KEY)
    assert masked.passed and masked.forward[0].relative == 0
    wider = gj.certify(gj.copy(mlp=9, shares="random"), model("GPT", 0), batch)
    assert wider.passed and wider.forward[0].relative < 1e-6


@pytest.mark.parametrize(
    "op, message",
    [
        (gj.stack(layers=3), r"no layer to copy 3 times; gj\.fresh\(layers=3\)"),
        (gj.msg(layers=3), r"no layer to copy 3 times"),
        (gj.fresh(layers=3, init="matched"), r"matched' follows old coordinates.*init='born'"),
        (gj.fresh(mlp=9), r"not stacks of blocks:\n  - mlp"),
    ],
    ids=str,
)
def test_what_cannot_grow_from_nothing_says_what_does(op, message):
    with pytest.raises(GrowthError, match=message):
        op(model("GPT", 0), key=KEY)


def test_depth_may_be_zero_and_not_less():
    with pytest.raises(AxisError, match="layers: expected 0 or more layers, got -1"):
        config("GPT", -1)


# Fresh layers --------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_fresh_layers_are_drawn_as_a_model_is_born(family):
    """Leaf by leaf: the same deviation about the same mean, on arrays that are large enough to tell."""
    wide: dict[str, Any] = dict(embed=24, head_dim=12, mlp=40, heads=4)
    wide |= {"kv_heads": 2, "qk_norm": True} if family == "Llama" else {}
    born = config(family, 3, **wide).build(KEY)
    stacks = [axis for axis in sizes(born) if axis.endswith("layers")]
    start = config(family, 1, **wide).build(KEY)
    three: dict[str, Any] = dict.fromkeys(stacks, 3)
    grown = gj.grow(gj.fresh(**three), start, key=jax.random.key(1))
    assert sizes(grown) == sizes(born)
    for slot in axes_of(grown).of_kind("param"):
        if slot.arrays() and slot.dims[0].role == "stack":
            np.testing.assert_array_equal(slot.value[:1], get(start, slot.steps), slot.path)
            new, expected = np.asarray(slot.value[1:]), np.asarray(get(born, slot.steps))
            if slot.init == "normal":
                assert new.std() == pytest.approx(expected.std(), rel=0.12), slot.path
                assert not np.array_equal(new[0], new[1])
            else:
                np.testing.assert_array_equal(new, expected[1:], slot.path)


def test_the_epsilon_of_layers_from_nothing_is_that_of_a_new_model():
    """A buffer repeats its old entries, and here there are none."""
    grown = gj.grow(gj.fresh(layers=2), model("GPT", 0, eps=1e-3), key=KEY)
    np.testing.assert_allclose(grown.blocks.block.mlp_norm.eps, [1e-3, 1e-3], rtol=1e-6)

    with pytest.raises(
        AxisError, match=r"step: new coordinates of a buffer repeat .*born='attribute'"
    ):
        gj.fresh(layers=2)(Stack(), key=KEY)


class Stack(eqx.Module):
    """No layer, and a number for each that nobody can guess."""

    up: jax.Array = gj.param("layers: embed -> mlp")
    step: jax.Array = gj.buffer("layers:")

    def __init__(self):
        self.up, self.step = jnp.zeros((0, 2, 3)), jnp.zeros(0)


def test_fresh_rows_of_any_axis_can_be_drawn_as_they_are_born():
    """The fan-in is that of the grown array."""
    small = config("GPT", 1, mlp=64, embed=48).build(KEY)
    grown = gj.grow(gj.zeros(mlp=256, init="born"), small, key=KEY)
    assert np.asarray(grown.blocks.block.mlp.up)[..., 64:].std() == pytest.approx(
        48**-0.5, rel=0.05
    )
    opened = gj.grow(gj.msg(mlp=256, init="born"), small, key=KEY)
    assert np.asarray(opened.blocks.block.mlp.down)[:, 64:].std() == pytest.approx(1 / 16, rel=0.05)


@pytest.mark.parametrize(
    "old, new, block",
    [
        (6, 10, range(1, 5)),
        (6, 11, range(5)),
        (5, 7, range(1, 3)),
        (5, 8, range(1, 4)),
        (6, 8, range(2, 4)),
    ],
)
def test_the_middle_block_need_not_divide_the_layers(old, new, block):
    source, end = sources("middle", old, new).tolist(), block[-1] + 1
    assert source == [*range(end), *block, *range(end, old)]


def test_a_middle_block_is_no_larger_than_the_stack():
    with pytest.raises(GrowthError, match="'middle' duplicates 7 layers, but there are 6"):
        sources("middle", 6, 13)


# Loops ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "loop, depth, layers",
    [
        (gj.loop(2), 3, (0, 1, 2, 0, 1, 2)),
        (gj.loop(3, first=1, last=-2), 4, (0, 1, 2, 1, 2, 1, 2, 3)),
        (gj.loop(2, last=0), 2, (0, 0, 1)),
        (gj.loop(4, first=-1), 3, (0, 1, 2, 2, 2, 2)),
        (gj.loop(1, first=1), 3, (0, 1, 2)),
    ],
    ids=str,
)
def test_a_loop_runs_its_layers_in_rounds(loop, depth, layers):
    assert loop.layers(depth) == layers
    small = model("GPT", depth)
    looped = loop(small, key=KEY)
    assert sizes(looped)["layers"] == len(layers)
    assert eqx.tree_equal(looped, gj.stack(layers=layers)(small))
    on = loop.running(small, key=KEY).get("layers", np.ones(depth, bool))
    assert np.asarray(on).all()


def test_every_run_of_a_layer_adds_to_its_gradient():
    small, args = model("GPT", 2), tokens("GPT")
    loop = gj.loop(2, first=1)

    def loss(model):
        return jnp.mean(run(model, *args) ** 2)

    with jax.enable_x64(True):
        small = jax.tree.map(lambda x: jnp.asarray(x, float), small)
        whole = eqx.filter_grad(lambda m: loss(loop(m, key=KEY)))(small).blocks.block.mlp.up
        apart = eqx.filter_grad(loss)(gj.stack(layers=(0, 1, 1))(small)).blocks.block.mlp.up
    np.testing.assert_allclose(whole, [apart[0], apart[1] + apart[2]], rtol=1e-9)


def test_a_loop_costs_what_it_runs():
    small, args = model("GPT", 2), tokens("GPT")
    one, two, three = (
        flops(lambda m, n=n: run(gj.loop(n)(m, key=KEY), *args), small) for n in (1, 2, 3)
    )
    assert two - one == three - two > one / 4


@pytest.mark.parametrize(
    "loop, message",
    [
        (lambda: gj.loop(2, first=2, last=1), "last: expected layer 2 or a later one, got 1"),
        (lambda: gj.loop(2, first=5), "first: 5 is not among them"),
        (lambda: gj.loop(2, axis="mlp"), "axis: expected a stack of blocks"),
        (lambda: gj.loop(0), "times: expected 1 or more times, got 0"),
        (lambda: gj.loop(1.5), "times: expected .* got 1.5"),  # type: ignore[arg-type]
    ],
)
def test_a_loop_that_does_not_fit_says_so(loop, message):
    with pytest.raises(SubnetError, match=message):
        loop()(model("GPT", 3), key=KEY)


def test_a_plan_of_loops_and_fresh_layers_is_saved_priced_trained_and_resumed(tmp_path):
    of = plan(
        steps(2, "no layer"),
        steps(2, "fresh", grow=gj.fresh(layers=2)),
        steps(2, "looped", subnet=gj.loop(2)),
        steps(2, "unrolled", grow=gj.stack(layers=gj.loop(2).layers(2))),
        model=models.GPTConfig(
            layers=0, embed=16, heads=2, head_dim=8, mlp=16, vocab=384, positions=16, bias=False
        ),
    )
    assert from_dict(json.loads(json.dumps(to_dict(of)))) == of
    dry_run(of).check()
    costs = [np.mean(span.costs) for span in of.spans]
    assert costs[0] < costs[1] < costs[2]
    # Four layers run in either, and their weights are updated in one
    assert costs[2] == pytest.approx(costs[3], rel=0.01)
    once = list(train(of, feed(of)))
    # Killed where there is no layer yet, and some arrays have no entries
    killed = train(of, feed(of), run=tmp_path / "run", options=Options(save_every=1))
    for record in killed:
        if isinstance(record, Step) and record.step == 1:
            break
    killed.close()
    again = list(train(of, feed(of), run=tmp_path / "run"))
    begin = again[0]
    assert isinstance(begin, Begin) and begin.resumed is not None
    assert begin.resumed.endswith("00000001-00")
    assert len(losses(once)) == 8 and {**losses(once), **losses(again)} == losses(once)
    assert same(once, again)
    assert all(np.isfinite(list(losses(once).values())))


# Too long, beyond the table, more than one ---------------------------------------------------------


@pytest.mark.parametrize(
    "transform", [lambda f: f, jax.jit, jax.eval_shape], ids=["eager", "jit", "shapes"]
)
@pytest.mark.parametrize("family", ["GPT", "BERT"])
def test_a_sequence_longer_than_the_positions_is_an_error(family, transform):
    small = model(family, 1)

    def call(row):
        return first(small(row))

    called = (
        functools.partial(jax.eval_shape, call) if transform is jax.eval_shape else transform(call)
    )
    assert called(jnp.arange(6)).shape[0] == 6
    with pytest.raises(
        AxisError, match="tokens: 7 of them from place 0 on, but there is room for 6"
    ):
        called(jnp.arange(7))
    with pytest.raises(AxisError, match="room for 6"):
        jax.eval_shape(jax.vmap(call), jnp.zeros((2, 7), int))


def test_positions_of_ones_own_and_rotary_ones_have_room():
    gpt, row = model("GPT", 1), jnp.arange(9)
    assert run(lambda row, places: gpt(row, positions=places), row, row % 6).shape == (9, 11)
    assert model("GPT", 1, position="rotary")(row).shape == (9, 11)
    assert model("Llama", 1)(row).shape == (9, 11) and model("T5", 1)(row, row).shape == (9, 11)
    with pytest.raises(AxisError, match="positions: this table has the indices 0 to 5, got 0 to 8"):
        gpt(row, positions=row)


@pytest.mark.parametrize("family", FAMILIES)
def test_ids_beyond_the_table_are_an_error_where_they_are_known(family):
    small = model(family, 0)
    for row in (np.array([0, 11]), jnp.array([3, -1])):
        args = (row,) * len(tokens(family))
        with pytest.raises(
            AxisError, match=r"vocab: this table has the indices 0 to 10, got (0 to 11|-1 to 3)"
        ):
            small(*args)
        assert np.isfinite(run(small, *args)).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_forgotten_vmap_is_named_with_the_shapes(family):
    small, rows = model(family, 1), tuple(jnp.stack([row, row]) for row in tokens(family))
    name = "encoder_tokens" if family == "T5" else "tokens"
    with pytest.raises(
        AxisError, match=rf"{name}: .* one sequence, \[T\], and got shape \(2, 5\); use jax.vmap"
    ):
        small(*rows)
    assert (
        jax.eval_shape(lambda *rows: jax.vmap(lambda *r: first(small(*r)))(*rows), *rows).shape[0]
        == 2
    )


@pytest.mark.parametrize("family", ["GPT", "Llama", "T5"])
def test_a_cache_has_room_for_as_many_as_it_says(family):
    small, row = model(family, 1), jnp.arange(3)
    cache = small.cache(row, 4) if family == "T5" else small.cache(4)
    extend = eqx.filter_eval_shape(lambda: small.extend(row, cache, 1))
    assert extend[0].shape == (3, 11)
    with pytest.raises(AxisError, match="3 of them from place 2 on, but there is room for 4"):
        small.extend(row, cache, 2)
    with pytest.raises(AxisError, match="from place 0 on, but there is room for 4"):
        jax.eval_shape(lambda at: small.extend(jnp.arange(5), cache, at), jnp.int32(0))


# Layers that differ from their source -------------------------------------------------------------


@pytest.mark.parametrize("layers", [(1, 0, 1), (0, 0, 0), (1, 1, 1, 0)])
def test_closed_copies_are_no_excuse_to_lose_or_swap_layers(layers):
    axes = axes_of(eqx.filter_eval_shape(lambda: model("GPT", 2)))
    with pytest.raises(GrowthError, match="in their order, each before its copies"):
        gj.stack(layers=layers, branch="zero").maps(axes)
    assert gj.stack(layers=layers).maps(axes)


def test_without_layers_nothing_is_mixed_and_experts_grow_all_the_same():
    none = eqx.filter_eval_shape(lambda: model("Llama", 0, experts=3))
    with pytest.raises(GrowthError, match=r"no layer to mix; gj.fresh\(layers=2\)"):
        gj.growth.ligo(layers=2)(none)
    grown = gj.experts(6, gated=False, per_token="scaled", noise=0.3)(none, key=KEY)
    assert sizes(grown)["experts"] == 6


def test_some_arrays_of_copied_layers_are_scaled_and_their_sources_are_not():
    """Attention colder in the copies, or a branch that is closed by hand."""
    small = model("GPT", 2)
    op = gj.stack(layers=(0, 1, 1, 0), scale={"q": 0.9, "*.mlp.down*": 0.0})
    grown, plain = op(small), gj.stack(layers=(0, 1, 1, 0))(small)
    for slot in axes_of(grown).having("layers", "param"):
        if slot.arrays():
            name = slot.path.rpartition(".")[2]
            factor = {"q": 0.9, "down": 0.0, "down_bias": 0.0}.get(name, 1.0)
            expected = np.asarray(get(plain, slot.steps)).copy()
            expected[2:] *= np.float32(factor)
            np.testing.assert_array_equal(slot.value, expected, slot.path)
    # All that ends a branch is zero: what block expansion does
    ends = {name: 0.0 for name in ("o", "o_bias", "down", "down_bias")}
    closed = gj.stack(layers=(0, 1, 1), scale=ends)(small)
    expansion = gj.stack(layers=(0, 1, 1), branch="zero")(small)
    assert eqx.tree_equal(closed, expansion)


def test_a_name_that_no_array_of_the_stack_has_is_refused():
    with pytest.raises(GrowthError, match=r"no array of the stack.*attention\.q(.|\n)*- qq"):
        gj.stack(layers=4, scale={"qq": 0.5, "q": 1.0})(model("GPT", 2))


def test_layers_open_in_turn_from_the_first_one_up():
    """ProRes: number l of n is at `t / T_l` with `T_l = T l / n`, and stays at 1 from there on."""
    born = gj.grow(gj.msg(layers=4, init="born", opens="in turn"), model("GPT", 0), key=KEY)
    for done in (0.0, 0.1, 0.5, 0.75, 1.0):
        levels = gj.ramp(born, done).blocks.gate.value
        expected = np.clip(done / (np.arange(1, 5) / 4), 0, 1)
        np.testing.assert_allclose(levels, expected, rtol=1e-6)
    np.testing.assert_array_equal(run(born, *tokens("GPT")), run(model("GPT", 0), *tokens("GPT")))
    assert gj.sizes(gj.settle(gj.ramp(born, 1.0)))["layers"] == 4
    # Old layers stay open, and only the new ones are counted
    mixed = gj.msg(layers=4, order="interleave", opens="in turn")(model("GPT", 2))
    np.testing.assert_allclose(gj.ramp(mixed, 0.25).blocks.gate.value, [1, 0.5, 1, 0.25])
    # A stage's ramp is one program, of a traced level
    traced = jax.jit(lambda level: gj.ramp(mixed, level).blocks.gate.value)
    np.testing.assert_allclose(traced(0.25), [1, 0.5, 1, 0.25])
    # What opens in turn does so whatever else grows meanwhile
    wider = gj.msg(mlp=9)(gj.ramp(mixed, 1.0), key=KEY)
    np.testing.assert_allclose(
        gj.ramp(wider, 0.5, axes=["layers"]).blocks.gate.value, [1, 1, 1, 0.5]
    )


def test_every_layer_may_have_a_level_of_its_own():
    gated = gj.msg(layers=4)(model("GPT", 2))
    levels = gj.ramp(gated, jnp.asarray([0.1, 0.2, 0.3, 0.4]), axes=["layers"])
    np.testing.assert_allclose(levels.blocks.gate.value, [1, 1, 0.3, 0.4], rtol=1e-6)
    with pytest.raises(GateError, match=r"got shape \(3,\)(.|\n)*blocks.gate: 4 layers"):
        gj.ramp(gated, np.zeros(3))
    with pytest.raises(GateError, match="expected a number in"):
        gj.ramp(gated, np.asarray([0, 0, 0, 1.5]))
