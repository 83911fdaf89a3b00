"""Llama: transformers rotates the two halves of a head, growjax pairs of neighbouring coordinates."""

from typing import Any

from growjax.axes import sizes
from growjax.hf.family import ConfigFile, Family, activation_name, epsilon, is_tied
from growjax.hf.rotary import read_rotary, write_rotary
from growjax.hf.table import Row, linear, norm
from growjax.models import Llama, LlamaConfig


_BLOCK = "blocks.block"


def _rows(config: LlamaConfig) -> tuple[Row, ...]:
    def per_layer(name: str, leaf: str, into: str, out: str) -> list[Row]:
        return linear(f"layers.{{}}.{name}", f"{_BLOCK}.{leaf}", into, out)

    words = Row("embed_tokens.weight", "embedding.table: vocab embed", others=("lm_head.weight",))
    # [0] takes the weight without the bias, which norms and the MLP do not have in Llama
    return (
        words if config.tied else Row("embed_tokens.weight", words.holds),
        norm("layers.{}.input_layernorm", f"{_BLOCK}.attention_norm")[0],
        *per_layer("self_attn.q_proj", "attention.q", "embed", "(kv_heads group two pairs)"),
        *per_layer("self_attn.k_proj", "attention.k", "embed", "(kv_heads two pairs)"),
        *per_layer("self_attn.v_proj", "attention.v", "embed", "(kv_heads head_dim)"),
        *per_layer("self_attn.o_proj", "attention.o", "(kv_heads group head_dim)", "embed"),
        norm("layers.{}.post_attention_layernorm", f"{_BLOCK}.mlp_norm")[0],
        per_layer("mlp.gate_proj", "mlp.glu", "embed", "mlp")[0],
        per_layer("mlp.up_proj", "mlp.up", "embed", "mlp")[0],
        per_layer("mlp.down_proj", "mlp.down", "mlp", "embed")[0],
        norm("norm", "norm")[0],
        Row("lm_head.weight", "head: vocab embed"),
    )


def _read(file: ConfigFile, same: Any) -> LlamaConfig:
    embed, heads = file.size("hidden_size"), file.size("num_attention_heads")
    kv_heads = file.size("num_key_value_heads", default=heads)
    file.share("num_key_value_heads", heads, kv_heads)
    if file.get("head_dim") is not None:
        head_dim = file.size("head_dim")
    else:
        head_dim = file.share("hidden_size", embed, heads)
    if head_dim % 2:
        file.complaints.append(
            f"head_dim: expected an even number, since rotary positions turn pairs, got {head_dim}"
        )
    # LlamaConfig would refuse such sizes with a message that does not name the keys of the file
    file.check("llama")
    theta, scaling = read_rotary(file, positions=2048)
    return LlamaConfig(
        layers=file.layers("num_hidden_layers"),
        embed=embed,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        mlp=file.size("intermediate_size"),
        vocab=file.size("vocab_size"),
        theta=theta,
        scaling=scaling,
        eps=file.number("rms_norm_eps", default=1e-6),
        tied=is_tied(
            file, same, head="lm_head.weight", words=["embed_tokens.weight"], default=False
        ),
        bias=file.flag("attention_bias", default=False),
        activation=file.activation("hidden_act", "silu"),
    )


def _write(config: LlamaConfig) -> dict[str, Any]:
    c = config
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
        **write_rotary(c.theta, c.scaling),
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
    return [f"embed: transformers needs a multiple of heads={c.heads}, got {c.embed}"]


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
    defaults={
        "max_position_embeddings": 2048,
        **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id")),
    },
    aliases=("partial_rotary_factor", "original_max_position_embeddings"),
    fixed={"mlp_bias": False, "is_causal": True, "rope_interleaved": False},
    ignored=("layers.*.self_attn.rotary_emb.inv_freq", "rotary_emb.inv_freq"),
)
