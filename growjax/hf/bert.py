"""BERT, RoBERTa and XLM-R: with or without heads, with a tied or a separate decoder, and old names."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from growjax.axes import sizes
from growjax.hf.family import ConfigFile, Family, activation_name, config_sizes, epsilon, is_tied
from growjax.hf.gpt2 import head_dim_limits
from growjax.hf.heads import labelled
from growjax.hf.table import Row, linear, norm
from growjax.models import BERT, BERTConfig


_HEADS = "(kv_heads group head_dim)"
_BLOCK = "blocks.block"
_WORDS = "embeddings.word_embeddings.weight"


@dataclasses.dataclass(frozen=True)
class Heads:
    """What a family calls the heads of its encoders.

    **Fields**

    - `stem`: how the names of its classes begin.
    - `transform`, `norm`, `decoder`, `bias`: the parts of the masked-language head.
    - `classifier`, `tokens`: the heads that score a sequence and its tokens; `pooled` is the layer before
      the first, if that is its own and not the pooler (the same function under another name).
    - `pair`: whether it has the next-sentence head.
    """

    stem: str = "Bert"
    transform: str = "cls.predictions.transform.dense"
    norm: str = "cls.predictions.transform.LayerNorm"
    decoder: str = "cls.predictions.decoder"
    bias: str = "cls.predictions.bias"
    classifier: str = "classifier"
    tokens: str = "classifier"
    pooled: str = "pooler.dense"
    pair: bool = True


def _rows(heads: Heads, config: BERTConfig) -> tuple[Row, ...]:
    # All heads and biases; `load` and `save` drop the rows of those that a model lacks
    def per_layer(name: str, leaf: str, into: str, out: str) -> list[Row]:
        return linear(f"encoder.layer.{{}}.{name}", f"{_BLOCK}.{leaf}", into, out)

    bias = "mlm.decoder_bias: vocab"
    if config.tied:
        words = Row(_WORDS, "embedding.table: vocab embed", others=(f"{heads.decoder}.weight",))
        head = [Row(heads.bias, bias, others=(f"{heads.decoder}.bias",))]
    else:
        words = Row(_WORDS, "embedding.table: vocab embed")
        # A separate decoder has its own bias. transformers still expects the tied head's in the file,
        # though it does not use it
        head = [
            Row(f"{heads.decoder}.weight", "mlm.decoder: vocab embed"),
            Row(f"{heads.decoder}.bias", bias, others=(heads.bias,), all_names=True),
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
        *linear(
            heads.pooled if _of_sequence(config) else "pooler.dense",
            "pooler.weight",
            "embed",
            "embed2",
        ),
        *linear(heads.transform, "mlm.weight", "embed", "embed2"),
        *norm(heads.norm, "mlm.norm"),
        *head,
        *linear("cls.seq_relationship", "nsp", "embed", "nsp"),
        *linear(
            heads.classifier if _of_sequence(config) else heads.tokens,
            "classifier",
            "embed",
            "labels",
        ),
    )


def _of_sequence(config: BERTConfig) -> bool:
    return config.labels > 0 and config.labelled == "sequence"


def _read(heads: Heads, file: ConfigFile, same: Any) -> BERTConfig:
    embed, count = file.size("hidden_size"), file.size("num_attention_heads")
    has = file.names.__contains__
    pair = has("cls.seq_relationship.weight")
    # Without a pooler the scores can only be those of tokens. Old files of these have one all the same
    pooler = any(name.startswith("pooler.") for name in file.names)
    of = "token" if has(f"{heads.tokens}.weight") else "sequence"
    if heads.tokens == heads.classifier and of == "token":
        of = labelled(file, "sequence" if pooler else "token")
    scored = has(f"{heads.tokens if of == 'token' else heads.classifier}.weight")
    labels = file.labels() if scored else 0
    return BERTConfig(
        layers=file.layers("num_hidden_layers"),
        embed=embed,
        heads=count,
        head_dim=file.share("hidden_size", embed, count),
        mlp=file.size("intermediate_size"),
        vocab=file.size("vocab_size"),
        positions=file.size("max_position_embeddings"),
        token_types=file.size("type_vocab_size", default=2),
        activation=file.activation("hidden_act", "gelu"),
        eps=file.number("layer_norm_eps", default=1e-12),
        tied=is_tied(file, same, head=f"{heads.decoder}.weight", words=[_WORDS], default=True),
        mlm_head=any(name.startswith(_LANGUAGE) for name in file.names),
        pooler=(pooler and not (labels and of == "token"))
        or pair
        or (labels > 0 and of == "sequence"),
        nsp_head=pair,
        labels=labels,
        labelled=of if labels else "sequence",  # type: ignore[arg-type]
    )


def _read_roberta(file: ConfigFile, same: Any) -> BERTConfig:
    config = _read(ROBERTA_HEADS, file, same)
    padding = file.count("pad_token_id", default=1)
    if "pad_token_id" in file.values and file.values["pad_token_id"] is None:
        file.complaints.append("pad_token_id: positions are counted from it, and it is null")
    if padding + 1 >= config.positions:
        file.complaints.append(
            f"max_position_embeddings: those up to pad_token_id={padding} are no real token's, and "
            f"there are {config.positions}"
        )
    file.check(str(file.get("model_type")))
    return dataclasses.replace(config, padding=padding)


def _write(config: BERTConfig) -> dict[str, Any]:
    c = config
    return {
        **({"num_labels": c.labels} if c.labels else {}),
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
        labels=n.get("labels", 0),
        labelled=model.labelled,
        padding=model.padding,
    )


def _architecture(heads: Heads, config: BERTConfig) -> str:
    if config.labels:
        last = f"For{config.labelled.title()}Classification"
    elif config.mlm_head:
        last = "ForPreTraining" if config.nsp_head else "ForMaskedLM"
    else:
        last = "ForNextSentencePrediction" if config.nsp_head else "Model"
    return heads.stem + last


def _limits(heads: Heads, config: BERTConfig) -> list[str]:
    faults = head_dim_limits(config)
    if config.labels and (config.mlm_head or config.nsp_head):
        faults.append("labels: a classifier has no other heads there; remove mlm and nsp")
    if config.labels and config.labelled == "token" and config.pooler:
        faults.append("labels: what scores tokens has no pooler there; remove it")
    if config.nsp_head and not heads.pair:
        faults.append("nsp_head: this family has none")
    if (config.padding is None) == (heads.stem != "Bert"):
        faults.append(
            f"padding: got {config.padding}; BERT counts all tokens from 0 (None), and RoBERTa real "
            "ones from behind the id of padding"
        )
    return faults


# The prefixes of masked-language heads
_LANGUAGE = ("cls.predictions.", "lm_head.")
ROBERTA_HEADS = Heads(
    stem="Roberta",
    transform="lm_head.dense",
    norm="lm_head.layer_norm",
    decoder="lm_head.decoder",
    bias="lm_head.bias",
    classifier="classifier.out_proj",
    pooled="classifier.dense",
    pair=False,
)
_ONLY = {"norm": "layer", "post_norm": True, "bias": True, "qk_norm": False, "glu": False}
_FIXED: Mapping[str, Any] = {
    "position_embedding_type": "absolute",
    "is_decoder": False,
    "add_cross_attention": False,
}


def _encoder(model_type: str, heads: Heads, **fields: Any) -> Family:
    """The family with these names of heads."""
    common: dict[str, Any] = dict(
        only=_ONLY,
        fixed=_FIXED,
        prefix="bert.",
        read=lambda file, same: _read(heads, file, same),
        write=_write,
    )
    return Family(
        model_type=model_type,
        model=BERT,
        architecture=lambda config: _architecture(heads, config),
        base=f"{heads.stem}Model",
        heads=("cls.", "lm_head.", "classifier."),
        rows=lambda config: _rows(heads, config),
        config_of=_config_of,
        limits=lambda config: _limits(heads, config),
        # Old classifiers of tokens have a pooler that nothing reads; any other is read
        ignored=("embeddings.position_ids", "embeddings.token_type_ids", "pooler.dense.*"),
        renamed={".gamma": ".weight", ".beta": ".bias"},
        zero_biases=True,
        **(common | fields),
    )


BERT_ = _encoder("bert", Heads(), members="BERT, MiniLM, BGE and other encoders made from it")
# Its masked-language head has the exact GELU, whatever the other layers have
_ROBERTA: Mapping[str, Any] = dict(
    prefix="roberta.",
    only=_ONLY | {"activation": "gelu"},
    fixed={**_FIXED, "hidden_act": "gelu"},
    read=_read_roberta,
    write=lambda config: _write(config) | {"pad_token_id": config.padding},
)
ROBERTA = _encoder("roberta", ROBERTA_HEADS, members="RoBERTa, all-distilroberta", **_ROBERTA)
XLM_ROBERTA = _encoder(
    "xlm-roberta",
    dataclasses.replace(ROBERTA_HEADS, stem="XLMRoberta"),
    members="XLM-R, multilingual E5, BGE-M3",
    **_ROBERTA,
)
ENCODERS = (BERT_, ROBERTA, XLM_ROBERTA)
