"""Certificates: honest operators pass, and each way of being wrong is seen by its own line."""

import dataclasses
import functools
import json
import logging
import re
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import growjax as gj
from growjax import models, testing
from growjax.axes import put
from growjax.certificate import distance, probe
from growjax.certificate.measured import error, largest
from growjax.errors import GrowthError
from growjax.growth import Finish


KEY = jax.random.key(0)
TOKENS = testing.Architecture("GPT").batch()
POINTS = jnp.asarray(np.random.default_rng(0).standard_normal((5, 3)), jnp.float32)


def blank(make, *args):
    """A module without the seconds that drawing it takes."""
    shapes = eqx.filter_eval_shape(make, *args, key=KEY)
    return jax.tree.map(lambda s: jnp.full(s.shape, 1e-5, s.dtype), shapes)


def transformer(family: str, **options):
    sizes = testing.TOY | dict(layers=1, positions=testing.LENGTH) | options
    config = getattr(models, f"{family}Config")(remat="everything", **sizes)
    return testing.randomise(blank(getattr(models, family), config))


class Net(eqx.Module):
    """A model that knows nothing of growjax."""

    first: eqx.nn.Linear
    second: eqx.nn.Linear
    act: Callable = eqx.field(static=True)

    def __call__(self, x):
        return self.second(self.act(self.first(x)))


def net(act=jnp.tanh, dtype=jnp.float32, hidden=4):
    model = Net(blank(eqx.nn.Linear, 3, hidden), blank(eqx.nn.Linear, hidden, 2), act)
    specs = {
        "first.weight": "hidden <- inputs",
        "first.bias": "-> hidden",
        "second.weight": "outputs <- hidden",
        "second.bias": "-> outputs",
    }
    statics = {"first.out_features": "hidden", "second.in_features": "hidden"}
    model = testing.randomise(gj.annotate(model, specs, statics=statics))
    return jax.tree.map(lambda x: x.astype(dtype), model)


@functools.cache
def certificate(op, act=jnp.tanh, dtype=jnp.float32):
    return gj.certify(op, net(act, dtype), POINTS.astype(dtype), key=KEY)


# Honest operators ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def exact():
    return gj.certify(gj.msg(mlp=10), transformer("GPT"), TOKENS, key=KEY)


@pytest.fixture(scope="module")
def approximate():
    return gj.certify(gj.stack(layers=2), transformer("BERT", pooler=False, nsp_head=False), TOKENS)


def test_an_exact_operator_passes_every_line(exact):
    single, double = exact.forward
    assert exact.passed and exact.exactness == "exact"
    assert exact.axes == {"mlp": (6, 10)}
    assert (single.dtype, double.dtype) == ("float32", "float64")
    assert double.relative <= 1e-12 and single.relative <= 16 * single.floor
    assert 0 < double.floor < 1e-14 and 1e-9 < single.floor < 1e-5
    assert exact.poison == {"0": True, "N(0, 1)": True, "42": True, "1000": True}
    assert exact.gradient is not None and exact.gradient <= 1e-14
    assert exact.dead == {"mlp": (0.0, 0.0)} and not any(exact.locked.values())


def test_copies_pass_without_gates_and_leave_nothing_to_poison():
    record = certificate(gj.copy(hidden=8))
    assert record.passed and record.exactness == "exact-given-init"
    assert record.poison == {} and record.gradient is not None and record.gradient <= 1e-14


def test_an_approximate_operator_reports_its_jump_and_promises_nothing(approximate):
    assert approximate.passed and approximate.gradient is None and approximate.poison == {}
    assert all(d.relative > 0.01 and abs(d.loss) > 1e-4 for d in approximate.forward)
    assert "approximate, a jump is expected" in str(approximate)


@pytest.mark.parametrize("op", [gj.copy(hidden=7, shares="random"), gj.zeros(hidden=8)], ids=str)
def test_half_precision_is_held_to_its_own_noise(op):
    record = certificate(op, dtype=jnp.bfloat16)
    half, double = record.forward
    assert half.dtype == "bfloat16" and double.dtype == "float64"
    assert double.relative <= 1e-12 and half.relative <= 2**-6
    assert record.passed, str(record)


def in_half(model, batch):
    """Computes in bfloat16, in float64 as well, but for the outputs and what is accumulated."""
    model, batch = jax.tree.map(lambda x: x.astype(jnp.bfloat16), (model, batch))
    return jax.vmap(model)(batch).astype(jnp.float32)


