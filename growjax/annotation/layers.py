"""The layers of `eqx.nn`: their static fields that repeat a size, and ready specs for each.

A pattern of `gj.annotate` may name a whole layer; its spec then gives its input and output axes:

    eqx.nn.Linear              "embed -> mlp"
    eqx.nn.Embedding           "[vocab] -> embed"
    eqx.nn.LayerNorm, RMSNorm  "~embed"
    eqx.nn.MultiheadAttention  "embed -> heads head_dim"     a fourth name: the width of the values
    eqx.nn.Conv                "in -> out"                   or "channels", depthwise
    eqx.nn.GRUCell, LSTMCell   "embed -> hidden"
    eqx.nn.MLP                 "embed -> hidden -> out"
    eqx.nn.BatchNorm           "channels"
"""

from collections.abc import Callable, Mapping
from typing import Any

import equinox as eqx

from growjax.annotation.packing import walk
from growjax.errors import AxisError
from growjax.specs import Spec


Specs = dict[str, Any]


def _shape(array: Any) -> tuple[int, ...]:
    return getattr(array, "shape", ())


# Sizes that layers keep beside their arrays --------------------------------------------------


def repeated(layer: Any) -> dict[str, Any]:
    """The static fields of a layer of `eqx.nn` that repeat a size, as its arrays have it now."""
    for kind, read in _REPEATED.items():
        if isinstance(layer, kind):
            return {
                name: value
                for name, value in read(layer).items()
                if not isinstance(getattr(layer, name), str)  # "scalar" is no size
            }
    return {}


def stale(tree: Any, given: Mapping[tuple, Any]) -> dict[tuple, Any]:
    """New values, by steps, of layers' static fields that are out of date; not of those in `given`."""
    values = {}
    for steps, _, node in walk(tree):
        for name, value in repeated(node).items():
            where = (*steps, name)
            if where not in given and getattr(node, name) != value:
                values[where] = value
    return values


def _linear(layer) -> dict[str, Any]:
    if len(_shape(layer.weight)) < 2:
        return {}
    return {"in_features": layer.weight.shape[-1], "out_features": layer.weight.shape[-2]}


def _embedding(layer) -> dict[str, Any]:
    if len(_shape(layer.weight)) < 2:
        return {}
    return {"num_embeddings": layer.weight.shape[-2], "embedding_size": layer.weight.shape[-1]}


def _norm(layer) -> dict[str, Any]:
    for array in (layer.weight, layer.bias):
        if _shape(array):
            return {"shape": _shape(array)[-len(layer.shape) :]}
    return {}


def _group_norm(layer) -> dict[str, Any]:
    return {"channels": _shape(layer.weight)[-1]} if _shape(layer.weight) else {}


def _batch_norm(layer) -> dict[str, Any]:
    return {"input_size": _shape(layer.weight)[-1]} if _shape(layer.weight) else {}


def is_depthwise(layer: Any) -> bool:
    """Whether a convolution keeps its channels apart."""
    return layer.groups == layer.in_channels == layer.out_channels and layer.groups > 1


def _conv(layer) -> dict[str, Any]:
    shape = _shape(layer.weight)
    if len(shape) < layer.num_spatial_dims + 2:
        return {}
    out, each = shape[-layer.num_spatial_dims - 2], shape[-layer.num_spatial_dims - 1]
    groups = out if is_depthwise(layer) else layer.groups
    return {"out_channels": out, "in_channels": each * groups, "groups": groups}


def _cell(layer) -> dict[str, Any]:
    if len(_shape(layer.weight_ih)) < 2:
        return {}
    return {"input_size": layer.weight_ih.shape[-1], "hidden_size": layer.weight_hh.shape[-1]}


def _mlp(layer) -> dict[str, Any]:
    first, last = repeated(layer.layers[0]), repeated(layer.layers[-1])
    sizes = {"in_size": first.get("in_features"), "out_size": last.get("out_features")}
    if layer.depth > 0:
        sizes["width_size"] = first.get("out_features")
    return {name: size for name, size in sizes.items() if size is not None}


def _attention(layer) -> dict[str, Any]:
    parts = {"query": layer.query_proj, "key": layer.key_proj, "value": layer.value_proj}
    sizes = {f"{name}_size": repeated(part).get("in_features") for name, part in parts.items()}
    sizes["output_size"] = repeated(layer.output_proj).get("out_features")
    for name, part in (("qk_size", "query"), ("vo_size", "value")):
        width = repeated(parts[part]).get("out_features")
        sizes[name] = None if width is None else width // layer.num_heads
    return {name: size for name, size in sizes.items() if size is not None}


_REPEATED: dict[type, Callable[[Any], dict[str, Any]]] = {
    eqx.nn.Linear: _linear,
    eqx.nn.Embedding: _embedding,
    eqx.nn.LayerNorm: _norm,
    eqx.nn.RMSNorm: _norm,
    eqx.nn.GroupNorm: _group_norm,
    eqx.nn.BatchNorm: _batch_norm,
    eqx.nn.Conv: _conv,
    eqx.nn.ConvTranspose: _conv,
    eqx.nn.GRUCell: _cell,
    eqx.nn.LSTMCell: _cell,
    eqx.nn.MLP: _mlp,
    eqx.nn.MultiheadAttention: _attention,
}


# Specs of whole layers -----------------------------------------------------------------------


