"""What people asked of other libraries, in threads that one can look up: each is a test here.

Each docstring names the thread and what was asked there. Where another file holds a whole matrix of
cases, the case that was asked for stands here.
"""

import contextlib
import math
import time
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import growjax as gj
from growjax import optim, testing
from growjax.axes import axes_of, partition
from growjax.certificate import call, distance
from growjax.errors import CheckpointError, StateError
from growjax.growth import sources
from growjax.optim import Curve, Parts
from growjax.programs.ahead import Ahead, needs
from growjax.runs.checkpoint import load
from growjax.train import Options, Start, Step, train
from tests import zoo
from tests.folders import batch as inputs
from tests.folders import build
from tests.runs import every_kind, feed, losses, plan, programs_of, same, steps


KEY = jax.random.key(0)
GPT, UNTIED, GROUPED = (testing.ARCHITECTURES[i] for i in (0, 1, 3))


class Tiny(eqx.Module):
    """One layer's worth of leaves: a producer, a bias and a consumer, in a stack."""

    up: jax.Array = gj.param("layers: embed -> mlp")
    bias: jax.Array = gj.param("layers: -> mlp")
    down: jax.Array = gj.param("layers: mlp -> embed")
    scale: jax.Array | None = gj.branch("layers")

    def __call__(self, x):
        scales = jnp.ones(len(self.up)) if self.scale is None else self.scale
        for up, bias, down, scale in zip(self.up, self.bias, self.down, scales, strict=True):
            x = x + scale * (jnp.tanh(x @ up + bias) @ down)
        return x


def tiny() -> Tiny:
    rng = np.random.default_rng(0)
    arrays = [jnp.asarray(rng.normal(size=s), jnp.float32) for s in [(2, 3, 4), (2, 4), (2, 4, 3)]]
    return Tiny(*arrays)


X = jnp.asarray(np.random.default_rng(1).normal(size=(5, 3)), jnp.float32)


def gradient(model: Any) -> Any:
    return jax.grad(lambda m: jnp.sum(jnp.sin(m(X))))(model)


# 1, 2: state ---------------------------------------------------------------------------------------

LABELS = Tiny(up="one", bias="two", down="one")  # type: ignore[arg-type]
WRAPPED = {
    "partition": lambda: optax.partition(
        {"one": optax.adam(1e-2), "two": optax.sgd(0.1)}, lambda params: LABELS
    ),
    "masked": lambda: optax.masked(optax.adam(1e-2), Tiny(True, False, True)),  # type: ignore[arg-type]
    "every k": lambda: optax.MultiSteps(optax.adam(1e-2), 2),
    "injected": lambda: optax.inject_hyperparams(optax.adam)(learning_rate=1e-2),
    "if finite": lambda: optax.apply_if_finite(optax.adam(1e-2), 3),
}


@pytest.mark.parametrize("name", sorted(WRAPPED))
def test_state_inside_wrappers_grows_and_is_used_in_the_next_update(name):
    """google-deepmind/optax #1371: part of a wrapped state is reset, and the next update breaks."""
    small, tx = tiny(), WRAPPED[name]()
    state = tx.update(gradient(small), tx.init(small), small)[1]
    op = gj.zeros(mlp=6)
    grown = gj.carry(op, state, small, optimizer=tx, key=KEY)
    big = op(small, key=KEY)
    updates, _ = tx.update(gradient(big), grown, big)
    assert jax.tree.map(np.shape, updates) == jax.tree.map(np.shape, big)
    old = [x for x in jax.tree.leaves(state) if np.ndim(x) == 3]
    new = [x for x in jax.tree.leaves(grown) if np.ndim(x) == 3]
    assert old and len(old) == len(new)
    for a, b in zip(old, new, strict=True):
        np.testing.assert_array_equal(np.asarray(b)[tuple(map(slice, a.shape))], a)


