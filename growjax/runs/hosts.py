"""Agreement between the hosts of a run: values that process 0 decides, and actions that succeed on all.

All processes must call each of these functions, in the same order. With one process nothing is sent.
"""

import json
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from growjax.errors import CheckpointError, DamagedError, GrowjaxError, raise_all


T = TypeVar("T")

_LONGEST = 1024  # bytes of a fault that are sent to the other processes
_DAMAGED = "damaged: "  # the prefix of a fault that is a `DamagedError`


def from_first(make: Callable[[], Any]) -> Any:
    """Call `make` on process 0 and return its result, anything that JSON can hold, on every process.

    If `make` raises an error of growjax, process 0 raises it, and every other process a
    `CheckpointError` with the same message.
    """
    if jax.process_count() == 1:
        return make()
    answer: dict[str, Any] = {}
    raised: GrowjaxError | None = None
    if jax.process_index() == 0:
        try:
            answer = {"value": make()}
        except GrowjaxError as error:
            raised, answer = error, {"error": f"process 0: {error}"}
    text = np.frombuffer(json.dumps(answer).encode(), np.uint8)
    length = int(multihost_utils.broadcast_one_to_all(np.int32(len(text))))
    # All processes must send arrays of one length; that of process 0 is the one that counts
    padded = np.zeros(length, np.uint8)
    padded[: len(text)] = text[:length]
    answer = json.loads(bytes(multihost_utils.broadcast_one_to_all(padded)))
    if raised is not None:
        raise raised
    if "error" in answer:
        raise CheckpointError(answer["error"])
    return answer["value"]


def together(do: Callable[[], T]) -> T:
    """Call `do` on every process, and return its result once it has succeeded on all.

    If it raises an error of growjax on some processes, all raise one that names these and their faults:
    a `DamagedError` if all of the faults are, and a `CheckpointError` otherwise.
    """
    if jax.process_count() == 1:
        return do()
    result: Any = None
    fault = ""
    try:
        result = do()
    except GrowjaxError as error:
        fault = f"{_DAMAGED if isinstance(error, DamagedError) else ''}{error}"
    text = fault.encode()[:_LONGEST]
    padded = np.zeros(_LONGEST, np.uint8)
    padded[: len(text)] = np.frombuffer(text, np.uint8)
    everyone = np.asarray(multihost_utils.process_allgather(padded))
    # Cutting may have split a character
    messages = [bytes(row).rstrip(b"\0").decode(errors="replace") for row in everyone]
    kind: type[CheckpointError] = DamagedError
    faults = []
    for i, message in enumerate(messages):
        if message:
            faults.append(f"process {i}: {message.removeprefix(_DAMAGED)}")
            if not message.startswith(_DAMAGED):
                kind = CheckpointError
    raise_all(kind, "the hosts cannot go on together:", faults)
    return result


def number_of_first(value: int) -> int:
    """The integer that process 0 passes (32 bits), on every process."""
    if jax.process_count() == 1:
        return value
    return int(multihost_utils.broadcast_one_to_all(np.int32(value)))
