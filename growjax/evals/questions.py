"""Questions with accepted answers: readers of SQuAD and of closed-book sets, and closed-book scores.

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
    """A question, its accepted answers, and for SQuAD the context that contains them.

    `starts` are the offsets of the answers in the context, in characters. An unanswerable question has
    no `answers`.
    """

    id: str
    question: str
    answers: tuple[str, ...]
    context: str = ""
    starts: tuple[int, ...] = ()


def read_squad(path: str | Path) -> list[Question]:
    """The questions of a file in the layout of SQuAD 1.1 or 2.0, `.xz`, `.gz` and `.bz2` too.

    Raises `EvalError` for another layout, and if an answer is not at its offset in the context.
    """
    path = Path(path)
    questions: list[Question] = []
    try:
        for article in read_json(path)["data"]:
            for paragraph in article["paragraphs"]:
                for qa in paragraph["qas"]:
                    accepted = () if qa.get("is_impossible") else qa["answers"]
                    texts = tuple(answer["text"] for answer in accepted)
                    starts = tuple(int(answer["answer_start"]) for answer in accepted)
                    questions.append(
                        Question(qa["id"], qa["question"], texts, paragraph["context"], starts)
                    )
    except (KeyError, TypeError) as error:
        raise EvalError(f"{path}: is not laid out as SQuAD: {error} is missing") from error
    for q in questions:
        for text, start in zip(q.answers, q.starts, strict=True):
            if q.context[start : start + len(text)] != text:
                raise EvalError(f"{path}: question {q.id}: {text!r} is not at character {start}")
    return questions


# The keys of the question and of its answers in the published files
_QUESTION, _ANSWERS = ("question", "qText", "Question"), ("answers", "answer", "Answer")


def read_questions(path: str | Path) -> list[Question]:
    """The questions of a closed-book set: JSON lines, or a JSON list, compressed or not.

    It reads the published files of Natural Questions (`question`, `answer`), WebQuestions (`qText`,
    `answers`) and TriviaQA (`Data`, or its records, whose `Answer` has `Aliases`). Raises `EvalError`
    for a record without a question or answers.

    **Example**

        read_questions("qa/nq_open/NQ-open.dev.jsonl.xz")[0].answers
    """
    path = Path(path)
    questions = []
    for number, record in enumerate(_entries(path)):
        question = next((record[name] for name in _QUESTION if name in record), None)
        accepted = next((record[name] for name in _ANSWERS if name in record), None)
        if isinstance(accepted, Mapping):
            # TriviaQA's `Aliases` and `Value`; the library `datasets` writes them in lower case
            lower = {str(name).lower(): value for name, value in accepted.items()}
            accepted = [*lower.get("aliases", ()), *filter(None, [lower.get("value")])]
        if isinstance(accepted, str):
            accepted = [accepted]
        if not isinstance(question, str) or not accepted:
            raise EvalError(f"{path}: record {number} has no question and answers: {[*record]}")
        questions.append(Question(str(number), question, tuple(dict.fromkeys(map(str, accepted)))))
    return questions


def _entries(path: Path) -> Iterator[Mapping[str, Any]]:
    """The records of a file: JSON lines, a JSON list, or TriviaQA's object with a list as `Data`."""
    # JSON lines may be called .json too: then the first line is a whole object
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
    """Exact match and token F1 of questions without a context, after TriviaQA's normalisation.

    **Arguments**

    - `language`: a decoder, or an encoder-decoder.
    - `questions`: the questions to ask; with `limit` only the first `limit` of them.
    - `examples`: the pool from which `seed` draws the `shots` answered questions before each one; None
      is `questions`, without the one that is asked.
    - `new`: the most tokens of an answer, which ends with its line.

    Raises `EvalError` if there are no questions, or fewer examples than `shots`.

    **Example**

        questions = read_questions("qa/nq_open/NQ-open.dev.jsonl.xz")
        closed_book(LanguageModel(model, tokenizer), questions, shots=1, limit=500)["exact_match"]
    """
    asked, pool = questions[:limit], questions if examples is None else examples
    if not asked or len(pool) < shots + (examples is None):
        raise EvalError(
            f"closed-book questions: expected 1 or more, and {shots} others as examples, got "
            f"{len(asked)} and {len(pool)}"
        )
    prompts = []
    for i, question in enumerate(asked):
        order = np.random.default_rng([seed, i]).permutation(len(pool)).tolist()
        drawn = [pool[j] for j in order if examples is not None or j != i][:shots]
        answered = [f"Question: {q.question}\nAnswer: {q.answers[0]}\n\n" for q in drawn]
        prompts.append(f"{''.join(answered)}Question: {question.question}\nAnswer:")
    generated = generate(language, prompts, new=new, until=["\n"])
    return answers(generated, [question.answers for question in asked], normalise_triviaqa)
