"""Attention by kernels: splash attention interpreted against all scores, and who takes which body.

`tests/tpu` compiles the same for TPUs.
"""

import inspect
import json
import os
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from growjax.cost import flops
from growjax.data import Causal
from growjax.errors import AxisError
from growjax.forecast.residuals import residual_bytes
from growjax.models import GPTConfig
from growjax.nn import Attention, Mask, RelativeBias, attend
from growjax.nn.place import Place, current, place_of, running_on
from growjax.parallel import Layout
from tests.conftest import DEEP, SEVERAL_DEVICES
from tests.runs import plan, steps


T = 200  # two tiles of 128, of which the second is padded
PLACES = jnp.arange(T)
TPU, GPU = Place("tpu"), Place("gpu")

MASKS = {
    "causal": Mask(causal=True),
    "padding": Mask(keys=PLACES % 5 != 0),
    "window and documents": Mask(causal=True, window=60, documents=PLACES // 70),
    "prefix in a window": Mask(
        causal=True, window=80, prefix=PLACES % 100 < 50, documents=PLACES // 100
    ),
}
DEEPER = {
    "everything": Mask(),
    "window on both sides": Mask(window=60),
    "causal padding": Mask(causal=True, keys=PLACES % 5 != 1),
    "prefix": Mask(causal=True, prefix=PLACES < 77),
    "a prefix that changes nothing": Mask(prefix=PLACES < 77),
    "a window of one": Mask(causal=True, window=1),
}


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch):
    monkeypatch.setattr("growjax.nn.splash._SIDES", (128,))


def draw(seed: int, *shape: int, dtype: Any = "float32"):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def both(body: Any, mask: Mask, *arrays: Any) -> Any:
    """The output of attention, and the gradients by queries, keys and values of a sum over it."""
    q, k, v, weights = arrays
    cap = 3.0 if mask.window is not None else None  # scores are bent as well

    @jax.jit
    def run(q, k, v):
        out, pull = jax.vjp(lambda q, k, v: attend(q, k, v, mask, cap=cap, body=body), q, k, v)
        return out, pull(weights)

    return run(q / 2, k, v)


@pytest.mark.parametrize("name", [*MASKS, *(DEEPER if DEEP else ())])
@pytest.mark.parametrize("group", [2, *([1, 3] if DEEP else ())])
def test_splash_gives_what_all_scores_give(name, group):
    """And so do its gradients, in float32, over every mask and with keys that queries share."""
    mask = (MASKS | DEEPER)[name]
    arrays = draw(1, 2, group, T, 4), draw(2, 2, T, 4), draw(3, 2, T, 4), draw(4, 2, group, T, 4)
    for ours, right in zip(
        jax.tree.leaves(both("splash", mask, *arrays)),
        jax.tree.leaves(both("einsum", mask, *arrays)),
        strict=True,
    ):
        np.testing.assert_allclose(ours, right, rtol=0, atol=2e-5)


def test_splash_reads_another_sequence():
    """Of another length, which tiles do not divide: the padding behind its keys is not seen."""
    arrays = draw(1, 2, 2, T, 4), draw(2, 2, 70, 4), draw(3, 2, 70, 4), draw(4, 2, 2, T, 4)
    for mask in (Mask(), Mask(keys=jnp.arange(70) % 5 != 0)):
        for ours, right in zip(
            jax.tree.leaves(both("splash", mask, *arrays)),
            jax.tree.leaves(both("einsum", mask, *arrays)),
            strict=True,
        ):
            np.testing.assert_allclose(ours, right, rtol=0, atol=2e-5)


def test_rows_that_see_nothing_are_finite():
    q, k, weights = draw(1, 1, 1, T, 4), draw(2, 1, T, 4), draw(3, 1, 1, T, 4)
    mask = Mask(causal=True, keys=jnp.arange(T) > 9)
    results = both("splash", mask, q, k, k, weights)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(results))


