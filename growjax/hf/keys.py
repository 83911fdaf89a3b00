"""Keys of config.json that growjax ignores, since they do not change the function of a model.

A key that is neither read nor on this list is refused unless its value is empty: a newer version of
transformers may compute something else with it. `make test-hf` changes every key that transformers
knows, and checks that its outputs change with no key on this list.
"""

import fnmatch


# Patterns as in a shell, by the reason why their keys may be ignored
TOLERATED: dict[str, tuple[str, ...]] = {
    "matter in training, or when weights are drawn": (
        *("*dropout*", "*_pdrop", "initializer_*", "init_std", "*_init_std", "z_loss*"),
        *("gradient_checkpointing", "use_gradient_checkpointing", "layerdrop", "*_layerdrop"),
        *("router_jitter_noise", "output_router_logits"),
    ),
    "tell where a file came from": (
        *("model_type", "architectures", "transformers_version", "_name_or_path", "name_or_path"),
        *(
            "_commit_hash",
            "auto_map",
            "unsloth_*",
            "transformers.js_config",
            "_*_version",
            "license",
        ),
        *(
            "base_model",
            "finetuning_task",
            "task_specific_params",
            "model_max_length",
            "is_llama_config",
        ),
    ),
    "name the type in which numbers are stored; parameters keep the type of the file": (
        *("dtype", "torch_dtype", "use_bfloat16", "fp16", "bf16"),
    ),
    "name tokens, which a tokenizer and a generator read": (
        *("*_token_id", "*_token_ids", "*_token", "tokenizer_class", "prefix", "suffix"),
    ),
    "choose how text is generated": (
        *("do_sample", "early_stopping", "num_beams", "num_beam_groups", "diversity_penalty"),
        *("temperature", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff"),
        *("repetition_penalty", "length_penalty", "no_repeat_ngram_size", "bad_words_ids"),
        *("encoder_no_repeat_ngram_size", "max_length", "min_length", "max_new_tokens"),
        *("num_return_sequences", "output_scores", "return_dict_in_generate", "use_cache"),
        *("exponential_decay_length_penalty", "suppress_tokens", "begin_suppress_tokens"),
        *("remove_invalid_values", "renormalize_logits", "cache_implementation"),
    ),
    "belong to heads that are not read, or to labels": (
        *("id2label", "label2id", "num_labels", "_num_labels", "problem_type", "summary_*"),
        *("pooler_*", "directionality", "classifier_*", "n_special", "predict_special_tokens"),
        *("vocab_size_or_config_json_file", "nsp_*"),
        *("sentence_transformers", "sbert_ce_default_activation_function"),
    ),
    "choose which outputs are returned, or which program computes them": (
        *("output_attentions", "output_hidden_states", "output_past", "return_dict"),
        *("tie_last_hidden_states", "torchscript", "chunk_size_feed_forward", "pretraining_tp"),
        *("*attn_implementation*", "*experts_implementation*", "reorder_and_upcast_attn"),
        *("use_return_dict", "use_flash_attention*", "use_sdpa"),
        *(
            "deterministic_flash_attn",
            "reference_compile",
            "repad_logits_with_grad",
            "sparse_pred*",
        ),
    ),
}
_PATTERNS = tuple(pattern for patterns in TOLERATED.values() for pattern in patterns)


def is_tolerated(key: str) -> bool:
    """Whether a key of config.json is known not to change the function of a model."""
    return any(fnmatch.fnmatchcase(key, pattern) for pattern in _PATTERNS)
