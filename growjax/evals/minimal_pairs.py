"""BLiMP: pairs of sentences that differ in one point of grammar; the model should prefer the right one.

Warstadt et al., "BLiMP: The Benchmark of Linguistic Minimal Pairs for English", TACL 2020.
"""

from pathlib import Path

from growjax.errors import EvalError
from growjax.evals.files import read_archive
from growjax.evals.language import LanguageModel
from growjax.evals.metrics import Scores


# Terms of the files that the paper counts under another of its 12 phenomena
_PHENOMENA = {"s-selection": "argument_structure"}


def blimp(language: LanguageModel, path: str | Path, *, limit: int | None = None) -> Scores:
    """The share of pairs whose good sentence is the likelier one; 0.5 is chance.

    **Arguments**

    - `language`: a decoder, scored by the likelihood of whole sentences; or an encoder, by their
      pseudo-log-likelihood.
    - `path`: the folder of the 67 files of pairs (`adjunct_island.jsonl` and so on), or a tar archive.
    - `limit`: how many pairs of each file; None is all 1,000.

    `{"accuracy": ...}` is the mean over the files; `phenomenon/...` is the mean over the files of each
    of the paper's 12 phenomena, and `paradigm/...` the share of each file. A tie counts as a mistake.
    Raises `EvalError` without files, and for records without the fields of BLiMP.

    **Example**

        blimp(LanguageModel(model, tokenizer), "blimp/data", limit=100)["accuracy"]
    """
    # A dict per phenomenon serves as an ordered set of its files
    names, phenomena, pairs = [], {}, []
    for name, records in read_archive(Path(path), ".jsonl"):
        for record in records[:limit]:
            try:
                pairs.append((record["sentence_good"], record["sentence_bad"]))
                term = record.get("linguistics_term", "other")
                phenomena.setdefault(_PHENOMENA.get(term, term), {})[name] = None
            except KeyError as error:
                raise EvalError(
                    f"{path}: {name} has no {error}, which every pair of BLiMP has"
                ) from error
            names.append(name)
    if not pairs:
        raise EvalError(f"{path}: expected the .jsonl files of BLiMP, got none")
    scored = language.loglikelihoods([("", sentence) for pair in pairs for sentence in pair])
    right: dict[str, list[bool]] = {}
    for name, good, bad in zip(names, scored[::2], scored[1::2], strict=True):
        right.setdefault(name, []).append(good.logprob > bad.logprob)
    share = {name: sum(results) / len(results) for name, results in right.items()}

    def mean(files) -> float:
        return sum(share[file] for file in files) / len(files)

    return {
        "accuracy": mean(share),
        **{f"phenomenon/{name}": mean(files) for name, files in sorted(phenomena.items())},
        **{f"paradigm/{name}": value for name, value in share.items()},
    }
