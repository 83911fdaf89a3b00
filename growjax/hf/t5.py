"""T5, T5 v1.1, UL2, mT5 and encoders: a head that may be tied and may be scaled, by several keys."""

import dataclasses
from typing import Any

import jax.numpy as jnp

from growjax.axes import put, sizes
from growjax.hf.family import ConfigFile, Family, activation_name, config_sizes, epsilon, is_tied
from growjax.hf.table import Row, linear, norm
from growjax.models import T5, T5Config, T5Encoder, T5EncoderConfig


_HEADS = "(kv_heads group head_dim)"
_WORDS = ("shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight")


def _rows(config: T5Config | T5EncoderConfig) -> tuple[Row, ...]:
    # A gated feed-forward has two inputs, wi_0 (the gate) and wi_1; a plain one has wi
    up = "wi_1" if config.glu else "wi"
    if isinstance(config, T5EncoderConfig):
        words = Row(_WORDS[0], "embedding.table: vocab embed", others=_WORDS[1:2])
        return (words, *_stack("encoder", up, 1))
    # Old files repeat the embedding under the names of both stacks and, if tied, of the head
    aliases = (*_WORDS[1:], "lm_head.weight") if config.tied else _WORDS[1:]
    return (
        Row(_WORDS[0], "embedding.table: vocab embed", others=aliases),
        *_stack("encoder", up, 1),
        *_stack("decoder", up, 2),
        Row("lm_head.weight", "head: vocab embed"),
    )


def _stack(stack: str, up: str, mlp: int) -> list[Row]:
    """The rows of the encoder or the decoder; `mlp` is the index of the feed-forward sub-layer.

    [0] takes a weight without its bias: T5 has none.
    """
    # The first layer has the relative bias, which all layers of its stack use
    first = f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    rows = [Row(first, f"{stack}_bias.table: buckets (kv_heads group)")]
    # Class names in the file, and fields of growjax's block; an encoder has the first alone
    attentions = [("SelfAttention", "attention"), ("EncDecAttention", "cross")][:mlp]
    for i, (file_name, field) in enumerate(attentions):
        layer, leaf = f"{stack}.block.{{}}.layer.{i}", f"{stack}.block.{field}"
        rows.append(norm(f"{layer}.layer_norm", f"{leaf}_norm")[0])
        for name in ("q", "k", "v"):
            rows.append(linear(f"{layer}.{file_name}.{name}", f"{leaf}.{name}", "embed", _HEADS)[0])
        rows.append(linear(f"{layer}.{file_name}.o", f"{leaf}.o", _HEADS, "embed")[0])
    layer, leaf = f"{stack}.block.{{}}.layer.{mlp}", f"{stack}.block.mlp"
    return [
        *rows,
        norm(f"{layer}.layer_norm", f"{leaf}_norm")[0],
        linear(f"{layer}.DenseReluDense.wi_0", f"{leaf}.glu", "embed", "mlp")[0],
        linear(f"{layer}.DenseReluDense.{up}", f"{leaf}.up", "embed", "mlp")[0],
        linear(f"{layer}.DenseReluDense.wo", f"{leaf}.down", "mlp", "embed")[0],
        norm(f"{stack}.final_layer_norm", f"{stack}_norm")[0],
    ]


@dataclasses.dataclass(frozen=True)
class Flavour:
    """A member of the family: how the names of its classes begin, and what it does if no key says so.

    `scales` says whether its head may be scaled: that of mT5 is not, whatever is tied.
    """

    stem: str = "T5"
    feed_forward: str = "relu"
    scales: bool = True


def _read(flavour: Flavour, file: ConfigFile, same: Any) -> T5Config | T5EncoderConfig:
    activation, glu = _feed_forward(file, flavour.feed_forward)
    layers = file.layers("num_layers", "num_hidden_layers")
    file.get("n_positions")  # in the first files, which have no positions either
    buckets = file.size("relative_attention_num_buckets", default=32)
    max_distance = file.size("relative_attention_max_distance", default=128)
    if buckets % 4 or max_distance <= buckets // 2:
        file.complaints.append(
            "relative_attention_num_buckets: expected a multiple of 4, and a max_distance of more than "
            f"its half, got {buckets} and {max_distance}"
        )
        file.check("t5")
    common: dict[str, Any] = dict(
        encoder_layers=layers,
        embed=file.size("d_model", "hidden_size"),
        heads=file.size("num_heads", "num_attention_heads"),
        head_dim=file.size("d_kv", "head_dim", default=64),
        mlp=file.size("d_ff"),
        vocab=file.size("vocab_size"),
        buckets=buckets,
        max_distance=max_distance,
        activation=activation,
        glu=glu,
        eps=file.number("layer_norm_epsilon", default=1e-6),
    )
    if _is_encoder(file):
        # Keys about the decoder may be there, and mean nothing
        file.read |= {"is_encoder_decoder", "num_decoder_layers"}
        file.read |= {"tie_word_embeddings", "scale_decoder_outputs"}
        return T5EncoderConfig(**common)
    file.fixed({"is_encoder_decoder": True})
    tied = is_tied(file, same, head="lm_head.weight", words=_WORDS, default=True, by_content=True)
    # Until transformers 5 one flag meant both "tied" and "scaled"; since then it is always true, and
    # scale_decoder_outputs is written too
    scaled = file.flag("tie_word_embeddings", default=True) and flavour.scales
    if flavour.scales:
        scaled = file.flag("scale_decoder_outputs", default=scaled)
    decoder_layers = file.layers("num_decoder_layers", default=layers)
    return T5Config(**common, decoder_layers=decoder_layers, tied=tied, scale_output=scaled)