@pytest.mark.parametrize(
    "tx",
    [
        optax.adamax(1e-2),
        optax.rmsprop(1e-2, momentum=0.9),
        optax.adagrad(1e-2),
        optax.chain(optax.scale_by_adam(), optax.ema(0.9), optax.scale(-1e-2)),
        optax.sm3(1e-2),
    ],
    ids=["adamax", "rmsprop with momentum", "adagrad", "average of updates", "sm3"],
)
def test_no_moment_is_lost_or_wrong_without_a_word(tx):
    """online-ml/deep-river #169, cgrtml/neural-trees #67, pyhgf #421; test_carry.py has every factory."""
    with jax.enable_x64(True):
        model = jax.tree.map(lambda x: jnp.asarray(np.asarray(x, np.float64)), tiny())
        op = gj.copy(mlp=8, shares="equal")
        big = op(model)
        x = np.asarray(X, np.float64)
        states, models = [], (model, big)
        for each in models:
            grads = jax.grad(lambda m: jnp.sum(jnp.sin(m(x))))(each)
            states.append(tx.update(grads, tx.init(each), each)[1])
        try:
            carried = gj.carry(op, states[0], model, optimizer=tx, key=KEY)
        except StateError:
            return
        for a, b in zip(*map(jax.tree.leaves, (carried, states[1])), strict=True):
            # Up to the small constants of the optimizers; a wrong power of the share is off by 2
            np.testing.assert_allclose(a, b, atol=0.01 * np.abs(b).max())


# 3, 4, 5: the new part -----------------------------------------------------------------------------


def test_only_some_entries_of_an_array_train():
    """equinox #123, #266, #866: rows, columns and layers that were there stay, bit by bit."""
    small = tiny()
    inner = optax.chain(optax.clip_by_global_norm(0.1), optax.adamw(1e-2, weight_decay=0.5))
    tx = optim.parts(inner, old=0.0)
    op = gj.chain(gj.zeros(mlp=6), gj.stack(layers=3))
    state = gj.carry(op, tx.init(small), small, optimizer=tx, key=KEY)
    start = op(small, key=KEY)
    big: Any = start
    new = gj.new(op, small)
    for _ in range(10):
        updates, state = tx.update(gradient(big), state, big)
        big = optax.apply_updates(big, updates)
    for before, after, mask in zip(*map(jax.tree.leaves, (start, big, new)), strict=True):
        before, after, mask = map(np.asarray, (before, after, mask))
        np.testing.assert_array_equal(after[~mask], before[~mask])
        assert (after[mask] != before[mask]).all()


@pytest.mark.parametrize("order", ["top", "interleave", "middle", "centre", "insert"])
def test_one_can_ask_which_layers_are_new(order):
    """LLaMA-Pro #9 #10 #21, LlamaFactory #7558 #9010 #5401: also after a second growth."""
    shapes = eqx.filter_eval_shape(tiny)
    first, second = gj.stack(layers=4, order=order), gj.stack(layers=(0, 0, 1, 2, 3))
    source = sources(order, 2, 4)
    inserted = [i for i in range(4) if source[i] in source[:i]]
    assert np.flatnonzero(np.asarray(gj.new(first, shapes).up)[:, 0, 0]).tolist() == inserted
    deep = eqx.filter_eval_shape(first, shapes)
    births = gj.Births.original(shapes).grown(first, shapes).grown(second, deep)
    ages = births.of["layers"]
    expected = [0 if i not in inserted else 1 for i in range(4)]
    assert ages.tolist() == [expected[0], 2, *expected[1:]]
    assert births.ranges()[2] == {"layers": "1"}


def test_zero_projections_learn_and_what_is_behind_them_learns_one_step_later():
    """LLaMA-Pro #28: do o_proj and down_proj have gradients if they are zero?"""
    certificate = gj.certify(gj.stack(layers=4, branch="zero"), GPT.model(), GPT.batch(), key=KEY)
    one, two = certificate.dead["layers"]
    assert certificate.passed and 0.3 < one < 0.9 and two < 0.05


