"""The order in which a corpus is read, as arithmetic that a plan can do before any data is read.

The tokens are cut into *blocks*, which are shuffled anew in every epoch. A batch takes the *windows* of
blocks, one after the other. The position of a run in its corpus is one integer, the *cursor*: how many
blocks it has used. It does not depend on the batch size and the sequence length, so both may change from
stage to stage. With several corpora, the number of a block also says which corpus it is from.
"""

import math
from collections.abc import Sequence
from fractions import Fraction

from growjax.errors import DataError, raise_all


def windows_per_block(block: int, raw_length: int) -> int:
    """How many windows of `raw_length` tokens one block holds; the rest of the block is not read.

    **Example**

        windows_per_block(1024, 128)     # 8
    """
    _positive(block=block, raw_length=raw_length)
    if raw_length > block:
        raise DataError(
            f"block: expected at least the {raw_length} tokens of a window, got {block}; take the "
            "longest raw_length of all stages"
        )
    return block // raw_length


def blocks_of(tokens: int, block: int) -> int:
    """How many whole blocks a corpus has, with one token more as the last target; the rest is not read.

    **Example**

        blocks_of(2049, 1024)     # 2
    """
    _positive(block=block)
    return max(tokens - 1, 0) // block


def blocks_used(steps: int, *, batch: int, block: int, raw_length: int) -> int:
    """How many blocks `steps` steps use, rounded up: the next stage begins with a new block.

    **Example**

        blocks_used(10, batch=16, block=1024, raw_length=128)     # 20
    """
    _positive(batch=batch)
    if steps < 0:
        raise DataError(f"steps: expected 0 or more, got {steps}")
    return -(-steps * batch // windows_per_block(block, raw_length))  # rounded up


def proportions(weights: Sequence[float]) -> tuple[int, ...]:
    """The smallest integers in the ratio of some weights, which are rounded to fractions of 10**6.

    **Example**

        proportions((0.5, 0.3, 0.2))     # (5, 3, 2)
    """
    total = math.fsum(weights)
    # At least 10**-6 of the sum: a smaller weight would be rounded to nothing
    least = Fraction(1, 10**6)
    parts = [max(Fraction(w / total).limit_denominator(10**6), least) for w in weights]
    scale = math.lcm(*(part.denominator for part in parts))
    whole = [int(part * scale) for part in parts]
    factor = math.gcd(*whole)
    return tuple(n // factor for n in whole)


def corpus_of(index: int, shares: Sequence[int]) -> tuple[int, int]:
    """The corpus that a block comes from, and its number among those of that corpus.

    Of the first n blocks, corpus i has n * shares[i] / sum(shares), to within one for each corpus.

    **Example**

        [corpus_of(i, (2, 1))[0] for i in range(6)]     # [1, 0, 0, 1, 0, 0]
    """
    rest = sum(shares)
    # Each corpus in turn takes its share of the blocks that those before it have left. The block is from
    # the corpus that has one more of the first `after` blocks than of the first `before`.
    before, after = index, index + 1
    for n, share in enumerate(shares):
        left_before, left_after = before * (rest - share) // rest, after * (rest - share) // rest
        if before - left_before != after - left_after:
            return n, before - left_before
        rest, before, after = rest - share, left_before, left_after
    raise AssertionError("the last corpus takes all that is left")


def _positive(**sizes: int) -> None:
    faults = [f"{name}: expected 1 or more, got {n!r}" for name, n in sizes.items() if n < 1]
    raise_all(DataError, "a corpus cannot be read in this order:", faults)