def specs_of(layer: Any, text: str) -> tuple[Specs, Specs]:
    """The specs of a layer's arrays, and of its static fields, by their paths within the layer.

    Raises `AxisError` for a layer without ready specs, and for a text that does not fit it.

    **Example**

        specs_of(eqx.nn.Linear(8, 32, key=key), "embed -> mlp")[0]    # {"weight": "mlp <- embed", ...}
    """
    for kind, (write, example) in _SPECS.items():
        if isinstance(layer, kind):
            sides = text.split("->")
            for side in sides:
                Spec.parse(side)
            written = write(layer, [side.split() for side in sides])
            if written is None:
                raise AxisError(
                    f"{text!r} is no spec of a whole {kind.__name__}: expected one like {example!r}, or "
                    "one spec for each of its arrays"
                )
            return written
    known = ", ".join(kind.__name__ for kind in _SPECS)
    raise AxisError(
        f"{type(layer).__name__} is no array, and only these layers of eqx.nn have ready specs: {known}"
    )


def _one(names: list[str]) -> str:
    """One dimension of a spec, in brackets where several axes share it."""
    return names[0] if len(names) == 1 else f"({' '.join(names)})"


def _linear_specs(layer, sides):
    if len(sides) != 2 or not all(sides):
        return None
    into, out = map(_one, sides)
    return {"weight": f"{out} <- {into}", "bias": f"-> {out}"}, {}


def _embedding_specs(layer, sides):
    if len(sides) != 2 or not all(len(side) == 1 for side in sides):
        return None
    (rows,), (out,) = sides
    return {"weight": f"{rows} -> {out}"}, {}


def _norm_specs(layer, sides):
    names = [side for side in sides if side]
    if len(names) != 1 or len(names[0]) != 1 or not names[0][0].startswith("~"):
        return None
    (axis,) = names[0]
    before, after = ("-> " if not sides[0] else ""), (" ->" if not sides[-1] else "")
    bare = axis.removeprefix("~")
    statics = {} if layer.use_weight or layer.use_bias else {"shape": (bare,)}
    return {"weight": before + axis + after, "bias": before + bare + after}, statics


def _attention_specs(layer, sides):
    if len(sides) not in (2, 3) or [len(sides[0]), len(sides[1])] not in ([1, 2], [1, 3]):
        return None
    (embed,), (heads, width, *values) = sides[:2]
    (out,) = sides[2] if len(sides) == 3 else [embed]
    value = values[0] if values else width
    specs = {
        "query_proj.weight": f"({heads} {width}) <- {embed}",
        "query_proj.bias": f"-> ({heads} {width})",
        "key_proj.weight": f"({heads} <- {width}) {embed}",
        "key_proj.bias": f"({heads} <- {width})",
        "value_proj.weight": f"({heads} {value}) <- {embed}",
        "value_proj.bias": f"-> ({heads} {value})",
        "output_proj.weight": f"{out} <- ({heads} {value})",
        "output_proj.bias": f"-> {out}",
    }
    return specs, {"num_heads": heads}


def _conv_specs(layer, sides):
    kernel = " ".join(map(str, layer.kernel_size))
    ones = " ".join("1" for _ in layer.kernel_size)
    if len(sides) == 1 and len(sides[0]) == 1 and is_depthwise(layer):
        (channels,) = sides[0]
        return {"weight": f"{channels} 1 {kernel}", "bias": f"-> {channels} {ones}"}, {}
    if len(sides) != 2 or not all(len(side) == 1 for side in sides) or layer.groups != 1:
        return None
    (into,), (out,) = sides
    return {"weight": f"{out} <- {into} {kernel}", "bias": f"-> {out} {ones}"}, {}


def _cell_specs(layer, sides):
    if len(sides) != 2 or not all(len(side) == 1 for side in sides):
        return None
    (into,), (hidden,) = sides
    gates = 3 if isinstance(layer, eqx.nn.GRUCell) else 4
    specs = {
        "weight_ih": f"({gates} {hidden}) <- {into}",
        "weight_hh": f"({gates} {hidden}) <- {hidden}",
        "bias": f"-> ({gates} {hidden})",
        "bias_n": f"-> {hidden}",
    }
    return specs, {}


def _mlp_specs(layer, sides):
    hidden = [[side] for (side,) in sides[1:-1]] if all(len(side) == 1 for side in sides) else []
    if len(hidden) != min(layer.depth, 1) or len(sides) < 2:
        return None
    names = [sides[0], *(hidden * layer.depth), sides[-1]]
    specs: Specs = {}
    for i, linear in enumerate(layer.layers):
        written, _ = _linear_specs(linear, [names[i], names[i + 1]]) or ({}, {})
        specs |= {f"layers.{i}.{name}": spec for name, spec in written.items()}
    return specs, {}


def _batch_norm_specs(layer, sides):
    if len(sides) != 1 or len(sides[0]) != 1:
        return None
    (channels,) = sides[0]
    state = {
        "batch_counter.init": "",
        "batch_state_index.init.*": channels,
        "ema_first_time_index.init": "",
        "ema_state_index.init.*": channels,
    }
    return {"weight": channels, "bias": channels} | state, {"input_size": channels}


_SPECS: dict[type, tuple[Callable, str]] = {
    eqx.nn.Linear: (_linear_specs, "embed -> mlp"),
    eqx.nn.Embedding: (_embedding_specs, "[vocab] -> embed"),
    eqx.nn.LayerNorm: (_norm_specs, "~embed"),
    eqx.nn.RMSNorm: (_norm_specs, "~embed"),
    eqx.nn.MultiheadAttention: (_attention_specs, "embed -> heads head_dim"),
    eqx.nn.Conv: (_conv_specs, "in -> out"),
    eqx.nn.GRUCell: (_cell_specs, "embed -> hidden"),
    eqx.nn.LSTMCell: (_cell_specs, "embed -> hidden"),
    eqx.nn.MLP: (_mlp_specs, "embed -> hidden -> out"),
    eqx.nn.BatchNorm: (_batch_norm_specs, "channels"),
}
