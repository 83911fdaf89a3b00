"""Random models of transformers, and what they compute, in numpy."""

# pyright: reportMissingImports=false
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers


transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
torch.set_num_threads(1)

TOKENS = np.random.default_rng(0).integers(1, 61, (2, 24))
MASK = np.arange(24) < np.array([[24], [17]])
LEFT = np.arange(24) >= np.array([[0], [7]])
TYPES = np.random.default_rng(1).integers(0, 2, (2, 24))
OTHERS = np.random.default_rng(2).integers(1, 61, (2, 9))


def random_model(config: Any, architecture: str, seed: int = 0, *, own_head: bool = True) -> Any:
    """A model with every parameter moved off where it starts: gains, biases and embeddings too."""
    torch.manual_seed(seed)
    model = getattr(transformers, architecture)(config).eval()
    if "experts" in str(vars(config).keys()):
        model.set_experts_implementation("eager")  # grouped products have no float64
    unscaled = not getattr(config, "scale_decoder_outputs", False)
    if hasattr(model, "lm_head") and "t5" in config.model_type and unscaled and own_head:
        # transformers 5 ties what it makes, whatever it is told; it loads such files all the same
        model.lm_head.weight = torch.nn.Parameter(torch.empty_like(model.lm_head.weight))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim == 1:
                gain = "bias" not in name
                p.copy_(gain + 0.3 * torch.randn_like(p))
            elif "wte" in name or "shared" in name or "embed" in name:
                p.copy_(0.1 * torch.randn_like(p))  # small, so that an epsilon shows
            else:
                p.copy_(torch.randn_like(p) * p.shape[-1] ** -0.5)
    return model


def outputs(model: Any, mask: np.ndarray = MASK) -> dict[str, np.ndarray]:
    """Everything that a model computes on the tokens above, where they are not padding."""
    torch_of = torch.from_numpy
    kind = model.config.model_type
    inputs = {"input_ids": torch_of(TOKENS), "attention_mask": torch_of(mask.astype(np.int64))}
    if kind in ("bert", "roberta", "xlm-roberta"):
        inputs["token_type_ids"] = torch_of(TYPES)
    if "t5" in kind and not type(model).__name__.endswith("EncoderModel"):
        inputs["decoder_input_ids"] = torch_of(OTHERS)
    with torch.no_grad():
        results = model(**inputs)
    names = {
        "logits": "logits",
        "prediction_logits": "logits",
        "seq_relationship_logits": "nsp_logits",
        "last_hidden_state": "hidden",
        "pooler_output": "pooled",
    }
    if type(model).__name__ == "BertForNextSentencePrediction":
        names["logits"] = "nsp_logits"
    if type(model).__name__.endswith(("ForSequenceClassification", "ForTokenClassification")):
        names["logits"] = "label_logits"
    got = {
        ours: results[theirs].numpy()
        for theirs, ours in names.items()
        if results.get(theirs) is not None
    }
    real = lambda x: x[mask] if x.shape[:2] == mask.shape else x  # noqa: E731
    return {name: real(value) for name, value in got.items()}


def reloaded(folder: Path, architecture: str | None = None) -> Any:
    """A folder as transformers loads it, which may leave nothing out and miss nothing."""
    import json

    named = json.loads((folder / "config.json").read_text())["architectures"][0]
    cls = getattr(transformers, architecture or named)
    model, info = cls.from_pretrained(folder, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), (
        info
    )
    return model.eval()
