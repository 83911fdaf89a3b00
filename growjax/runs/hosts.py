"""What the hosts of a run agree on before they go on: process 0 decides, and all confirm.

With one process nothing is sent. Every function here must be called by all processes alike.
"""

import json
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from growjax.errors import CheckpointError, DamagedError, GrowjaxError, raise_all


T = TypeVar("T")

_LONGEST = 1024  # bytes of a fault that is told to the other processes
_DAMAGED = "damaged: "  # stands before a fault that is damage


def from_first(make: Callable[[], Any]) -> Any:
    """What `make` returns on process 0, on every process: anything that JSON can hold.

    If it raises an error of growjax there, every process raises it: as what it is on process 0, as a
    `CheckpointError` elsewhere.
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
    # Of a length that all know, which is that of process 0
    padded = np.zeros(length, np.uint8)
    padded[: len(text)] = text[:length]
    answer = json.loads(bytes(multihost_utils.broadcast_one_to_all(padded)))
    if raised is not None:
        raise raised
    if "error" in answer:
        raise CheckpointError(answer["error"])
    return answer["value"]


def together(do: Callable[[], T]) -> T:
    """What `do` returns here, once it has succeeded on every process.

    If it raises an error of growjax on any of them, all raise one that names them: a `DamagedError` if
    all of the faults are, and a `CheckpointError` otherwise.
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
    faults = [bytes(row).rstrip(b"\0").decode(errors="replace") for row in everyone]
    broken = [text for text in faults if text]
    kind = DamagedError if all(text.startswith(_DAMAGED) for text in broken) else CheckpointError
    named = [f"process {i}: {t.removeprefix(_DAMAGED)}" for i, t in enumerate(faults) if t]
    raise_all(kind, "the hosts cannot go on together:", named)
    return result


def number_of_first(value: int) -> int:
    """A whole number of process 0, on every process."""
    if jax.process_count() == 1:
        return value
    return int(multihost_utils.broadcast_one_to_all(np.int32(value)))