def test_kernels_are_split_over_devices():
    """Under every layout of eight devices: the same values, and no array is gathered for the kernel."""
    child = subprocess.run(
        [sys.executable, "-m", "tests.hosts", "kernels"],
        env={**os.environ, **SEVERAL_DEVICES, "JAX_NUM_CPU_DEVICES": "8"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert child.returncode == 0, child.stderr[-2000:]
    results = json.loads(child.stdout.splitlines()[-1])
    assert len(results) == 2
    for layout, (error, gathers) in results.items():
        assert error < 1e-5 and gathers == 0, (layout, error, gathers)


# Who takes which body --------------------------------------------------------------------------------


def traced(place: Place | None, mask: Any = None, bias: Any = None, **changes: Any) -> str:
    """The body that "auto" takes."""
    length, dtype = changes.get("length", 256), changes.get("dtype", "bfloat16")
    q = jax.ShapeDtypeStruct((2, 2, length, 8), dtype)
    k = jax.ShapeDtypeStruct((2, length, 8), dtype)
    mask = Mask(causal=True) if mask is None else mask
    with running_on(place):
        text = str(jax.make_jaxpr(lambda q, k: attend(q, k, k, mask, bias))(q, k))
    bodies = ("splash", "cudnn", "blockwise")
    return next((body for body in bodies if f"name={body}_attention" in text), "einsum")


@pytest.fixture
def cudnn(monkeypatch):
    """cuDNN's attention refuses to be traced where there is no GPU: its shapes stand for it."""
    monkeypatch.setattr(jax.nn, "dot_product_attention", lambda q, *_, **__: q)


def test_the_platform_that_is_compiled_for_decides(cudnn):
    assert [traced(place) for place in (TPU, GPU, Place("cpu"), None)] == [
        "splash",
        "cudnn",
        "blockwise",
        "blockwise",
    ]
    assert traced(TPU, length=128) == traced(GPU, length=128) == "einsum"


def test_what_a_kernel_cannot_do_the_tiles_do(cudnn):
    bias = RelativeBias(8, 2, 2, bidirectional=True, max_distance=12, key=jax.random.key(0))
    places = jnp.arange(256)
    for place in (TPU, GPU):
        assert traced(place, bias=bias) == "blockwise"
        assert traced(place, Mask(window=jnp.asarray(3))) == "blockwise"
        assert traced(place, Mask(pairs=jnp.ones((256, 256), bool))) == "blockwise"
        assert traced(place, Mask(causal=True, window=3)) != "blockwise"
    with jax.enable_x64():
        assert traced(TPU, dtype="float64") == "blockwise"
    assert traced(TPU, dtype="float16") == traced(GPU, dtype="float32") == "blockwise"
    assert traced(TPU, dtype="float32") == "splash" and traced(GPU, dtype="float16") == "cudnn"
    seen = places < 9
    for mask in (
        Mask(documents=places),
        Mask(causal=True, prefix=seen),
        Mask(keys=seen),
        Mask(window=9),
    ):
        assert (traced(TPU, mask), traced(GPU, mask)) == ("splash", "blockwise")


def test_a_plan_of_kernels_that_are_not_there_can_be_counted():
    """A laptop works out the cost and memory of a plan for GPUs, whose kernel it does not have."""
    sizes: Any = {"layers": 1, "embed": 16, "heads": 2, "head_dim": 8, "mlp": 16, "vocab": 30}
    sizes |= {"positions": 24}
    bodies: list[Any] = ["cudnn", "splash", "auto"]
    counts = []
    for body in bodies:
        model = GPTConfig(**sizes, dtype="bfloat16", attention=body)
        of = plan(steps(1), model=model, objective=Causal(24, packing="concat"))
        counts.append((of.flops, residual_bytes(of.spans[0], None)))
    assert counts[0][0] == counts[1][0] == counts[2][0] > 0
    assert counts[0][1] == counts[1][1] > 0


@pytest.mark.parametrize("mask", [Mask(), Mask(causal=True, window=9)], ids=["all", "window"])
def test_cudnn_takes_what_it_is_handed(mask, monkeypatch):
    """Lowered for GPUs, forward and backward, as far as JAX does it where no cuDNN is installed."""
    from jax._src.cudnn import fused_attention_stablehlo as fused

    monkeypatch.setattr(fused, "check_cudnn_version", lambda: 91100)
    monkeypatch.setattr(fused, "check_compute_capability", lambda _: True)

    @jax.jit
    def gradient(q, k):
        def total(q, k):
            return jax.vmap(lambda q, k: attend(q, k, k, mask))(q, k).astype("float32").sum()

        return jax.grad(total, (0, 1))(q, k)

    q = jax.ShapeDtypeStruct((3, 2, 2, 256, 64), "bfloat16")
    k = jax.ShapeDtypeStruct((3, 2, 256, 64), "bfloat16")
    with running_on(GPU):
        text = gradient.trace(q, k).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("@__cudnn$fmhaSoftmax(") == text.count("@__cudnn$fmhaSoftmaxBackward(") == 1


def test_a_program_is_traced_anew_for_another_platform():
    """JAX keeps traced functions by the place as well, so that one is not taken for another's."""
    x = jax.ShapeDtypeStruct((1, 1, 256, 8), "float32")
    inner = jax.jit(lambda x: attend(x, x[0], x[0]))
    uses_kernel = []
    for place in (TPU, None, TPU):
        with running_on(place):
            uses_kernel.append("splash_attention" in str(jax.make_jaxpr(inner)(x)))
    assert uses_kernel == [True, False, True]


def test_what_was_asked_for_and_cannot_be_is_an_error():
    x = draw(1, 1, 1, 16, 4)
    run = inspect.unwrap(attend)
    bias = draw(2, 1, 1, 16, 16)
    with pytest.raises(AxisError, match="'splash' cannot compute .* bias: the kernel adds nothing"):
        run(x, x[0], x[0], bias=bias, body="splash")
    with pytest.raises(AxisError, match="dtype: expected bfloat16 or float16, got float32"):
        run(x, x[0], x[0], body="cudnn")
    half = jnp.zeros((1, 1, 16, 8), "bfloat16")
    with pytest.raises(AxisError, match="'cudnn' is for NVIDIA GPUs, not for cpu"):
        run(half, half[0], half[0], body="cudnn")
    with pytest.raises(AxisError, match="head_dim: expected a multiple of 8, got 4"):
        run(half[..., :4], half[0, ..., :4], half[0, ..., :4], body="cudnn")


def test_a_place_is_that_of_the_devices():
    mesh = Layout().mesh(jax.devices()[:1])
    assert place_of(mesh) == Place("cpu", None) and place_of(Layout().outline(8)) is None
    assert current() == Place("cpu", None)
    with running_on(TPU), running_on(None):
        assert current() == TPU
    # Several accelerators without a mesh: their arrays may be split in any way
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "default_backend", lambda: "tpu")
        assert current() == Place("tpu")
        patch.setattr(jax, "device_count", lambda: 4)
        assert current() is None
        with jax.default_device(jax.devices("cpu")[0]):
            assert current() == Place("cpu")


def test_a_kernel_is_charged_as_every_body_is():
    """4 T S d FLOPs a head: two products, whatever tiles the kernel skips."""
    x, counts = jax.ShapeDtypeStruct((3, 24, 8), "float32"), {}
    for body in ("einsum", "splash"):
        layer: Any = Attention(8, 4, 2, 2, body=body, key=jax.random.key(0))
        counts[body] = flops(lambda layer, x: jax.vmap(layer)(x), layer, x)
    assert counts["einsum"] == counts["splash"]
    q, k = (
        jax.ShapeDtypeStruct((2, 3, 24, 8), "float32"),
        jax.ShapeDtypeStruct((2, 40, 8), "float32"),
    )
    assert flops(lambda q, k: attend(q, k, k, body="splash"), q, k) == 4 * 6 * 24 * 40 * 8
