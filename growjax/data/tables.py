"""Sources that are columns of tables: Parquet files, and data sets of the library `datasets`."""

import dataclasses
import importlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from growjax.data.files import DataFile, find
from growjax.data.sources import Document, FileSource, digest, text_fault
from growjax.errors import DataError
from growjax.values import File, check, register


@register
@dataclasses.dataclass(frozen=True)
class Parquet(FileSource):
    """Parquet files, one document a row. Needs `pyarrow`: `pip install 'growjax[data]'`.

    **Arguments**

    - `path`: a file; a folder with `*.parquet`; or a pattern of either. On this machine or at a URL, as
      in `Text`.
    - `field`: the column of the text.

    **Example**

        Parquet("fineweb/sample", field="text")
    """

    path: File
    field: str = "text"

    def __post_init__(self):
        check(self, DataError)

    def files(self) -> list[DataFile]:
        return find(self.path, "*.parquet")

    def _read(self) -> Iterator[Document | str]:
        files = self.files()
        parquet = _library("pyarrow.parquet", self)
        for file in files:
            # Parquet has a compression of its own, whatever the suffix
            with file.opened(decompress=False) as stream:
                try:
                    table = parquet.ParquetFile(stream)
                except OSError:
                    raise
                except Exception as error:  # pyarrow raises a dozen types
                    yield f"{file.path}: {error}"
                    continue
                columns = table.schema_arrow.names
                if self.field not in columns:
                    has = ", ".join(columns)
                    yield f"{file.path}: no column {self.field!r}; its columns are {has}"
                    continue
                row = 0
                for batch in table.iter_batches(batch_size=256, columns=[self.field]):
                    for scalar in batch.column(0):
                        value: Any = None
                        try:
                            value = scalar.as_py()
                            fault = text_fault(value)
                        except UnicodeDecodeError as error:
                            # Parquet does not look at the bytes of a text
                            fault = f"is not UTF-8: {error}"
                        if fault is None:
                            yield Document(f"{file.name}:{row}", value)
                        else:
                            yield f"{file.path}, row {row}: {self.field!r} {fault}"
                        row += 1


@register
@dataclasses.dataclass(frozen=True)
class HuggingFace(FileSource):
    """A split of a data set of the library `datasets`: `pip install 'growjax[data]'`.

    **Arguments**

    - `name`: the name of the data set; or a local folder of data files, or one saved by `save_to_disk`.
    - `split`: such as `"train"`, `"train[:10%]"` or `"train+test"`. A saved folder without splits is
      one split, which has any name.
    - `field`: the column of the text.
    - `config`, `revision`: the variant of the data set, and its version.

    **Example**

        HuggingFace("roneneldan/TinyStories", split="train")
    """

    name: str
    split: str = "train"
    field: str = "text"
    config: str | None = None
    revision: str | None = None

    def __post_init__(self):
        check(self, DataError)

    def fingerprint(self) -> str:
        return super().fingerprint() if os.path.exists(self.name) else self._hub_digest()

    def content(self) -> str:
        return super().content() if os.path.exists(self.name) else self._hub_digest()

    def files(self) -> list[DataFile]:
        return find(self.name, "*") if os.path.exists(self.name) else []

    def _options(self) -> str:
        return repr(dataclasses.replace(self, name="-"))

    def _hub_digest(self) -> str:
        # The library's own fingerprint of a data set, which has no public name
        rows = self._load()
        return digest(repr(self), getattr(rows, "_fingerprint", ""), str(len(rows)))

    def _load(self) -> Any:
        datasets, path = _library("datasets", self), Path(self.name)
        try:
            if (path / "state.json").exists() or (path / "dataset_dict.json").exists():
                return self._part_of(datasets.load_from_disk(self.name), datasets)
            return datasets.load_dataset(
                self.name, self.config, split=self.split, revision=self.revision
            )
        except Exception as error:  # the network, a cache or a builder may raise anything
            raise DataError(
                f"{self.name} (split {self.split!r}): the library datasets cannot load it: {error}"
            ) from error

    def _part_of(self, saved: Any, datasets: Any) -> Any:
        """The rows of a saved data set that `split` names, which `load_from_disk` does not look at."""
        instruction = datasets.ReadInstruction.from_spec(self.split)
        if isinstance(saved, datasets.DatasetDict):
            splits: dict[str, Any] = dict(saved)
        else:
            # The part before a bracket, of each summand, is the one split's name
            names = {part.partition("[")[0].strip() for part in self.split.split("+")}
            splits = dict.fromkeys(names, saved)
        lengths = {name: len(rows) for name, rows in splits.items()}
        parts = [
            splits[part.splitname].select(range(part.from_, part.to))
            for part in instruction.to_absolute(lengths)
        ]
        return parts[0] if len(parts) == 1 else datasets.concatenate_datasets(parts)

    def _read(self) -> Iterator[Document | str]:
        rows = self._load()
        if self.field not in rows.column_names:
            columns = ", ".join(rows.column_names)
            yield f"{self.name}: no column {self.field!r}; its columns are {columns}"
            return
        for n, row in enumerate(rows.select_columns([self.field])):
            fault = text_fault(row[self.field])
            if fault is None:
                yield Document(f"{self.split}:{n}", row[self.field])
            else:
                yield f"{self.name}, row {n}: {self.field!r} {fault}"


def _library(name: str, source: Any) -> Any:
    """An optional module, or `DataError` that names the extra to install."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        library = name.partition(".")[0]
        raise DataError(
            f"{source}: reading it needs {library}; pip install 'growjax[data]'"
        ) from error