# 6: checkpoints ------------------------------------------------------------------------------------


def test_fewer_layers_are_no_part_of_a_deeper_model(run, programs, tmp_path):
    """google/orbax #2972, equinox #1093 #136, MaxText PR #4099: 2 layers restored into 4 shapes."""
    checkpoint = run[2] / "checkpoints" / "00000003-00"
    deep = plan(steps(1, grow=gj.stack(layers=4)), start=Start(str(checkpoint)))
    shapes = programs_of(deep).shapes(deep.spans[0].model)
    with pytest.raises(CheckpointError) as caught:
        load(checkpoint, shapes)
    for name in ("attention.q", "mlp.up", "mlp.down"):
        assert name in str(caught.value)
    # The same by an operator
    records: list[Any] = list(train(deep, feed(deep), run=tmp_path, cache=programs))
    assert gj.sizes(records[-1].model)["layers"] == 4


# 7, 8, 9: operators --------------------------------------------------------------------------------


def test_repeated_layers_alone_are_scaled_and_exported(tmp_path):
    """arcee-ai/mergekit #198: attention temperature, or a closed branch, of repeated layers."""
    with jax.enable_x64(True):
        small = build("llama", jnp.float64)
        op = gj.stack(layers=(0, 1, 0, 1), scale={"q": 0.9, "k": 0.9, "o": 0.0})
        big = op(small)
        attention = big.blocks.block.attention
        np.testing.assert_allclose(attention.q[2:], 0.9 * np.asarray(attention.q[:2]), rtol=1e-12)
        assert np.asarray(attention.o[:2]).any() and not np.asarray(attention.o[2:]).any()
        gj.hf.save(big, tmp_path / "big")
        again = gj.hf.load(tmp_path / "big")
        assert distance(call(big, inputs(big)), call(again, inputs(big)))[1] <= 1e-12


def test_some_layers_of_a_stack_grow_and_the_others_stay_as_they_were():
    """karpathy/llama2.c #406, Grow-Don't-Overwrite: one program still scans all of them."""
    op = gj.growth.within(gj.copy(mlp=7), layers=(1,))
    small = tiny()
    np.testing.assert_allclose(op(small)(X), small(X), atol=1e-5)
    np.testing.assert_array_equal(op(small).down[0, :4], small.down[0])
    assert not np.asarray(op(small).down[0, 4:]).any() and np.asarray(op(small).down[1, 4:]).any()


def test_some_layers_alone_grow():
    """karpathy/llama2.c #406, Gemma 3n: in a list of blocks each may have an axis of its own."""
    specs = {key: spec for key, spec in zoo.TOWER.items() if "*" not in key}
    for i, axis in enumerate(["mlp", "wide", "mlp"]):
        specs |= {
            f"blocks.{i}.norm": "~embed",
            f"blocks.{i}.up": f"embed -> {axis}",
            f"blocks.{i}.down": f"{axis} -> embed",
        }
    x = zoo.normal((2, 5, 8))
    with jax.enable_x64(True):
        small = gj.annotate(zoo.build(zoo.Tower), specs)
        op = gj.copy(wide=11)
        testing.assert_contract(op, small, x)
        shapes = [block.up.weight.shape for block in op(small).model.blocks]
    assert shapes == [(6, 8), (11, 8), (6, 8)]


