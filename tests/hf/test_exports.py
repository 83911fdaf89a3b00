"""Every operator on every family that it grows: what is written is read by transformers, or refused."""

# pyright: reportMissingImports=false
from pathlib import Path

import jax
import numpy as np
import pytest
import torch

import growjax as gj
from growjax.errors import HuggingFaceError
from tests.exports import EXPORTS, families_of, grown
from tests.folders import batch, outputs
from tests.hf.oracle import reloaded


CASES = {
    f"{f}-{row.op}": (row, f) for rows in EXPORTS.values() for row in rows for f in families_of(row)
}
# One family of every operator, in turn (T5's two stacks take longest); all at the deep profile
FIRST = [rows[0] for rows in EXPORTS.values()]
SAMPLE = {
    f"{(fs := families_of(row))[i % min(len(fs), 3)]}-{row.op}" for i, row in enumerate(FIRST)
}
# Of the largest output
LIMIT = 5e-6


@pytest.mark.parametrize(
    "case", [pytest.param(c, marks=[] if c in SAMPLE else [pytest.mark.slow]) for c in CASES]
)
def test_a_grown_model_is_read_by_transformers_or_refused(case: str, tmp_path: Path):
    row, family = CASES[case]
    big = grown(row, family)
    if family in row.refused:
        with pytest.raises(HuggingFaceError) as caught:
            gj.hf.save(big, tmp_path / "big")
        assert row.refused[family] in str(caught.value)
        return
    gj.hf.save(big, tmp_path / "big")
    # An operator may have made the vocabulary smaller
    given = jax.tree.map(lambda ids: ids % gj.sizes(big)["vocab"], batch(big))
    ours = outputs(big, given)
    expected = np.asarray(getattr(ours, "mlm_logits", ours))
    gap = np.abs(_theirs(tmp_path / "big", given) - expected).max() / np.abs(expected).max()
    print(f"{case}: {gap:.1e}")
    assert gap <= LIMIT


def _theirs(folder: Path, given: object) -> np.ndarray:
    """The logits of transformers for the folder's model."""
    model = reloaded(folder)
    if hasattr(model, "set_experts_implementation") and "num_local_experts" in vars(model.config):
        model.set_experts_implementation("eager")  # grouped products need rows of 16 bytes
    tokens = [
        torch.from_numpy(np.asarray(x, np.int64))
        for x in (given if isinstance(given, tuple) else [given])
    ]
    names = ("input_ids", "decoder_input_ids")
    with torch.no_grad():
        result = model(**dict(zip(names, tokens, strict=False)))
    return (
        result["prediction_logits"] if "prediction_logits" in result else result["logits"]
    ).numpy()
