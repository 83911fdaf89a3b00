"""Tokenizers in folders, as checkpoints come with them: spellings, frames and ends are drawn."""

import json
import random
from pathlib import Path
from typing import Any

from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)


CORPUS = [
    "The colour of the sky is blue, and that of grass is green.",
    "Schnee fällt, naïve café, 2 + 2 = 4; a tree grows and a tree grows",
    "0123456789 and 12 and 12 is 24",
    "user asks, assistant answers\n\n\tand so on  and on",
]
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|turn|>{{ m['role'] }}\n"
    "{{ m['content'] | trim }}{{ eos_token }}\n"
    "{% endfor %}{% if add_generation_prompt %}<|turn|>assistant\n{% endif %}"
)
_BOS = ("<s>", "<|begin_of_text|>", "⟪start⟫", "[BOS]")
_EOS = ("</s>", "<|endoftext|>", "⟪halt⟫", "<|im_end|>")


def trained(kind: str, special: list[str]) -> Tokenizer:
    """A small tokenizer of one of the usual kinds."""
    if kind == "bytes":
        made = Tokenizer(models.BPE())
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        made.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer: Any = trainers.BpeTrainer(
            vocab_size=320, special_tokens=special, initial_alphabet=alphabet, show_progress=False
        )
    else:
        made = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
        made.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
        made.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
        trainer = trainers.BpeTrainer(
            vocab_size=200, special_tokens=["<unk>", *special], show_progress=False
        )
    made.train_from_iterator(CORPUS, trainer)
    return made


def draw(folder: Path, seed: int) -> dict[str, Any]:
    """Write a drawn tokenizer with its companion files into a folder, and say what was drawn."""
    rng = random.Random(seed)
    bos, eos = rng.choice(_BOS), rng.choice(_EOS)
    kind = ("bytes", "spaces")[seed % 2]
    special = [eos, bos, "<|turn|>", "<|pad|>", "<odd one>"]
    rng.shuffle(special)
    made = trained(kind, special)
    frame = ("template", "added", "not added", "template, not added", "none")[seed % 5]
    if "template" in frame:
        made.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, made.token_to_id(bos))]
        )
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": eos,
        "pad_token": rng.choice(("<|pad|>", eos)),
        "model_max_length": 64,
        "clean_up_tokenization_spaces": False,
    }
    if frame == "none":
        config["bos_token"] = None
    elif seed % 3:
        # As older files spell a token
        config["bos_token"] = {
            "content": bos,
            "lstrip": False,
            "rstrip": False,
            "__type": "AddedToken",
        }
    else:
        config["bos_token"] = bos
    if frame.endswith("not added"):
        config["add_bos_token"] = False
    elif frame == "added":
        config["add_bos_token"] = True
    if frame != "none":
        config["chat_template"] = TEMPLATE
    made.enable_truncation(5)  # as training may have left it
    made.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    ids = {name: made.token_to_id(token) for name, token in (("eos", eos), ("turn", "<|turn|>"))}
    ends = [ids["eos"], ids["turn"]] if seed % 4 else ids["eos"]
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    return {
        "bos": bos,
        "eos": eos,
        "frame": frame,
        "size": made.get_vocab_size(),
        "ends": {*ends} if isinstance(ends, list) else {ends},
    }
