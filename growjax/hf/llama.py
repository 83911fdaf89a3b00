"""Llama: halves of heads turned against each other there, neighbouring coordinates here."""

from typing import Any

from growjax.axes import sizes
from growjax.errors import AxisError
from growjax.hf.family import Family, Said, activation_name, epsilon, is_tied
from growjax.hf.table import Row, linear, norm
from growjax.models import Llama, LlamaConfig
from growjax.nn import RotaryScaling


_BLOCK = "blocks.block"


def _rows(config: LlamaConfig) -> tuple[Row, ...]:
    def product(name: str, leaf: str, into: str, out: str) -> list[Row]:
        return linear(f"layers.{{}}.{name}", f"{_BLOCK}.{leaf}", into, out)

    words = Row("embed_tokens.weight", "embedding.table: vocab embed", others=("lm_head.weight",))
    return (
        words if config.tied else Row("embed_tokens.weight", words.holds),
        norm("layers.{}.input_layernorm", f"{_BLOCK}.attention_norm")[0],
        *product("self_attn.q_proj", "attention.q", "embed", "(kv_heads group two pairs)"),
        *product("self_attn.k_proj", "attention.k", "embed", "(kv_heads two pairs)"),
        *product("self_attn.v_proj", "attention.v", "embed", "(kv_heads head_dim)"),
        *product("self_attn.o_proj", "attention.o", "(kv_heads group head_dim)", "embed"),
        norm("layers.{}.post_attention_layernorm", f"{_BLOCK}.mlp_norm")[0],
        product("mlp.gate_proj", "mlp.glu", "embed", "mlp")[0],
        product("mlp.up_proj", "mlp.up", "embed", "mlp")[0],
        product("mlp.down_proj", "mlp.down", "mlp", "embed")[0],
        norm("norm", "norm")[0],
        Row("lm_head.weight", "head: vocab embed"),
    )


def _read(said: Said, same: Any) -> LlamaConfig:
    embed, heads = said.size("hidden_size"), said.size("num_attention_heads")
    kv_heads = said.size("num_key_value_heads", default=heads)
    said.share("num_key_value_heads", heads, kv_heads)
    given = said.get("head_dim") is not None
    head_dim = said.size("head_dim") if given else said.share("hidden_size", embed, heads)
    if head_dim % 2:
        said.complaints.append(f"head_dim: rotary positions turn pairs, got {head_dim}")
    if said.complaints:  # the config would refuse these in its own words
        said.check("llama")
    theta, scaling = _rotary(said)
    return LlamaConfig(
        layers=said.layers("num_hidden_layers"),
        embed=embed,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        mlp=said.size("intermediate_size"),
        vocab=said.size("vocab_size"),
        theta=theta,
        scaling=scaling,
        eps=said.number("rms_norm_eps", default=1e-6),
        tied=is_tied(
            said, same, head="lm_head.weight", words=["embed_tokens.weight"], default=False
        ),
        bias=said.flag("attention_bias", default=False),
        activation=said.activation("hidden_act", "silu"),
    )


def _rotary(said: Said) -> tuple[float, RotaryScaling | None]:
    """Theta and the scaling, from `rope_parameters` or, as it was until transformers 5, apart."""
    found = said.get("rope_parameters", "rope_scaling", default={})
    if not isinstance(found, dict):
        said.complaints.append(f"rope_parameters: expected an object, got {found!r}")
        return 1.0, None
    rope = Said({**found, "rope_theta": found.get("rope_theta", said.get("rope_theta"))}, ())
    theta = rope.number("rope_theta", default=10000.0)
    kind = rope.get("rope_type", "type", default="default")
    rope.fixed({"partial_rotary_factor": 1.0})
    scaling: dict[str, Any] = {}
    if kind in ("linear", "llama3"):
        scaling["factor"] = rope.number("factor", default=0.0)
    if kind == "llama3":
        scaling["low"] = rope.number("low_freq_factor", default=0.0)
        scaling["high"] = rope.number("high_freq_factor", default=0.0)
        scaling["length"] = rope.size("original_max_position_embeddings")
    elif kind not in ("linear", "default"):
        rope.complaints.append(f"rope_type: expected default, linear or llama3, got {kind!r}")
    if scaling and not rope.complaints:
        try:
            return theta, RotaryScaling(**scaling)
        except AxisError as error:
            rope.complaints.append(str(error))
    said.complaints.extend(f"rope_parameters.{fault}" for fault in rope.complaints)
    return theta, None


def _write(config: LlamaConfig) -> dict[str, Any]:
    c, scaling = config, None
    if c.scaling is not None:
        scaling = {"rope_type": "linear", "factor": c.scaling.factor}
        if c.scaling.length is not None:
            scaling |= {
                "rope_type": "llama3",
                "low_freq_factor": c.scaling.low,
                "high_freq_factor": c.scaling.high,
                "original_max_position_embeddings": c.scaling.length,
            }
    return {
        "num_hidden_layers": c.layers,
        "hidden_size": c.embed,
        "num_attention_heads": c.heads,
        "num_key_value_heads": c.kv_heads,
        "head_dim": c.head_dim,
        "intermediate_size": c.mlp,
        "vocab_size": c.vocab,
        "hidden_act": activation_name(c.activation),
        "rms_norm_eps": c.eps,
        "attention_bias": c.bias,
        "mlp_bias": False,
        "rope_theta": c.theta,
        "rope_scaling": scaling,
        "rope_parameters": {"rope_type": "default", "rope_theta": c.theta} | (scaling or {}),
        "tie_word_embeddings": c.tied,
    }


def _config_of(model: Llama) -> LlamaConfig:
    n, attention = sizes(model), model.blocks.block.attention
    return LlamaConfig(
        layers=n["layers"],
        embed=n["embed"],
        heads=n["kv_heads"] * n["group"],
        kv_heads=n["kv_heads"],
        head_dim=n["head_dim"],
        mlp=n["mlp"],
        vocab=n["vocab"],
        theta=model.rotary.theta,
        scaling=model.rotary.scaling,
        eps=epsilon(model.norm.eps),
        tied=model.head is None,
        bias=attention.q_bias is not None,
        qk_norm=attention.q_norm is not None,
        activation=model.blocks.block.mlp.activation,
        dtype=model.dtype,
        remat=model.blocks.remat,
    )


def _limits(config: LlamaConfig) -> list[str]:
    c = config
    if c.embed % c.heads == 0:
        return []
    return [f"embed: transformers wants a multiple of heads={c.heads}, and it is {c.embed}"]


LLAMA = Family(
    model_type="llama",
    model=Llama,
    architecture=lambda config: "LlamaForCausalLM",
    prefix="model.",
    heads=("lm_head.",),
    rows=_rows,
    read=_read,
    write=_write,
    config_of=_config_of,
    limits=_limits,
    only={"qk_norm": False},
    fixed={"mlp_bias": False},
    ignored=("layers.*.self_attn.rotary_emb.inv_freq", "rotary_emb.inv_freq"),
)
