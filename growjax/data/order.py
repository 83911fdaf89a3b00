"""In which order a corpus is read, as arithmetic: a plan needs it before any data is there.

A token stream is cut into *blocks*, and the blocks are shuffled anew in every epoch. A batch takes
*windows* of blocks, one after the other. Where a run stands is one integer, its *cursor*: how many
blocks it has used. It means the same whatever the batch size and the sequence length are, so both may
change from stage to stage.
"""

from growjax.errors import DataError, raise_all


def windows_per_block(block: int, raw_length: int) -> int:
    """How many windows of `raw_length` tokens one block holds; what is left over is not read.

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
    """How many blocks a corpus has. One more token is needed, the last target; the rest is not read.

    **Example**

        blocks_of(2049, 1024)     # 2
    """
    _positive(block=block)
    return max(tokens - 1, 0) // block


def blocks_used(steps: int, *, batch: int, block: int, raw_length: int) -> int:
    """How many blocks some steps use. The next stage starts after them, at a whole block.

    **Example**

        blocks_used(10, batch=16, block=1024, raw_length=128)     # 20
    """
    _positive(batch=batch)
    if steps < 0:
        raise DataError(f"steps: expected 0 or more, got {steps}")
    return -(-steps * batch // windows_per_block(block, raw_length))


def _positive(**sizes: int) -> None:
    wrong = [f"{name}: expected 1 or more, got {n!r}" for name, n in sizes.items() if n < 1]
    raise_all(DataError, "there is no such order:", wrong)
