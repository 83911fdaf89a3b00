"""Tokenizers by the files of their folder: roles, frames, ends, and special tokens in prompts."""

import json
from pathlib import Path
from typing import Any

import pytest

from growjax.data import ByteTokenizer, load_tokenizer
from growjax.errors import DataError, ExtraError


tokenizers = pytest.importorskip("tokenizers")
FRAME = tokenizers.processors.TemplateProcessing(
    single="<s> $A </s>", special_tokens=[("<s>", 10), ("</s>", 11)]
)
WORDS = {word: i for i, word in enumerate("a b c d e f g h <unk>".split())}
# Their ids are 9 and so on
SPECIAL = ["<pad>", "<s>", "</s>", "<|endoftext|>", "<|turn|>"]


def folder(path: Path, *, frame: Any = None, **files: Any) -> Path:
    """A tokenizer of words with these files beside it; `__` in a name stands for a dot."""
    path.mkdir(exist_ok=True)
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(WORDS, unk_token="<unk>"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    made.add_special_tokens(SPECIAL)
    if frame is not None:
        made.post_processor = frame
    made.save(str(path / "tokenizer.json"))
    for name, value in files.items():
        text = value if isinstance(value, str) else json.dumps(value)
        (path / name.replace("__", ".")).write_text(text)
    return path


def specials(path: Path, **files: Any) -> dict[str, int]:
    return load_tokenizer(folder(path, **files)).vocabulary.specials


def test_roles_are_what_the_files_say(tmp_path):
    config: dict[str, Any] = {"eos_token": "<|endoftext|>", "bos_token": None}
    named = {"eos": 12, "pad": 9}
    assert specials(tmp_path / "a", tokenizer_config__json=config) == named
    # The older file is for what the newer one does not say; both may write objects
    older = {"eos_token": "</s>", "pad_token": {"content": "<|turn|>", "lstrip": False}}
    both = {"tokenizer_config__json": config, "special_tokens_map__json": older}
    assert specials(tmp_path / "b", **both) == {"eos": 12, "pad": 13}
    assert specials(tmp_path / "c", special_tokens_map__json=older) == {
        "eos": 11,
        "pad": 13,
        "bos": 10,
    }
    # Spellings decide about a file by itself, and in a folder that says nothing
    guessed = {"pad": 9, "bos": 10, "eos": 11}
    assert load_tokenizer(tmp_path / "a" / "tokenizer.json").vocabulary.specials == guessed
    assert specials(tmp_path / "d") == guessed
    # A class has defaults of its own; one that is not known begins texts with no bos
    known = {"tokenizer_class": "GPT2TokenizerFast"}
    assert specials(tmp_path / "e", tokenizer_config__json=known) == {"bos": 12, "eos": 12}
    other = {"tokenizer_class": "PreTrainedTokenizerFast"}
    assert specials(tmp_path / "f", tokenizer_config__json=other) == {"pad": 9, "eos": 11}
    own = load_tokenizer(tmp_path / "f", specials={"eos": "<|turn|>"})
    assert own.vocabulary.specials["eos"] == 13


def test_ends_are_a_list(tmp_path):
    config = {"eos_token": "</s>"}

    def ends(name: str, **files: Any) -> set[int]:
        return {*load_tokenizer(folder(tmp_path / name, **files)).ends}

    assert ends("a", tokenizer_config__json=config) == {11}
    both = {"tokenizer_config__json": config, "generation_config__json": {"eos_token_id": [12, 13]}}
    assert ends("b", **both) == {11, 12, 13}
    assert ends("c", generation_config__json={"eos_token_id": 13}) == {11, 13}
    # config.json is for what generation_config.json does not say
    model = {"config__json": {"eos_token_id": 12}}
    assert ends("d", **model) == {11, 12}
    assert ends("e", **model, generation_config__json={"eos_token_id": 13}) == {11, 13}
    with pytest.raises(DataError, match="eos_token_id: expected an id or a list of ids, got 'x'"):
        ends("f", generation_config__json={"eos_token_id": "x"})


def test_documents_are_letters_and_prompts_have_special_tokens(tmp_path):
    framed = load_tokenizer(folder(tmp_path / "a", frame=FRAME))
    plain = load_tokenizer(folder(tmp_path / "b"))
    for tokenizer in (framed, plain):
        assert tokenizer.encode("a </s> b").tolist() == [0, 8, 1]
        assert tokenizer.encode_prompt("a </s> b").tolist() == [0, 11, 1]
        assert tokenizer.encode("").tolist() == tokenizer.encode_prompt("").tolist() == []
    assert framed.prefix == (10,) and plain.prefix == ()
    # The key does not decide beside tokenizer.json, as in transformers 5
    key = {"tokenizer_config__json": {"add_bos_token": False}}
    assert load_tokenizer(folder(tmp_path / "c", frame=FRAME, **key)).prefix == (10,)


def test_bytes_in_prompts_and_byt5(tmp_path):
    own, byt5 = ByteTokenizer(), load_tokenizer("byt5")
    ids = own.vocabulary.specials
    assert own.encode_prompt("<bos>a[R]").tolist() == [ids["bos"], 97, ids["R"]]
    assert own.encode_prompt("<extra_id_0>").tolist() == [own.vocabulary.size - 1]
    assert own.encode("<bos>").tolist() == [*b"<bos>"]
    assert byt5.encode("a").tolist() == [100] and byt5.vocabulary.sentinels[:2] == (259, 260)
    assert byt5.encode_prompt("a</s><extra_id_1>").tolist() == [100, 1, 260]
    assert byt5.decode([100, 1, 260]) == "a<eos><1>" and byt5.ends == (1,) and byt5.prefix == ()
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "ByT5Tokenizer"}')
    assert load_tokenizer(tmp_path) == byt5


