"""Keys of config.json that no reader asks for, since they change nothing that a model computes.

A key that is neither read nor on this list is refused unless its value is empty: a file may come from a
version of transformers that computes something else with it. `make test-hf` flips every key that
transformers knows and holds this list to what it computes.
"""

import fnmatch


# By the reason why they may be ignored; patterns as in a shell.
TOLERATED: dict[str, tuple[str, ...]] = {
    "act in training, or when weights are drawn": (
        *("*dropout*", "*_pdrop", "initializer_*", "init_std", "*_init_std", "z_loss*"),
        *("gradient_checkpointing", "use_gradient_checkpointing", "layerdrop", "*_layerdrop"),
    ),
    "say where a file came from": (
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
    "say in which type numbers are stored; parameters keep that of the file": (
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
    ),
    "choose what is returned, or by which program it is computed": (
        *("output_attentions", "output_hidden_states", "output_past", "return_dict"),
        *("tie_last_hidden_states", "torchscript", "chunk_size_feed_forward", "pretraining_tp"),
        *("*attn_implementation*", "*experts_implementation*", "reorder_and_upcast_attn"),
        *("use_return_dict", "use_flash_attention*", "use_sdpa"),
    ),
}
_PATTERNS = tuple(pattern for patterns in TOLERATED.values() for pattern in patterns)


def is_tolerated(key: str) -> bool:
    """Whether a key of config.json is known to change nothing that a model computes."""
    return any(fnmatch.fnmatchcase(key, pattern) for pattern in _PATTERNS)
