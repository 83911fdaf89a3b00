"""ModernBERT: layers by type with two rotary bases, fused weights, and a first layer without its norm."""

import dataclasses
from typing import Any

from growjax.axes import sizes
from growjax.hf.decoder import pattern_of
from growjax.hf.family import ConfigFile, Family, activation_name, config_sizes, epsilon, is_tied
from growjax.hf.gpt2 import head_dim_limits
from growjax.hf.heads import labelled
from growjax.hf.sights import FULL, TwoRotations
from growjax.hf.table import Row, linear, norm
from growjax.models import ModernBERT, ModernBERTConfig


_HEADS = "(kv_heads group head_dim)"
_WORDS, _DECODER = "embeddings.tok_embeddings.weight", "decoder.weight"
_EVERY = "global_attn_every_n_layers"


def _all_but_every_third(file: ConfigFile, layer: int) -> bool:
    return layer % file.size(_EVERY, default=3) != 0


@dataclasses.dataclass(frozen=True)
class _BothSides(TwoRotations):
    """Windows that reach half of `local_attention` to both sides."""

    def windows(self, file: ConfigFile, layers: int) -> list[int | None]:
        """The window of every layer, with the token itself and those on one side."""
        window = file.size("local_attention", default=128) // 2 + 1
        slides = self.sliding(file, max(layers, 1), window)
        return [window if sliding else None for sliding in slides]

    def written_windows(self, config: Any) -> dict[str, Any]:
        """The keys of windows, in the old spelling as well where it can say them."""
        keys = super().written_windows(config)
        if "sliding_window" in keys:
            keys["local_attention"] = 2 * (keys.pop("sliding_window") - 1)
        full = [kind == FULL for kind in keys["layer_types"]]
        for every in range(1, len(full) + 1):
            if full == [i % every == 0 for i in range(len(full))]:
                return keys | {_EVERY: every}
        return keys


_SIGHTS = _BothSides(
    theta=160000.0,
    positions=8192,
    types=_all_but_every_third,
    bases=("global_rope_theta", "local_rope_theta"),
    everywhere=True,
)


def _rows(config: ModernBERTConfig) -> tuple[Row, ...]:
    # All heads and biases; `load` and `save` drop the rows of those that a model lacks
    tied = (_DECODER,) if config.tied else ()
    return (
        Row(_WORDS, "embedding.table: vocab embed", others=tied),
        *norm("embeddings.norm", "embedding_norm"),
        *_layer("layers.0", "first"),
        *_layer("layers.{}", "blocks.block"),
        *norm("final_norm", "norm"),
        *linear("head.dense", "transform.weight", "embed", "embed2"),
        *norm("head.norm", "transform.norm"),
        Row(_DECODER, "decoder: vocab embed"),
        Row("decoder.bias", "decoder_bias: vocab"),
        *linear("classifier", "classifier", "embed", "labels"),
    )


def _layer(name: str, leaf: str) -> list[Row]:
    """The rows of the first layer, or of those behind it, which are counted from 1 there."""
    rows = [
        *norm(f"{name}.attn_norm", f"{leaf}.attention_norm"),
        *linear(f"{name}.attn.Wqkv", f"{leaf}.attention.q|k|v", "embed", "(kv_heads group turned)"),
        *linear(f"{name}.attn.Wo", f"{leaf}.attention.o", _HEADS, "embed"),
        *norm(f"{name}.mlp_norm", f"{leaf}.mlp_norm"),
        *linear(f"{name}.mlp.Wi", f"{leaf}.mlp.glu|up", "embed", "mlp"),
        *linear(f"{name}.mlp.Wo", f"{leaf}.mlp.down", "mlp", "embed"),
    ]
    # A fused weight is [out, in], and its parts are joined along the first dimension
    return [dataclasses.replace(row, joined=0, start=1) for row in rows]


