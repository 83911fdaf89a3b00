"""GPT-2: weights are `[in, out]`, and queries, keys and values share one tensor."""

from typing import Any

from growjax.axes import sizes
from growjax.hf.family import ConfigFile, Family, activation_name, config_sizes, epsilon
from growjax.hf.heads import DecoderHeads, head_of
from growjax.hf.table import Row, linear, norm
from growjax.models import GPT, GPTConfig


_HEADS = "(kv_heads group head_dim)"
_BLOCK = "blocks.block"
_NAMES = DecoderHeads("GPT2", causal="GPT2LMHeadModel", words="wte", token="classifier", tied=True)


def _rows(config: GPTConfig) -> tuple[Row, ...]:
    # GPT-2's layers are Conv1D of transformers, whose weights are [in, out]
    def per_layer(name: str, leaf: str, into: str, out: str) -> list[Row]:
        return linear(f"h.{{}}.{name}", f"{_BLOCK}.{leaf}", into, out, transposed=True)

    return (
        *_NAMES.rows(config),
        Row("wpe.weight", "position.table: positions embed"),
        *norm("h.{}.ln_1", f"{_BLOCK}.attention_norm"),
        *per_layer("attn.c_attn", "attention.q|k|v", "embed", _HEADS),
        *per_layer("attn.c_proj", "attention.o", _HEADS, "embed"),
        *norm("h.{}.ln_2", f"{_BLOCK}.mlp_norm"),
        *per_layer("mlp.c_fc", "mlp.up", "embed", "mlp"),
        *per_layer("mlp.c_proj", "mlp.down", "mlp", "embed"),
        *norm("ln_f", "norm"),
    )


def _read(file: ConfigFile, same: Any) -> GPTConfig:
    embed, heads = file.size("n_embd", "hidden_size"), file.size("n_head", "num_attention_heads")
    return GPTConfig(
        layers=file.layers("n_layer", "num_hidden_layers"),
        embed=embed,
        heads=heads,
        head_dim=file.share("n_embd", embed, heads),
        mlp=file.size("n_inner", default=4 * embed),
        vocab=file.size("vocab_size"),
        positions=file.size("n_positions", "n_ctx", "max_position_embeddings"),
        activation=file.activation("activation_function", "gelu_new"),
        eps=file.number("layer_norm_epsilon", default=1e-5),
        **_NAMES.read(file, same),
    )


def _write(config: GPTConfig) -> dict[str, Any]:
    c = config
    return {
        "n_layer": c.layers,
        "n_embd": c.embed,
        "n_head": c.heads,
        "n_inner": c.mlp,
        "vocab_size": c.vocab,
        "n_positions": c.positions,
        "n_ctx": c.positions,
        "activation_function": activation_name(c.activation),
        "layer_norm_epsilon": c.eps,
        **_NAMES.write(c),
    }


def _config_of(model: GPT) -> GPTConfig:
    n, block = sizes(model), model.blocks.block
    return GPTConfig(
        layers=n["layers"],
        **config_sizes(model),
        kv_heads=None if n["group"] == 1 else n["kv_heads"],
        positions=n.get("positions", 1),
        norm="layer" if model.norm.centre else "rms",
        post_norm=block.post_norm,
        bias=block.attention.q_bias is not None,
        qk_norm=block.attention.q_norm is not None,
        glu=block.mlp.glu is not None,
        activation=block.mlp.activation,
        tied=model.head is None and model.lm,
        head=head_of(model),
        position="rotary" if model.position is None else "learned",
        eps=epsilon(model.norm.eps),
        dtype=model.dtype,
        remat=model.blocks.remat,
    )


def head_dim_limits(config: Any) -> list[str]:
    """The faults of a config whose `head_dim` is not `embed / heads`, or whose heads share keys.

    The files of GPT-2 and BERT have no keys for either.
    """
    c, complaints = config, []
    if c.heads * c.head_dim != c.embed:
        complaints.append(
            f"head_dim: expected embed / heads, as transformers derives it; {c.heads} heads of "
            f"{c.head_dim} need embed={c.heads * c.head_dim}, got {c.embed}; grow heads along with embed"
        )
    if getattr(c, "kv_heads", None) not in (None, c.heads):
        complaints.append(
            f"kv_heads: {c.kv_heads} for {c.heads} queries; in this family no heads share keys"
        )
    return complaints


GPT2 = Family(
    model_type="gpt2",
    members="GPT-2, DistilGPT-2",
    model=GPT,
    architecture=_NAMES.architecture,
    prefix="transformer.",
    heads=_NAMES.prefixes,
    base=_NAMES.base,
    rows=_rows,
    read=_read,
    write=_write,
    config_of=_config_of,
    limits=lambda config: head_dim_limits(config) + _NAMES.limits(config),
    only={
        "norm": "layer",
        "post_norm": False,
        "bias": True,
        "qk_norm": False,
        "glu": False,
        "position": "learned",
    },
    fixed={
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "add_cross_attention": False,
        "is_causal": True,
    },
    aliases=(
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "max_position_embeddings",
    ),
    ignored=("h.*.attn.bias", "h.*.attn.masked_bias"),
    zero_biases=True,
)