def _is_encoder(file: ConfigFile) -> bool:
    """Whether it is an encoder alone: it has no tensor of a decoder, and does not name a pair."""
    architectures = str(file.get("architectures", default=""))
    alone = "EncoderModel" in architectures or file.get("is_encoder_decoder") is False
    return alone and not any(name.startswith("decoder.") for name in file.names)


def _feed_forward(file: ConfigFile, default: str) -> tuple[str, bool]:
    """The activation and whether it is gated.

    `feed_forward_proj` has both: `gated-gelu` means the tanh form, `gelu` the exact one. The file also
    has the values derived from it, `dense_act_fn` and `is_gated_act`, which transformers prefers.
    """
    value = file.get("feed_forward_proj", default=default)
    gated, _, name = value.rpartition("-") if isinstance(value, str) else ("?", "", "")
    if gated not in ("", "gated"):
        file.complaints.append(
            f"feed_forward_proj: expected an activation, or gated- and one, got {value!r}"
        )
        return "relu", False
    name = "gelu_new" if value == "gated-gelu" else name
    activation = file.activation("dense_act_fn", name)
    return activation, file.flag("is_gated_act", default=bool(gated))


def _write(flavour: Flavour, config: T5Config | T5EncoderConfig) -> dict[str, Any]:
    c = config
    name = "gelu" if c.glu and c.activation == "gelu_tanh" else activation_name(c.activation)
    keys: dict[str, Any] = {
        "num_layers": c.encoder_layers,
        "d_model": c.embed,
        "num_heads": c.heads,
        "d_kv": c.head_dim,
        "d_ff": c.mlp,
        "vocab_size": c.vocab,
        "relative_attention_num_buckets": c.buckets,
        "relative_attention_max_distance": c.max_distance,
        "feed_forward_proj": f"gated-{name}" if c.glu else name,
        "dense_act_fn": activation_name(c.activation),
        "is_gated_act": c.glu,
        "layer_norm_epsilon": c.eps,
        "is_encoder_decoder": isinstance(c, T5Config),
    }
    if isinstance(c, T5Config):
        keys |= {"num_decoder_layers": c.decoder_layers, "tie_word_embeddings": c.tied}
        if flavour.scales:
            # `_fold_head_scale` has made the two equal
            keys["scale_decoder_outputs"] = c.tied
    return keys


def _config_of(model: T5 | T5Encoder) -> T5Config | T5EncoderConfig:
    n, block = sizes(model), model.encoder.block
    common: dict[str, Any] = dict(
        encoder_layers=n["encoder_layers"],
        **config_sizes(model),
        buckets=n["buckets"],
        max_distance=model.encoder_bias.max_distance,
        activation=block.mlp.activation,
        glu=block.mlp.glu is not None,
        eps=epsilon(model.encoder_norm.eps),
        dtype=model.dtype,
        remat=model.encoder.remat,
    )
    if isinstance(model, T5Encoder):
        return T5EncoderConfig(**common)
    return T5Config(
        **common,
        decoder_layers=n["decoder_layers"],
        tied=model.head is None,
        scale_output=model.output_scale is not None,
    )


def _fold_head_scale(flavour: Flavour, model: T5 | T5Encoder) -> T5 | T5Encoder:
    """The model with the scale of its head on which all readers agree.

    That is `embed ** -0.5` for a tied head, and none for a separate one, or for any of mT5. The last
    norm's weights take up the ratio to the model's own scale.
    """
    if isinstance(model, T5Encoder):
        return model
    dtype = model.embedding.table.dtype
    tied, scale = model.head is None and flavour.scales, model.output_scale
    target = jnp.asarray(sizes(model)["embed"] ** -0.5 if tied else 1.0, dtype)
    own = jnp.ones((), dtype) if scale is None else scale.astype(dtype)
    weight = model.decoder_norm.weight
    assert weight is not None
    folded = weight if bool(own == target) else weight * (own / target)
    return put(
        model, {("decoder_norm", "weight"): folded, ("output_scale",): target if tied else None}
    )


def _limits(config: T5Config | T5EncoderConfig) -> list[str]:
    if config.glu and config.activation == "gelu":
        return ["activation: a gated GELU is the tanh form in T5, and the model has the exact one"]
    return []


def _architecture(flavour: Flavour, config: T5Config | T5EncoderConfig) -> str:
    pair = isinstance(config, T5Config)
    return flavour.stem + ("ForConditionalGeneration" if pair else "EncoderModel")


def _family(model_type: str, flavour: Flavour, members: str) -> Family:
    return Family(
        model_type=model_type,
        members=members,
        growth="embed, heads, head_dim, mlp, encoder_layers, decoder_layers",
        model=T5,
        accepts=(T5, T5Encoder),
        architecture=lambda config: _architecture(flavour, config),
        rows=_rows,
        read=lambda file, same: _read(flavour, file, same),
        write=lambda config: _write(flavour, config),
        config_of=_config_of,
        limits=_limits,
        # The ids of T5's own tokenizer
        defaults={"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0},
        ignored=("decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight",),
        aliases=("hidden_size", "num_hidden_layers", "num_attention_heads", "head_dim"),
        fixed={"is_decoder": False, "is_causal": True},
        scale=lambda attention: 1.0,
        fold_scales=lambda model: _fold_head_scale(flavour, model),
    )


T5_ = _family("t5", Flavour(), "T5, T5 v1.1, Flan-T5, UL2, ByT5, and their encoders")
MT5 = _family("mt5", Flavour("MT5", "gated-gelu", scales=False), "mT5 and its encoder")
PAIRS = (T5_, MT5)
