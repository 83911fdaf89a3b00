"""What users get wrong, and what they are told: which argument, what was expected, what came."""

# pyright: reportArgumentType=false

import functools
import inspect

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jaxtyping import Array

import growjax as gj
from growjax import maps, testing
from growjax.axes import Spec, put, sizes
from growjax.errors import (
    AxisError,
    GateError,
    GrowjaxError,
    GrowthError,
    StateError,
    SubnetError,
)
from growjax.growth import solar, sources
from growjax.models import BERT, GPT, BERTConfig, GPTConfig, LlamaConfig, T5Config
from growjax.nn import Attention
from growjax.values import from_dict


SIZES = dict(embed=8, heads=2, head_dim=4, mlp=6, vocab=11)
DECODER = dict(SIZES, layers=4, positions=8)
KEY = jax.random.key(0)


@functools.cache
def model(family: str = "GPT", **options):
    """A small model whose arrays are made by numpy."""
    made, config = {"GPT": (GPT, GPTConfig), "BERT": (BERT, BERTConfig)}[family]
    empty = eqx.filter_eval_shape(made, config(**{**DECODER, **options}), key=KEY)
    full = testing.randomise(empty)
    return jax.tree.map(lambda x: x if eqx.is_array(x) else jnp.full(x.shape, 1e-5), full)


def grow(op, family: str = "GPT", key=KEY, **options):
    return lambda: gj.grow(op(), model(family, **options), key=key)


def ramping():
    return eqx.filter_jit(gj.msg(mlp=8, init="zeros"))(model(), key=KEY)


def broken():
    return put(model(), {("blocks", "block", "mlp", "up"): jnp.full((4, 8, 6), jnp.nan)})


def apply(**fields):
    return lambda: maps.apply(gj.AxisMap(**fields), model(), KEY)


def part(subnet):
    return lambda: subnet()(model(), key=KEY)


def state(tx, whole: bool = False, op=None, **options):
    def carried():
        params = model() if whole else gj.partition(put(model(), {("gate",): None}))[0]
        optimizer = tx()
        options.setdefault("optimizer", optimizer)
        return gj.carry(op or gj.copy(mlp=9), optimizer.init(params), model(), **options)

    return carried


class Rank(eqx.Module):
    a: Array = gj.param("embed -> mlp")
    b: Array = gj.param("-> mlp")


class Nameless(eqx.Module):
    a: Array = gj.param("{nope} -> mlp")


class Bare(eqx.Module):
    a: Array


KNOWN = "this model has vocab=11, embed=8, positions=8, layers=4, kv_heads=2, group=1"
RANGE = r"level: expected a number in \[0, 1\], got "
SCHEDULE = dict(layers=4, steps=20)

