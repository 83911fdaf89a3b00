"""Sequences that are split over eight devices, against one device that has them whole.

python -m tests.context     attention under every mask; losses and gradients of models (deep: of all)
"""

import json
from collections.abc import Iterator
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

import growjax as gj
from growjax.axes import partition
from growjax.data import MLM, UL2, Causal, PrefixLM, batch_shapes
from growjax.models import BERTConfig, DecoderConfig, GPTConfig, LlamaConfig, Sight, T5Config
from growjax.nn import Mask, RelativeBias, attend, bodies, head
from growjax.nn.place import place_of, running_on
from growjax.parallel import gathered, split_rows
from growjax.plan.losses import objective
from growjax.programs.step import Programs, each_row
from growjax.train import Layout, Optimizer, cross_entropy
from tests.conftest import DEEP


T = 48
PLACES = jnp.arange(T)


def error(ours: Any, right: Any) -> float:
    """The largest difference of two trees of arrays, by the largest number of the second."""
    largest = max(float(abs(y).max()) for y in jax.tree.leaves(right))
    pairs = zip(jax.tree.leaves(ours), jax.tree.leaves(right), strict=True)
    return max(float(abs(np.asarray(x) - np.asarray(y)).max()) for x, y in pairs) / largest


# Attention ------------------------------------------------------------------------------------------

