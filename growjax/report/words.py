"""The results of comparisons as sentences; a difference that is not significant is never an equality."""

import math
from collections.abc import Sequence

from growjax.report.arms import Arm, by_place, place, sizes_in_words
from growjax.report.rows import AgainstFrontier, EqualCost


# The most arms of one verdict that a sentence names; it gives only the number of more arms
_NAMED = 4


def answer(arms: Sequence[Arm], rows: Sequence[AgainstFrontier]) -> list[str]:
    """The results of a comparison with the frontier: a sentence or two for each workload and budget.

    The text never calls a difference that is not significant an equality.
    """
    if not any(arm.fixed for arm in arms):
        return [
            "No arm here trains one model of one size from its first step to its last, so there is no "
            "baseline: these runs cannot tell whether growing pays."
        ]
    if not rows:
        best = min((arm for arm in arms if arm.fixed), key=lambda arm: arm.loss)
        return [
            f"All arms here are of one fixed size; the lowest loss is that of {best.name}, "
            f"{best.loss:.4f} nats. No arm that grows is compared with them."
        ]
    sentences = []
    for group in by_place(rows).values():
        best = min(group, key=_estimate)
        sentence = (
            f"{verdicts(group, 'the best fixed size at equal cost')} That fixed size is "
            f"{best.baseline}; fixed sizes run to such a cost: {sizes_in_words(best.sizes)}."
        )
        if len(best.sizes) < 2:
            sentence += " No other size was run for as long; one of those may be better still."
        sentences.append(sentence)
    return sentences


_PHRASES = {
    "better": "better than {}",
    "equivalent": "equivalent to {}",
    "no difference found": "no difference found to {}",
    "worse": "worse than {}",
    "too few seeds": "too few seeds to say (6 are needed), against {}",
}


def verdicts(rows: Sequence[EqualCost], baseline: str) -> str:
    """A sentence with the arms of each verdict and their differences.

    All rows have one workload and one budget.
    """
    kinds: dict[str, list[EqualCost]] = {kind: [] for kind in _PHRASES}
    for row in sorted(rows, key=_estimate):
        kinds[row.verdict].append(row)
    parts = [
        f"{_PHRASES[kind].format(baseline)}: {_list(group)}"
        for kind, group in kinds.items()
        if group
    ]
    text = "; ".join(parts) + "."
    setting = place(rows[0].workload, rows[0].budget)
    return f"At {setting}, {text}" if setting else text[0].upper() + text[1:]


def _estimate(row: EqualCost) -> float:
    return math.inf if row.estimate is None else row.estimate


def _list(rows: Sequence[EqualCost]) -> str:
    """The arms with their differences; of many arms, the first and the last."""
    if len(rows) <= _NAMED:
        return ", ".join(f"{row.arm} {_by(row)}" for row in rows)
    first, last = rows[0], rows[-1]
    return (
        f"{len(rows)} arms, from {first.arm} ({first.estimate:+.3f} nats) to {last.arm} "
        f"({last.estimate:+.3f})"
    )


def _by(row: EqualCost) -> str:
    """By how much an arm is better or worse; a signed difference for the other verdicts."""
    if row.verdict not in ("better", "worse") or row.interval is None or row.estimate is None:
        return interval_text(row.estimate, row.interval)
    low, high = sorted(abs(x) for x in row.interval if x is not None)
    return f"by {abs(row.estimate):.3f} nats ({low:.3f} to {high:.3f})"


# Numbers in words --------------------------------------------------------------------------------


def interval_text(
    mean: float | None, interval: Sequence[float | None] | None, form: str = "+.3f"
) -> str:
    """A number with its interval, or alone if one seed gives none."""
    if mean is None:
        return "-"
    if interval is None or None in interval:
        return format(mean, form)
    low, high = interval
    return f"{mean:{form}} ({low:{form}} to {high:{form}})"


def bounded(value: float | None, bound: str, interval: Sequence[float | None] | None = None) -> str:
    """A speed-up with its interval, or a bound on the speed-up.

    **Example**

        bounded(2.412, ">=") == ">= 2.41"
    """
    if value is None:
        return "-"
    if bound != "=":
        return f"{bound} {value:.2f}"
    return interval_text(value, interval, ".2f")
