"""The command `growjax export`: a run or a checkpoint as a folder that `transformers` loads."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from growjax import __version__
from growjax.axes import sizes
from growjax.cost import parameters
from growjax.data import Tokenizer, load_tokenizer
from growjax.data.tokenizer_export import stock_files
from growjax.errors import CheckpointError, DataError
from growjax.hf.companions import front_matter
from growjax.hf.convert import save, with_dtype
from growjax.hf.files import located
from growjax.models.protocol import kind_of
from growjax.runs.lineage import load_model, operators_of, pretrained_folder
from growjax.runs.run import Run, checkpoint_in


def export_checkpoint(
    path: str | Path,
    out: str | Path,
    *,
    source: str | Path | None = None,
    tokenizer: str | Path | None = None,
    window: int | None = None,
    dtype: str | None = None,
) -> None:
    """Write the model of a checkpoint (of a run, its last one) as a folder of `transformers`.

    It has the weights, `config.json` and `generation_config.json` with the special ids, the tokenizer and
    a card. A model that was trained on from a Hugging Face folder keeps the files of that folder.

    **Arguments**

    - `source`: the folder that the model came from; None is the one that the run started from, if any.
    - `tokenizer`: another tokenizer than the one that the run was trained with.
    - `window`: the most tokens that the model reads, for models without a limit of their own; None is the
      longest window of the run's plan.
    - `dtype`: the dtype of the parameters in the files; None is that of the model.

    Raises `CheckpointError` for a folder that is no run or checkpoint, and if `source` has another
    tokenizer than the run, `HuggingFaceError` if no stock
    model computes the same function, and `GateError` while gates are not open; nothing is written then.
    """
    checkpoint = checkpoint_in(path)
    model, lineage = load_model(checkpoint)
    if dtype is not None:
        model = with_dtype(model, dtype)
    origin = source or pretrained_folder(lineage)
    trained = load_tokenizer(tokenizer or lineage["tokenizer"])
    if origin is not None and _same(trained, located(origin)):
        save(model, out, source=origin, more=_card(model, lineage, checkpoint, origin))
        return
    if source is not None:
        raise CheckpointError(
            f"source: the tokenizer of {source} is not the one that the model was trained with; leave it "
            "out, and the tokenizer of the run is written"
        )
    limit = sizes(model).get("positions") or window or _window_of(checkpoint)
    files = stock_files(trained, kind=kind_of(model), window=limit)
    ids = _special_ids(model, trained)
    if ids:
        files["generation_config.json"] = json.dumps(ids, indent=2, sort_keys=True) + "\n"
    keys: dict[str, Any] = {**ids}
    if ids:
        # Older readers take one id here
        keys["eos_token_id"] = trained.vocabulary.separator
    if kind_of(model) == "causal" and "positions" not in sizes(model) and limit is not None:
        keys["max_position_embeddings"] = limit
    more = {**files, **_card(model, lineage, checkpoint, origin)}
    save(model, out, keys=keys, more=more)


def _same(tokenizer: Tokenizer, folder: Path) -> bool:
    """Whether the tokenizer of a run is that of a folder, so that the files of the folder hold."""
    try:
        own = load_tokenizer(folder)
    except DataError:  # a folder of weights alone, to which the run's tokenizer is written
        return False
    return _text_of(tokenizer) == _text_of(own)


def _text_of(tokenizer: Tokenizer) -> str:
    """The algorithm and the words of a tokenizer as a text."""
    to_json = getattr(tokenizer, "to_json", None)
    return tokenizer.vocabulary.digest if to_json is None else to_json()


def _special_ids(model: Any, tokenizer: Tokenizer) -> dict[str, Any]:
    """The ids that generation needs, by the names of `transformers`; none for an encoder."""
    kind, vocabulary = kind_of(model), tokenizer.vocabulary
    if kind == "encoder":
        return {}
    ends = [*tokenizer.ends]
    ids: dict[str, Any] = {"eos_token_id": ends[0] if len(ends) == 1 else ends}
    if "pad" in vocabulary.specials:
        ids["pad_token_id"] = vocabulary.specials["pad"]
    if kind == "seq2seq":
        ids["decoder_start_token_id"] = vocabulary.specials["pad"]
    else:
        ids["bos_token_id"] = vocabulary.separator
    return ids


def _window_of(checkpoint: Path) -> int | None:
    """The longest window that the run of a checkpoint trained on, or None if its plan is not there."""
    # RUN/checkpoints/STEP-STAGE
    run = Run(checkpoint.parent.parent)
    if not run.plan_file.is_file():
        return None
    return max(span.objective.raw_length for span in run.plan().spans)


def _card(
    model: Any, lineage: Mapping[str, Any], path: Path, origin: str | Path | None
) -> dict[str, str]:
    """The model card: what was trained, for how long, and how it grew."""
    operators = [f"- `{op}`" for op in operators_of(lineage)] or ["- none"]
    metadata = "tags:\n- growjax\n" if origin is None else front_matter(origin)
    text = _CARD.format(
        metadata=metadata,
        plan=lineage["plan"],
        version=__version__,
        count=f"{parameters(model):,}",
        sizes=", ".join(f"{axis} {size}" for axis, size in sizes(model).items()),
        checkpoint=path.name,
        tokens=f"{lineage['tokens']:,}",
        step=f"{lineage['step']:,}",
        digest=lineage["data"],
        operators="\n".join(operators),
    )
    return {"README.md": text}


_CARD = """---
{metadata}---

# {plan}

Trained by growjax {version}: {count} parameters; {sizes}. Checkpoint `{checkpoint}`, after {step} steps
and {tokens} tokens of a corpus whose digest is `{digest}`.

It grew by:

{operators}
"""