def test_folders_that_cannot_be_read_say_why(tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="expected tokenizer.json, vocab.txt, spiece.model"):
        load_tokenizer(tmp_path / "empty")
    absent = {"tokenizer_config__json": {"eos_token": "<none>"}}
    with pytest.raises(DataError, match="its files name eos_token='<none>', which the vocabulary"):
        load_tokenizer(folder(tmp_path / "a", **absent))
    for bad, message in (
        ("{", "not readable as JSON"),
        ("[]", "expected a JSON object, got a list"),
        ('{"eos_token": 5}', "eos_token: expected a token, got 5"),
        ('{"chat_template": 5}', "chat_template: expected a text, got 5"),
    ):
        with pytest.raises(DataError, match=message):
            load_tokenizer(folder(tmp_path / "b", tokenizer_config__json=bad))
    with pytest.raises(DataError, match="have no chat template"):
        load_tokenizer(folder(tmp_path / "c")).chat([])  # type: ignore[attr-defined]
    # What only transformers reads says what to install
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for name in ("spiece.model", "merges.txt"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).write_text("")
        (tmp_path / name / "vocab.json").write_text("{}")
        with pytest.raises(ExtraError, match=r"pip install 'growjax\[tokenizers\]'"):
            load_tokenizer(tmp_path / name)


def test_the_files_of_a_bert_vocabulary_say_how_text_is_read(tmp_path):
    words = "[PAD] [UNK] [CLS] [SEP] [MASK] über uber 我爱 我 爱"
    (tmp_path / "vocab.txt").write_text(words.replace(" ", "\n"))
    assert load_tokenizer(tmp_path).encode("Über 我爱").tolist() == [6, 8, 9]
    (tmp_path / "tokenizer_config.json").write_text(
        '{"strip_accents": false, "tokenize_chinese_chars": false}'
    )
    assert load_tokenizer(tmp_path).encode("Über 我爱").tolist() == [5, 7]


def test_the_mark_of_words_is_that_of_most_pieces(tmp_path):
    pieces = ["<pad>", "</s>", "<unk>", "[MASK]", "Ġ", "▁", "▁the", "▁cat", "s"]
    model = tokenizers.models.Unigram([(piece, -1.0) for piece in pieces], unk_id=2)
    inner = tokenizers.Tokenizer(model)
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    inner.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path / "tokenizer.json")
    tokens = tokenizer.encode("the cats the")
    assert tokens.tolist() == [6, 7, 8, 6]
    assert tokenizer.vocabulary.words(tokens).tolist() == [0, 1, 1, 2]


# What the files beside a vocabulary change ----------------------------------------------------------


def beside(path: Path, **config: Any) -> Any:
    """The tokenizer of words with these keys of tokenizer_config.json."""
    return load_tokenizer(folder(path, tokenizer_config__json=config))


