"""Tokenizers written as the files that `transformers` reads."""

import json
from typing import Any, Literal

from growjax.data.tokenizer_files import CONFIG, ROLES, TOKENIZER
from growjax.data.tokenizers import ByT5Tokenizer, ByteTokenizer, LibraryTokenizer, Tokenizer
from growjax.errors import DataError
from growjax.extras import load


def stock_files(
    tokenizer: Tokenizer,
    *,
    kind: Literal["causal", "encoder", "seq2seq"],
    window: int | None = None,
) -> dict[str, str]:
    """The texts of `tokenizer.json` and `tokenizer_config.json` for a model that growjax trained.

    **Arguments**

    - `kind`: of the model. Texts get the special tokens that growjax trains with: none for a decoder,
      `cls` and `sep` for an encoder, `eos` at the end for an encoder-decoder. A decoder's `bos` is the
      separator between documents, the only token that it saw before a text.
    - `window`: the most tokens that the model reads.

    Raises `DataError` for a tokenizer that is not growjax's.

    **Example**

        stock_files(ByteTokenizer(), kind="causal")["tokenizer.json"]
    """
    roles = dict(tokenizer.vocabulary.specials)
    if isinstance(tokenizer, ByT5Tokenizer):
        config: dict[str, Any] = {
            "tokenizer_class": "ByT5Tokenizer",
            "extra_ids": tokenizer.sentinels,
            **_spelled({"pad": "<pad>", "eos": "</s>"}),
        }
        return {CONFIG: _text(config)}
    if isinstance(tokenizer, ByteTokenizer):
        inner, spelling = _of_bytes(tokenizer), {i: name for name, i in tokenizer.names.items()}
    elif isinstance(tokenizer, LibraryTokenizer):
        inner = load("tokenizers", "a tokenizer").Tokenizer.from_str(tokenizer.to_json())
        spelling = {i: tokenizer.spelling(i) for i in roles.values()}
    else:
        raise DataError(
            f"tokenizer: expected one of growjax.data, got a {type(tokenizer).__name__}, whose files are "
            "not known; write a tokenizer.json into the folder yourself"
        )
    if kind == "causal":
        roles["bos"] = roles["eos"] = tokenizer.vocabulary.separator
    spellings = {name: spelling[roles[name]] for name in ROLES if name in roles}
    inner.post_processor = _frame(kind, roles, spellings)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        **_spelled(spellings),
    }
    if window is not None:
        config["model_max_length"] = window
    template = getattr(tokenizer, "chat_template", None)
    if template is not None:
        config["chat_template"] = template
    return {TOKENIZER: inner.to_str(pretty=True), CONFIG: _text(config)}


def _frame(kind: str, roles: dict[str, int], spellings: dict[str, str]) -> Any:
    """The post-processor that puts special tokens around texts, or None."""
    frames = {"causal": (), "encoder": ("cls", "sep"), "seq2seq": ("eos",)}
    used = frames[kind]
    if not used or any(name not in roles for name in used):
        # Without these tokens growjax trained without a frame (`MLM(frame=False)`)
        return None
    names = [spellings[name] for name in used]
    before, after = names[:-1], names[-1]
    single, pair = [*before, "$A", after], [*before, "$A", after, "$B:1", f"{after}:1"]
    processors = load("tokenizers", "a tokenizer").processors
    return processors.TemplateProcessing(
        single=single, pair=pair, special_tokens=[(spellings[n], roles[n]) for n in used]
    )


def _of_bytes(tokenizer: ByteTokenizer) -> Any:
    """A byte tokenizer as one of the library: byte-level BPE without merges, and the same ids."""
    library = load("tokenizers", "a tokenizer of bytes as tokenizer.json")
    ids = {letter: byte for byte, letter in enumerate(_letters_of_bytes())}
    inner = library.Tokenizer(library.models.BPE(vocab=ids | tokenizer.names, merges=[]))
    inner.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = library.decoders.ByteLevel()
    tokens = [library.AddedToken(name, special=True, normalized=False) for name in tokenizer.names]
    inner.add_special_tokens(tokens)
    return inner


def _letters_of_bytes() -> list[str]:
    """The letter by which byte-level BPE writes each byte: itself if it prints, or one from 256 on."""
    printing = {*range(33, 127), *range(161, 173), *range(174, 256)}
    letters, more = [], 256
    for byte in range(256):
        letters.append(chr(byte if byte in printing else more))
        more += byte not in printing
    return letters


def _spelled(spellings: dict[str, str]) -> dict[str, str]:
    return {f"{name}_token": spelling for name, spelling in spellings.items()}


def _text(config: dict[str, Any]) -> str:
    return json.dumps(config, indent=2, sort_keys=True) + "\n"