GROWTH = [
    # sizes
    ("shrink embed", grow(lambda: gj.msg(embed=4)), "embed=4 is smaller than the model's 8"),
    ("shrink mlp", grow(lambda: gj.copy(mlp=5)), "mlp=5 is smaller than the model's 6"),
    ("shrink heads", grow(lambda: gj.zeros(heads=1)), "heads=1 is smaller than the model's 2"),
    ("shrink head_dim", grow(lambda: gj.msg(head_dim=2)), "head_dim=2 is smaller than"),
    ("shrink layers", grow(lambda: gj.stack(layers=2)), "layers=2 is smaller than the model's 4"),
    ("shrink by list", grow(lambda: gj.stack(layers=(0, 1))), "layers=2 is smaller than"),
    ("size 0", grow(lambda: gj.msg(mlp=0)), "mlp: expected a positive integer, got 0"),
    ("size 7.5", grow(lambda: gj.msg(mlp=7.5)), "mlp: expected a positive integer, got 7.5"),
    ("heads a group", grow(lambda: gj.msg(heads=5), heads=4, kv_heads=2), "heads=5 .* evenly by 2"),
    ("heads and kv", grow(lambda: gj.msg(heads=8, kv_heads=3)), "heads=8 .* evenly by 3"),
    # what an operator cannot do
    ("uneven embed", grow(lambda: gj.copy(embed=12)), r"embed: copies are uneven.*norm\.weight"),
    ("lost", grow(lambda: gj.copy(mlp=(0, 0, 1, 2, 3, 4, 4))), r"mlp: old coordinates \[5\] have"),
    ("pairs", grow(lambda: gj.copy(head_dim=(0, 1, 2, 3, 0)), position="rotary"), "rotary"),
    ("zeros LN", grow(lambda: gj.zeros(embed=12)), r"statistics of these norms.*\n.*norm\.weight"),
    ("zeros QK", grow(lambda: gj.zeros(head_dim=6), qk_norm=True), "head_dim: a norm averages"),
    ("stack mlp", grow(lambda: gj.stack(mlp=8)), "only layers can be stacked.*\n.*mlp"),
    ("post-LN", grow(lambda: gj.stack(layers=5, branch="zero"), "BERT"), "post-LN.*\n.*norm"),
    ("top", grow(lambda: gj.stack(layers=9, order="top")), "'top' .* last 5 layers.* there are 4"),
    ("insert", grow(lambda: gj.stack(layers=7, order="insert")), "'insert' .* 3 does not divide 4"),
    ("solar", lambda: solar(4, 4), "dropped: expected 0 to 3, got 4"),
    ("msg vocab", grow(lambda: gj.msg(vocab=12)), "rows of a table .*\n.*vocab"),
    ("msg positions", grow(lambda: gj.msg(positions=12)), "rows of a table .*\n.*positions"),
    ("no key", grow(lambda: gj.msg(mlp=8), key=None), "pass key="),
    ("not finite", lambda: gj.grow(gj.copy(mlp=9), broken()), r"not finite.*\n.*block\.mlp\.up"),
    # names
    ("init", lambda: gj.msg(mlp=8, init="norml"), "'zeros', 'matched', 'copy' or a fun.* 'norml'"),
    ("zeros init", lambda: gj.zeros(mlp=8, init="copy"), "init: expected .* got 'copy'"),
    ("no sizes", lambda: gj.msg(), "sizes: expected at least one axis .* such as mlp=2048"),
    ("a float", lambda: gj.msg(mlp=64.0), "mlp: expected a positive integer, got 64.0"),
    ("a string", lambda: gj.stack(layers="4"), "layers: expected a positive integer, got '4'"),
    ("a name", lambda: gj.stack(layers=4, init="normal"), "init: expected .* got 'normal'"),
    ("jitter", lambda: gj.copy(mlp=64, jitter=0.1), "jitter: expected .* got 0.1"),
    ("noise", lambda: gj.copy(mlp=64, noise=-1.0), "noise: expected 0 or more, got -1"),
    ("True", lambda: gj.zeros(mlp=True), "mlp: expected a positive integer, got True"),
    ("huge", lambda: gj.msg(mlp=2**40), r"mlp: expected an integer of at most 2\*\*24"),
    ("no list", lambda: gj.copy(mlp=()), r"mlp: expected the old index .* got \(\)"),
    ("seed", lambda: gj.copy(mlp=8, seed=-1), "seed: expected 0 or more, got -1"),
    ("chain maps", lambda: gj.chain(gj.msg(mlp=8), gj.msg(mlp=9)).maps(None), "gj.growth.atoms"),
    ("order", grow(lambda: gj.stack(layers=5, order="up")), "order: expected .* got 'up'"),
    ("not an operator", grow(lambda: "msg"), "op: expected an operator .* got 'msg'"),
    (
        "unknown op",
        lambda: from_dict({"is": "growjax:Shrink"}, error=GrowthError),
        "growjax has no 'Shrink'",
    ),
]

