"""Windows over long texts, answers put together from them, and an encoder that learns to point."""

import jax
import numpy as np
import pytest

from growjax.data import ByteTokenizer, load_tokenizer
from growjax.errors import EvalError
from growjax.evals import Question, Recipe, SpanRecipe, fine_tune_spans, spans
from growjax.models import BERT, BERTConfig


TOKENIZER = ByteTokenizer(sentinels=0, multiple=1)
SPECIAL = TOKENIZER.vocabulary.specials
CLS, SEP = SPECIAL["cls"], SPECIAL["sep"]
SIZES: dict = dict(embed=16, heads=2, head_dim=8, mlp=32, vocab=TOKENIZER.vocabulary.size)
SMALL = SpanRecipe(Recipe(length=16), stride=4, query=3)


def ask(context: str, answer: str = "", question: str = "who?") -> Question:
    answers = (answer,) if answer else ()
    return Question("q", question, answers, context, tuple(context.index(a) for a in answers))


# Places ------------------------------------------------------------------------------------------


def test_places_are_characters_and_not_bytes(tmp_path):
    assert TOKENIZER.places("d\u00f6g").tolist() == [[0, 1], [1, 2], [1, 2], [2, 3]]
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "do", "##g"]
    (tmp_path / "vocab.txt").write_text("\n".join(words) + "\n")
    tokenizer = load_tokenizer(tmp_path / "vocab.txt")
    text = "The  dog \u00f6 the"
    assert tokenizer.encode(text).tolist() == [5, 6, 7, 1, 5]
    assert [text[a:b] for a, b in tokenizer.places(text)] == ["The", "do", "g", "\u00f6", "the"]
    assert tokenizer.places("").shape == (0, 2)


# Windows -----------------------------------------------------------------------------------------


def test_windows_by_hand():
    """10 tokens fit behind a question of 3; the next window begins 4 further."""
    text = "abcdefghijklmnop"
    windows = spans.windows(TOKENIZER, ask(text, "ijk"), 7, SMALL)
    assert [w.tokens.tolist() for w in windows] == [
        [CLS, *b"who", SEP, *part, SEP] for part in (b"abcdefghij", b"efghijklmn", b"ijklmnop")
    ]
    assert {w.question for w in windows} == {7} and {w.first for w in windows} == {5}
    # Whole only in the second and the third
    assert [w.target for w in windows] == [(0, 0), (9, 11), (5, 7)]
    assert [text[w.places[0, 0] : w.places[-1, 1]] for w in windows] == [
        "abcdefghij",
        "efghijklmn",
        "ijklmnop",
    ]
    # "g" is sixth from the left of 10 and 3 from the end; in the second window third from the left
    assert "".join(text[p] for w in windows for p in w.places[w.best, 0]) == text
    assert [text[w.places[w.best][0, 0]] for w in windows] == ["a", "h", "l"]


def test_a_text_that_fits_has_one_window():
    (window,) = spans.windows(TOKENIZER, ask("012345678"), 0, SMALL, 2)
    assert window.tokens.tolist() == [CLS, *b"who", SEP, SEP, *b"012345678", SEP]
    assert window.first == 6 and len(spans.windows(TOKENIZER, ask("0123456789"), 0, SMALL, 2)) == 2
    (window,) = spans.windows(TOKENIZER, ask("0123456789"), 0, SMALL)
    assert window.target == (0, 0) and window.best.all()
    assert len(spans.windows(TOKENIZER, ask("0123456789a"), 0, SMALL)) == 2


def test_an_answer_may_begin_within_a_token(tmp_path):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "rainbow", "arch"]
    (tmp_path / "vocab.txt").write_text("\n".join(words) + "\n")
    tokenizer = load_tokenizer(tmp_path / "vocab.txt")
    (window,) = spans.windows(tokenizer, ask("arch rainbow arch", "bow a"), 0, SMALL)
    assert np.subtract(window.target, window.first).tolist() == [1, 2]


# Answers -----------------------------------------------------------------------------------------


def pointed(window: spans.Window, **ends: tuple[int, float]) -> np.ndarray:
    """Scores of a window: at a token of the text the start or the end has this score, else 0."""
    scores = np.zeros((len(window.tokens), 2))
    for name, (token, score) in ends.items():
        scores[window.first + token if token >= 0 else 0, ["start", "end"].index(name[:-1])] = score
    return scores


