"""The vocabulary of another tokenizer: shared rows, sums of pieces, and pursuit."""

import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import growjax as gj
from growjax import growth, testing
from growjax.axes import axes_of
from growjax.errors import GrowthError
from growjax.growth import pieces, pursuit, transplant
from growjax.values import from_dict, to_dict
from tests.test_lookups import Table


KEY = jax.random.key(0)
GPT, UNTIED, BERT = (testing.ARCHITECTURES[i] for i in (0, 1, 5))
OLD = {token: i for i, token in enumerate("abcdefghijk")}
NEW = {"c": 0, "ab": 1, "a": 2, "abc": 3}
ROWS = ((2,), (0, 1), (0,), (0, 1, 2))


def spelled(text: str) -> list[int]:
    return [OLD[letter] for letter in text]


def test_tokens_are_shared_or_fall_into_pieces():
    assert pieces(OLD, NEW, spelled) == ROWS
    with pytest.raises(GrowthError, match="no piece of these new tokens:\n.*'ab'"):
        pieces(OLD, NEW, lambda text: [])
    with pytest.raises(GrowthError, match="expected the ids 0 to 1, each once"):
        pieces(OLD, {"a": 0, "b": 2}, spelled)


OPERATORS = [
    transplant(ROWS),
    transplant(ROWS, output="first"),
    transplant(((0,), (1, 2)), weights=((1.0,), (0.5, -2.0))),
]


@pytest.mark.parametrize("op", OPERATORS, ids=["mean", "first", "weights"])
def test_an_operator_survives_json_and_is_what_it_prints(op):
    back = from_dict(json.loads(json.dumps(to_dict(op))))
    assert back == op and hash(back) == hash(op) and type(back) is type(op)
    assert growth.parse(str(op)) == op and eval(repr(op), vars(growth).copy()) == op


def expected(table: np.ndarray, first: bool = False) -> np.ndarray:
    return np.stack([table[row[0]] if first else table[list(row)].mean(0) for row in ROWS])


@pytest.mark.parametrize("output", ["mean", "first"])
def test_rows_are_means_of_their_pieces_in_table_and_head(output):
    with jax.enable_x64(True):
        small: Any = UNTIED.model()
        big: Any = transplant(ROWS, output=output)(small)
    assert gj.sizes(big)["vocab"] == 4
    old = {
        s.path: np.asarray(s.value) for s in axes_of(small).having("vocab", "param") if s.arrays()
    }
    assert len(old) >= 2
    for slot in axes_of(big).having("vocab", "param"):
        if slot.arrays():
            (dim,) = slot.positions("vocab")
            table, first = np.moveaxis(old[slot.path], dim, 0), slot.dims[dim].role != "lookup"
            new = np.moveaxis(np.asarray(slot.value), dim, 0)
            np.testing.assert_allclose(
                new, expected(table, first and output == "first"), rtol=1e-14
            )


@pytest.mark.parametrize("architecture", [GPT, BERT], ids=str)
def test_a_transplanted_model_reads_new_ids(architecture):
    """Logits of shared tokens after shared tokens are the old ones: only the other columns differ."""
    with jax.enable_x64(True):
        small: Any = architecture.model()
        big: Any = transplant(ROWS)(small)
        new, old = big(np.asarray([2, 0, 2])), small(np.asarray([0, 2, 0]))
    old, new = (np.asarray(x.mlm_logits if architecture is BERT else x) for x in (old, new))
    np.testing.assert_allclose(new[:, [0, 2]], old[:, [2, 0]], rtol=1e-12)
    np.testing.assert_allclose(new[:, 1], (old[:, 0] + old[:, 1]) / 2, rtol=1e-10)


def test_a_smaller_vocabulary_is_certified_on_the_words_that_both_have():
    rows = [[i] for i in range(10)]
    tokens = jnp.asarray(GPT.batch()) % 10
    certificate = gj.certify(transplant(rows), GPT.model(), tokens, key=KEY)
    assert certificate.axes == {"vocab": (11, 10)}
    assert all(d.relative <= d.limit for d in certificate.forward)


def test_shared_tokens_keep_their_moments_and_others_start_anew():
    tx: Any = optax.scale_by_adam()
    table = Table(jnp.arange(22.0).reshape(11, 2))
    state: Any = tx.init(table)._replace(mu=table)
    carried: Any = gj.carry(transplant(ROWS), state, table, optimizer=tx)
    moments = np.asarray(jax.tree.leaves(carried.mu)[0])
    rows = np.asarray(jax.tree.leaves(table)[0])
    np.testing.assert_array_equal(moments[[0, 2]], rows[[2, 0]])
    assert not moments[[1, 3]].any()


def test_pursuit_finds_the_sum_that_a_donor_has():
    rng = np.random.default_rng(0)
    donor = rng.normal(size=(6, 12))
    donor[4] = 2 * donor[0] - 0.5 * donor[3]
    donor[5] = donor[1]
    rows, weights = pursuit(donor, {0: 7, 1: 3, 2: 5, 3: 1}, pieces=2)
    assert rows[:4] == ((7,), (3,), (5,), (1,)) and weights[:4] == ((1.0,),) * 4
    combined = dict(zip(rows[4], weights[4], strict=True))
    assert combined == pytest.approx({7: 2.0, 1: -0.5})
    assert rows[5] == (3,) and weights[5] == pytest.approx((1.0,))
    with pytest.raises(GrowthError, match="some tokens that both"):
        pursuit(donor, {})


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: transplant(((0,), (11,))), "are not among the 11 old rows"),
        (lambda: transplant(((0,), ())), "have no old ids"),
        (lambda: transplant(()), "got none"),
        (lambda: transplant(((0, 1),), weights=((1.0,),)), "one for every id"),
        (lambda: transplant(((0, 1),), weights=((1.0, np.inf),)), "expected a number, got inf"),
        (lambda: transplant(((0,),), axis="mlp"), "no table is looked up"),
    ],
    ids=["beyond", "no ids", "no rows", "too few weights", "infinite", "other axis"],
)
def test_what_does_not_fit_says_why(make, message):
    with pytest.raises(GrowthError, match=message):
        make().maps(axes_of(GPT.model()))
