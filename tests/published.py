"""The keys of config.json that published checkpoints have, each with its value, and small sizes.

A file of another checkpoint of a family has the same keys in most cases. What `transformers` does not
read stands in these files too, left over from the code that trained the model.
"""

from typing import Any


_SIZES: dict[str, Any] = dict(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=24,
    num_hidden_layers=3,
    num_attention_heads=4,
    initializer_range=0.02,
)
_ENCODER: dict[str, Any] = _SIZES | dict(
    max_position_embeddings=34,
    attention_probs_dropout_prob=0.1,
    hidden_act="gelu",
    hidden_dropout_prob=0.1,
    position_embedding_type="absolute",
    use_cache=True,
    pad_token_id=0,
    type_vocab_size=2,
    layer_norm_eps=1e-12,
)
_ROBERTA: dict[str, Any] = _ENCODER | dict(
    bos_token_id=0, eos_token_id=2, pad_token_id=1, layer_norm_eps=1e-5
)
_DECODER: dict[str, Any] = _SIZES | dict(
    num_key_value_heads=2,
    attention_dropout=0.0,
    bos_token_id=1,
    eos_token_id=2,
    hidden_act="silu",
    max_position_embeddings=4096,
    rms_norm_eps=1e-6,
    rope_theta=10000.0,
    tie_word_embeddings=False,
    torch_dtype="bfloat16",
    use_cache=True,
)
_LLAMA: dict[str, Any] = _DECODER | dict(
    attention_bias=False, mlp_bias=False, pretraining_tp=1, rope_scaling=None
)
_LLAMA3: dict[str, Any] = dict(
    factor=32.0,
    high_freq_factor=4.0,
    low_freq_factor=1.0,
    original_max_position_embeddings=8192,
    rope_type="llama3",
)
_QWEN: dict[str, Any] = _DECODER | dict(
    max_window_layers=28, sliding_window=32768, use_sliding_window=False, rope_theta=1e6
)
_QWEN3: dict[str, Any] = _QWEN | dict(
    attention_bias=False, head_dim=16, rope_scaling=None, sliding_window=None
)
_GEMMA: dict[str, Any] = {
    key: value
    for key, value in _DECODER.items()
    if key not in ("hidden_act", "tie_word_embeddings")
} | dict(attention_bias=False, head_dim=16, pad_token_id=0)
_GEMMA2: dict[str, Any] = _GEMMA | dict(
    attn_logit_softcapping=50.0,
    cache_implementation="hybrid",
    final_logit_softcapping=30.0,
    hidden_act="gelu_pytorch_tanh",
    hidden_activation="gelu_pytorch_tanh",
    query_pre_attn_scalar=256,
    sliding_window=4096,
)
_GEMMA3: dict[str, Any] = _GEMMA | dict(
    attn_logit_softcapping=None,
    final_logit_softcapping=None,
    hidden_activation="gelu_pytorch_tanh",
    query_pre_attn_scalar=256,
    rope_local_base_freq=10000,
    rope_scaling=None,
    rope_theta=1000000,
    sliding_window=512,
)
_PHI: dict[str, Any] = _DECODER | dict(
    attention_bias=False,
    auto_map={"AutoConfig": "configuration_phi3.Phi3Config"},
    embd_pdrop=0.0,
    original_max_position_embeddings=4096,
    pad_token_id=2,
    resid_pdrop=0.0,
    rope_scaling=None,
    sliding_window=2047,
)
_MIXTURE: dict[str, Any] = _DECODER | dict(
    num_experts_per_tok=2, output_router_logits=False, router_aux_loss_coef=0.001
)
_QWEN_MOE: dict[str, Any] = _MIXTURE | dict(
    decoder_sparse_step=1,
    max_window_layers=48,
    moe_intermediate_size=16,
    num_experts=4,
    sliding_window=None,
    use_sliding_window=False,
)
_QWEN3_MOE: dict[str, Any] = _QWEN_MOE | dict(
    attention_bias=False, head_dim=16, mlp_only_layers=[], norm_topk_prob=True, rope_scaling=None
)
_T5: dict[str, Any] = dict(
    d_model=32,
    d_kv=8,
    d_ff=24,
    num_heads=4,
    num_layers=3,
    vocab_size=64,
    decoder_start_token_id=0,
    dropout_rate=0.1,
    eos_token_id=1,
    initializer_factor=1.0,
    is_encoder_decoder=True,
    layer_norm_epsilon=1e-6,
    n_positions=512,
    output_past=True,
    pad_token_id=0,
    relative_attention_num_buckets=32,
)
_GPT2: dict[str, Any] = dict(
    n_embd=32,
    n_head=4,
    n_layer=3,
    n_positions=34,
    n_ctx=34,
    vocab_size=64,
    activation_function="gelu_new",
    attn_pdrop=0.1,
    bos_token_id=0,
    embd_pdrop=0.1,
    eos_token_id=0,
    initializer_range=0.02,
    layer_norm_epsilon=1e-5,
    resid_pdrop=0.1,
    summary_activation=None,
    summary_first_dropout=0.1,
    summary_proj_to_labels=True,
    summary_type="cls_index",
    summary_use_proj=True,
    task_specific_params={"text-generation": {"do_sample": True, "max_length": 50}},
)