AXES = [
    ("unknown", grow(lambda: gj.msg(width=5)), f"unknown axis 'width'; {KNOWN}"),
    ("unknown copy", grow(lambda: gj.copy(width=5)), f"unknown axis 'width'; {KNOWN}"),
    ("unknown layers", grow(lambda: gj.stack(encoder_layers=5)), "unknown axis 'encoder_layers'"),
    (
        "layer 9",
        grow(lambda: gj.stack(layers=(0, 1, 2, 3, 9))),
        r"'layers': source \[9\] is not amo",
    ),
    ("source", apply(axis="mlp", source=[0, 6, -3]), r"source \[-3, 6\] is not among the 6"),
    ("share", apply(axis="mlp", source=[0, 1], share=np.ones(3)), r"shape \(3,\), expected \(2,\)"),
    ("init", apply(axis="mlp", source=[0, -1], init="xavier"), "'mlp': init must be .* 'xavier'"),
    ("spec", lambda: Spec.parse("a -> b -> c"), "'a -> b -> c': 'b' lies between"),
    ("rank", lambda: sizes(Rank(np.ones(2), np.ones(3))), r"a: declared .* \(embed mlp\).* \(2,\)"),
    ("size", lambda: sizes(Rank(np.ones((2, 3)), np.ones(4))), "'mlp' .* 3 at a, 4 at b"),
    ("undeclared", lambda: sizes(Bare(np.ones(2))), r"gj.annotate.*:\n.*a: shape \(2,\)"),
    ("not a model", lambda: gj.grow(gj.msg(mlp=8), {"w": np.ones(2)}), r"w: shape \(2,\)"),
    # configurations
    ("layers", lambda: GPTConfig(**{**DECODER, "layers": -1}), "layers: expected 0 or more .* -1"),
    (
        "embed",
        lambda: GPTConfig(**{**DECODER, "embed": 8.0}),
        "embed: expected .* integer, got 8.0",
    ),
    ("eps", lambda: GPTConfig(**DECODER, eps=0.0), "eps: expected a positive number, got 0.0"),
    ("norm", lambda: GPTConfig(**DECODER, norm="batch"), "norm: expected one of .* got 'batch'"),
    (
        "activation",
        lambda: GPTConfig(**DECODER, activation="sin"),
        "activation: .*relu.* got 'sin'",
    ),
    (
        "dtype",
        lambda: GPTConfig(**DECODER, dtype="int8"),
        "dtype: expected a floating.* got 'int8'",
    ),
    ("kv_heads", lambda: LlamaConfig(layers=1, kv_heads=3, **SIZES), "2 query heads .* 3 kv_heads"),
    (
        "odd rotary",
        lambda: LlamaConfig(layers=1, kv_heads=2, **{**SIZES, "head_dim": 3}),
        "head_dim: rotary positions .* even, got 3",
    ),
    ("nsp", lambda: BERTConfig(**DECODER, pooler=False), "nsp_head: it reads the pooler"),
    (
        "buckets",
        lambda: T5Config(encoder_layers=1, decoder_layers=1, buckets=6, **SIZES),
        "buckets: .* multiple of 4, got 6",
    ),
]

# Either kind of error would do for these.
EITHER = [
    ("copy to 7.5", grow(lambda: gj.copy(mlp=7.5)), "mlp: expected .* got 7.5"),
    ("stack to 4.5", grow(lambda: gj.stack(layers=4.5)), "layers: expected .* got 4.5"),
    ("lost evenly", grow(lambda: gj.copy(mlp=(0, 0, 1, 2, 3, 4))), r"mlp: .*\[5\]"),
    ("copy of -1", grow(lambda: gj.copy(mlp=(0, 1, 2, 3, 4, 5, -1))), r"mlp.*-1"),
    ("copy of 9", grow(lambda: gj.copy(mlp=(0, 1, 2, 3, 4, 5, 9))), r"mlp.*\b9\b"),
    ("odd head", grow(lambda: gj.msg(head_dim=5), position="rotary"), "head_dim: .*even, got 5"),
    ("sources down", lambda: sources("interleave", 4, 3), "4.*3"),
    ("copy order", grow(lambda: gj.copy(mlp=8, order="up")), "order: expected .* got 'up'"),
    ("shares", grow(lambda: gj.copy(mlp=8, shares="odd")), "shares: expected .* got 'odd'"),
    ("branch", grow(lambda: gj.stack(layers=5, branch="one")), "branch: expected .* got 'one'"),
    ("chain of what", lambda: gj.chain("msg"), "expected an operator .* got 'msg'"),
    ("unknown field", lambda: from_dict({"is": "growjax:MSG", "sizes": [], "speed": 1}), "'speed'"),
    ("stream", grow(lambda: gj.stack(layers=5, branch="zero", stream="width")), "axis 'width'"),
    ("layer -1", grow(lambda: gj.stack(layers=(0, 1, 2, 3, -1))), r"layers.*-1"),
    ("side", apply(axis="mlp", source=[0, 1], side="left"), "side: expected .* got 'left'"),
    ("template", lambda: sizes(Nameless(np.ones((2, 3)))), "nope"),
    ("axes of a state", lambda: gj.sizes(gj.State(model())), r"state\.model"),
    ("new of a state", lambda: gj.new(gj.stack(layers=5), gj.State(model())), r"state\.model"),
    ("bound of a model", lambda: gj.vocabulary(40).bound(model()), r"axes: .*axes_of.* got a GPT"),
    ("attention", lambda: Attention(8, 3, 2, 4, key=KEY), "heads=3 .* multiple of kv_heads=2"),
]

