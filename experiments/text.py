"""The text of the experiments: for training, for held-out losses, and a part for second models.

`python -m experiments.text ARCHIVES OUT` unpacks WikiExtractor archives (`enwiki2018-AA.tar.xz`, `-AB`,
`-AC`) into `OUT/train.txt`, `OUT/valid.txt` and `OUT/test.txt`, one form feed between two articles.
"""

import dataclasses
import re
import tarfile
from pathlib import Path

import tyro

from growjax.data import ByteTokenizer, Corpus, StandardLibrary, Text, prepare
from growjax.errors import DataError


BETWEEN = "\x0c"
_ARTICLE = re.compile(r"<doc [^>]*>\n(.*?)</doc>", re.DOTALL)
# The name of the text that every machine has
LIBRARY = "Python's standard library"


@dataclasses.dataclass(frozen=True)
class Texts:
    """Corpora that share no document.

    Every arm trains on `training`, and a second model on `proxy` (a fifth of the text). Held-out losses
    are those on `valid`, and on the further texts `others`.
    """

    training: Corpus
    proxy: Corpus
    valid: Corpus
    others: dict[str, Corpus]
    name: str


def load_texts(folder: Path | None, cache: Path, others: dict[str, Path] | None = None) -> Texts:
    """The texts of a folder with `train.txt` and `valid.txt`, or of Python's standard library.

    `others` are folders of text files by name. Raises `DataError` if something is not there.
    """
    tokenizer = ByteTokenizer()
    more = {name: _whole(path) for name, path in (others or {}).items()}
    if folder is None:
        training, rest = prepare(StandardLibrary(), tokenizer, cache, held_out=4)
        proxy, valid = _halves(rest)
        return Texts(training, proxy, valid, more, LIBRARY)
    missing = [n for n in ("train.txt", "valid.txt") if not (folder / n).is_file()]
    if missing:
        raise DataError(
            f"{folder}: expected {' and '.join(missing)}; `python -m experiments.text` writes them"
        )
    source = Text(str(folder / "train.txt"), split=BETWEEN)
    training, proxy = prepare(source, tokenizer, cache, held_out=5)
    valid = _whole(folder / "valid.txt")
    return Texts(training, proxy, valid, more, folder.name)


def _whole(path: Path) -> Corpus:
    """All documents of a text that nobody trains on."""
    if not path.exists():
        raise DataError(f"{path}: there is no such file or folder")
    documents = [d.content for d in Text(str(path), split=BETWEEN).documents()]
    return Corpus.of(documents, ByteTokenizer())


def _halves(corpus: Corpus) -> tuple[Corpus, Corpus]:
    """The documents of a corpus in turn."""
    ends = [*corpus.starts[1:].tolist(), len(corpus)]
    documents = [corpus.read(a, b) for a, b in zip(corpus.starts.tolist(), ends, strict=True)]
    return tuple(Corpus.of(documents[i::2], ByteTokenizer()) for i in (0, 1))  # type: ignore


def unpack(archives: Path, out: Path, /) -> None:
    """Write the articles of WikiExtractor archives as text: AA and AB to train on, AC to judge by."""
    out.mkdir(parents=True, exist_ok=True)
    parts: dict[str, list[str]] = {"train": [], "valid": [], "test": []}
    for archive in sorted(archives.glob("*.tar.xz")):
        with tarfile.open(archive) as tar:
            for member in sorted(tar.getmembers(), key=lambda m: m.name):
                file = tar.extractfile(member)
                if file is None:
                    continue
                articles = _ARTICLE.findall(file.read().decode("utf-8"))
                # An article of one line has a title and nothing else
                texts = [a.strip() for a in articles if a.strip().count("\n")]
                part = _part(member)
                if part is not None:
                    parts[part] += texts
    for name, texts in parts.items():
        (out / f"{name}.txt").write_text(BETWEEN.join(texts), encoding="utf-8")
        print(f"{name}: {len(texts)} articles")


def _part(member: tarfile.TarInfo) -> str | None:
    """What a file is for; the rest of AC stays unused, so that a train.txt is the same everywhere."""
    folder, file = Path(member.name).parts[-2:]
    if folder != "AC":
        return "train"
    number = int(file.removeprefix("wiki_"))
    return "valid" if number < 5 else "test" if number < 10 else None


if __name__ == "__main__":
    tyro.cli(unpack)