def _as(model_type: str, architecture: str, keys: dict[str, Any], **own: Any) -> dict[str, Any]:
    return keys | own | {"model_type": model_type, "architectures": [architecture]}


_LONG: dict[str, Any] = dict(long_factor=[1.5] * 4, short_factor=[1.25] * 4, type="longrope")
CONFIGS: dict[str, dict[str, Any]] = {
    "BERT base": _as("bert", "BertForMaskedLM", _ENCODER, gradient_checkpointing=False),
    "MiniLM": _as("bert", "BertModel", _ENCODER, _name_or_path="nreimers/MiniLM-L6-H384-uncased"),
    "mBERT": _as(
        "bert",
        "BertForMaskedLM",
        _ENCODER,
        directionality="bidi",
        pooler_fc_size=768,
        pooler_num_attention_heads=12,
        pooler_num_fc_layers=3,
        pooler_size_per_head=128,
        pooler_type="first_token_transform",
    ),
    "RoBERTa base": _as("roberta", "RobertaForMaskedLM", _ROBERTA),
    "XLM-R base": _as("xlm-roberta", "XLMRobertaForMaskedLM", _ROBERTA, output_past=True),
    "ModernBERT base": _as(
        "modernbert",
        "ModernBertForMaskedLM",
        _SIZES,
        attention_bias=False,
        attention_dropout=0.0,
        bos_token_id=2,
        classifier_activation="gelu",
        classifier_bias=False,
        classifier_dropout=0.0,
        classifier_pooling="mean",
        cls_token_id=2,
        decoder_bias=True,
        deterministic_flash_attn=False,
        embedding_dropout=0.0,
        eos_token_id=3,
        global_attn_every_n_layers=3,
        global_rope_theta=160000.0,
        gradient_checkpointing=False,
        hidden_activation="gelu",
        initializer_cutoff_factor=2.0,
        layer_norm_eps=1e-5,
        local_attention=8,
        local_rope_theta=10000.0,
        max_position_embeddings=8192,
        mlp_bias=False,
        mlp_dropout=0.0,
        norm_bias=False,
        norm_eps=1e-5,
        pad_token_id=0,
        position_embedding_type="absolute",
        reference_compile=True,
        repad_logits_with_grad=False,
        sep_token_id=3,
        sparse_pred_ignore_index=-100,
        sparse_prediction=False,
    ),
    "GPT-2": _as("gpt2", "GPT2LMHeadModel", _GPT2),
    "GPT-2 medium": _as("gpt2", "GPT2LMHeadModel", _GPT2, n_special=0, predict_special_tokens=True),
    "Llama 2": _as("llama", "LlamaForCausalLM", _LLAMA, max_length=4096),
    "Llama 3.2 1B": _as(
        "llama",
        "LlamaForCausalLM",
        _LLAMA,
        eos_token_id=[2, 3],
        head_dim=8,
        rope_scaling=_LLAMA3,
        rope_theta=500000.0,
    ),
    "SmolLM 2": _as(
        "llama", "LlamaForCausalLM", _LLAMA, is_llama_config=True, rope_interleaved=False
    ),
    "Mistral 7B v0.1": _as("mistral", "MistralForCausalLM", _DECODER, sliding_window=4096),
    "Mistral Nemo": _as(
        "mistral", "MistralForCausalLM", _DECODER, head_dim=16, sliding_window=None
    ),
    "Qwen 2.5 0.5B": _as("qwen2", "Qwen2ForCausalLM", _QWEN, use_mrope=False),
    "Qwen 2.5 7B Instruct": _as("qwen2", "Qwen2ForCausalLM", _QWEN, sliding_window=131072),
    "Qwen 3 0.6B": _as("qwen3", "Qwen3ForCausalLM", _QWEN3, tie_word_embeddings=True),
    "OLMo 2": _as(
        "olmo2",
        "Olmo2ForCausalLM",
        _DECODER,
        attention_bias=False,
        pad_token_id=1,
        rope_scaling=None,
    ),
    "Gemma 2B": _as("gemma", "GemmaForCausalLM", _GEMMA, hidden_act="gelu", hidden_activation=None),
    "Gemma 2 2B": _as("gemma2", "Gemma2ForCausalLM", _GEMMA2),
    "Gemma 2 9B": _as("gemma2", "Gemma2ForCausalLM", _GEMMA2, sliding_window_size=4096),
    "Gemma 3 1B": _as(
        "gemma3_text",
        "Gemma3ForCausalLM",
        _GEMMA3,
        cache_implementation="hybrid",
        eos_token_id=[1, 6],
        sliding_window_pattern=6,
    ),
    "Gemma 3 270M": _as(
        "gemma3_text",
        "Gemma3ForCausalLM",
        _GEMMA3,
        _sliding_window_pattern=6,
        layer_types=["sliding_attention"] * 3,
        use_bidirectional_attention=False,
    ),
    "Phi-3 mini": _as("phi3", "Phi3ForCausalLM", _PHI),
    "Phi-3 mini 128k": _as(
        "phi3", "Phi3ForCausalLM", _PHI, rope_scaling=_LONG, max_position_embeddings=131072
    ),
    "Phi-4 mini": _as(
        "phi3",
        "Phi3ForCausalLM",
        _PHI,
        full_attn_mod=1,
        interpolate_factor=1,
        lm_head_bias=False,
        mlp_bias=False,
        partial_rotary_factor=0.75,
        rope_scaling=_LONG | dict(long_factor=[1.5] * 3, short_factor=[1.25] * 3),
        max_position_embeddings=131072,
        sliding_window=262144,
        tie_word_embeddings=True,
    ),
    "SmolLM 3": _as(
        "smollm3",
        "SmolLM3ForCausalLM",
        _LLAMA,
        layer_types=["full_attention"] * 3,
        max_window_layers=28,
        no_rope_layer_interval=4,
        no_rope_layers=[1, 1, 0],
        pad_token_id=2,
        pretraining_tp=2,
        sliding_window=None,
        tie_word_embeddings=True,
        use_sliding_window=False,
    ),
    "Pythia": _as(
        "gpt_neox",
        "GPTNeoXForCausalLM",
        _SIZES,
        bos_token_id=0,
        eos_token_id=0,
        hidden_act="gelu",
        layer_norm_eps=1e-5,
        max_position_embeddings=2048,
        rotary_emb_base=10000,
        rotary_pct=0.25,
        tie_word_embeddings=False,
        torch_dtype="float16",
        use_cache=True,
        use_parallel_residual=True,
    ),
    "Mixtral 8x7B": _as(
        "mixtral", "MixtralForCausalLM", _MIXTURE, num_local_experts=4, sliding_window=None
    ),
    "OLMoE": _as(
        "olmoe",
        "OlmoeForCausalLM",
        _MIXTURE,
        attention_bias=False,
        clip_qkv=None,
        norm_topk_prob=False,
        num_experts=4,
        num_key_value_heads=4,
        pad_token_id=1,
        rope_scaling=None,
    ),
    "Qwen 3 30B-A3B": _as("qwen3_moe", "Qwen3MoeForCausalLM", _QWEN3_MOE),
    "Qwen 3 30B-A3B 2507": _as(
        "qwen3_moe",
        "Qwen3MoeForCausalLM",
        _QWEN3_MOE,
        qkv_bias=False,
        shared_expert_intermediate_size=0,
        use_qk_norm=True,
    ),
    "Qwen 1.5 MoE": _as(
        "qwen2_moe",
        "Qwen2MoeForCausalLM",
        _QWEN_MOE,
        norm_topk_prob=False,
        shared_expert_intermediate_size=16,
        sliding_window=32768,
    ),
    "T5 small": _as("t5", "T5ForConditionalGeneration", _T5, task_specific_params={"a": {}}),
    "Flan-T5 small": _as(
        "t5",
        "T5ForConditionalGeneration",
        _T5,
        feed_forward_proj="gated-gelu",
        num_decoder_layers=3,
        relative_attention_max_distance=128,
        tie_word_embeddings=False,
        use_cache=True,
    ),
    "mT5 small": _as(
        "mt5",
        "MT5ForConditionalGeneration",
        _T5,
        feed_forward_proj="gated-gelu",
        num_decoder_layers=3,
        tie_word_embeddings=False,
        tokenizer_class="T5Tokenizer",
    ),
}