def _read(file: ConfigFile, same: Any) -> ModernBERTConfig:
    embed, heads = file.size("hidden_size"), file.size("num_attention_heads")
    head_dim = file.share("hidden_size", embed, heads)
    if head_dim % 2:
        file.complaints.append(
            f"hidden_size: rotary positions turn pairs, and {heads} heads have {head_dim} coordinates"
        )
    layers = file.layers("num_hidden_layers")
    pattern, _ = _SIGHTS.read(file, layers, head_dim)
    labels = file.labels() if "classifier.weight" in file.names else 0
    pooling = file.get("classifier_pooling", default="cls")
    if pooling not in ("cls", "mean"):
        file.complaints.append(f"classifier_pooling: expected cls or mean, got {pooling!r}")
    file.get("layer_norm_eps")  # written by the first versions beside norm_eps, and read by none
    config: dict[str, Any] = dict(
        layers=layers,
        embed=embed,
        heads=heads,
        head_dim=head_dim,
        mlp=file.size("intermediate_size"),
        vocab=file.size("vocab_size"),
        pattern=pattern,
        norm_bias=file.flag("norm_bias", default=False),
        bias=file.flag("attention_bias", default=False),
        activation=file.activation("hidden_activation", "gelu"),
        head_activation=file.activation("classifier_activation", "gelu"),
        head_bias=file.flag("classifier_bias", default=False),
        decoder_bias=file.flag("decoder_bias", default=True),
        eps=file.number("norm_eps", default=1e-5),
        tied=is_tied(file, same, head=_DECODER, words=[_WORDS], default=True),
        mlm_head="head.dense.weight" in file.names and not labels,
        labels=labels,
        labelled=labelled(file, "sequence") if labels else "sequence",
        pooling=pooling,
    )
    # The configuration would refuse such values with a message that does not name the keys of the file
    file.check("modernbert")
    return ModernBERTConfig(**config)


def _write(config: ModernBERTConfig) -> dict[str, Any]:
    c: Any = config  # it says what layers see as a DecoderConfig does
    return {
        **({"num_labels": c.labels} if c.labels else {}),
        "num_hidden_layers": c.layers,
        "hidden_size": c.embed,
        "num_attention_heads": c.heads,
        "intermediate_size": c.mlp,
        "vocab_size": c.vocab,
        **_SIGHTS.write(c),
        "norm_bias": c.norm_bias,
        "attention_bias": c.bias,
        "mlp_bias": False,
        "hidden_activation": activation_name(c.activation),
        "classifier_activation": activation_name(c.head_activation),
        "classifier_bias": c.head_bias,
        "classifier_pooling": c.pooling,
        "decoder_bias": c.decoder_bias,
        "norm_eps": c.eps,
        "tie_word_embeddings": c.tied,
    }


def _config_of(model: ModernBERT) -> ModernBERTConfig:
    block, head = model.first, model.transform
    layers = sizes(model)["layers"] + 1
    attentions = [block.attention, model.blocks.block.attention]
    return ModernBERTConfig(
        layers=layers,
        **config_sizes(model),
        pattern=pattern_of((model.rotary, *model.others), attentions),
        norm_bias=model.norm.bias is not None,
        bias=block.attention.q_bias is not None,
        activation=block.mlp.activation,
        head_activation="gelu" if head is None else head.activation,
        head_bias=head is not None and head.bias is not None,
        decoder_bias=model.decoder_bias is not None or not model.mlm,
        eps=epsilon(model.norm.eps),
        tied=model.decoder is None,
        mlm_head=model.mlm,
        labels=sizes(model).get("labels", 0),
        labelled=model.labelled,
        pooling=model.pooling,
        dtype=model.dtype,
        attention=block.attention.body,
        remat=model.blocks.remat,
    )


def _architecture(config: ModernBERTConfig) -> str:
    if config.labels:
        return f"ModernBertFor{config.labelled.title()}Classification"
    return "ModernBertForMaskedLM" if config.mlm_head else "ModernBertModel"


def _limits(config: Any) -> list[str]:
    faults = head_dim_limits(config) + _SIGHTS.limits(config)
    if config.labels and config.mlm_head:
        faults.append("labels: a classifier has no other heads there")
    return faults


MODERNBERT = Family(
    model_type="modernbert",
    members="ModernBERT, and encoders made from it",
    model=ModernBERT,
    architecture=_architecture,
    base="ModernBertModel",
    prefix="model.",
    heads=("head.", "decoder.", "classifier."),
    rows=_rows,
    read=_read,
    write=_write,
    config_of=_config_of,
    limits=_limits,
    fixed={"mlp_bias": False, "position_embedding_type": "absolute"},
    aliases=(_EVERY, "rope_scaling"),
)
