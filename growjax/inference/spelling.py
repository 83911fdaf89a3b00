"""Dimensions and roles as the text of a spec."""

import dataclasses
from collections.abc import Callable, Sequence

from growjax.trace import Node


@dataclasses.dataclass(frozen=True)
class Token:
    """One axis of a spec: its name or number, and its role ("" for one that has none)."""

    text: str
    role: str = ""


Term = list[Token]


def terms_of(node: Node, token: Callable[[int, Node], Token]) -> list[Term]:
    """A dimension as a sum of products; `token(offset, atom)` spells an atom."""
    terms, at = [], 0
    for block in node.blocks():
        tokens: Term = []
        for factor in block.factors():
            # Blocks inside a product do not grow: their size is one number
            whole = factor.root.structure is not None
            spelled = Token(str(factor.root.size)) if whole else token(at, factor.root)
            if spelled.text.isdigit() and tokens and tokens[-1].text.isdigit():
                tokens[-1] = Token(str(int(tokens[-1].text) * int(spelled.text)))
            elif spelled.text != "1":
                tokens.append(spelled)
        terms.append(tokens or [Token("1")])
        at += block.root.size
    if len(terms) > 1 and all(len(term) == 1 and term[0].text.isdigit() for term in terms):
        return [[Token(str(sum(int(term[0].text) for term in terms)))]]
    if len(terms) > 1 and all(term == terms[0] for term in terms):
        return [_counted(len(terms), terms[0])]
    return terms


def _counted(count: int, term: Term) -> Term:
    """Several equal blocks as a product."""
    if term[0].text.isdigit():
        return [Token(str(count * int(term[0].text))), *term[1:]]
    return [Token(str(count)), *term]


def spell(dims: Sequence[list[Term]]) -> str:
    """The spec of an array, one list of terms for each dimension; at most one has several.

    Arrows are put where roles change. In a leaf with arrows every axis has a side, so an elementwise one
    is written as produced: copies are the same for both.
    """
    sums = [i for i, terms in enumerate(dims) if len(terms) > 1]
    where = sums[0] if sums else None
    texts = []
    count = len(dims[where]) if where is not None else 1
    for n in range(count):
        chosen = [terms[n if i == where else 0] for i, terms in enumerate(dims)]
        texts.append(_product(chosen, where))
    if where is None:
        return texts[0][1]
    before, _, after = texts[0]
    middle = " + ".join(text for _, text, _ in texts)
    return f"{before} ({middle}) {after}".strip()


def _product(dims: Sequence[Term], where: int | None) -> tuple[str, str, str]:
    """The text before, in and after dimension `where` of a spec without sums (None: all in the middle).

    Before and after have the same text for every term of the sum: arrows at its ends belong to the term.
    """
    sided = {t.role for term in dims for t in term} & {"consumed", "produced"}
    pieces: list[list[str]] = []
    last, arrows = "", False
    for i, term in enumerate(dims):
        piece: list[str] = []
        for token in term:
            role = "produced" if sided and token.role == "elementwise" else token.role
            if role in ("consumed", "produced"):
                if last and role != last:
                    arrow, arrows = "->" if role == "produced" else "<-", True
                    leaves_sum = i - 1 == where and not piece
                    (pieces[-1] if leaves_sum else piece).append(arrow)
                last = role
            piece.append(token.text)
        pieces.append(piece)
    if sided and not arrows:
        first = 0 if where is None else where
        if last == "produced" and 0 < first == len(pieces) - 1:
            pieces[first].append("<-")  # what stands before the sum is produced, too
        elif last == "produced":
            pieces[first].insert(0, "->")
        elif where is None or where == len(pieces) - 1:
            pieces[-1].append("->")
        else:
            pieces[first].insert(0, "<-")
    parts = []
    for i, (term, piece) in enumerate(zip(dims, pieces, strict=True)):
        text = " ".join(piece)
        parts.append(_bracketed(text, len(term)) if i != where else text)
    if where is None:
        return "", " ".join(parts), ""
    return " ".join(parts[:where]), parts[where], " ".join(parts[where + 1 :])


def _bracketed(text: str, count: int) -> str:
    """Axes that share a dimension in brackets, an arrow in front of them outside."""
    if count == 1:
        return text
    for arrow in ("-> ", "<- "):
        if text.startswith(arrow):
            return f"{arrow}({text.removeprefix(arrow)})"
    if text.endswith(" ->"):
        return f"({text.removesuffix(' ->')}) ->"
    return f"({text})"
