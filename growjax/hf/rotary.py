"""Rotary positions in config.json: one object since transformers 5, several keys before."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from growjax.errors import AxisError
from growjax.hf.family import ConfigFile
from growjax.nn import LongRotary, RotaryScaling, Scaling, YarnScaling


_LENGTH = "original_max_position_embeddings"
KINDS = ("default", "linear", "llama3", "yarn")


class Rotation(NamedTuple):
    """What config.json says of rotary positions; `part` of the coordinates of a head are turned."""

    theta: float
    scaling: Scaling | None = None
    part: float = 1.0


def read_rotary(
    file: ConfigFile,
    *,
    theta: float = 10000.0,
    positions: int | None = None,
    part: float | None = None,
    outside: tuple[str, str] = ("rope_theta", "partial_rotary_factor"),
    kinds: Sequence[str] = KINDS,
    length: int | None = None,
) -> Rotation:
    """The rotary positions of a config.json.

    `theta`, `positions` and `part` are the family's defaults for `rope_theta`, for
    `max_position_embeddings` and for `partial_rotary_factor`, which must be 1 if `part` is None. `length`
    is that for `original_max_position_embeddings`, in a family whose file has it outside the object.
    `outside` are the names of theta and part in old files, `kinds` the allowed kinds of scaling. As in
    transformers, a `rope_scaling` that is not empty replaces `rope_parameters`; theta comes from that
    object, or else from the key outside of it. Two objects with different thetas are a fault.
    """
    blocks = {key: file.get(key, default={}) for key in ("rope_scaling", "rope_parameters")}
    for key, block in blocks.items():
        if not isinstance(block, dict):
            file.complaints.append(f"{key}: expected an object, got {block!r}")
            return Rotation(theta)
    key = "rope_scaling" if blocks["rope_scaling"] else "rope_parameters"
    # Old files have these two keys outside the object, which wins
    given = {}
    for name, old in zip(("rope_theta", "partial_rotary_factor"), outside, strict=True):
        value = file.get(old)
        if value is not None:
            given[name] = value
    block = ConfigFile(given | blocks[key], ())
    other = blocks["rope_parameters"].get("rope_theta")
    rotation = read_block(block, file, theta, positions, part, kinds, length)
    if other not in (None, rotation.theta) and rotation.theta > 0:
        block.complaints.append(
            f"rope_theta: {rotation.theta:g} for rope_scaling, and {other} in rope_parameters; "
            "transformers takes the first; keep one of them"
        )
    file.complaints.extend(f"{key}.{fault}" for fault in block.complaints)
    return rotation


def read_block(
    block: ConfigFile,
    file: ConfigFile,
    theta: float,
    positions: int | None,
    part: float | None = None,
    kinds: Sequence[str] = KINDS,
    length: int | None = None,
) -> Rotation:
    """The rotary positions that one object describes; faults are noted in `block`."""
    base = block.number("rope_theta", default=theta)
    scaling = _scaling(block, file, positions, kinds, length)
    if part is None:
        block.fixed({"partial_rotary_factor": 1.0})
    else:
        part = block.number("partial_rotary_factor", default=part)
        if part > 1:
            block.complaints.append(f"partial_rotary_factor: expected at most 1, got {part}")
    if block.get("rope_type", "type", default="default") in kinds:
        if not isinstance(scaling, YarnScaling | LongRotary):
            block.fixed({"attention_factor": None, "mscale": None})
        block.unread()
    return Rotation(base, None if block.complaints else scaling, 1.0 if part is None else part)


def _scaling(
    block: ConfigFile,
    file: ConfigFile,
    positions: int | None,
    kinds: Sequence[str],
    length: int | None,
) -> Scaling | None:
    """The scaling in the object `block` of a config.json, or None; faults are noted in `block`."""
    kind = block.get("rope_type", "type", default="default")
    trained = file.get("max_position_embeddings", default=positions)
    file_length = file.get(_LENGTH, default=length)
    if kind not in kinds:
        block.complaints.append(f"rope_type: expected one of {', '.join(kinds)}, got {kind!r}")
        return None
    if kind == "default":
        if length is not None:
            block.get(_LENGTH)  # written by some versions of transformers, whatever the kind
        return None
    if kind == "linear":
        return _valid(block, RotaryScaling, factor=block.number("factor", default=0.0))
    if file_length not in (None, block.get(_LENGTH, default=file_length)):
        block.complaints.append(
            f"{_LENGTH}: {block.get(_LENGTH)} in the object, and {file_length} outside it"
        )
    length = block.size(_LENGTH, default=trained if file_length is None else file_length)
    if kind == "llama3":
        return _valid(
            block,
            RotaryScaling,
            factor=block.number("factor", default=0.0),
            low=block.number("low_freq_factor", default=0.0),
            high=block.number("high_freq_factor", default=0.0),
            length=length,
        )
    grown = trained / length if isinstance(trained, int) else 0.0
    magnitude = block.get("attention_factor")
    if magnitude is not None:
        magnitude = block.number("attention_factor", default=1.0)
    if kind == "longrope":
        return _long(block, grown, length, magnitude)
    return _yarn(block, length, magnitude)


def _yarn(block: ConfigFile, length: int, magnitude: float | None) -> Scaling | None:
    factor = block.number("factor", default=0.0)
    one, every = block.get("mscale"), block.get("mscale_all_dim")
    if magnitude is None and one and every:
        # DeepSeek's two numbers, as transformers reads them
        sizes = [
            0.1 * block.number(key, default=1.0) * math.log(factor) + 1 if factor > 1 else 1.0
            for key in ("mscale", "mscale_all_dim")
        ]
        magnitude = sizes[0] / sizes[1]
    return _valid(
        block,
        YarnScaling,
        factor=factor,
        length=length,
        fast=block.number("beta_fast", default=32.0),
        slow=block.number("beta_slow", default=1.0),
        magnitude=magnitude,
        truncate=block.flag("truncate", default=True),
    )


def _long(block: ConfigFile, grown: float, length: int, magnitude: float | None) -> Scaling | None:
    factor = block.number("factor", default=grown)
    lists = []
    for key in ("short_factor", "long_factor"):
        value = block.get(key)
        numbers = isinstance(value, list) and all(
            isinstance(x, int | float) and not isinstance(x, bool) for x in value
        )
        if not numbers:
            block.complaints.append(f"{key}: expected a list of numbers, got {value!r}")
            return None
        lists.append(tuple(map(float, value)))
    if magnitude is None:
        wide = factor > 1 and length > 1
        magnitude = math.sqrt(1 + math.log(factor) / math.log(length)) if wide else 1.0
    return _valid(
        block, LongRotary, short=lists[0], long=lists[1], length=length, magnitude=magnitude
    )


def _valid(block: ConfigFile, kind: Any, **fields: Any) -> Scaling | None:
    """The scaling with these fields; None, and a noted fault, if it refuses them."""
    if block.complaints:
        return None
    try:
        return kind(**fields)
    except AxisError as error:
        block.complaints.append(str(error))
        return None


def write_rotary(
    theta: float, scaling: Scaling | None, part: float | None = None
) -> dict[str, Any]:
    """The keys of rotary positions, once for old and once for new readers of config.json."""
    scaled = None if scaling is None else write_scaling(scaling)
    share = {} if part is None else {"partial_rotary_factor": part}
    parameters = {"rope_type": "default", "rope_theta": theta} | share | (scaled or {})
    return {
        "rope_theta": theta,
        **share,
        "rope_scaling": scaled,
        "rope_parameters": parameters,
    }


def write_scaling(scaling: Scaling) -> dict[str, Any]:
    """The keys of a scaling in the object of rotary positions."""
    if isinstance(scaling, LongRotary):
        return {
            "rope_type": "longrope",
            "short_factor": list(scaling.short),
            "long_factor": list(scaling.long),
            "attention_factor": scaling.magnitude,
            _LENGTH: scaling.length,
        }
    if isinstance(scaling, YarnScaling):
        block = {
            "rope_type": "yarn",
            "factor": scaling.factor,
            "beta_fast": scaling.fast,
            "beta_slow": scaling.slow,
            _LENGTH: scaling.length,
        }
        if scaling.magnitude is not None:
            block["attention_factor"] = scaling.magnitude
        return block if scaling.truncate else block | {"truncate": False}
    if scaling.length is None:
        return {"rope_type": "linear", "factor": scaling.factor}
    return {
        "rope_type": "llama3",
        "factor": scaling.factor,
        "low_freq_factor": scaling.low,
        "high_freq_factor": scaling.high,
        _LENGTH: scaling.length,
    }