GATES = [
    (
        "ramping",
        lambda: gj.grow(gj.msg(mlp=9), ramping(), key=KEY),
        r"'mlp' is still.*\n.*mlp\.gate",
    ),
    ("level 2", lambda: gj.ramp(ramping(), 2), RANGE + "2"),
    ("level -0.1", lambda: gj.ramp(ramping(), -0.1), RANGE + "-0.1"),
    ("level nan", lambda: gj.ramp(ramping(), float("nan")), RANGE + "nan"),
    ("no gates", lambda: gj.ramp(model(), 0.5), "this model has no gate"),
    ("no gate on embed", lambda: gj.ramp(ramping(), 1, axes=["embed"]), "no gate on embed"),
    ("settle early", lambda: gj.settle(ramping()), r"ramp these first:\n.*mlp\.gate: level 0"),
    ("a table", apply(axis="positions", source=[0, -1], gated=True), "no gate on axis 'positions'"),
]

SUBNETS = [
    ("short", part(lambda: gj.random_path(1)), r"between 2 \(the fixed layers\) and 4, got 1"),
    ("long", part(lambda: gj.random_path(5)), "length: expected .* and 4, got 5"),
    ("half", part(lambda: gj.random_path(2.5)), r"length: 2.5 is not whole; take path\.at\("),
    ("keep", part(lambda: gj.random_path(3, keep=(7,))), r"keep: \[7\] are not among 4 layers"),
    ("scale", part(lambda: gj.random_path(3, scale="cube")), "scale: expected .* got 'cube'"),
    ("mode", part(lambda: gj.random_path(3, mode="any")), "mode: expected .* got 'any'"),
    ("path of units", part(lambda: gj.random_path(3, axis="mlp")), "mlp"),
    ("count 0", part(lambda: gj.random_part(mlp=0)), "mlp: expected a positive integer, got 0"),
    ("count 7", part(lambda: gj.random_part(mlp=7)), "mlp: expected between 1 and 6, got 7"),
    ("part of embed", part(lambda: gj.random_part(embed=4)), "embed: only units that norms"),
    ("part of layers", part(lambda: gj.random_part(layers=2)), "layers: only units"),
    ("drop, no step", part(gj.progressive_layer_drop), "step: ProgressiveLayerDrop changes .*step="),
    ("rising, no step", part(lambda: gj.layer_skip(steps=9)), "step: LayerSkip changes from step"),
    (
        "flags, no step",
        lambda: gj.progressive_layer_drop().running(model(), key=KEY),
        "step: ProgressiveLayerDrop changes",
    ),
    ("part scale", part(lambda: gj.random_part(mlp=3, scale="cube")), "scale: expected .* 'cube'"),
    ("falling", lambda: gj.path_schedule((3, 2, 4), **SCHEDULE), r"rising .* got \(3, 2, 4\)"),
    ("not all", lambda: gj.path_schedule((2, 3), **SCHEDULE), r"ends at 4 layers, got \(2, 3\)"),
    ("no stage", lambda: gj.path_schedule((), **SCHEDULE), r"lengths: .* got \(\)"),
    ("few steps", lambda: gj.path_schedule((2, 3, 4), layers=4, steps=2), "2 steps .* 3 stages"),
    ("stage of 0", lambda: gj.path_schedule((2, 2, 2, 4), layers=4, steps=4, stages="proportional"),
     "steps"),
    ("stages", lambda: gj.path_schedule((2, 4), stages="odd", **SCHEDULE), "stages: .* got 'odd'"),
    ("stage too short", lambda: gj.path_schedule((1, 4), **SCHEDULE), "length: .* got 1"),
    ("after the end", lambda: gj.path_schedule((2, 4), **SCHEDULE).at(20), "step 20 .* 20 steps"),
    ("floor 0", part(lambda: gj.progressive_layer_drop(floor=0)), "floor: expected .* got 0"),
    ("floor 2", part(lambda: gj.progressive_layer_drop(floor=2)), "floor: expected .* got 2"),
    ("rate 0", part(lambda: gj.progressive_layer_drop(rate=0)), "rate: expected .* got 0"),
    ("a step in words", lambda: gj.random_path(1.5).at("x"), "step: .* got 'x'"),
    ("step -1", lambda: gj.random_path(1.5).at(-1), "step: expected .* got -1"),
    ("seed -1", lambda: gj.nested(mlp=(2, 4)).at(1, seed=-1), "seed: expected .* got -1"),
    ("step of a count", lambda: gj.random_tokens(2, stop=4, steps=4).at("x"), "step: .* got 'x'"),
    ("step of exits", lambda: gj.layer_skip(exits=0.1, summed=True, curriculum="rotate").at("x"),
     "step: .* got 'x'"),
    ("step of stages", lambda: gj.path_schedule((2, 4), **SCHEDULE).at("x"), "step: .* got 'x'"),
    ("depth of a loop", lambda: gj.loop(2).layers("x"), "depth: expected .* got 'x'"),
    (
        "drop of units",
        lambda: gj.progressive_layer_drop(axis="mlp")(model(), key=KEY, step=0),
        "mlp",
    ),
]  # fmt: skip


