"""Questions and their accepted answers: SQuAD, and the closed-book sets, which are asked here.

Rajpurkar et al., "SQuAD", EMNLP 2016; Roberts et al., "How Much Knowledge Can You Pack Into the
Parameters of a Language Model?", EMNLP 2020.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from growjax.errors import EvalError
from growjax.evals.files import read_json, read_lines, read_records
from growjax.evals.generation import generate
from growjax.evals.language import LanguageModel
from growjax.evals.metrics import Scores, answers, normalise_triviaqa


@dataclasses.dataclass(frozen=True)
class Question:
    """A question, the answers that are accepted, and for SQuAD the text that holds them.

    `starts` says where in the context each answer begins, in characters. No answers: it has none.
    """

    id: str
    question: str
    answers: tuple[str, ...]
    context: str = ""
    starts: tuple[int, ...] = ()


def read_squad(path: str | Path) -> list[Question]:
    """The questions of a file in the layout of SQuAD 1.1 or 2.0, `.xz`, `.gz` and `.bz2` too.

    Raises `EvalError` if it is laid out otherwise, or if an answer is not where it says.
    """
    path = Path(path)
    found: list[Question] = []
    try:
        for article in read_json(path)["data"]:
            for paragraph in article["paragraphs"]:
                for qa in paragraph["qas"]:
                    given = () if qa.get("is_impossible") else qa["answers"]
                    texts = tuple(answer["text"] for answer in given)
                    starts = tuple(int(answer["answer_start"]) for answer in given)
                    found.append(
                        Question(qa["id"], qa["question"], texts, paragraph["context"], starts)
                    )
    except (KeyError, TypeError) as error:
        raise EvalError(f"{path}: is not laid out as SQuAD is; there is no {error}") from error
    for q in found:
        for text, start in zip(q.answers, q.starts, strict=True):
            if q.context[start : start + len(text)] != text:
                raise EvalError(f"{path}: question {q.id}: {text!r} is not at character {start}")
    return found


_QUESTION, _ANSWERS = ("question", "qText", "Question"), ("answers", "answer", "Answer")


def read_questions(path: str | Path) -> list[Question]:
    """The questions of a closed-book set: JSON lines, or a JSON list, compressed or not.

    Natural Questions (`question`, `answer`), WebQuestions (`qText`, `answers`) and TriviaQA (`Data`, or
    its records, whose `Answer` has `Aliases`) as they are published. Raises `EvalError` otherwise.

    **Example**

        read_questions("qa/nq_open/NQ-open.dev.jsonl.xz")[0].answers
    """
    path = Path(path)
    found = []
    for number, record in enumerate(_entries(path)):
        question = next((record[name] for name in _QUESTION if name in record), None)
        given = next((record[name] for name in _ANSWERS if name in record), None)
        if isinstance(given, Mapping):
            lower = {str(name).lower(): value for name, value in given.items()}
            given = [*lower.get("aliases", ()), *filter(None, [lower.get("value")])]
        given = [given] if isinstance(given, str) else given
        if not isinstance(question, str) or not given:
            raise EvalError(f"{path}: record {number} has no question and answers: {[*record]}")
        found.append(Question(str(number), question, tuple(dict.fromkeys(map(str, given)))))
    return found


def _entries(path: Path) -> Iterator[Mapping[str, Any]]:
    first = next((line.strip() for line in read_lines(path) if line.strip()), "")
    if ".jsonl" in path.name or (first.startswith("{") and first.endswith("}")):
        yield from read_records(path)
        return
    whole = read_json(path)
    yield from whole["Data"] if isinstance(whole, Mapping) else whole


def closed_book(
    language: LanguageModel,
    questions: Sequence[Question],
    *,
    examples: Sequence[Question] | None = None,
    shots: int = 5,
    new: int = 32,
    limit: int | None = None,
    seed: int = 0,
) -> Scores:
    """Questions answered from memory: exact match and token F1 after TriviaQA's normalisation.

    **Arguments**

    - `language`: a decoder, or an encoder-decoder.
    - `questions`: those that are asked; with `limit` only the first so many.
    - `examples`: where the `shots` answered questions before each one are drawn from, with `seed`; None
      is `questions`, without the one that is asked.
    - `new`: how many tokens an answer may have; it ends with its line.

    Raises `EvalError` if there are too few questions.

    **Example**

        questions = read_questions("qa/nq_open/NQ-open.dev.jsonl.xz")
        closed_book(LanguageModel(model, tokenizer), questions, shots=1, limit=500)["exact_match"]
    """
    asked, pool = questions[:limit], questions if examples is None else examples
    if not asked or len(pool) < shots + (examples is None):
        raise EvalError(
            f"closed-book questions: expected some, and {shots} others to show, got {len(asked)} and "
            f"{len(pool)}"
        )
    prompts = []
    for i, question in enumerate(asked):
        order = np.random.default_rng([seed, i]).permutation(len(pool)).tolist()
        shown = [pool[j] for j in order if examples is not None or j != i][:shots]
        solved = [f"Question: {q.question}\nAnswer: {q.answers[0]}\n\n" for q in shown]
        prompts.append(f"{''.join(solved)}Question: {question.question}\nAnswer:")
    given = generate(language, prompts, new=new, until=["\n"])
    return answers(given, [question.answers for question in asked], normalise_triviaqa)
