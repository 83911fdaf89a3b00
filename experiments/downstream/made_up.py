"""A tiny random encoder and made-up data in the layout of GLUE, to run an experiment in seconds."""

from pathlib import Path

import jax
import numpy as np

import growjax as gj


WORDS = ("yes", "no", *(f"{a}{b}" for a in "bdfgk" for b in "aeiou"))
_SPECIALS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def make_up(folder: Path, rows: tuple[int, int] = (64, 40)) -> tuple[Path, Path]:
    """Write data and a model into a folder and say where: `(data, model)`.

    A row is of class 1 (or entailed) if its text ends in "yes", and of class 0 if in "no".
    """
    data, model = folder / "glue", folder / "model"
    config = gj.models.BERTConfig(
        layers=1,
        embed=12,
        heads=3,
        head_dim=4,
        mlp=24,
        vocab=len(_SPECIALS) + len(WORDS),
        positions=24,
    )
    gj.hf.save(gj.models.BERT(config, key=jax.random.key(0)), model)
    (model / "vocab.txt").write_text("\n".join([*_SPECIALS, *WORDS]) + "\n")
    rng = np.random.default_rng(0)
    for split, count in zip(("train", "dev"), rows, strict=True):
        for name, (header, line) in _TABLES.items():
            lines = [] if header is None else [header]
            for i in range(count):
                label = int(rng.integers(2))
                words = rng.choice(WORDS[2:], 6).tolist()
                words[5] = WORDS[1 - label]
                lines.append(line(i, " ".join(words[:3]), " ".join(words[3:]), label))
            path = data / name / f"{split}.tsv"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("\n".join(lines) + "\n")
    return data, model


# The header of each table, and the function that formats a row of it
_TABLES = {
    "RTE": (
        "index\tsentence1\tsentence2\tlabel",
        lambda i, a, b, y: f"{i}\t{a}\t{b}\t{'entailment' if y else 'not_entailment'}",
    ),
    "MRPC": (
        "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String",
        lambda i, a, b, y: f"{y}\t{i}\t{i}\t{a}\t{b}",
    ),
    "CoLA": (None, lambda i, a, b, y: f"x\t{y}\t\t{a} {b}"),
    "SST-2": ("sentence\tlabel", lambda i, a, b, y: f"{a} {b}\t{y}"),
}