def test_outputs_are_held_to_the_coarsest_dtype_that_computes_them():
    right = gj.certify(gj.copy(hidden=7, shares="random"), net(), POINTS, key=KEY, forward=in_half)
    wrong = gj.certify(Forgotten(), net(), POINTS, forward=in_half)
    assert right.gradient is not None and wrong.gradient is not None
    assert right.forward[0].relative > 1e-3 and right.gradient > 1e-4
    assert right.passed and right.forward[0].dtype == "bfloat16", str(right)
    assert not wrong.passed and wrong.gradient > 0.2, str(wrong)
    # A cast of the model's own is in its measurement in float64, too
    assert right.forward[1].dtype == "bfloat16"


def test_a_model_in_double_precision_has_one_forward_line():
    with jax.enable_x64(True):
        record = gj.certify(gj.zeros(hidden=8), net(dtype=jnp.float64), POINTS, key=KEY)
    (line,) = record.forward
    assert record.passed and line.dtype == "float64" and all(record.poison.values())
    assert len(record.poison) == 4


def test_a_floor_below_one_rounding_is_not_taken_for_exact_arithmetic():
    """Two units add up to the same in either order: the floor may be 0, yet rounding is allowed."""
    record = gj.certify(gj.copy(hidden=3, shares="random"), net(hidden=2), POINTS, key=KEY)
    assert record.forward[0].floor < 2**-24 and 0 < record.forward[0].relative < 1e-6
    assert record.passed, str(record)


def test_a_certificate_goes_through_json(exact, approximate):
    for record in (exact, approximate):
        stored = json.loads(json.dumps(record.to_dict(), allow_nan=False))
        assert stored["operator"] == record.operator and stored["passed"] is record.passed
        assert stored["gradient"] == record.gradient
        assert stored["forward"][-1]["relative"] == record.forward[-1].relative
        assert {axis: tuple(n) for axis, n in stored["axes"].items()} == record.axes


def test_a_certificate_prints_a_line_for_every_question(exact):
    lines = str(exact).splitlines()
    assert lines[0] == "msg(mlp=10): exact, keeps its promise"
    words = [line.split()[0] for line in lines[1:]]
    assert words == ["axes", "forward", "forward", "poison", "gradient", "liveness"]
    assert "mlp 6 -> 10" in lines[1] and "0, N(0, 1), 42, 1000" in lines[4]


def test_the_loss_and_the_outputs_may_be_given():
    def loss(model, batch):
        return jnp.mean(forward(model, batch) ** 2)

    def forward(model, batch):
        return jax.vmap(model)(batch)[:, :1]

    model = net()
    record = gj.certify(Forgotten(), model, POINTS, loss=loss, forward=forward)
    grown = gj.grow(Forgotten(), model)
    moved = forward(grown, POINTS) - forward(model, POINTS)
    assert record.forward[0].absolute == pytest.approx(float(jnp.abs(moved).max()), rel=1e-5)
    change = loss(grown, POINTS) - loss(model, POINTS)
    assert record.forward[0].loss == pytest.approx(float(change), rel=1e-4)


# Wrong operators -----------------------------------------------------------------------------


class Forgotten(gj.Operator):
    """Copies whose consumers are not divided."""

    exactness = "exact-given-init"

    def maps(self, axes):
        return [gj.AxisMap("hidden", np.arange(8) % 4)]


class WrongSide(gj.Operator):
    """Copies whose producers are divided."""

    exactness = "exact-given-init"

    def maps(self, axes):
        return [gj.AxisMap("hidden", np.arange(8) % 4, share=np.full(8, 0.5), side="produced")]


class Snapshot(gj.Operator):
    """Copies that are right in value, but whose map is not: they are constants."""

    exactness = "exact-given-init"

    def maps(self, axes):
        return [gj.AxisMap("hidden", np.arange(8) % 4, share=np.full(8, 0.5))]

    def __call__(self, model, *, key=None):
        grown = super().__call__(model, key=key)
        weight = grown.model.first.weight
        copies = jax.lax.stop_gradient(weight[4:])
        return put(grown, {("tree", "first", "weight"): jnp.concatenate([weight[:4], copies])})


class Ajar(gj.Operator):
    """Zeros into new units, which does not close them if the activation of zero is not zero."""

    exactness = "exact-given-init"

    def maps(self, axes):
        source = np.where(np.arange(8) < 4, np.arange(8), gj.NONE)
        share = np.where(np.arange(8) < 4, 1.0, 0.0)
        return [gj.AxisMap("hidden", source, share=share, side="produced", init="zeros")]