def test_answers_by_hand():
    question = ask("abcdefghij")
    (window,) = parts = spans.windows(TOKENIZER, question, 0, SMALL)

    def answer(recipe=SMALL, **ends):
        return spans.answer_of(question, parts, [pointed(window, **ends)], recipe)

    assert answer(start0=(2, 5.0), end0=(4, 5.0)) == "cde"
    # An end before the start does not count, however high
    assert answer(start0=(4, 5.0), end0=(2, 3.0), end1=(6, 1.0)) == "efg"
    short = SpanRecipe(Recipe(length=16), stride=4, query=3, answer=2)
    assert answer(short, start0=(2, 5.0), end0=(4, 5.0), end1=(3, 1.0)) == "cd"
    # Nowhere is 7 in all, 2 more than "a"
    lazy = dict(start0=(-1, 3.0), end0=(-1, 4.0), start1=(0, 5.0), end1=(0, 0.0))
    for threshold, expected in ((None, True), (2.5, True), (1.5, False)):
        recipe = SpanRecipe(Recipe(length=16), stride=4, query=3, threshold=threshold)
        assert bool(answer(recipe, **lazy)) == expected


def test_a_start_counts_where_it_has_the_most_context():
    question = ask("abcdefghijklmnop")
    parts = spans.windows(TOKENIZER, question, 0, SMALL)
    # "h" is surest in the first window, which knows less about it than the second
    scores = [
        pointed(parts[0], start0=(7, 9.0), end0=(8, 9.0)),
        pointed(parts[1], start0=(3, 2.0), end0=(5, 2.0)),
        pointed(parts[2]),
    ]
    assert spans.answer_of(question, parts, scores, SMALL) != "hi"
    scores[0] = pointed(parts[0])
    assert spans.answer_of(question, parts, scores, SMALL) == "hij"
    # Nowhere scores what it does in the window that likes it least
    strict = SpanRecipe(Recipe(length=16), stride=4, query=3, threshold=0.0)
    scores[0][0], scores[2][0] = 90.0, 90.0
    assert spans.answer_of(question, parts, scores, strict) == "hij"
    scores[1][0] = 9.0
    assert spans.answer_of(question, parts, scores, strict) == ""


# Learning ----------------------------------------------------------------------------------------


def digits(n: int, seed: int) -> list[Question]:
    """From the 7 to the 9 in a text of letters. Every fourth text has none."""
    rng, questions = np.random.default_rng(seed), []
    for i in range(n):
        letters = list(rng.choice(list("abc"), int(rng.integers(6, 30))))
        answer = "" if i % 4 == 0 else f"7{'8' * int(rng.integers(0, 3))}9"
        place = int(rng.integers(0, len(letters)))
        questions.append(ask("".join(letters[:place]) + answer + "".join(letters[place:]), answer))
    return questions


def test_an_encoder_learns_to_point():
    model = BERT(BERTConfig(layers=1, positions=24, **SIZES), key=jax.random.key(0))
    training = Recipe(batch=16, rate=5e-3, epochs=10, length=24)
    recipe = SpanRecipe(training, stride=12, query=4, threshold=0.0)
    tuned = fine_tune_spans(model, TOKENIZER, digits(96, 1), digits(40, 2), recipe=recipe)
    first, last = tuned.runs[0][0], tuned.runs[0][-1]
    assert last["f1"] > 0.9 > first["answerable_exact_match"]
    assert last["unanswerable_exact_match"] > 0.9
    assert tuned.summary()["score"] == pytest.approx((last["f1"] + last["exact_match"]) / 2)


def test_what_does_not_fit_is_refused():
    model = BERT(BERTConfig(layers=1, positions=24, **SIZES), key=jax.random.key(0))
    with pytest.raises(EvalError, match="384 tokens are longer than the 24 positions"):
        fine_tune_spans(model, TOKENIZER, digits(2, 0), digits(2, 0))
    with pytest.raises(EvalError, match="expected questions to train on"):
        fine_tune_spans(model, TOKENIZER, [], digits(2, 0))
    with pytest.raises(EvalError, match=r"(?s)answer: expected.*stride: expected from 1 to 10"):
        SpanRecipe(Recipe(length=16), stride=11, query=3, answer=0)
