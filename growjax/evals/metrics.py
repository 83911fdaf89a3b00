"""How tasks are scored: the benchmarks' own metrics, each a thin function over a well-kept one.

Counting and correlating is scikit-learn's and SciPy's. What they do not have is written here, in the
words of the official scripts: how answers are normalised before they are compared, and the metrics that
group several answers to one question. Every score is a share from 0 to 1, or a correlation.
"""

import collections
import re
import string
import warnings
from collections.abc import Callable, Hashable, Sequence

import numpy as np

from growjax.errors import EvalError
from growjax.extras import load


_SKLEARN = "sklearn.metrics", "this metric"
Scores = dict[str, float]
Normalise = Callable[[str], str]


# Labels ------------------------------------------------------------------------------------------


def accuracy(truth: Sequence, predicted: Sequence) -> Scores:
    """The share of predictions that are right: `{"accuracy": ...}`."""
    _paired(truth, predicted)
    return {"accuracy": float(load(*_SKLEARN).accuracy_score(truth, predicted))}


def f1(truth: Sequence, predicted: Sequence, positive: Hashable = "1") -> Scores:
    """The harmonic mean of precision and recall of one label, and the accuracy.

    0 where nothing is predicted to be positive, as in the GLUE scripts.
    """
    _paired(truth, predicted)
    found = load(*_SKLEARN).f1_score(
        [label == positive for label in truth],
        [label == positive for label in predicted],
        zero_division=0,
    )
    return {"f1": float(found), **accuracy(truth, predicted)}


def macro_f1(truth: Sequence, predicted: Sequence) -> Scores:
    """The mean of the labels' F1, over those that are in either list, and the accuracy."""
    _paired(truth, predicted)
    found = load(*_SKLEARN).f1_score(truth, predicted, average="macro", zero_division=0)
    return {"f1": float(found), **accuracy(truth, predicted)}


def matthews(truth: Sequence, predicted: Sequence) -> Scores:
    """Matthews' correlation of two labellings; 0 if one of them has one label only."""
    _paired(truth, predicted)
    if len(set(truth)) == 1 or len(set(predicted)) == 1:
        return {"matthews": 0.0}
    return {"matthews": float(load(*_SKLEARN).matthews_corrcoef(truth, predicted))}


def correlations(truth: Sequence[float], predicted: Sequence[float]) -> Scores:
    """Pearson's and Spearman's correlation.

    They do not exist for a constant: then both are 0, and `"constant": 1.0` says why.
    """
    _paired(truth, predicted)
    if np.ptp(np.asarray(truth)) == 0 or np.ptp(np.asarray(predicted)) == 0:
        return {"pearson": 0.0, "spearman": 0.0, "constant": 1.0}
    stats = load("scipy.stats", "this metric")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", stats.NearConstantInputWarning)
        pearson = stats.pearsonr(truth, predicted).statistic
        spearman = stats.spearmanr(truth, predicted).statistic
    return {"pearson": float(pearson), "spearman": float(spearman)}


def grouped_f1(groups: Sequence[Hashable], truth: Sequence, predicted: Sequence) -> Scores:
    """MultiRC's two: the F1 of "1" over all answers, and the share of questions without a mistake.

    Khashabi et al., "Looking Beyond the Surface", NAACL 2018.

    **Example**

        grouped_f1(["q1", "q1", "q2"], ["1", "0", "1"], ["1", "1", "1"])    # f1 0.8, exact_match 0.5
    """
    _paired(groups, truth)
    right: dict[Hashable, bool] = {}
    for group, label, guess in zip(groups, truth, predicted, strict=True):
        right[group] = right.get(group, True) and label == guess
    exact = sum(right.values()) / len(right)
    return {"f1": f1(truth, predicted)["f1"], "exact_match": exact}


# Answers in words ----------------------------------------------------------------------------------


_ARTICLES = re.compile(r"\b(a|an|the)\b")
_QUOTES = "\u2018\u2019\u00b4`"


def normalise_squad(answer: str) -> str:
    """Lower case, without punctuation, articles and more than one space (SQuAD, ReCoRD)."""
    bare = "".join(c for c in answer.lower() if c not in string.punctuation)
    return " ".join(_ARTICLES.sub(" ", bare).split())


def normalise_triviaqa(answer: str) -> str:
    """The same, but with spaces for punctuation and quotes, as in TriviaQA's script."""
    marks = string.punctuation + _QUOTES
    bare = "".join(" " if c in marks else c for c in answer.lower())
    return " ".join(_ARTICLES.sub(" ", bare).split())


def token_f1(answer: str, gold: str, normalise: Normalise = normalise_squad) -> float:
    """The F1 of the words of two answers, counted with repetition; two empty ones agree."""
    ours, theirs = normalise(answer).split(), normalise(gold).split()
    if not ours or not theirs:
        return float(ours == theirs)
    shared = sum((collections.Counter(ours) & collections.Counter(theirs)).values())
    return 2 * shared / (len(ours) + len(theirs))


def answers(
    given: Sequence[str], gold: Sequence[Sequence[str]], normalise: Normalise = normalise_squad
) -> Scores:
    """Exact match and token F1 of answers, each against the best of those that are accepted.

    A question without an answer (SQuAD 2.0) accepts the empty one alone. If some have none and others
    do, the scores are given for both kinds too: `answerable_f1`, `unanswerable_f1` and so on.
    Rajpurkar et al., "SQuAD", EMNLP 2016; "Know What You Don't Know", ACL 2018.

    **Example**

        answers(["the Eiffel tower"], [["Eiffel Tower", "Tour Eiffel"]])     # exact_match 1, f1 1
    """
    _paired(gold, given)
    exact, overlap = [], []
    for answer, accepted in zip(given, gold, strict=True):
        # An accepted answer of articles alone is one that nobody could give
        kept = [a for a in accepted if normalise(a)] or [""]
        exact.append(max(float(normalise(answer) == normalise(a)) for a in kept))
        overlap.append(max(token_f1(answer, a, normalise) for a in kept))
    has = np.array([bool(accepted) for accepted in gold])
    scores = {"exact_match": float(np.mean(exact)), "f1": float(np.mean(overlap))}
    if has.any() and not has.all():
        for kind, which in (("answerable", has), ("unanswerable", ~has)):
            scores[f"{kind}_exact_match"] = float(np.mean(np.array(exact)[which]))
            scores[f"{kind}_f1"] = float(np.mean(np.array(overlap)[which]))
    return scores


def _paired(truth: Sequence, predicted: Sequence) -> None:
    if len(truth) != len(predicted) or not len(truth):
        raise EvalError(
            "a metric compares two lists of the same length, not empty; got "
            f"{len(truth)} and {len(predicted)}"
        )
