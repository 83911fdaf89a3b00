"""Questions and their accepted answers: SQuAD, and the closed-book sets.

Rajpurkar et al., "SQuAD", EMNLP 2016; Roberts et al., "How Much Knowledge Can You Pack Into the
Parameters of a Language Model?", EMNLP 2020.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from growjax.errors import EvalError
from growjax.evals.files import read_json, read_lines, read_records


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
