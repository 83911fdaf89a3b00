"""The order in which a corpus is read, as arithmetic that a plan can do before any data is read.

The tokens are cut into *blocks*, which are shuffled anew in every epoch. A batch takes the *windows* of
blocks, one after the other. The position of a run in its corpus is one integer, the *cursor*: how many
blocks it has used. It does not depend on the batch size and the sequence length, so both may change from
stage to stage.
"""

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


def _positive(**sizes: int) -> None:
    faults = [f"{name}: expected 1 or more, got {n!r}" for name, n in sizes.items() if n < 1]
    raise_all(DataError, "a corpus cannot be read in this order:", faults)
