"""The files of a tokenizer in a Hugging Face folder: which tokens have which roles.

`tokenizer.json` has the vocabulary and the algorithm. What a token is for stands in other files, and is
read from them: spellings alone do not say whether `<|endoftext|>` ends a text or a turn, or pads.
"""

import dataclasses
import itertools
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
# The classes that read a vocab.txt as BERT's does, and text as their tokenizer_config.json says
WORDPIECE = frozenset(
    (
        *("", "PreTrainedTokenizer", "BertTokenizer", "DistilBertTokenizer", "ElectraTokenizer"),
        *("MobileBertTokenizer", "ConvBertTokenizer", "SqueezeBertTokenizer", "LayoutLMTokenizer"),
    )
)
# Those that put a space before a text if it says so
_SPACED = ("GPT2Tokenizer", "RobertaTokenizer", "GPTNeoXTokenizer")
_NORMALISING = {
    "do_lower_case": "lowercase",
    "strip_accents": "strip_accents",
    "tokenize_chinese_chars": "handle_chinese_chars",
}
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
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
    - `added`: tokens by their ids, with the flags of how they are found in a text; these count, and not
      those in `tokenizer.json`.
    - `others`: spellings of further special tokens.
    - `letters`: whether spellings of special tokens are text in prompts too.
    - `normalizer`: what the class sets of the normalizer of BERT, whatever `tokenizer.json` says.
    - `space`: whether the class puts a space before a text; None is what `tokenizer.json` says.
    """

    roles: Mapping[str, str | None] = dataclasses.field(default_factory=dict)
    defaults: Mapping[str, str] | None = None
    ends: tuple[int, ...] = ()
    chat_template: str | None = None
    lowercase: bool = True
    strip_accents: bool | None = None
    chinese_characters: bool = True
    added: Mapping[int, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    others: tuple[str, ...] = ()
    letters: bool = False
    normalizer: Mapping[str, bool | None] = dataclasses.field(default_factory=dict)
    space: bool | None = None


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
    cls = class_of(folder)
    defaults = _DEFAULTS.get(cls)
    normalising = _NORMALISING if cls in WORDPIECE - {"", "PreTrainedTokenizer"} else {}
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
        added=_added(folder, config),
        others=_others(folder, config, older),
        letters=bool(config.get("split_special_tokens")),
        normalizer={name: config[key] for key, name in normalising.items() if key in config},
        space=config.get("add_prefix_space") if cls in _SPACED else None,
    )


def class_of(folder: Path) -> str:
    """The class of transformers that tokenizer_config.json names, without "Fast", or an empty text."""
    return str(_json(folder / CONFIG).get("tokenizer_class") or "").removesuffix("Fast")


def complete(inner: Any, files: TokenizerFiles) -> None:
    """Change the tokenizer of a `tokenizer.json` as transformers does by the files beside it.

    They add tokens to it, or change how one is found in a text, and some classes set their own
    normalizer or pre-tokenizer. Raises `DataError` for a token that would have another id than they say.
    """
    library = load("tokenizers", "a tokenizer")
    known, changed = inner.get_added_tokens_decoder(), []
    for number, given in sorted(files.added.items()):
        flags = {name: given[name] for name in _FLAGS if name in given}
        token = library.AddedToken(given["content"], **flags)
        if repr(known.get(number)) != repr(token):
            changed.append(token)
    for special, tokens in itertools.groupby(changed, key=lambda token: token.special):
        (inner.add_special_tokens if special else inner.add_tokens)([*tokens])
    wrong = [
        f"{given['content']!r} would have {inner.token_to_id(given['content'])}, not {number}"
        for number, given in sorted(files.added.items())
        if inner.token_to_id(given["content"]) != number
    ]
    if wrong:
        raise DataError(
            f"tokenizer: {CONFIG} gives tokens other ids than {TOKENIZER}: {', '.join(wrong)}; save the "
            "tokenizer again where its model comes from"
        )
    # What names a token in the vocabulary makes it one that is found whole
    whole = {token.content for token in inner.get_added_tokens_decoder().values()}
    named = [*(x for x in files.roles.values() if x), *files.others]
    words = [x for x in dict.fromkeys(named) if x not in whole and inner.token_to_id(x) is not None]
    inner.add_special_tokens(words)
    if isinstance(inner.normalizer, library.normalizers.BertNormalizer):
        for name, value in files.normalizer.items():
            setattr(inner.normalizer, name, value)
    if files.space is not None and isinstance(
        inner.pre_tokenizer, library.pre_tokenizers.ByteLevel
    ):
        inner.pre_tokenizer.add_prefix_space = files.space


def _added(folder: Path, config: Mapping[str, Any]) -> dict[int, Mapping[str, Any]]:
    """The tokens of `added_tokens_decoder`, by their ids."""
    given = config.get("added_tokens_decoder") or {}
    valid = isinstance(given, dict) and all(
        str(number).isdecimal() and isinstance(x, dict) and isinstance(x.get("content"), str)
        for number, x in given.items()
    )
    if not valid:
        raise DataError(f"{folder / CONFIG}: added_tokens_decoder: expected tokens by their ids")
    return {int(number): x for number, x in given.items()}


def _others(folder: Path, *files: Mapping[str, Any]) -> tuple[str, ...]:
    """The special tokens without a role of some files, and the tokens of `added_tokens.json`."""
    spellings = [*_json(folder / "added_tokens.json")]
    for file in files:
        for key in ("additional_special_tokens", "extra_special_tokens"):
            given = file.get(key) or []
            values = [*given.values()] if isinstance(given, dict) else given
            if not isinstance(values, list):
                raise DataError(f"{folder}: {key}: expected a list of tokens, got {given!r}")
            spellings += [x for value in values if (x := _spelling(folder, key, value))]
    return tuple(dict.fromkeys(spellings))


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
