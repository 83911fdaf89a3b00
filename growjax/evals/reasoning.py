"""Reasoning primitives: small generated problems that a model solves from its context.

They are copying the word that followed before (induction), looking up a variable through zero, one or
two others, and sums of digits. Growing depth by stacking improves these more than perplexity (Saunshi et
al., "On the Inductive Bias of Stacking Towards Improving Reasoning", NeurIPS 2024). The wording is
growjax's own, so scores compare runs of growjax and not with the paper.
"""

import string
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from growjax.errors import EvalError, expect_one_of
from growjax.evals.language import LanguageModel
from growjax.evals.metrics import Scores


class Problem(NamedTuple):
    """A prompt, the right answer, and all answers that a guess could choose from."""

    prompt: str
    answer: str
    options: tuple[str, ...]


def _copy(rng: np.random.Generator) -> Problem:
    """Ten random words, then three of them again in a row; the answer is the word after the third."""
    letters = list(string.ascii_lowercase)
    words: list[str] = []
    while len(words) < 10:
        word = "".join(rng.choice(letters, 3))
        if word not in words:
            words.append(word)
    start = int(rng.integers(0, 7))
    prompt = " ".join([*words, *words[start : start + 3]])
    return Problem(prompt, f" {words[start + 3]}", tuple(f" {word}" for word in words))


def _variables(depth: int) -> Callable[[np.random.Generator], Problem]:
    """Five variables equal digits; then, `depth` times, five more equal one of the last five each.

    The answer is the digit of one variable of the last five.
    """

    def problem(rng: np.random.Generator) -> Problem:
        names = rng.permutation(list(string.ascii_lowercase)).tolist()
        digits = rng.permutation(10)[:5].astype(str).tolist()
        values = dict(zip(names[:5], digits, strict=True))
        equations = [f"{name}={digit}" for name, digit in values.items()]
        for i in range(1, depth + 1):
            # Each of the next five names equals one of the last five, in random order
            fresh = names[5 * i : 5 * i + 5]
            sources = dict(zip(fresh, rng.permutation(list(values)).tolist(), strict=True))
            equations += [f"{name}={source}" for name, source in sources.items()]
            values = {name: values[source] for name, source in sources.items()}
        query = str(rng.choice(list(values)))
        return Problem(f"{','.join(equations)},{query}=", values[query], tuple(digits))

    return problem


def _arithmetic(rng: np.random.Generator) -> Problem:
    """The sum or the difference of two digits, itself a digit."""
    a, b, unknown = rng.permutation(list(string.ascii_lowercase))[:3].tolist()
    # The result is drawn first, so that all digits are equally likely
    result, right = int(rng.integers(0, 10)), int(rng.integers(0, 10))
    sign = "+" if rng.integers(2) else "-"
    left = result - right if sign == "+" else result + right
    if not 0 <= left < 10:
        left, right = result, 0
    prompt = f"{a}={left},{b}={right},{unknown}={a}{sign}{b},{unknown}="
    return Problem(prompt, str(result), tuple(string.digits))


PRIMITIVES: dict[str, Callable[[np.random.Generator], Problem]] = {
    "copy": _copy,
    "variables-0": _variables(0),
    "variables-1": _variables(1),
    "variables-2": _variables(2),
    "arithmetic": _arithmetic,
}


def problems(name: str, count: int, *, shots: int = 5, seed: int = 0) -> list[Problem]:
    """Problems of one kind, each after `shots` solved ones, a line each; the same ones for a seed.

    Problem n does not depend on `count`. Raises `EvalError` for an unknown name.

    **Example**

        problems("variables-1", 200)[0].prompt.splitlines()[-1]     # such as "k=3,...,y=k,q=u,y="
    """
    expect_one_of(EvalError, "name", name, PRIMITIVES)
    draw, drawn = PRIMITIVES[name], []
    for i in range(count):
        rng = np.random.default_rng([seed, i])
        solved = [draw(rng) for _ in range(shots)]
        examples = "".join(f"{problem.prompt}{problem.answer}\n" for problem in solved)
        problem = draw(rng)
        drawn.append(problem._replace(prompt=examples + problem.prompt))
    return drawn


def primitives(
    language: LanguageModel, name: str, *, count: int = 500, shots: int = 5, seed: int = 0
) -> Scores:
    """The shares of problems of one kind (`PRIMITIVES`) that a model solves.

    `exact_match`: the likeliest tokens are the answer and the end of the line. `choice`: no option is
    likelier than the answer; options are the words or digits that the problem could have as its answer,
    and `chance` is the expected `choice` of a guess among them.

    **Example**

        primitives(LanguageModel(model, tokenizer), "copy")["choice"]
    """
    drawn = problems(name, count, shots=shots, seed=seed)
    if not drawn:
        raise EvalError(f"count: expected 1 problem or more, got {count}")
    pairs = [(p.prompt, f"{option}\n") for p in drawn for option in p.options]
    scored = iter(language.loglikelihoods(pairs))
    exact = chosen = 0
    for problem in drawn:
        scores = {option: next(scored) for option in problem.options}
        exact += scores[problem.answer].greedy
        best = max(score.logprob for score in scores.values())
        chosen += scores[problem.answer].logprob == best
    return {
        "exact_match": exact / count,
        "choice": chosen / count,
        "chance": sum(1 / len(p.options) for p in drawn) / count,
    }