@pytest.mark.parametrize("heads, kv_heads", [(4, 1), (4, 2), (2, 2)])
@pytest.mark.parametrize("grow", ["queries", "keys", "both", "regroup"])
def test_grouped_queries_grow_by_queries_by_keys_and_by_both(heads, kv_heads, grow):
    """apple/ml-hypercloning #1: tiled heads read other keys than theirs."""
    group = heads // kv_heads
    op = {
        "queries": gj.copy(heads=2 * heads, kv_heads=kv_heads),
        "keys": gj.copy(kv_heads=2 * kv_heads),
        "both": gj.copy(heads=4 * heads, kv_heads=2 * kv_heads),
        "regroup": gj.regroup(kv_heads=heads),
    }[grow]
    with jax.enable_x64(True):
        make = lambda key: gj.nn.Attention(6, heads, kv_heads, 2, key=key)  # noqa: E731
        model = testing.randomise(eqx.filter_eval_shape(make, KEY))
        x = jnp.asarray(zoo.normal((5, 6)))
        np.testing.assert_allclose(op(model)(x), model(x), rtol=1e-10, atol=1e-12)
        after = gj.sizes(op(model))
    expected = {
        "queries": (kv_heads, 2 * group),
        "keys": (2 * kv_heads, group),
        "both": (2 * kv_heads, 2 * group),
        "regroup": (heads, 1),
    }[grow]
    assert (after["kv_heads"], after["group"]) == expected


# 10, 11: schedules ---------------------------------------------------------------------------------


def test_the_rate_warms_up_again_for_all_or_for_the_new_part():
    """wandb/senpai PR #1784, TokenFormer #11 #15: one decay or several, and a curve for new weights."""
    whole = plan(steps(4), steps(8, grow=gj.msg(mlp=24), ramp=4, rewarm=0.5))
    spent, cost = whole.spans[1].spent, whole.spans[1].costs[0]
    assert whole.learning_rate(spent + cost / 2) < 0.3 * whole.learning_rate(spent + 4 * cost)
    again = plan(steps(4), steps(8, grow=gj.msg(mlp=24), ramp=4, rewind="stretch"))
    assert again.learning_rate(again.spans[1].spent + 1) > whole.learning_rate(
        again.spans[0].spent + 1
    )
    part = steps(8, grow=gj.zeros(mlp=24), train=Parts(new=Curve(((0, 0.0), (4, 1.0)))))
    assert plan(steps(4), part).spans[1].stage.parts == part.train


def test_one_transition_goes_deep_and_wide_and_keeps_all_else():
    """marin PR #7838, #7836: identity layers and width at once, with moments, average and data offset."""
    small, tx = tiny(), optax.adam(1e-2)
    weights: Any = small
    state: Any = tx.update(gradient(small), tx.init(weights), weights)[1]
    op = gj.chain(gj.stack(layers=(0, *[1] * 7), branch="zero"), gj.zeros(mlp=6))
    before = gj.State(small, state, average=small, cursor=17)
    after = gj.grow(op, before, optimizer=tx, key=KEY)
    np.testing.assert_allclose(after.model(X), small(X), atol=1e-5)
    assert gj.sizes(after.model) == dict(layers=8, embed=3, mlp=6) and after.cursor == 17
    np.testing.assert_array_equal(after.opt_state[0].mu.up[:2, :, :4], state[0].mu.up)
    np.testing.assert_array_equal(after.average.up[:2, :, :4], small.up)
    assert int(after.opt_state[0].count) == 1


# 12: vocabulary ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gpt2", "gpt2 untied", "bert"])
def test_a_resized_vocabulary_keeps_old_text_and_its_file(name, tmp_path):
    """transformers #35141 #33325 #45079, LlamaFactory PR #10547, skeletoken #108: head, bias, padding."""
    with jax.enable_x64(True):
        small = build(name, jnp.float64)
        op = gj.vocabulary(16, used=9)  # two rows of padding, and five more
        big = op(small)
        tokens = inputs(small) % 9
        old, new = (call(m, tokens) for m in (small, big))
        old, new = (x.mlm_logits if name == "bert" else x for x in (old, new))
        rise = jax.nn.logsumexp(new, -1) - jax.nn.logsumexp(old, -1)
        assert float(rise.max()) <= math.log(16 / 9) == op.bound(axes_of(small))
        np.testing.assert_allclose(new[..., :9], old[..., :9], rtol=1e-12)
        gj.hf.save(big, tmp_path / "big")
        again = gj.hf.load(tmp_path / "big")
        assert distance(call(big, tokens), call(again, tokens))[1] <= 1e-12
    assert gj.sizes(again)["vocab"] == 16


