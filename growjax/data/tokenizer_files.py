"""The files of a tokenizer in a Hugging Face folder: which tokens have which roles.

`tokenizer.json` has the vocabulary and the algorithm. What a token is for stands in other files, and is
read from them: spellings alone do not say whether `<|endoftext|>` ends a text or a turn, or pads.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from growjax.errors import DataError
from growjax.extras import load


TOKENIZER, WORDS, CONFIG = "tokenizer.json", "vocab.txt", "tokenizer_config.json"
# growjax's names of roles; the files say bos_token, eos_token and so on
ROLES = ("bos", "eos", "pad", "mask", "cls", "sep")
# What the classes of transformers take where a file says nothing
_END = "<|endoftext|>"
_ROBERTA = {
    **{"bos": "<s>", "cls": "<s>", "eos": "</s>", "sep": "</s>"},
    **{"pad": "<pad>", "mask": "<mask>"},
}
_DEFAULTS: dict[str, dict[str, str]] = {
    "BertTokenizer": {"pad": "[PAD]", "mask": "[MASK]", "cls": "[CLS]", "sep": "[SEP]"},
    "GPT2Tokenizer": {"bos": _END, "eos": _END},
    "GPTNeoXTokenizer": {"bos": _END, "eos": _END},
    "LlamaTokenizer": {"bos": "<s>", "eos": "</s>"},
    "Qwen2Tokenizer": {"eos": _END, "pad": _END},
    "GemmaTokenizer": {"bos": "<bos>", "eos": "<eos>", "pad": "<pad>", "mask": "<mask>"},
    "T5Tokenizer": {"eos": "</s>", "pad": "<pad>"},
    "RobertaTokenizer": _ROBERTA,
    "XLMRobertaTokenizer": _ROBERTA,
}
_LARGEST = 50_000_000  # bytes of JSON that are parsed; tokenizer.json itself is not read here


@dataclasses.dataclass(frozen=True)
class TokenizerFiles:
    """What the files beside a vocabulary say about its tokens.

    **Fields**

    - `roles`: the spelling of the token for a role (`bos`, `eos`, `pad`, `mask`, `cls`, `sep`), or None
      if the files say that there is none. A role is absent if they say nothing.
    - `defaults`: the spellings that the class of the tokenizer takes for absent roles; None for a class
      that is not known.
    - `ends`: the ids that end a text that is generated, besides `eos`.
    - `chat_template`: the Jinja template of conversations.
    - `lowercase`: whether a `vocab.txt` belongs to an uncased model.
    - `strip_accents`: whether a `vocab.txt` is for text without accents; None is as `lowercase`.
    - `chinese_characters`: whether each Chinese character of a `vocab.txt` is a word of its own.
    """

    roles: Mapping[str, str | None] = dataclasses.field(default_factory=dict)
    defaults: Mapping[str, str] | None = None
    ends: tuple[int, ...] = ()
    chat_template: str | None = None
    lowercase: bool = True
    strip_accents: bool | None = None
    chinese_characters: bool = True


def read_files(folder: Path) -> TokenizerFiles:
    """Read what the files of a folder say about its tokenizer; raises `DataError` if one is broken."""
    config = _json(folder / CONFIG)
    older = _json(folder / "special_tokens_map.json")
    roles: dict[str, str | None] = {}
    for name in ROLES:
        key = f"{name}_token"
        # tokenizer_config.json decides; null there means that there is no such token
        values = [file[key] for file in (config, older) if key in file]
        if values:
            roles[name] = _spelling(folder, key, values[0])
    defaults = _DEFAULTS.get(class_of(folder).removesuffix("Fast"))
    if config and defaults is None:
        # transformers guesses none, and begins a text with eos instead
        roles.setdefault("bos", None)
    return TokenizerFiles(
        roles=roles,
        defaults=defaults,
        ends=_ends(folder),
        chat_template=_chat_template(folder, config),
        lowercase=bool(config.get("do_lower_case", True)),
        strip_accents=config.get("strip_accents"),
        chinese_characters=bool(config.get("tokenize_chinese_chars", True)),
    )


def class_of(folder: Path) -> str:
    """The class of transformers that tokenizer_config.json names, or an empty text."""
    return str(_json(folder / CONFIG).get("tokenizer_class") or "")


def converted(folder: Path) -> tuple[Any, dict[str, str | None]]:
    """The tokenizer of a folder without `tokenizer.json`, by transformers, and its tokens' roles.

    It reads `spiece.model`, `tokenizer.model` and `vocab.json` with `merges.txt`; code in the folder is
    not run. Raises `DataError` if transformers cannot read it.
    """
    transformers = load("transformers", f"{folder}: a tokenizer without {TOKENIZER}")
    if any(folder.glob("*.model")):
        load("sentencepiece", f"{folder}: a tokenizer of SentencePiece")
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False
        )
        backend = tokenizer.backend_tokenizer
    except Exception as error:  # of many types
        raise DataError(
            f"{folder}: transformers cannot convert its tokenizer, or only to Python code: {error}; save "
            f"it once as {TOKENIZER}, where its model comes from"
        ) from error
    spellings = tokenizer.special_tokens_map
    return backend, {name: spellings.get(f"{name}_token") for name in ROLES}


def _ends(folder: Path) -> tuple[int, ...]:
    """The ids that end a generated text: an integer or a list of generation_config.json."""
    path = folder / "generation_config.json"
    value = _json(path).get("eos_token_id")
    if value is None:
        path = folder / "config.json"
        value = _json(path).get("eos_token_id")
    ends = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(end, int) and not isinstance(end, bool) for end in ends):
        raise DataError(f"{path}: eos_token_id: expected an id or a list of ids, got {value!r}")
    return tuple(ends)


def _chat_template(folder: Path, config: Mapping[str, Any]) -> str | None:
    """The template of conversations, from the newest of the places that it has had."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    template = config.get("chat_template") or _json(folder / "chat_template.json").get(
        "chat_template"
    )
    if isinstance(template, list):
        # Several templates, by name
        named = {t.get("name"): t.get("template") for t in template if isinstance(t, dict)}
        template = named.get("default")
    if template is not None and not isinstance(template, str):
        raise DataError(f"{folder}: chat_template: expected a text, got {template!r}")
    return template


def _spelling(folder: Path, key: str, value: Any) -> str | None:
    """The spelling of a token, which files write as a text or as an object with its `content`."""
    spelling = value.get("content") if isinstance(value, dict) else value
    if spelling is not None and not isinstance(spelling, str):
        raise DataError(f"{folder}: {key}: expected a token, got {value!r}")
    return spelling


def _json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty if there is no such file."""
    if not path.is_file():
        return {}
    if path.stat().st_size > _LARGEST:
        raise DataError(f"{path}: {path.stat().st_size:,} bytes are too many")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path}: not readable as JSON: {error}") from error
    if not isinstance(value, dict):
        raise DataError(f"{path}: expected a JSON object, got a {type(value).__name__}")
    return value