class Beside(Ajar):
    """Zeros into new units, and a call that also changes what was there."""

    def __call__(self, model, *, key=None):
        grown = super().__call__(model, key=key)
        return put(grown, {("tree", "first", "bias"): grown.model.first.bias + 0.5})


@dataclasses.dataclass(frozen=True)
class Moved(Finish):
    """Half more than the map says."""

    def applied(self, move, slot, old, new, *, key):
        return 1.5 * new


class Finished(Ajar):
    """Zeros into new units, and a finish that also changes what was there."""

    def maps(self, axes):
        return [dataclasses.replace(move, finish=Moved()) for move in super().maps(axes)]


@pytest.mark.parametrize("op", [Beside(), Finished()], ids=str)
def test_what_an_operator_does_beside_its_maps_is_seen_in_every_dtype(op):
    """Closed coordinates are filled without it, so outputs under their fills are not the operator's."""
    record = certificate(op)
    assert all(record.poison.values()) and all(d.relative > 0.01 for d in record.forward)
    assert not record.passed


@pytest.mark.parametrize("op", [Forgotten(), WrongSide()], ids=str)
def test_a_missing_or_misplaced_share_is_seen_by_the_forward_line(op):
    record = certificate(op)
    assert not record.passed
    assert all(d.relative > 0.01 for d in record.forward)
    assert "BREAKS ITS PROMISE" in str(record)


def test_a_wrong_map_behind_right_values_is_seen_by_the_gradient_line_alone():
    record = certificate(Snapshot())
    assert all(d.relative < 1e-6 for d in record.forward) and record.forward[-1].relative < 1e-14
    assert record.gradient is not None and record.gradient > 0.01
    assert not record.passed


def test_an_open_new_coordinate_is_seen_by_the_poison_line_alone():
    record = certificate(Ajar(), act=jax.nn.sigmoid)
    assert all(d.relative < 1e-6 for d in record.forward)
    assert record.gradient is not None and record.gradient < 1e-14
    assert record.poison == {"0": True, "N(0, 1)": False, "42": False, "1000": False}
    assert not record.passed
    assert "bitwise equal under 0; CHANGED by N(0, 1), 42, 1000" in str(record)
    assert certificate(Ajar()).passed  # tanh of zero is zero


def test_what_is_not_finite_is_never_lost():
    fine, lost = np.ones(2), np.asarray([1, np.nan])
    assert np.isnan(error({"a": fine, "b": fine}, {"a": fine, "b": lost}))
    assert np.isnan(largest([fine, lost])) and largest([]) == 0
    assert error([0 * fine], [0 * fine]) == 0 and error([0 * fine], [fine]) == 1
    # A masked logit is infinite before and after
    masked = np.asarray([-np.inf, 2.0, 4.0])
    assert distance(masked, masked + [0, 0, 1]) == (1.0, 0.25)
    assert distance(masked, np.asarray([0, 2.0, 4.0])) == (np.inf, np.inf)
    assert distance(fine, lost) == (np.inf, np.inf)
    assert np.isfinite(probe(masked, ((3,),))) and np.isnan(probe(lost, ((2,),)))


def test_a_gradient_that_is_not_finite_at_new_entries_fails():
    """The square root has no slope at the zero that new units compute."""
    record = certificate(gj.zeros(hidden=8, init="zeros"), act=root)
    assert all(d.relative < 1e-6 for d in record.forward) and record.gradient == np.inf
    assert not record.passed and record.dead["hidden"][0] > 0.5


def root(x):
    return jnp.sqrt(jnp.abs(x))


def test_outputs_without_gradients_or_fractions():
    def constant(model, batch):
        return jax.lax.stop_gradient(jax.vmap(model)(batch))

    def choice(model, batch):
        return jnp.argmax(jax.vmap(model)(batch), -1)

    record = gj.certify(gj.copy(hidden=8), net(), POINTS, forward=constant)
    assert record.gradient == 0 and record.dead == {"hidden": (1.0, 1.0)} and record.passed
    with pytest.raises(GrowthError, match="forward: expected outputs with fractions.*got int32"):
        gj.certify(gj.copy(hidden=8), net(), POINTS, forward=choice)


# Liveness ------------------------------------------------------------------------------------