def mixed():
    return optax.chain(optax.add_decayed_weights(0.1), optax.trace(0.9), optax.scale(-1.0))


STATES = [
    ("gradients with weights", state(mixed), r"trace\..*no power of the (gradient|weight)s"),
    (
        "whole model",
        state(lambda: optax.adam(1e-3), whole=True),
        r"buffers.*gj\.partition\(model\)",
    ),
    (
        "factored",
        state(lambda: optax.adafactor(1e-3, min_dim_size_to_factor=2)),
        r"(?s)v_row.*not shaped like its parameter",
    ),
    ("copies", state(lambda: optax.adam(1e-3), copies="all"), "copies: expected .* got 'all'"),
    ("not an operator", state(lambda: optax.adam(1e-3), op="msg"), "op: expected .* got 'msg'"),
    ("no optimizer", state(lambda: optax.adam(1e-3), optimizer="adam"), "optimizer: .* got 'adam'"),
    (
        "another",
        state(lambda: optax.adam(1e-3), optimizer=optax.lion(1e-3)),
        r"nu.*expected nothing",
    ),
    ("any average", state(lambda: optax.ema(0.9)), "average of gradients or of the weights"),
    ("a norm", state(lambda: optax.novograd(1e-3)), r"mixes entries of its parameter.*gj\.msg"),
    (
        "a line search",
        state(lambda: optax.lbfgs(1e-3)),
        r"(?s)small copy of the parameters.*missing.*value_fn",
    ),
]

TABLE = [
    pytest.param(call, error, message, id=f"{error.__name__}: {name}")
    for error, rows in [
        (GrowthError, GROWTH),
        (AxisError, AXES),
        (GateError, GATES),
        (SubnetError, SUBNETS),
        (StateError, STATES),
        (GrowjaxError, EITHER),
    ]
    for name, call, message in rows
]


@pytest.mark.parametrize("call, error, message", TABLE)
def test_bad_input_is_refused_and_the_message_says_why(call, error, message):
    with pytest.raises(error, match=message):
        call()