def test_tokens_that_the_files_add_are_found_as_they_say(tmp_path):
    plain = {"content": "<|turn|>", "special": True}
    new = {"content": "<new>", "special": True}
    tokenizer = beside(tmp_path / "a", added_tokens_decoder={"13": plain, "14": new})
    assert tokenizer.encode_prompt("a <new> <|turn|>b").tolist() == [0, 14, 13, 1]
    # As letters it is a word that nobody knows
    assert tokenizer.encode("<new>").tolist() == [8] and tokenizer.vocabulary.size == 15
    alone = beside(tmp_path / "b", added_tokens_decoder={"13": plain | {"single_word": True}})
    assert alone.encode_prompt("<|turn|>b").tolist() == [8]
    with pytest.raises(DataError, match="'<new>' would have 14, not 99"):
        beside(tmp_path / "c", added_tokens_decoder={"99": new})
    for bad in ([1], {"x": new}, {"14": {"special": True}}):
        with pytest.raises(DataError, match="added_tokens_decoder: expected tokens by their ids"):
            beside(tmp_path / "d", added_tokens_decoder=bad)


def test_special_tokens_without_a_role_are_tokens(tmp_path):
    """A word of the vocabulary is found whole then, also within others; any other is refused."""
    assert beside(tmp_path / "a").encode_prompt("ahb").tolist() == [8]
    for i, keys in enumerate(
        (
            {"additional_special_tokens": ["h"]},
            {"extra_special_tokens": {"image_token": {"content": "h"}}},
            {"pad_token": "h"},
        )
    ):
        tokenizer = beside(tmp_path / f"b{i}", **keys)
        assert tokenizer.encode_prompt("ahb").tolist() == [0, 7, 1]
        assert tokenizer.encode("ahb").tolist() == [8]
    lost = {"additional_special_tokens": ["<lost>"]}
    with pytest.raises(DataError, match="its files name '<lost>', which the vocabulary lacks"):
        beside(tmp_path / "c", **lost)
    for files in ({"special_tokens_map__json": lost}, {"added_tokens__json": {"<lost>": 14}}):
        with pytest.raises(DataError, match="its files name '<lost>', which the vocabulary lacks"):
            load_tokenizer(folder(tmp_path / "d", **files))
        (tmp_path / "d" / "special_tokens_map.json").unlink(missing_ok=True)
    with pytest.raises(DataError, match="extra_special_tokens: expected a list of tokens, got 5"):
        beside(tmp_path / "e", extra_special_tokens=5)


def test_prompts_are_letters_too_if_the_files_say_so(tmp_path):
    assert beside(tmp_path / "a").encode_prompt("a <s>").tolist() == [0, 10]
    assert beside(tmp_path / "b", split_special_tokens=True).encode_prompt("a <s>").tolist() == [
        *(0, 8)
    ]


def test_a_class_of_bert_says_how_text_is_read_whatever_its_normalizer(tmp_path):
    words = {word: i for i, word in enumerate("[PAD] [UNK] [CLS] [SEP] a A".split())}
    made = tokenizers.Tokenizer(tokenizers.models.WordPiece(words, unk_token="[UNK]"))
    made.normalizer = tokenizers.normalizers.BertNormalizer(lowercase=True)
    made.save(str(tmp_path / "tokenizer.json"))
    for cls, keys, expected in (
        ("BertTokenizerFast", {"do_lower_case": False}, 5),
        ("BertTokenizer", {}, 4),
        ("PreTrainedTokenizerFast", {"do_lower_case": False}, 4),
    ):
        config = json.dumps({"tokenizer_class": cls, **keys})
        (tmp_path / "tokenizer_config.json").write_text(config)
        assert load_tokenizer(tmp_path).encode("A").tolist() == [expected]


def test_a_class_of_gpt2_puts_a_space_before_a_text_if_it_says_so(tmp_path):
    made = tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0, "Ġ": 1}, []))
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.save(str(tmp_path / "tokenizer.json"))
    for cls, expected in (("GPT2TokenizerFast", [1, 0]), ("PreTrainedTokenizerFast", [0])):
        config = json.dumps({"tokenizer_class": cls, "add_prefix_space": True})
        (tmp_path / "tokenizer_config.json").write_text(config)
        assert load_tokenizer(tmp_path).encode("a").tolist() == expected


def test_words_of_another_class_are_not_read_as_those_of_bert(tmp_path, monkeypatch):
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\na")
    config = tmp_path / "tokenizer_config.json"
    config.write_text('{"tokenizer_class": "DistilBertTokenizerFast"}')
    assert load_tokenizer(tmp_path).encode("a").tolist() == [5]
    config.write_text('{"tokenizer_class": "BertJapaneseTokenizer"}')
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ExtraError, match=r"pip install 'growjax\[tokenizers\]'"):
        load_tokenizer(tmp_path)
