"""Several objectives drawn from for one model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from growjax.data import (
    UL2,
    ByteTokenizer,
    Causal,
    Denoiser,
    Mixture,
    PrefixLM,
    SpanCorruption,
    Window,
)
from growjax.data.objectives import batch_shapes
from growjax.errors import DataError
from growjax.models import GPT
from growjax.train import cross_entropy, load_plan, save_plan
from tests.runs import SMALL, plan, steps


VOCABULARY = ByteTokenizer().vocabulary
SPANS = UL2(12, 4, (Denoiser("R", 0.15, 2.0),), form="decoder")
PARTS = Causal(16, packing="concat"), PrefixLM(16), SPANS
MIX = Mixture(PARTS, (0.6, 0.2, 0.2))


def window(mix: Mixture) -> Window:
    n = mix.raw_length + mix.lookahead
    return Window(np.arange(100, 100 + n, dtype=np.int32), np.zeros(n, np.int32))


def draw(mix: Mixture, seed: int):
    return mix(window(mix), VOCABULARY, np.random.default_rng(seed))


def test_every_example_has_the_same_shapes():
    shapes = {k: (x.shape[1:], x.dtype) for k, x in batch_shapes(MIX, 1).items()}
    assert set(shapes) == {"tokens", "targets", "weights", "segments", "positions", "prefix"}
    assert all(shape == (16,) for shape, _ in shapes.values())
    for seed in range(20):
        drawn = {k: (x.shape, x.dtype) for k, x in draw(MIX, seed).items()}
        assert drawn == shapes


def kind(example) -> str:
    if example["tokens"][0] == VOCABULARY.specials["R"]:
        return "spans"
    return "prefix" if example["prefix"].any() else "causal"


def test_parts_are_drawn_as_often_as_their_weights_say():
    kinds = [kind(draw(MIX, seed)) for seed in range(1000)]
    for name, share in [("causal", 0.6), ("prefix", 0.2), ("spans", 0.2)]:
        assert abs(kinds.count(name) / 1000 - share) < 5 * (share * (1 - share) / 1000) ** 0.5
    alone = Mixture(PARTS, (0.0, 1.0, 0.0))
    assert {kind(draw(alone, seed)) for seed in range(20)} == {"prefix"}


def test_a_part_is_what_it_is_alone():
    """The causal part fills every place, and the model's loss is that of the plain objective."""
    only = Mixture(PARTS, (1.0, 0.0, 0.0))
    mixed, alone = draw(only, 0), PARTS[0](window(only), VOCABULARY, np.random.default_rng(0))
    model = GPT(SMALL, key=jax.random.key(0))
    a, b = (cross_entropy(model, jax.tree.map(jnp.asarray, e)) for e in (mixed, alone))
    np.testing.assert_allclose(a, b, atol=1e-5)
    spans = draw(Mixture(PARTS, (0.0, 0.0, 1.0)), 0)
    assert spans["weights"].sum() < 16 and np.array_equal(spans["positions"], np.arange(16))


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Mixture(()), "parts: expected objectives"),
        (lambda: Mixture(("causal",)), r"parts\[0\]: expected an objective"),  # type: ignore
        (lambda: Mixture((Causal(8), SpanCorruption(8))), "one model reads one kind"),
        (lambda: Mixture(PARTS, (1.0,)), "one of 0 or more for each of 3 parts"),
        (lambda: Mixture(PARTS, (0.0, 0.0, 0.0)), "one of 0 or more for each"),
        (lambda: Mixture(PARTS, (1.0, 1.0, -1.0)), r"weights\[2\]: expected 0 or more"),
    ],
)
def test_what_cannot_be_mixed_is_refused(make, message):
    with pytest.raises(DataError, match=message):
        make()


def test_a_plan_with_a_mixture_survives_the_trip_through_json(tmp_path):
    made = plan(steps(1), objective=MIX)
    save_plan(made, tmp_path / "plan.json")
    assert load_plan(tmp_path / "plan.json") == made
