"""The same fine-tuning by PyTorch: model, tokenizer and optimizer are those of transformers and torch.

What growjax draws or decides is handed over, so that a difference is one of the implementations: the
rows, their order, the head, and the rate of every step. There is no dropout, as there is none in growjax.
"""

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from growjax.evals import Example, GlueTask, Recipe


def fine_tuned(
    folder: Path,
    task: GlueTask,
    train: Sequence[Example],
    dev: Sequence[Example],
    recipe: Recipe,
    seed: int,
    head: Float[np.ndarray, "embed labels"],
) -> Float[np.ndarray, "n labels"]:
    """What the model in a folder says of every development example after fine-tuning."""
    torch, transformers = map(importlib.import_module, ("torch", "transformers"))
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.BertForSequenceClassification.from_pretrained(
        folder,
        num_labels=len(task.labels),
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        dtype=torch.float32,
    )
    with torch.no_grad():
        model.classifier.weight.copy_(torch.tensor(np.array(head.T)))
        model.classifier.bias.zero_()

    def batch(examples: Sequence[Example]) -> Any:
        texts = zip(*(example.choices[0] for example in examples), strict=True)
        return tokenizer(
            *map(list, texts),
            truncation="longest_first",
            max_length=recipe.length,
            padding=True,
            return_tensors="pt",
        )

    epochs = recipe.epochs_of(len(train))
    starts = range(0, len(train), recipe.batch)
    plain = [n for n, _ in model.named_parameters() if "bias" in n or "LayerNorm" in n]
    groups = [
        {"params": [p for n, p in model.named_parameters() if (n in plain) == flag], **more}
        for flag, more in (
            (False, {"weight_decay": recipe.weight_decay}),
            (True, {"weight_decay": 0}),
        )
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, recipe.b2), eps=recipe.eps)
    step, rng = 0, np.random.default_rng(seed)
    model.train()
    for _ in range(epochs):
        order = rng.permutation(len(train))
        for start in starts:
            chosen = [train[i] for i in order[start : start + recipe.batch]]
            labels = torch.tensor([task.labels.index(str(x.label)) for x in chosen])
            loss = model(**batch(chosen), labels=labels).loss
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
            for group in optimizer.param_groups:
                group["lr"] = recipe.rate_at(step, epochs * len(starts))
            optimizer.step()
            step += 1
    model.eval()
    # By length, so that little of a batch is padding
    order = sorted(range(len(dev)), key=lambda i: sum(map(len, dev[i].choices[0])))
    outputs = np.zeros((len(dev), len(task.labels)))
    with torch.no_grad():
        for start in range(0, len(dev), 32):
            places = order[start : start + 32]
            outputs[places] = model(**batch([dev[i] for i in places])).logits.numpy()
    return outputs
