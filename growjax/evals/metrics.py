"""The benchmarks' own metrics.

scikit-learn and SciPy compute F1 and correlations. This module adds what they lack, after the official
scripts: the normalisation of answers before they are compared, and the metrics over several answers to
one question. Every score is a share from 0 to 1, or a correlation.
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
    score = load(*_SKLEARN).f1_score(
        [label == positive for label in truth],
        [label == positive for label in predicted],
        zero_division=0,
    )
    return {"f1": float(score), **accuracy(truth, predicted)}


def macro_f1(truth: Sequence, predicted: Sequence) -> Scores:
    """The mean F1 of all labels in either list, and the accuracy."""
    _paired(truth, predicted)
    score = load(*_SKLEARN).f1_score(truth, predicted, average="macro", zero_division=0)
    return {"f1": float(score), **accuracy(truth, predicted)}


def matthews(truth: Sequence, predicted: Sequence) -> Scores:
    """Matthews' correlation of two lists of labels; 0 if either has a single label."""
    _paired(truth, predicted)
    if len(set(truth)) == 1 or len(set(predicted)) == 1:
        return {"matthews": 0.0}
    return {"matthews": float(load(*_SKLEARN).matthews_corrcoef(truth, predicted))}


def correlations(truth: Sequence[float], predicted: Sequence[float]) -> Scores:
    """Pearson's and Spearman's correlation.

    They are undefined if either list is constant: then both are 0, and `"constant": 1.0` marks it.
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
    """MultiRC's metrics: the F1 of "1" over all answers, and the share of questions without a mistake.

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


# Answers as text -----------------------------------------------------------------------------------


_ARTICLES = re.compile(r"\b(a|an|the)\b")
_QUOTES = "\u2018\u2019\u00b4`"  # both single quotes, the acute accent and the backtick


def normalise_squad(answer: str) -> str:
    """Lower case, without punctuation, articles and more than one space (SQuAD, ReCoRD)."""
    bare = "".join(c for c in answer.lower() if c not in string.punctuation)
    return " ".join(_ARTICLES.sub(" ", bare).split())


def normalise_triviaqa(answer: str) -> str:
    """As `normalise_squad`, with a space for each punctuation mark and quote (TriviaQA)."""
    marks = string.punctuation + _QUOTES
    bare = "".join(" " if c in marks else c for c in answer.lower())
    return " ".join(_ARTICLES.sub(" ", bare).split())


def token_f1(answer: str, gold: str, normalise: Normalise = normalise_squad) -> float:
    """The F1 of the words of two answers, counted with repetition; 1 if both are empty."""
    words, gold_words = normalise(answer).split(), normalise(gold).split()
    if not words or not gold_words:
        return float(words == gold_words)
    shared = sum((collections.Counter(words) & collections.Counter(gold_words)).values())
    return 2 * shared / (len(words) + len(gold_words))


def answers(
    given: Sequence[str], gold: Sequence[Sequence[str]], normalise: Normalise = normalise_squad
) -> Scores:
    """Exact match and token F1 of answers, each against the best matching of its accepted answers.

    A question without accepted answers (SQuAD 2.0) accepts the empty one alone. If there are questions of
    both kinds, each kind has scores of its own too: `answerable_f1`, `unanswerable_f1` and so on.
    Rajpurkar et al., "SQuAD", EMNLP 2016; "Know What You Don't Know", ACL 2018.

    **Example**

        answers(["the Eiffel tower"], [["Eiffel Tower", "Tour Eiffel"]])     # exact_match 1, f1 1
    """
    _paired(gold, given)
    exact, overlap = [], []
    for answer, accepted in zip(given, gold, strict=True):
        # SQuAD's script ignores accepted answers that normalise to nothing, such as "the"
        candidates = [a for a in accepted if normalise(a)] or [""]
        exact.append(max(float(normalise(answer) == normalise(a)) for a in candidates))
        overlap.append(max(token_f1(answer, a, normalise) for a in candidates))
    answerable = np.array([bool(accepted) for accepted in gold])
    scores = {"exact_match": float(np.mean(exact)), "f1": float(np.mean(overlap))}
    if answerable.any() and not answerable.all():
        for kind, members in (("answerable", answerable), ("unanswerable", ~answerable)):
            scores[f"{kind}_exact_match"] = float(np.mean(np.array(exact)[members]))
            scores[f"{kind}_f1"] = float(np.mean(np.array(overlap)[members]))
    return scores


def _paired(truth: Sequence, predicted: Sequence) -> None:
    """Raise `EvalError` unless two lists have the same length, which is not 0."""
    if len(truth) != len(predicted) or not len(truth):
        raise EvalError(
            "a metric compares two lists of the same length, not empty; got lengths "
            f"{len(truth)} and {len(predicted)}"
        )
