"""BLiMP: which of two sentences that differ in one point of grammar a model finds likelier.

Warstadt et al., "BLiMP: The Benchmark of Linguistic Minimal Pairs for English", TACL 2020.
"""

from pathlib import Path

from growjax.errors import EvalError
from growjax.evals.files import read_archive
from growjax.evals.language import LanguageModel
from growjax.evals.metrics import Scores


# What the files call by another name than the paper, which counts 12 phenomena
_PAPERS = {"s-selection": "argument_structure"}


def blimp(language: LanguageModel, path: str | Path, *, limit: int | None = None) -> Scores:
    """The share of pairs whose good sentence is the likelier one; half of them is chance.

    **Arguments**

    - `language`: a decoder, scored by the likelihood of whole sentences; or an encoder, by their
      pseudo-log-likelihood.
    - `path`: the folder of the 67 files of pairs (`adjunct_island.jsonl` and so on), or a tar archive.
    - `limit`: how many pairs of each file; None is all 1,000.

    `{"accuracy": ...}` is the mean over the files; `phenomenon/...` is that over the files of each of
    the paper's 12 phenomena, and `paradigm/...` that of each file. A tie is an error. Raises `EvalError`
    if there are no files, or other ones.

    **Example**

        blimp(LanguageModel(model, tokenizer), "blimp/data", limit=100)["accuracy"]
    """
    names, terms, pairs = [], {}, []
    for name, records in read_archive(Path(path), ".jsonl"):
        for record in records[:limit]:
            try:
                pairs.append((record["sentence_good"], record["sentence_bad"]))
                term = record.get("linguistics_term", "other")
                terms.setdefault(_PAPERS.get(term, term), {})[name] = None
            except KeyError as error:
                raise EvalError(
                    f"{path}: {name} has no {error}, as the pairs of BLiMP have"
                ) from error
            names.append(name)
    if not pairs:
        raise EvalError(f"{path}: expected the .jsonl files of BLiMP, found none")
    scored = language.loglikelihoods([("", sentence) for pair in pairs for sentence in pair])
    right: dict[str, list[bool]] = {}
    for name, good, bad in zip(names, scored[::2], scored[1::2], strict=True):
        right.setdefault(name, []).append(good.logprob > bad.logprob)
    share = {name: sum(found) / len(found) for name, found in right.items()}

    def mean(files) -> float:
        return sum(share[file] for file in files) / len(files)

    return {
        "accuracy": mean(share),
        **{f"phenomenon/{term}": mean(files) for term, files in sorted(terms.items())},
        **{f"paradigm/{name}": value for name, value in share.items()},
    }
