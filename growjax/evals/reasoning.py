"""Reasoning primitives: small problems, made on the spot, that a model solves from what it just read.

Copying what followed before (induction), looking up a variable through zero, one or two others, and sums
of digits. Depth by stacking helps these more than perplexity (Saunshi et al., "On the Inductive Bias of
Stacking Towards Improving Reasoning", NeurIPS 2024). The wording is our own; compare runs of our own.
"""

import string
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from growjax.errors import EvalError, expect_one_of
from growjax.evals.language import LanguageModel
from growjax.evals.metrics import Scores


class Problem(NamedTuple):
    """What is read, what should follow, and what could follow if one did not understand."""

    prompt: str
    answer: str
    options: tuple[str, ...]


def _copy(rng: np.random.Generator) -> Problem:
    """Ten made-up words, then three of them again in a row: which one is next?"""
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
    """Five variables get digits, and `depth` times five others get them on: what is the last kind?"""

    def problem(rng: np.random.Generator) -> Problem:
        names = rng.permutation(list(string.ascii_lowercase)).tolist()
        digits = rng.permutation(10)[:5].astype(str).tolist()
        level = dict(zip(names[:5], digits, strict=True))
        said = [f"{name}={digit}" for name, digit in level.items()]
        for i in range(1, depth + 1):
            fresh = names[5 * i : 5 * i + 5]
            sources = dict(zip(fresh, rng.permutation(list(level)).tolist(), strict=True))
            said += [f"{name}={source}" for name, source in sources.items()]
            level = {name: level[source] for name, source in sources.items()}
        asked = str(rng.choice(list(level)))
        return Problem(f"{','.join(said)},{asked}=", level[asked], tuple(digits))

    return problem


def _arithmetic(rng: np.random.Generator) -> Problem:
    """The sum or the difference of two digits, itself a digit."""
    one, other, unknown = rng.permutation(list(string.ascii_lowercase))[:3].tolist()
    result, part = int(rng.integers(0, 10)), int(rng.integers(0, 10))
    if rng.integers(2):
        left, right, sign = (result - part, part, "+") if part <= result else (result, 0, "+")
    else:
        left, right, sign = (result + part, part, "-") if result + part < 10 else (result, 0, "-")
    prompt = f"{one}={left},{other}={right},{unknown}={one}{sign}{other},{unknown}="
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

    Problem n does not depend on how many there are. Raises `EvalError` for an unknown name.

    **Example**

        problems("variables-1", 200)[0].prompt.splitlines()[-1]     # such as "k=3,...,y=k,q=u,y="
    """
    expect_one_of(EvalError, "name", name, PRIMITIVES)
    make, found = PRIMITIVES[name], []
    for i in range(count):
        rng = np.random.default_rng([seed, i])
        shown = "".join(f"{p.prompt}{p.answer}\n" for p in (make(rng) for _ in range(shots)))
        asked = make(rng)
        found.append(asked._replace(prompt=shown + asked.prompt))
    return found


def primitives(
    language: LanguageModel, name: str, *, count: int = 500, shots: int = 5, seed: int = 0
) -> Scores:
    """How many problems of one kind (`PRIMITIVES`) a model solves.

    `exact_match`: the likeliest tokens are the answer and the end of the line. `choice`: no option is
    likelier than the answer; options are what could be copied, or all digits, and `chance` is the share
    for guessing one of them.

    **Example**

        primitives(LanguageModel(model, tokenizer), "copy")["choice"]
    """
    asked = problems(name, count, shots=shots, seed=seed)
    if not asked:
        raise EvalError(f"count: expected 1 problem or more, got {count}")
    pairs = [(p.prompt, f"{option}\n") for p in asked for option in p.options]
    scored = iter(language.loglikelihoods(pairs))
    exact = chosen = 0
    for problem in asked:
        found = {option: next(scored) for option in problem.options}
        exact += found[problem.answer].greedy
        best = max(scores.logprob for scores in found.values())
        chosen += found[problem.answer].logprob == best
    return {
        "exact_match": exact / count,
        "choice": chosen / count,
        "chance": sum(1 / len(p.options) for p in asked) / count,
    }
