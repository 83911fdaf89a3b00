"""The indices at which a program reads its arrays, worked out from shapes and one example."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from growjax.trace import Read, reads


TABLE = jax.ShapeDtypeStruct((9, 4), jnp.float32)
TOKENS = np.array([1, 30, 2])


def looped(table, tokens):
    total, _ = jax.lax.scan(lambda total, i: (total + table[i], None), jnp.zeros(4), tokens)
    return total


READS = {
    "an index": (lambda table, t: table[t], 30),
    "take": (lambda table, t: jnp.take(table, t, axis=0), 30),
    "clipped by the read": (lambda table, t: jnp.take(table, t, axis=0, mode="clip"), 30),
    "one by one": (lambda table, t: jax.vmap(lambda i: table[i])(t), 30),
    "in a loop": (looped, 30),
    "under jit": (jax.jit(lambda table, t: table[t + 1]), 31),
    "computed again": (jax.checkpoint(lambda table, t: table[t]), 30),
    "remainders": (lambda table, t: table[t % 9], 3),
    "replaced": (lambda table, t: table[jnp.where(t < 9, t, 0)], 2),
    "clipped before": (lambda table, t: table[jnp.clip(t, 0, 8)], 8),
    "from behind": (lambda table, t: table[-t % 9], 8),
    "sorted by a parameter": (lambda table, t: table[jnp.argsort(table[:, 0])], None),
}


@pytest.mark.parametrize("name", READS)
def test_the_largest_index_is_that_of_the_program(name):
    run, index = READS[name]
    assert Read(9, index) in reads(run, TABLE, TOKENS)


def test_a_slice_reads_as_many_rows_as_it_has():
    run = lambda table, t: jax.lax.dynamic_slice(table, (t[0], t[0] * 0), (3, 4))  # noqa: E731
    assert reads(run, TABLE, TOKENS) == [Read(7, 1), Read(1, 0)]


def test_both_branches_are_read():
    run = lambda table, t: jax.lax.cond(t[0] > 0, lambda: table[t], lambda: table[t * 2])  # noqa: E731
    assert {read.index for read in reads(run, TABLE, TOKENS)} == {30, 60}


def test_the_second_dimension_and_what_a_loop_carries():
    def run(table, t):
        _, rows = jax.lax.scan(lambda i, _: ((i + 1) % 9, table[i]), t[0], None, length=3)
        return rows[:, 0] + jnp.take_along_axis(table[:3], t[:, None], axis=1)[:, 0]

    made = reads(run, TABLE, TOKENS)
    assert Read(9, None) in made and Read(4, 30) in made


def test_a_number_for_what_a_table_does_not_have_is_deliberate():
    fill = lambda table, t: table.at[t].get(mode="fill", fill_value=0)  # noqa: E731
    assert reads(fill, TABLE, TOKENS) == []
    assert reads(lambda table, t: jax.nn.one_hot(t, 9) @ table, TABLE, TOKENS) == []
