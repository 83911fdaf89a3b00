"""Lists of layers: which old layer each new one is, in the orders of the papers."""

from typing import get_args

import numpy as np
import pytest

from growjax.errors import GrowthError
from growjax.growth import solar, sources
from growjax.growth.depth import Order


@pytest.mark.parametrize(
    "order, old, new, expected",
    [
        ("repeat", 2, 3, [0, 1, 1]),
        ("repeat", 2, 4, [0, 1, 0, 1]),
        ("repeat", 2, 5, [0, 1, 0, 1, 1]),
        ("repeat", 6, 12, [*range(6), *range(6)]),
        ("repeat", 3, 12, [0, 1, 2] * 4),
        ("interleave", 2, 4, [0, 0, 1, 1]),
        ("interleave", 3, 9, [0, 0, 0, 1, 1, 1, 2, 2, 2]),
        ("interpolate", 2, 3, [0, 1, 1]),
        ("interpolate", 2, 4, [0, 0, 1, 1]),
        ("interpolate", 2, 5, [0, 0, 1, 1, 1]),
        ("interpolate", 4, 6, [0, 1, 2, 2, 3, 3]),
        ("top", 6, 9, [0, 1, 2, 3, 4, 5, 3, 4, 5]),
        ("top", 3, 5, [0, 1, 2, 1, 2]),
        ("middle", 4, 8, [0, 1, 2, 3, 0, 1, 2, 3]),  # one block: itself
        ("middle", 4, 6, [0, 1, 0, 1, 2, 3]),  # two blocks: the first
        ("middle", 6, 8, [0, 1, 2, 3, 2, 3, 4, 5]),  # three: the second
        ("middle", 4, 5, [0, 1, 1, 2, 3]),
        ("middle", 6, 10, [*range(5), *range(1, 6)]),  # a block that does not divide the stack
        ("middle", 8, 12, [*range(4), *range(4), *range(4, 8)]),
        ("centre", 8, 12, [*range(6), *range(2, 8)]),  # LIDAS: the layers around the middle
        ("centre", 8, 10, [*range(5), *range(3, 8)]),
        ("centre", 5, 6, [0, 1, 2, 2, 3, 4]),
        ("centre", 5, 7, [0, 1, 2, 3, 2, 3, 4]),
        ("centre", 3, 6, [0, 1, 2, 0, 1, 2]),
        ("insert", 4, 6, [0, 1, 1, 2, 3, 3]),
        ("insert", 3, 6, [0, 0, 1, 1, 2, 2]),
    ],
)
def test_layers_are_copied_in_the_order_of_the_papers(order, old, new, expected):
    assert sources(order, old, new).tolist() == expected


def test_solar_drops_layers_on_both_sides_of_the_seam():
    assert solar(4, 1) == (0, 1, 2, 1, 2, 3)
    assert solar(3, 0) == (0, 1, 2, 0, 1, 2)
    assert len(solar(32, 8)) == 48


PAIRS = [(old, new) for old in range(1, 9) for new in range(old + 1, 9)]


ORDERS = pytest.mark.parametrize("order", get_args(Order))


@ORDERS
def test_no_new_layers_are_no_change_in_any_order(order):
    assert sources(order, 4, 4).tolist() == [0, 1, 2, 3]


@ORDERS
def test_every_order_keeps_all_layers_and_their_first_appearances_in_order(order):
    reached = 0
    for old, new in PAIRS:
        try:
            source = sources(order, old, new)
        except GrowthError:
            assert order in ("top", "middle", "centre", "insert") and (
                new > 2 * old or old % (new - old)
            )
            continue
        reached += 1
        assert source.shape == (new,) and set(source) == set(range(old))
        firsts = [int(np.flatnonzero(source == i)[0]) for i in range(old)]
        assert firsts == sorted(firsts)
        if order in ("top", "repeat"):  # old layers stay where they are, at the bottom
            assert source[:old].tolist() == list(range(old))
        if order in ("interleave", "interpolate", "insert"):  # depth keeps its order
            assert (np.diff(source) >= 0).all()
        if order not in ("repeat", "interpolate"):  # which repeat the last layers more
            assert np.bincount(source).max() <= -(-new // old)
    assert reached >= len(PAIRS) // 3
