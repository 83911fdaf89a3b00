"""The families of decoders, each as data."""

import dataclasses

from growjax.hf.decoder import AROUND, Spelling, decoder_family
from growjax.hf.heads import DecoderHeads
from growjax.hf.mixtures import EXPERTS, SHARED, Mixture
from growjax.hf.sights import OneWindow, Sights, SomeWithout, TwoRotations, TypedLayers
from growjax.models import DecoderConfig, LlamaConfig


_STALE = ("partial_rotary_factor", "original_max_position_embeddings")
# Keys that no family computes with another value
_FIXED = {"is_causal": True, "rope_interleaved": False}
_BIASES = {"bias": ("attention_bias", False), "o_bias": ("attention_bias", False)}


def _llama(config: DecoderConfig) -> LlamaConfig:
    (sight,) = config.pattern
    names = {field.name for field in dataclasses.fields(LlamaConfig)}
    same = {name: getattr(config, name) for name in names - {"theta", "scaling", "qk_norm"}}
    return LlamaConfig(**same, theta=sight.theta, scaling=sight.scaling)


LLAMA = decoder_family(
    "llama",
    DecoderHeads("Llama"),
    Spelling(flags=_BIASES, parts=True),
    public=_llama,
    fixed=_FIXED | {"mlp_bias": False},
    aliases=_STALE,
    members="Llama 1 to 3, TinyLlama, SmolLM 1 and 2",
)
MISTRAL = decoder_family(
    "mistral",
    DecoderHeads("Mistral"),
    Spelling(
        kv_default=8,
        sights=OneWindow(positions=131072, window=4096),
    ),
    fixed=_FIXED,
    aliases=_STALE,
    members="Mistral 7B, Mistral Nemo",
)


def _late(file, layer: int) -> bool:
    """Qwen's layers slide from `max_window_layers` on."""
    return layer >= file.count("max_window_layers", default=28)


_QWEN = TypedLayers(positions=32768, types=_late)
QWEN2 = decoder_family(
    "qwen2",
    DecoderHeads("Qwen2"),
    Spelling(choices={"bias": True}, kv_default=32, sights=_QWEN),
    fixed=_FIXED | {"use_mrope": False},
    aliases=_STALE,
    members="Qwen 2 and 2.5",
)
QWEN3 = decoder_family(
    "qwen3",
    DecoderHeads("Qwen3"),
    Spelling(
        choices={"qk_norm": "head"}, flags=_BIASES, kv_default=32, head_default=128, sights=_QWEN
    ),
    fixed=_FIXED,
    aliases=_STALE,
    members="Qwen 3 (dense)",
)
OLMO2 = decoder_family(
    "olmo2",
    DecoderHeads("Olmo2", token=None, padding=1),
    Spelling(
        choices={"placement": "after", "qk_norm": "width"},
        flags=_BIASES,
        names=AROUND | {"mlp_norm": None, "attention_norm": None},
        eps=("rms_norm_eps", 1e-5),
    ),
    fixed=_FIXED,
    aliases=_STALE,
    members="OLMo 2",
)
GEMMA = decoder_family(
    "gemma",
    DecoderHeads("Gemma", tied=True, padding=0),
    Spelling(
        choices={"plus_one": True},
        flags=_BIASES,
        kv_default=16,
        head_default=256,
        activation=("hidden_act", "gelu_pytorch_tanh"),
        other_activation="hidden_activation",
        tanh_gelu=True,
        parts=True,
        embed_scale=True,
        sights=Sights(positions=8192),
    ),
    fixed=_FIXED | {"use_bidirectional_attention": False},
    aliases=_STALE,
    members="Gemma 1 and 1.1",
)
_GEMMA = Spelling(
    choices={"placement": "both", "plus_one": True},
    flags=_BIASES,
    names=AROUND,
    kv_default=4,
    head_default=256,
    activation=("hidden_activation", "gelu_pytorch_tanh"),
    other_activation="hidden_act",
    parts=True,
    embed_scale=True,
    scale=("query_pre_attn_scalar", 256.0),
)
GEMMA2 = decoder_family(
    "gemma2",
    DecoderHeads("Gemma2", tied=True, padding=0),
    dataclasses.replace(
        _GEMMA,
        numbers={
            "attention_cap": ("attn_logit_softcapping", 50.0),
            "logit_cap": ("final_logit_softcapping", 30.0),
        },
        sights=TypedLayers(positions=8192, switch=False, types=lambda file, i: i % 2 == 0),
    ),
    fixed=_FIXED | {"use_bidirectional_attention": None},
    aliases=_STALE,
    members="Gemma 2",
)