def test_zeros_are_half_dead_after_one_step_and_alive_after_two():
    record = certificate(gj.zeros(hidden=8))
    assert record.passed and all(record.poison.values())
    assert record.dead == {
        "hidden": (pytest.approx(4 / 6), 0.0)
    }  # what produces, not what consumes


def test_zeros_on_both_sides_are_dead_for_ever():
    record = certificate(gj.zeros(hidden=8, init="zeros"))
    assert record.passed and record.dead == {"hidden": (1.0, 1.0)}
    assert "100% of new entries without gradient after one step, 100% after two" in str(record)


def test_words_and_outputs_that_grow_are_alive_and_biases_of_keys_are_nobodys_fault():
    """A card that says what cannot learn names no new word, whose logit the loss could see."""
    tokens = jnp.arange(8)[None] % 5
    words = gj.certify(gj.vocabulary(9), _random(gj.models.Llama, WORDS), tokens)
    assert words.axes == {"vocab": (6, 9)} and words.dead == {"vocab": (0.0, 0.0)}
    # The pooled output grows with the stream; softmax cancels a bias of keys, in old layers too
    encoder = _random(gj.models.BERT, ENCODER)
    wide = gj.certify(gj.copy(embed=8, heads=4), encoder, tokens)
    assert wide.dead["embed"] == wide.dead["kv_heads"] == (0.0, 0.0) and not any(
        wide.locked.values()
    )
    equal = gj.certify(gj.copy(embed=8, heads=4, shares="equal"), encoder, tokens)
    assert equal.locked["embed"] == 4
    deep = gj.certify(gj.stack(layers=4), encoder, tokens)
    assert deep.dead == {"layers": (0.0, 0.0)}


WORDS = gj.models.LlamaConfig(layers=1, embed=4, heads=2, kv_heads=2, head_dim=2, mlp=4, vocab=6)
ENCODER = gj.models.BERTConfig(
    layers=2,
    embed=4,
    heads=2,
    head_dim=2,
    mlp=4,
    vocab=6,
    positions=8,
    nsp_head=False,
)


def _random(model: type, config) -> Any:
    return gj.testing.randomise(model(config, key=jax.random.key(0)))


def test_equal_copies_are_locked_to_their_source_and_unequal_ones_are_not():
    equal, unequal = (certificate(gj.copy(hidden=8, shares=s)) for s in ("equal", "random"))
    assert equal.locked == {"hidden": 4} and unequal.locked == {"hidden": 0}
    assert "4 locked to their source" in str(equal) and "locked" not in str(unequal)


# What it costs -------------------------------------------------------------------------------


class Compiled(logging.Handler):
    """The names of the programs that are compiled while it listens."""

    def __init__(self):
        super().__init__()
        self.names: list[str] = []

    def emit(self, record):
        compiled = re.match(r"Finished XLA compilation of (.*) in ", record.getMessage())
        self.names += [compiled[1]] if compiled else []

    def __enter__(self):
        self.logger, self.logs = logging.getLogger("jax._src.dispatch"), jax.log_compiles()
        self.logger.addHandler(self)
        self.quiet, self.logger.propagate = self.logger.propagate, False
        self.logs.__enter__()
        return self

    def __exit__(self, *_):
        self.logs.__exit__(None, None, None)
        self.logger.removeHandler(self)
        self.logger.propagate = self.quiet


@pytest.mark.parametrize("op, most", [(gj.msg(mlp=12), 7), (gj.copy(mlp=12), 7)], ids=str)
def test_a_certificate_takes_few_programs_and_a_second_one_none(op, most):
    model, batch = transformer("GPT", layers=2), TOKENS
    with Compiled() as first:
        gj.certify(op, model, batch, key=KEY)
    with Compiled() as second:
        gj.certify(op, jax.tree.map(lambda x: 2 * np.asarray(x), model), batch, key=KEY)
    assert 4 <= len(first.names) <= most, first.names
    assert second.names == []


def test_a_model_is_born_by_one_program():
    """The same as by its class, to the last rounding."""
    sizes: dict[str, Any] = testing.TOY | dict(mlp=13)
    config = models.GPTConfig(layers=2, positions=8, **sizes)
    with Compiled() as programs:
        born = config.build(KEY)
    assert len(programs.names) == 1
    made = models.GPT(config, key=KEY)
    for a, b in zip(jax.tree.leaves(born), jax.tree.leaves(made), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)
    assert jax.tree.structure(born) == jax.tree.structure(made)