# Every query sees a key: what the others get is an average of any values
MASKS = {
    "everything": Mask(),
    "causal": Mask(causal=True),
    "prefix and documents": Mask(causal=True, prefix=PLACES < 19, documents=PLACES // 27),
    "window": Mask(causal=True, window=7),
    "a window of the layer": Mask(causal=True, window=jnp.asarray(7)),
    "documents and padding": Mask(causal=True, documents=PLACES // 11, keys=PLACES % 7 != 3),
    "pairs": Mask(pairs=(PLACES[:, None] * 7 + PLACES) % 3 != 1),
}
NOT_SPLASH = ("a window of the layer", "pairs")
BODIES = ("einsum", "blockwise")
CONTEXTS = (Layout(context=2, fsdp=2), Layout(context=4, tensor=2), Layout(context=8))
QUICK = (
    (CONTEXTS[0], "blockwise", "causal"),
    (CONTEXTS[1], "blockwise", "documents and padding"),
    (CONTEXTS[2], "einsum", "pairs"),
)


def attention() -> dict[str, float]:
    """The relative errors of outputs and gradients, by layout, body and mask."""
    draw = np.random.default_rng(0)
    q, k, v, out = (
        jnp.asarray(draw.normal(size=(4, 2, *shape)))
        for shape in ((3, T, 4), (T, 4), (T, 4), (3, T, 4))
    )
    bias = RelativeBias(8, 2, 3, bidirectional=True, max_distance=12, key=jax.random.key(0))
    bias = eqx.tree_at(lambda b: b.table, bias, jnp.asarray(draw.normal(size=(8, 2, 3))))

    def run(body: Any, layout: Layout | None, bias: Any, mask: Mask, *arrays: Any) -> Any:
        mesh = None if layout is None else layout.mesh()
        rows = None if mesh is None else ("data", "fsdp")

        def loss(bias: Any, q: Any, k: Any, v: Any, out: Any) -> Any:
            def one(q: Any, k: Any, v: Any) -> Any:
                return attend(q, k, v, mask, bias, cap=3.0, body=body)

            values = jax.vmap(one, spmd_axis_name=rows)(q, k, v)
            return jnp.sum(out * values), values

        gradient = jax.grad(loss, (0, 1, 2, 3), has_aux=True)
        with running_on(None if mesh is None else place_of(mesh)):
            return jax.jit(gradient)(bias, *arrays)

    errors = {}
    cases = [(x, b, m) for x in CONTEXTS for b in BODIES for m in MASKS] if DEEP else QUICK
    for i, (layout, body, name) in enumerate(cases):
        some = None if i % 3 == 2 else bias
        right = run("einsum", None, some, MASKS[name], q, k, v, out)
        ours = run(body, layout, some, MASKS[name], q, k, v, out)
        errors[f"{layout} {body} {name}"] = error(ours, right)
    narrow = [np.asarray(x, "float32") for x in (q, k, v, out)]
    with jax.enable_x64(False):  # the kernel knows no 64-bit numbers
        for name in MASKS if DEEP else ("causal", "prefix and documents"):
            if name in NOT_SPLASH:
                continue
            right = run("einsum", None, None, MASKS[name], *narrow)
            ours = run("splash", CONTEXTS[1], None, MASKS[name], *narrow)
            errors[f"splash {name}"] = 1e-7 * error(ours, right)  # in float32
    return errors


# Models ---------------------------------------------------------------------------------------------

SIZES: dict[str, Any] = {"embed": 16, "heads": 4, "head_dim": 4, "mlp": 32, "vocab": 60}
SIGHTS = (Sight(window=7), Sight(theta=1e5))
MODELS: dict[str, tuple[Any, Any]] = {
    "GPT": (GPTConfig(layers=1, positions=T, kv_heads=2, **SIZES), PrefixLM(T)),
}
MORE: dict[str, tuple[Any, Any]] = {
    "mixture": (
        LlamaConfig(layers=1, kv_heads=2, experts=4, expert_body="ragged", **SIZES),
        Causal(T),
    ),
    "windows": (
        DecoderConfig(
            layers=2, kv_heads=2, pattern=SIGHTS, qk_norm="head", logit_cap=30.0, **SIZES
        ),
        Causal(T),
    ),
    "T5": (T5Config(encoder_layers=1, decoder_layers=1, **SIZES), UL2(64)),  # 48 to decode
    "one key head": (GPTConfig(layers=2, positions=T, kv_heads=1, **SIZES), Causal(T)),
    "BERT": (BERTConfig(layers=2, positions=T, **SIZES), MLM(T)),
    "dense mixture": (LlamaConfig(layers=2, kv_heads=2, experts=4, **SIZES), Causal(T)),
}
LAYOUTS = {
    "GPT": (Layout(context=4, tensor=2),),
    "T5": (Layout(context=4, tensor=2),),
    "mixture": (Layout(context=2, experts=2, fsdp=2),),
}
MORE_LAYOUTS = (Layout(context=8), Layout(context=2, fsdp=2), Layout(context=2, fsdp=2, tensor=2))


def example(of: Any, rows: int) -> dict[str, Any]:
    """A batch of an objective: documents, paddings and prefixes of many lengths."""
    draw = np.random.default_rng(0)
    batch = {}
    for key, shape in batch_shapes(of, rows).items():
        length = shape.shape[1]
        places, cuts = np.arange(length)[None], draw.integers(length // 2, length, (rows, 1))
        values: Any = places < cuts  # masks, weights and prefixes
        if "tokens" in key or key == "targets":
            values = draw.integers(0, SIZES["vocab"], shape.shape)
        elif key == "segments":
            values = np.sort(draw.integers(0, 4, shape.shape), axis=1)
        elif key == "positions":
            values = np.broadcast_to(places, shape.shape)
        batch[key] = values.astype(shape.dtype)
    return batch


def loss_and_gradient(model: Any, batch: Any, layout: Layout, devices: int) -> tuple[Any, str]:
    """Of a model on a mesh; and the text of the program."""
    mesh = layout.mesh(jax.devices()[:devices])
    programs = Programs(Optimizer().build(), cross_entropy, mesh, layout)
    trained, rest = partition(model)

    def loss(trained: Any, rest: Any, rows: Any) -> Any:
        whole = gathered(eqx.combine(trained, rest), mesh)
        losses = each_row(programs, lambda row: cross_entropy(whole, row), rows)
        return objective(losses, jnp.sum(rows["weights"]))

    where = programs.shardings(jax.eval_shape(programs.state_of, model))
    program = jax.jit(
        jax.value_and_grad(loss), in_shardings=(where.trained, where.rest, split_rows(mesh))
    )
    compiled = program.lower(trained, rest, batch).compile()
    arguments = jax.device_put(
        (trained, rest, batch), (where.trained, where.rest, split_rows(mesh))
    )
    return jax.device_get(compiled(*arguments)), str(compiled.as_text())


def models() -> Iterator[tuple[str, Any]]:
    """Errors of the loss and of the gradient, and the tokens of the longest activations on a device."""
    bodies.LONG, bodies.TILE = 0, 4
    table = MODELS | (MORE if DEEP else {})
    for name, (config, of) in table.items():
        model = config.build(jax.random.key(1))
        if name in ("T5", "GPT"):  # half-open gates
            model = gj.msg(heads=8, mlp=48)(model, key=jax.random.key(2))
            model = gj.gates.opened(model, jnp.asarray(0.5))
        model = jax.tree.map(lambda x: x.astype("float64") if eqx.is_inexact_array(x) else x, model)
        batch = example(of, 8)
        head.LARGE, head.CHUNK = 2**23, 256
        (loss, gradient), _ = loss_and_gradient(model, batch, Layout(), 1)
        head.LARGE, head.CHUNK = 0, 5  # which divides no part of a sequence
        for layout in (*LAYOUTS.get(name, ()), *(MORE_LAYOUTS if DEEP else ())):
            (ours, its), text = loss_and_gradient(model, batch, layout, 8)
            whole = [f",{T},{SIZES[s]}]" in text for s in ("embed", "mlp")]
            yield f"{name} {layout}", (error(ours, loss), error(its, gradient), any(whole))


if __name__ == "__main__":
    with jax.enable_x64():
        print(json.dumps({"attention": attention(), "models": dict(models())}))
