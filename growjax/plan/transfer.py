"""The faults of a plan whose learning rate transfers, apart from those of its models' shapes."""

from collections.abc import Iterator, Sequence
from typing import Any

from growjax.growth import atoms
from growjax.optim.transfer import Transfer
from growjax.plan.stages import Stage


# The rules whose updates have a size of their own, whatever the size of the gradients
_OWN_SIZE = ("adamw", "nadamw", "ademamix", "lion")


def transfer_faults(transfer: Transfer, optimizer: Any, stages: Sequence[Stage]) -> Iterator[str]:
    """The reasons why rates do not transfer with an optimizer and through the growths of some stages."""
    if getattr(optimizer, "name", None) not in _OWN_SIZE:
        name = getattr(optimizer, "name", type(optimizer).__name__)
        yield (
            f"transfer: the updates of {name} do not have a size of their own; use "
            f"{', '.join(_OWN_SIZE[:-1])} or {_OWN_SIZE[-1]}"
        )
    elif optimizer.scale_by_parameter:
        yield "transfer: scale_by_parameter scales updates by the weights, as transfer does; use one"
    for n, stage in enumerate(stages if transfer.depth else ()):
        operators = () if stage.grow is None else atoms(stage.grow)
        if any(getattr(op, "init", None) == "born" for op in operators):
            yield (
                f"transfer: stage {n} {stage.name!r}: fresh layers would be drawn without the multiple "
                "of the depth; draw them like the old ones, by gj.fresh(init='matched')"
            )