# 13, 14: runs --------------------------------------------------------------------------------------


def test_a_growth_in_depth_waits_for_no_compiler(programs):
    """openai/parameter-golf PR #1230, modded-nanogpt #19: bench/stall.py measures what is left."""
    of = every_kind()
    ahead = Ahead(of, programs_of(of), cache=programs)
    with contextlib.closing(ahead):
        ahead.start(1)  # the stage before the one that stacks layers
        wanted = needs(of.spans[2], first=False)
        assert {kind for kind, *_ in wanted} == {"grow", "before", "evaluate", "step"}
        until = time.monotonic() + 60
        while time.monotonic() < until and not all(map(ahead.ready, wanted)):
            time.sleep(0.01)
        assert all(map(ahead.ready, wanted))
        compiled = ahead.compiled
        assert all(callable(ahead.get(need)) for need in wanted) and ahead.compiled == compiled


def test_a_block_expanded_run_with_old_layers_frozen_goes_on_bit_by_bit(programs, tmp_path):
    """mosaicml/llm-foundry #1231; tests/test_hosts.py has it sharded over two devices."""
    of = plan(
        steps(1),
        steps(3, grow=gj.stack(layers=4, order="insert", branch="zero"), train="new"),
    )
    options = Options(save_every=1, keep_last=9)

    def session(run=None):
        return train(of, feed(of), run=run, options=options, cache=programs)

    whole: list[Any] = list(session())
    for record in session(tmp_path):
        if isinstance(record, Step) and record.step == 2:
            break
    resumed: list[Any] = list(session(tmp_path))
    assert losses(resumed) == {n: loss for n, loss in losses(whole).items() if n >= 2}
    assert same(whole, resumed)
    shapes = programs_of(of).shapes(of.spans[1].model)
    grown = load(tmp_path / "checkpoints" / "00000001-01", shapes).trained
    old = of.spans[1].births.masks(of.spans[1].model, "old")
    end = partition(resumed[-1].model)[0]
    for before, after, mask in zip(*map(jax.tree.leaves, (grown, end, old)), strict=True):
        before, after = np.asarray(before), np.asarray(after)
        np.testing.assert_array_equal(after[mask], before[mask])
        assert mask.all() or not np.array_equal(after, before)


# 15, 16: models of one's own -----------------------------------------------------------------------


def test_a_list_of_modules_is_a_stack_and_a_list_again():
    """equinox #709 #1046 #1055 #329 #246, levanter #105: no boilerplate around scanned layers."""
    mine = zoo.build(zoo.Tower)
    small = gj.annotate(mine, zoo.TOWER, stacks={"blocks": "layers"})
    assert eqx.tree_equal(small.model, mine) and gj.sizes(small)["layers"] == 3
    deep = gj.stack(layers=5)(small).model
    assert isinstance(deep.blocks, list) and len(deep.blocks) == 5
    assert eqx.tree_equal(deep.blocks[:3], mine.blocks)


def test_closed_layers_change_no_bit_of_the_logits_and_no_name(tmp_path):
    """NVIDIA-NeMo/Automodel PR #3509: exact at step 0, ordinary names, no wrapper."""
    small = build("llama")
    big = gj.stack(layers=4, order="top", branch="zero")(small)
    old, new = (np.asarray(call(model, inputs(small))) for model in (small, big))
    np.testing.assert_array_equal(new, old)  # no sum has another order, unlike in a wider product
    gj.hf.save(big, tmp_path / "big")
    assert type(gj.hf.load(tmp_path / "big")) is type(small)
