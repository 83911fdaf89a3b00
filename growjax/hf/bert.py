"""BERT: with or without heads, with a tied or a separate decoder, and with old names of norms."""

from typing import Any

from growjax.axes import sizes
from growjax.hf.family import ConfigFile, Family, activation_name, config_sizes, epsilon, is_tied
from growjax.hf.gpt2 import head_dim_limits
from growjax.hf.table import Row, linear, norm
from growjax.models import BERT, BERTConfig


_HEADS = "(kv_heads group head_dim)"
_BLOCK = "blocks.block"
_WORDS = "embeddings.word_embeddings.weight"
_DECODER = "cls.predictions.decoder"


def _rows(config: BERTConfig) -> tuple[Row, ...]:
    # All heads and biases; `load` and `save` drop the rows of those that a model lacks
    def per_layer(name: str, leaf: str, into: str, out: str) -> list[Row]:
        return linear(f"encoder.layer.{{}}.{name}", f"{_BLOCK}.{leaf}", into, out)

    bias = "mlm.decoder_bias: vocab"
    if config.tied:
        words = Row(_WORDS, "embedding.table: vocab embed", others=(f"{_DECODER}.weight",))
        head = [Row("cls.predictions.bias", bias, others=(f"{_DECODER}.bias",))]
    else:
        words = Row(_WORDS, "embedding.table: vocab embed")
        # A separate decoder has its own bias. transformers still expects the tied head's in the file,
        # though it does not use it
        unused = ("cls.predictions.bias",)
        head = [
            Row(f"{_DECODER}.weight", "mlm.decoder: vocab embed"),
            Row(f"{_DECODER}.bias", bias, others=unused, all_names=True),
        ]
    return (
        words,
        Row("embeddings.position_embeddings.weight", "position.table: positions embed"),
        Row("embeddings.token_type_embeddings.weight", "token_type.table: token_types embed"),
        *norm("embeddings.LayerNorm", "embedding_norm"),
        *per_layer("attention.self.query", "attention.q", "embed", _HEADS),
        *per_layer("attention.self.key", "attention.k", "embed", _HEADS),
        *per_layer("attention.self.value", "attention.v", "embed", _HEADS),
        *per_layer("attention.output.dense", "attention.o", _HEADS, "embed"),
        *norm("encoder.layer.{}.attention.output.LayerNorm", f"{_BLOCK}.attention_norm"),
        *per_layer("intermediate.dense", "mlp.up", "embed", "mlp"),
        *per_layer("output.dense", "mlp.down", "mlp", "embed"),
        *norm("encoder.layer.{}.output.LayerNorm", f"{_BLOCK}.mlp_norm"),
        *linear("pooler.dense", "pooler.weight", "embed", "embed2"),
        *linear("cls.predictions.transform.dense", "mlm.weight", "embed", "embed2"),
        *norm("cls.predictions.transform.LayerNorm", "mlm.norm"),
        *head,
        *linear("cls.seq_relationship", "nsp", "embed", "nsp"),
    )


def _read(file: ConfigFile, same: Any) -> BERTConfig:
    embed, heads = file.size("hidden_size"), file.size("num_attention_heads")
    has = file.names.__contains__
    return BERTConfig(
        layers=file.layers("num_hidden_layers"),
        embed=embed,
        heads=heads,
        head_dim=file.share("hidden_size", embed, heads),
        mlp=file.size("intermediate_size"),
        vocab=file.size("vocab_size"),
        positions=file.size("max_position_embeddings"),
        token_types=file.size("type_vocab_size", default=2),
        activation=file.activation("hidden_act", "gelu"),
        eps=file.number("layer_norm_eps", default=1e-12),
        tied=is_tied(file, same, head=f"{_DECODER}.weight", words=[_WORDS], default=True),
        mlm_head=any(name.startswith("cls.predictions.") for name in file.names),
        pooler=has("pooler.dense.weight") or has("cls.seq_relationship.weight"),
        nsp_head=has("cls.seq_relationship.weight"),
    )


def _write(config: BERTConfig) -> dict[str, Any]:
    c = config
    return {
        "num_hidden_layers": c.layers,
        "hidden_size": c.embed,
        "num_attention_heads": c.heads,
        "intermediate_size": c.mlp,
        "vocab_size": c.vocab,
        "max_position_embeddings": c.positions,
        "type_vocab_size": c.token_types,
        "hidden_act": activation_name(c.activation),
        "layer_norm_eps": c.eps,
        "tie_word_embeddings": c.tied,
    }


def _config_of(model: BERT) -> BERTConfig:
    n, block = sizes(model), model.blocks.block
    # A post-norm BERT has a norm behind the embedding; a pre-norm one has a norm at the end
    first_norm = model.embedding_norm or model.norm
    assert first_norm is not None
    return BERTConfig(
        layers=n["layers"],
        **config_sizes(model),
        positions=n["positions"],
        token_types=n["token_types"],
        post_norm=block.post_norm,
        embedding_norm=not block.post_norm and model.embedding_norm is not None,
        norm="layer" if first_norm.centre else "rms",
        bias=block.attention.q_bias is not None,
        qk_norm=block.attention.q_norm is not None,
        glu=block.mlp.glu is not None,
        activation=block.mlp.activation,
        eps=epsilon(first_norm.eps),
        tied=model.mlm is None or model.mlm.decoder is None,
        dtype=model.dtype,
        remat=model.blocks.remat,
        mlm_head=model.mlm is not None,
        nsp_head=model.nsp is not None,
        pooler=model.pooler is not None,
    )


def _architecture(config: BERTConfig) -> str:
    if config.mlm_head:
        return "BertForPreTraining" if config.nsp_head else "BertForMaskedLM"
    return "BertForNextSentencePrediction" if config.nsp_head else "BertModel"


BERT_ = Family(
    model_type="bert",
    members="BERT, MiniLM, BGE and other encoders made from it",
    model=BERT,
    architecture=_architecture,
    base="BertModel",
    prefix="bert.",
    heads=("cls.",),
    rows=_rows,
    read=_read,
    write=_write,
    config_of=_config_of,
    limits=head_dim_limits,
    only={"norm": "layer", "post_norm": True, "bias": True, "qk_norm": False, "glu": False},
    fixed={
        "position_embedding_type": "absolute",
        "is_decoder": False,
        "add_cross_attention": False,
    },
    ignored=("embeddings.position_ids", "embeddings.token_type_ids"),
    renamed={".gamma": ".weight", ".beta": ".bias"},
    zero_biases=True,
)