# A call of each function that describes how a model grows, or which part of it is trained
CALLS = {
    gj.aki: dict(mlp=8),
    gj.copy: dict(mlp=8),
    gj.dense: dict(head_dim=((1, 0), (0, 1))),
    gj.experts: dict(number=4),
    gj.fresh: dict(layers=4),
    gj.lemon: dict(mlp=8),
    gj.msg: dict(mlp=8),
    gj.positions: dict(size=16),
    gj.regroup: dict(kv_heads=4),
    gj.stack: dict(layers=4),
    gj.upcycle: dict(experts=4),
    gj.vocabulary: dict(size=16),
    gj.warm: dict(mlp=8),
    gj.zeros: dict(mlp=8),
    gj.growth.between: dict(layers=3),
    gj.growth.centred: {},
    gj.growth.context: dict(factor=2.0, length=4),
    gj.growth.given: dict(entries={}, mlp=8),
    gj.growth.gradmax: dict(mlp=8),
    gj.growth.learned: {},
    gj.growth.ligo: dict(mlp=8),
    gj.growth.pieces: dict(old={"a": 0}, new={"a": 0}, encode=lambda text: (0,)),
    gj.growth.pool: dict(kv_heads=1),
    gj.growth.pursuit: dict(donor=np.ones((3, 2)), shared={0: 0}),
    gj.growth.solar: dict(old=4, dropped=1),
    gj.growth.sources: dict(order="top", old=4, new=6),
    gj.growth.transplant: dict(rows=((0,), (1, 2))),
    gj.growth.within: dict(operator=gj.zeros(mlp=8), layers=(1,)),
    gj.layer_skip: {},
    gj.loop: dict(times=2),
    gj.nested: dict(mlp=3),
    gj.path_schedule: dict(lengths=(2, 4), layers=4, steps=10),
    gj.progressive_layer_drop: {},
    gj.random_part: dict(mlp=3),
    gj.random_path: dict(length=2),
    gj.random_tokens: dict(count=3),
    gj.plan.mixing: dict(grown=[1.0], whole=[1.0], window=1, close=0.1),
    gj.plan.plateau: dict(losses=[1.0], window=1, least=0.1),
    gj.plan.proportional_shares: dict(stages=3),
    gj.plan.stacking_tokens: dict(parameters=1e6, flops=1e15),
}  # fmt: skip
WRONG = (None, -1, 2.5, 1e-3, "x", True, np.array([1, 2]), [1, "a"], {1: 2}, object())


# Equinox's own warning of arrays in static fields comes before the error
@pytest.mark.filterwarnings("ignore:A JAX array is being set as static")
@pytest.mark.parametrize("call", [pytest.param(call, id=call.__name__) for call in CALLS])
def test_an_argument_of_any_type_is_taken_or_refused_by_name(call):
    for name in {**inspect.signature(call).parameters, **CALLS[call]}:
        for wrong in WRONG if name not in ("sizes", "counts", "matrices") else ():
            try:
                call(**{**CALLS[call], name: wrong})
            except GrowjaxError as error:
                assert name in str(error), f"{name}={wrong!r}: {error}"


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: gj.ramp(ramping(), "half"), "level: expected a number in .* got half"),
        (lambda: gj.ramp(ramping(), None), "level: expected a number"),
        (lambda: gj.settle(ramping(), axes="mlp"), r"axes: expected a list of names .* got 'mlp'"),
        (lambda: gj.ramp(ramping(), 0.5, axes=3), "axes: expected a list of names .* got 3"),
        (lambda: gj.random_path(2)(model(), key=3), "key: expected one key .* got 3"),
        (lambda: gj.random_tokens(2)(model(), key="x"), "key: expected one key .* got 'x'"),
        (
            lambda: gj.fitting.fit(gj.growth.ligo(mlp=9), model(), 3, None, key=None),
            "(?s)key: expected.*loss: expected.*batches: expected 100",
        ),
    ],
    ids=["level", "no level", "axes as text", "axes", "key", "key of tokens", "fit"],
)
def test_what_is_given_to_a_model_with_an_operator_is_checked_too(call, message):
    with pytest.raises(GrowjaxError, match=message):
        call()


def test_a_text_is_not_taken_apart():
    for call in (
        lambda: gj.growth.gradmax(mlp=8, gates="glu"),
        lambda: gj.random_path(2, keep="01"),
        lambda: gj.growth.parse(3),
        lambda: gj.growth.transplant([[0.5]]),
    ):
        with pytest.raises(GrowjaxError, match="got ('glu'|'01'|3|0.5)"):
            call()


def test_every_error_is_a_value_error_of_its_own_kind():
    kinds = (AxisError, GrowthError, GateError, SubnetError, StateError)
    assert all(issubclass(kind, GrowjaxError) and issubclass(kind, ValueError) for kind in kinds)
    assert not any(issubclass(a, b) for a in kinds for b in kinds if a is not b)