def _five_of_six(file, layer: int) -> bool:
    """Gemma 3's layers slide but for every sixth, or as an old key says."""
    every = file.size("sliding_window_pattern", "_sliding_window_pattern", default=6)
    return (layer + 1) % every != 0


GEMMA3 = decoder_family(
    "gemma3_text",
    DecoderHeads("Gemma3Text", causal="Gemma3ForCausalLM", token=None, tied=True, padding=0),
    dataclasses.replace(
        _GEMMA,
        choices={**_GEMMA.choices, "qk_norm": "head"},
        numbers={"logit_cap": ("final_logit_softcapping", None)},
        sights=TwoRotations(positions=131072, types=_five_of_six),
    ),
    # transformers reads the cap of scores, and does not use it
    fixed=_FIXED | {"use_bidirectional_attention": False, "attn_logit_softcapping": None},
    aliases=(*_STALE, "sliding_window_pattern", "_sliding_window_pattern"),
    members="Gemma 3 1B and 270M, the text part of larger ones",
)
PHI3 = decoder_family(
    "phi3",
    DecoderHeads("Phi3", padding=32000),
    Spelling(
        names={
            **dict.fromkeys(("attention.q", "attention.k", "attention.v", "mlp.glu", "mlp.up")),
            "attention.q|k|v": "layers.{}.self_attn.qkv_proj",
            "mlp.glu|up": "layers.{}.mlp.gate_up_proj",
        },
        eps=("rms_norm_eps", 1e-5),
        sights=OneWindow(
            positions=4096, part=1.0, length=4096, kinds=("default", "longrope"), window=None
        ),
    ),
    # Phi-4 mini names what the code beside its weights could do and does not; transformers reads none
    fixed=_FIXED
    | dict.fromkeys(("attention_bias", "mlp_bias", "lm_head_bias"), False)
    | dict.fromkeys(("full_attn_mod", "interpolate_factor"), 1),
    members="Phi-3 mini and medium, Phi-4 mini",
)
SMOLLM3 = decoder_family(
    "smollm3",
    DecoderHeads("SmolLM3", tied=True, padding=128004),
    Spelling(
        flags=_BIASES,
        kv_default=4,
        sights=SomeWithout(theta=2e6, positions=32768, window=None),
    ),
    fixed=_FIXED | {"mlp_bias": False},
    aliases=_STALE,
    members="SmolLM 3",
)
NEOX = decoder_family(
    "gpt_neox",
    DecoderHeads("GPTNeoX", words="embed_in", lm="embed_out", token="classifier"),
    Spelling(
        choices={"norm": "layer", "mlp_bias": True, "glu": False},
        flags={
            "parallel": ("use_parallel_residual", True),
            "bias": ("attention_bias", True),
            "o_bias": ("attention_bias", True),
        },
        names={
            **dict.fromkeys(("attention.q", "attention.k", "attention.v", "mlp.glu")),
            "attention.q|k|v": "layers.{}.attention.query_key_value",
            "attention.o": "layers.{}.attention.dense",
            "mlp.up": "layers.{}.mlp.dense_h_to_4h",
            "mlp.down": "layers.{}.mlp.dense_4h_to_h",
            "norm": "final_layer_norm",
        },
        each=True,
        kv_heads=None,
        head_dim=None,
        activation=("hidden_act", "gelu"),
        eps=("layer_norm_eps", 1e-5),
        parts=True,
        sights=Sights(part=0.25, outside=("rotary_emb_base", "rotary_pct")),
    ),
    prefix="gpt_neox.",
    fixed=_FIXED | {"is_decoder": False},
    ignored=(
        "layers.*.attention.bias",
        "layers.*.attention.masked_bias",
        "layers.*.attention.rotary_emb.inv_freq",
    ),
    aliases=_STALE,
    members="Pythia, GPT-NeoX 20B",
)
MIXTRAL = decoder_family(
    "mixtral",
    DecoderHeads("Mixtral"),
    Spelling(
        choices={"norm_topk_prob": True},
        names={
            "mlp.router": "layers.{}.block_sparse_moe.gate",
            "mlp.glu": "layers.{}.block_sparse_moe.experts.{}.w1",
            "mlp.up": "layers.{}.block_sparse_moe.experts.{}.w3",
            "mlp.down": "layers.{}.block_sparse_moe.experts.{}.w2",
        },
        kv_default=8,
        eps=("rms_norm_eps", 1e-5),
        sights=OneWindow(theta=1e6, positions=131072),
        experts=Mixture(count=8, per_token=2),
    ),
    fixed=_FIXED,
    aliases=(*_STALE, *Mixture.spellings),
    members="Mixtral 8x7B and 8x22B, an upcycled Llama",
)
OLMOE = decoder_family(
    "olmoe",
    DecoderHeads("Olmoe", sequence=None, token=None, padding=1),
    Spelling(
        choices={"qk_norm": "width"},
        flags=_BIASES | {"norm_topk_prob": ("norm_topk_prob", False)},
        names=EXPERTS,
        head_dim=None,
        eps=("rms_norm_eps", 1e-5),
        sights=Sights(positions=4096),
        experts=Mixture(count=64, per_token=8, balance=0.01),
    ),
    fixed=_FIXED | {"clip_qkv": None},
    aliases=(*_STALE, *Mixture.spellings),
    members="OLMoE 1B-7B",
)
QWEN3_MOE = decoder_family(
    "qwen3_moe",
    DecoderHeads("Qwen3Moe"),
    Spelling(
        choices={"qk_norm": "head"},
        flags=_BIASES | {"norm_topk_prob": ("norm_topk_prob", False)},
        names=EXPERTS,
        kv_default=4,
        sights=OneWindow(positions=32768, window=4096, switch=True),
        experts=Mixture(count=128, per_token=8, units="moe_intermediate_size"),
    ),
    fixed=_FIXED
    | {"decoder_sparse_step": 1, "mlp_only_layers": [], "use_qk_norm": True}
    | {"qkv_bias": False, "shared_expert_intermediate_size": 0},
    aliases=(*_STALE, *Mixture.spellings),
    members="Qwen 3 30B-A3B and 235B-A22B, an upcycled Qwen 3",
)


def _every_second(file, layer: int) -> bool:
    """Qwen2-MoE's layers slide in turn, up to `max_window_layers`."""
    return layer % 2 == 0 and layer < file.count("max_window_layers", default=28)


QWEN2_MOE = decoder_family(
    "qwen2_moe",
    DecoderHeads("Qwen2Moe"),
    Spelling(
        flags={
            "bias": ("qkv_bias", True),
            "norm_topk_prob": ("norm_topk_prob", False),
        },
        names=EXPERTS | SHARED,
        kv_default=16,
        sights=TypedLayers(positions=32768, types=_every_second),
        experts=Mixture(count=60, per_token=4, units="moe_intermediate_size", shared=5632),
    ),
    fixed=_FIXED | {"decoder_sparse_step": 1, "mlp_only_layers": []},
    aliases=(*_STALE, *Mixture.spellings),
    members="Qwen 1.5 MoE A2.7B, Qwen 2 57B-A14B",
)
DECODERS = (
    *(LLAMA, MISTRAL, QWEN2, QWEN3, OLMO2, GEMMA, GEMMA2, GEMMA3, PHI3, SMOLLM3, NEOX),
    *(MIXTRAL, OLMOE, QWEN3_MOE, QWEN2_MOE),
)
