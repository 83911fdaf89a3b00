"""The arguments of a scan in a program, whose parameters have other names from JAX 0.12 on."""

from collections.abc import Mapping, Sequence
from typing import Any


def scanned(
    params: Mapping[str, Any], arguments: Sequence[Any]
) -> tuple[Sequence[Any], Sequence[Any], Sequence[Any]]:
    """The arguments of a scan equation: its constants, the start of its carry, and what it scans."""
    if "num_consts" in params:
        first = params["num_consts"]
        last = first + params["num_carry"]
        return arguments[:first], arguments[first:last], arguments[last:]
    # A tree of the arguments, whose leaves are replaced by these
    constants, carry, rows = params["ft_in"].update(arguments).unpack()
    return list(constants), list(carry), list(rows)
