"""What is known of a method: when to use it, its traps and its papers, kept with the class that does it.

A class of growjax (an operator, a sub-network, an optimizer, a schedule, a clock, ...) may have a class
attribute `card`. `cite` reads the cards of a plan, and of anything else that is made of such values.
"""

import dataclasses
import re
import unicodedata
from collections.abc import Iterator, Mapping
from typing import Any

from growjax.errors import FormatError


@dataclasses.dataclass(frozen=True)
class Paper:
    """A paper, as BibTeX needs it.

    **Fields**

    - `title`, `authors` ("Last, First", joined by " and "; "and others" for the rest), `year`.
    - `venue`: the proceedings; a paper without one is cited by its `arxiv` number or `url`.

    **Example**

        Paper("Wider", "Doe, Jane and others", 2026, arxiv="2601.00001").bibtex()
    """

    title: str
    authors: str
    year: int
    venue: str = ""
    arxiv: str = ""
    url: str = ""

    @property
    def key(self) -> str:
        """The first author, the year and the first long word of the title: `wang2024lemon`."""
        words = re.findall(r"[a-z0-9]+", _plain(self.title).lower())
        # A title in another script has no such word
        word = next((word for word in words if len(word) > 3), "".join(words[:1]))
        name = re.sub(r"[^a-z]", "", _plain(self.first).lower())
        return f"{name}{self.year}{word}"

    @property
    def first(self) -> str:
        """The last name of the first author."""
        return self.authors.partition(" and ")[0].partition(",")[0].strip("{}")

    def bibtex(self) -> str:
        """The entry; braces keep the capitals of the title."""
        fields = {
            "title": f"{{{self.title}}}",
            "author": self.authors,
            "year": str(self.year),
            "booktitle": self.venue,
            "eprint": self.arxiv,
            "archiveprefix": "arXiv" if self.arxiv else "",
            "url": self.url,
        }
        lines = [f"  {name} = {{{text}}}," for name, text in fields.items() if text]
        kind = "inproceedings" if self.venue else "misc"
        return "\n".join([f"@{kind}{{{self.key},", *lines, "}"])


def _plain(text: str) -> str:
    """The text without accents."""
    return unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()


@dataclasses.dataclass(frozen=True)
class Card:
    """What is known of a method, as the class attribute `card` of the class that does it.

    **Fields**

    - `use`: when to use it, in a sentence or two.
    - `traps`: what goes wrong with it, a sentence each.
    - `example`: of an operator, one of a size for the small models of `growjax.testing`, as it prints
      itself.
    - `papers`: the papers of the method whatever its fields are.
    - `by`: papers of some of its fields, by the name of the field (or property): `{value: papers}`, or
      papers that count wherever the field is neither 0, empty nor None.

    A class of your own needs none, and is then not cited. Raises `FormatError` for papers that are no
    tuple of `Paper`.

    **Example**

        class Widen(gj.Operator):
            card: ClassVar[gj.Card] = gj.Card(papers=(gj.Paper("Wider", "Doe, Jane", 2026),))
    """

    use: str = ""
    traps: tuple[str, ...] = ()
    example: str = ""
    papers: tuple[Paper, ...] = ()
    by: Mapping[str, Mapping[Any, tuple[Paper, ...]] | tuple[Paper, ...]] = dataclasses.field(
        default_factory=dict
    )

    def __post_init__(self):
        of_fields = {f"by[{name!r}]": cases for name, cases in self.by.items()}
        for name, cases in {"papers": self.papers, **of_fields}.items():
            for papers in cases.values() if isinstance(cases, Mapping) else [cases]:
                if not isinstance(papers, tuple) or not all(isinstance(p, Paper) for p in papers):
                    raise FormatError(f"card: {name}: expected a tuple of gj.Paper, got {papers!r}")

    def of(self, value: Any) -> tuple[Paper, ...]:
        """The papers of one value, whose fields choose among those of `by`."""
        papers = list(self.papers)
        for name, cases in self.by.items():
            field = getattr(value, name)
            if isinstance(cases, Mapping):
                papers += cases.get(field, ())
            elif field:
                papers += cases
        return tuple(dict.fromkeys(papers))

    def every(self) -> dict[Paper, str]:
        """All papers, each with the fields that it belongs to: `order="middle"`, or nothing."""
        papers = dict.fromkeys(self.papers, "")
        for name, cases in self.by.items():
            groups = cases.items() if isinstance(cases, Mapping) else [(None, cases)]
            for value, some in groups:
                for paper in some:
                    given = name if value is None else f"{name}={value!r}"
                    papers[paper] = ", ".join(filter(None, [papers.get(paper), given]))
        return papers


def cite(value: Any) -> str:
    """The BibTeX of exactly what a plan uses; or an operator, a sub-network, or a tuple of anything.

    One entry for each paper, after a comment that names the classes whose method it is; an empty text
    if nothing has a paper. A run that a plan starts or forks from is not read: cite its plan as well.
    Raises `FormatError` for what holds no such value: a folder, a function, a class.

    **Example**

        print(gj.cite(plan))
        print(gj.cite(Run("runs/first").plan()))
    """
    if _inside(value) is None:
        raise FormatError(
            f"value: expected a plan, an operator, a sub-network or a tuple of them, got {value!r}; of a "
            "run's folder, cite growjax.train.Run(folder).plan()"
        )
    users: dict[Paper, list[str]] = {}
    for part in _parts(value):
        for paper in type(part).card.of(part):
            users.setdefault(paper, []).append(type(part).__name__)
    entries = [
        f"% {', '.join(dict.fromkeys(names))}\n{paper.bibtex()}" for paper, names in users.items()
    ]
    return "\n\n".join(entries)


def _parts(value: Any) -> Iterator[Any]:
    """The value and all values in its fields that have a card."""
    if isinstance(getattr(type(value), "card", None), Card):
        yield value
    for part in _inside(value) or ():
        yield from _parts(part)


def _inside(value: Any) -> list[Any] | None:
    """What a value, a tuple or a mapping holds; None for anything else."""
    if isinstance(value, Mapping):
        return list(value.values())
    if isinstance(value, list | tuple):
        return list(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [getattr(value, field.name) for field in dataclasses.fields(value)]
    return None
