"""Rotary positions in config.json: one object since transformers 5, several keys before."""

from typing import Any

from growjax.errors import AxisError
from growjax.hf.family import ConfigFile
from growjax.nn import RotaryScaling


_LENGTH = "original_max_position_embeddings"


def read_rotary(
    file: ConfigFile, *, theta: float = 10000.0, positions: int | None = None
) -> tuple[float, RotaryScaling | None]:
    """Theta and the scaling of a config.json.

    `theta` and `positions` are the family's defaults for `rope_theta` and `max_position_embeddings`. As
    in transformers, a `rope_scaling` that is not empty replaces `rope_parameters`; theta comes from that
    object, or else from the key `rope_theta` of the file. Two objects with different thetas are a fault.
    """
    blocks = {key: file.get(key, default={}) for key in ("rope_scaling", "rope_parameters")}
    for key, block in blocks.items():
        if not isinstance(block, dict):
            file.complaints.append(f"{key}: expected an object, got {block!r}")
            return theta, None
    key = "rope_scaling" if blocks["rope_scaling"] else "rope_parameters"
    # Old files have these two keys outside the object, which wins
    outside = {}
    for name in ("rope_theta", "partial_rotary_factor"):
        value = file.get(name)
        if value is not None:
            outside[name] = value
    block = ConfigFile(outside | blocks[key], ())
    base = block.number("rope_theta", default=theta)
    other = blocks["rope_parameters"].get("rope_theta")
    if other not in (None, base) and base > 0:
        block.complaints.append(
            f"rope_theta: {base:g} for rope_scaling, and {other} in rope_parameters; "
            "transformers takes the first; keep one of them"
        )
    scaling = _scaling(block, file, positions)
    block.fixed({"partial_rotary_factor": 1.0, "attention_factor": None, "mscale": None})
    block.unread()
    file.complaints.extend(f"{key}.{fault}" for fault in block.complaints)
    return base, None if block.complaints else scaling


def _scaling(block: ConfigFile, file: ConfigFile, positions: int | None) -> RotaryScaling | None:
    """The scaling in the object `block` of a config.json, or None; faults are noted in `block`."""
    kind = block.get("rope_type", "type", default="default")
    length = file.get("max_position_embeddings", default=positions)
    file_length = file.get(_LENGTH)
    if kind == "default":
        return None
    if kind not in ("linear", "llama3"):
        block.complaints.append(f"rope_type: expected default, linear or llama3, got {kind!r}")
        return None
    factor = block.number("factor", default=0.0)
    if kind == "linear":
        return _valid(block, factor=factor)
    if file_length not in (None, block.get(_LENGTH)):
        block.complaints.append(
            f"{_LENGTH}: {block.get(_LENGTH)} in the object, and {file_length} outside it"
        )
    return _valid(
        block,
        factor=factor,
        low=block.number("low_freq_factor", default=0.0),
        high=block.number("high_freq_factor", default=0.0),
        length=block.size(_LENGTH, default=length),
    )


def _valid(block: ConfigFile, **fields: Any) -> RotaryScaling | None:
    """The scaling with these fields; None, and a noted fault, if it refuses them."""
    if block.complaints:
        return None
    try:
        return RotaryScaling(**fields)
    except AxisError as error:
        block.complaints.append(str(error))
        return None


def write_rotary(theta: float, scaling: RotaryScaling | None) -> dict[str, Any]:
    """The keys of rotary positions, once for old and once for new readers of config.json."""
    block = None
    if scaling is not None:
        block = {"rope_type": "linear", "factor": scaling.factor}
        if scaling.length is not None:
            block |= {
                "rope_type": "llama3",
                "low_freq_factor": scaling.low,
                "high_freq_factor": scaling.high,
                _LENGTH: scaling.length,
            }
    return {
        "rope_theta": theta,
        "rope_scaling": block,
        "rope_parameters": {"rope_type": "default", "rope_theta": theta} | (block or {}),
    }
