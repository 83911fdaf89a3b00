"""Tokenizers by their files: ids, prompts, chats and scores next to transformers and the harness."""

# pyright: reportMissingImports=false
import importlib
import json
import shutil
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import numpy as np
import pytest

import growjax as gj
from growjax.data import load_tokenizer
from growjax.errors import DataError
from growjax.evals import generate
from growjax.evals.commands import language_model
from growjax.models import GPT, GPTConfig, Llama, LlamaConfig
from tests.hf.vocabularies import draw


transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore")

SEEDS = range(10)
TEXTS = [
    "The colour of the sky is blue",
    "",
    "  two  spaces\n\n\tcafé ",
    "say {eos} and {bos} and <odd one> and <|turn|>user",
    "{bos}begins with it",
    "日本語 and 🌳",
]


def texts(drawn: dict[str, Any]) -> list[str]:
    return [t.replace("{bos}", drawn["bos"]).replace("{eos}", drawn["eos"]) for t in TEXTS]


@pytest.mark.parametrize("seed", SEEDS)
def test_ids_are_those_of_transformers(seed, tmp_path):
    drawn = draw(tmp_path, seed)
    ours, theirs = load_tokenizer(tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path)
    theirs_letters = transformers.AutoTokenizer.from_pretrained(tmp_path, split_special_tokens=True)
    for text in texts(drawn):
        # model_max_length and the file's truncation are for training
        expected = theirs(text, truncation=False)["input_ids"]
        plain = theirs(text, truncation=False, add_special_tokens=False)["input_ids"]
        assert [*ours.prefix, *ours.encode_prompt(text)] == expected, text
        assert ours.encode_prompt(text).tolist() == plain
        letters = theirs_letters(text, truncation=False, add_special_tokens=False)["input_ids"]
        assert ours.encode(text).tolist() == letters
        special = {*theirs.added_tokens_decoder} - {theirs.convert_tokens_to_ids("<unk>")}
        assert not special & {*letters}
    named = {n: getattr(theirs, f"{n}_token_id") for n in ("bos", "eos", "pad")}
    assert {n: ours.vocabulary.specials.get(n) for n in named} == named
    assert {*ours.ends} == drawn["ends"]


NEW = {"content": "<odd one>", "special": True, "lstrip": True, "rstrip": True}
BESIDE: dict[str, dict[str, Any]] = {
    "flags": {"added_tokens_decoder": {"?": NEW}},
    "letters": {"split_special_tokens": True},
    "space": {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": True},
}


@pytest.mark.parametrize("name", BESIDE)
def test_files_beside_a_vocabulary_change_it_as_in_transformers(name, tmp_path):
    draw(tmp_path, 0)
    path, keys = tmp_path / "tokenizer_config.json", BESIDE[name]
    before = load_tokenizer(tmp_path)
    if name == "flags":
        vocabulary = json.loads((tmp_path / "tokenizer.json").read_text())["model"]["vocab"]
        keys = {"added_tokens_decoder": {str(vocabulary["<odd one>"]): NEW}}
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))
    ours, theirs = load_tokenizer(tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path)
    text = "the colour and <odd one> other the"
    expected = theirs(text, truncation=False, add_special_tokens=False)["input_ids"]
    assert ours.encode_prompt(text).tolist() == expected != before.encode_prompt(text).tolist()


@pytest.mark.parametrize("seed", [0, 1, 2, 3])
def test_chats_are_those_of_transformers(seed, tmp_path):
    draw(tmp_path, seed)
    ours: Any = load_tokenizer(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    messages = [
        {"role": "user", "content": " 2 + 2?\n"},
        {"role": "assistant", "content": "Let me see: "},
    ]
    for reply in (True, False):
        expected = theirs.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=reply, continue_final_message=not reply
        )
        assert ours.chat(messages, reply=reply, continued=not reply) == expected


def test_older_places_of_a_chat_template(tmp_path):
    draw(tmp_path, 0)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    template = config.pop("chat_template")
    messages = [{"role": "user", "content": "hi"}]

    def text(**files: Any) -> str:
        for name, value in files.items():
            (tmp_path / name.replace("__", ".")).write_text(
                value if isinstance(value, str) else json.dumps(value)
            )
        return load_tokenizer(tmp_path).chat(messages)  # type: ignore[attr-defined]

    with pytest.raises(DataError, match="no chat template"):
        text(tokenizer_config__json=config)
    expected = text(tokenizer_config__json={**config, "chat_template": template})
    named = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": template}]
    assert text(tokenizer_config__json={**config, "chat_template": named}) == expected
    old = {"chat_template": template}
    assert text(tokenizer_config__json=config, chat_template__json=old) == expected
    # The newest place comes first
    assert text(chat_template__jinja="new {{ messages | tojson }}") == (
        'new [{"role": "user", "content": "hi"}]'
    )
    for bad, message in (
        ("{{ raise_exception('no system') }}", "no system"),
        ("{{ messages.__class__.__mro__ }}", "unsafe"),
        ("{% for %}", "Expected"),
    ):
        with pytest.raises(DataError, match=message):
            text(chat_template__jinja=bad)


# Tokenizers without tokenizer.json ------------------------------------------------------------------


def test_vocab_and_merges(tmp_path):
    draw(tmp_path, 0)
    whole = json.loads((tmp_path / "tokenizer.json").read_text())
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "generation_config.json").unlink()
    vocab = whole["model"]["vocab"]
    merges = [m if isinstance(m, str) else " ".join(m) for m in whole["model"]["merges"]]
    (tmp_path / "vocab.json").write_text(json.dumps({**vocab, "<|endoftext|>": len(vocab)}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges))
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')
    ours = load_tokenizer(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in (*TEXTS, "an end <|endoftext|>"):
        assert ours.encode_prompt(text).tolist() == theirs(text)["input_ids"]
    assert ours.vocabulary.specials["eos"] == len(vocab) == theirs.eos_token_id
    assert ours.encode("<|endoftext|>").tolist() != [len(vocab)]


@pytest.mark.parametrize("kind", ["t5", "llama"])
def test_sentencepiece(kind, tmp_path):
    sentencepiece = pytest.importorskip("sentencepiece")
    from tests.hf.vocabularies import CORPUS

    (tmp_path / "text").write_text("\n".join(line.replace("\n", " ") for line in CORPUS * 4))
    t5 = kind == "t5"
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text"),
        model_prefix=str(tmp_path / "made"),
        vocab_size=110 if t5 else 350,
        model_type="unigram" if t5 else "bpe",
        hard_vocab_limit=False,
        minloglevel=2,
        **(
            {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1}
            if t5
            # As Llama's was trained
            else {
                "byte_fallback": True,
                "normalization_rule_name": "identity",
                "remove_extra_whitespaces": False,
            }
        ),
    )
    folder = tmp_path / "folder"
    folder.mkdir()
    name, cls = ("spiece.model", "T5Tokenizer") if t5 else ("tokenizer.model", "LlamaTokenizer")
    shutil.move(tmp_path / "made.model", folder / name)
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": cls}))
    ours = load_tokenizer(folder)
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(folder / name))
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    for text in ("The colour of the sky", "naïve café  grows", "2 + 2"):
        assert ours.encode(text).tolist() == pieces.encode(text)
        assert (
            ours.encode_prompt(text).tolist() == theirs(text, add_special_tokens=False)["input_ids"]
        )
    specials = ours.vocabulary.specials
    assert specials["eos"] == pieces.eos_id() and len(ours.vocabulary.sentinels) == (
        100 if t5 else 0
    )
    assert ours.encode("</s>").tolist() != [specials["eos"]]
    assert specials.get("bos", -1) == pieces.bos_id()


def test_byt5(tmp_path):
    theirs = transformers.ByT5Tokenizer()
    theirs.save_pretrained(tmp_path)
    for ours in (load_tokenizer(tmp_path), load_tokenizer("byt5")):
        for text in ("grow", "naïve 🌳", "a <extra_id_0> b <extra_id_124></s>"):
            expected = theirs(text, add_special_tokens=False)["input_ids"]
            assert ours.encode_prompt(text).tolist() == expected
        assert ours.vocabulary.size == 384 and ours.vocabulary.specials == {"pad": 0, "eos": 1}
        first = theirs.convert_tokens_to_ids("<extra_id_0>")
        assert ours.vocabulary.sentinels[0] == first
        assert ours.decode(ours.encode("naïve")) == "naïve"


# Next to the harness's own model --------------------------------------------------------------------


def request(*args: Any) -> Any:
    return type("Instance", (), {"args": args})()


def checkpoint(folder: Path, seed: int) -> dict[str, Any]:
    """A drawn tokenizer with a model, whose weights are large enough that every token counts."""
    folder.mkdir()
    drawn = draw(folder, seed)
    sizes: dict = {"embed": 16, "heads": 2, "head_dim": 8, "mlp": 32, "vocab": drawn["size"]}
    if seed % 2:
        model: Any = Llama(LlamaConfig(layers=2, kv_heads=1, **sizes), key=jax.random.key(seed))
    else:
        model = GPT(GPTConfig(layers=2, positions=64, **sizes), key=jax.random.key(seed))
    trained, rest = gj.partition(model)
    model = eqx.combine(jax.tree.map(lambda x: 4 * x, trained), rest)
    keys = {"max_position_embeddings": 64} if seed % 2 else {}
    gj.hf.save(model, folder / "model", keys={**keys, "eos_token_id": 0})
    for file in folder.glob("*.json"):
        shutil.move(file, folder / "model")
    return drawn


@pytest.mark.parametrize("seed", SEEDS)
def test_scores_are_those_of_the_harness_own_model(seed, tmp_path):
    harness = pytest.importorskip("growjax.evals.harness")
    theirs_of: Any = importlib.import_module("lm_eval.models.huggingface").HFLM
    drawn = checkpoint(tmp_path / "made", seed)
    folder = str(tmp_path / "made" / "model")
    ours = harness.Checkpoint(pretrained=folder)
    theirs = theirs_of(pretrained=folder, device="cpu", batch_size=2, dtype="float32")
    assert (ours.max_length, ours.prefix_token_id) == (64, theirs.prefix_token_id)
    bos, eos = drawn["bos"], drawn["eos"]
    pairs = [
        ("The colour of the sky is", " blue"),
        ("", "a tree grows"),
        ("", f"{bos}grass"),
        (f"<|turn|>user\n2 + 2?{eos}\n<|turn|>", "assistant"),
        (f"{bos}The sky", f" is green{eos}"),
        ("with a space ", "café"),
        ("sky " * 40, "green"),
    ]
    requests = [request(*pair) for pair in pairs]
    expected = theirs.loglikelihood(requests, disable_tqdm=True)
    got = ours.loglikelihood(requests, disable_tqdm=True)
    for pair, (a, greedy), (b, likeliest) in zip(pairs, got, expected, strict=True):
        assert abs(a - b) < 1e-4 and greedy == likeliest, pair
    documents = [request("The sky is blue and " * 9), request(f"grass {eos} green")]
    np.testing.assert_allclose(
        ours.loglikelihood_rolling(documents),
        theirs.loglikelihood_rolling(documents, disable_tqdm=True),
        atol=1e-4,
        rtol=1e-6,
    )
    options = {"until": ["\n\n"], "max_gen_toks": 24, "do_sample": False}
    asked = [request("The colour of", options), request(f"<|turn|>user{eos}", options)]
    for one in asked:  # the harness decides about bos by the first prompt of a batch
        assert ours.generate_until([one]) == theirs.generate_until([one], disable_tqdm=True)
    # Too long: both refuse
    with pytest.raises(AssertionError):
        theirs.loglikelihood([request("a", " green" * 70)], disable_tqdm=True)
    with pytest.raises(gj.errors.EvalError, match="continuation: one has"):
        ours.loglikelihood([request("a", " green" * 70)], disable_tqdm=True)


def test_generation_stops_at_every_end(tmp_path):
    """The model writes one token after the other; whichever of the ends comes first ends the text."""
    checkpoint(tmp_path / "made", 1)
    folder = tmp_path / "made" / "model"
    language = language_model(folder)
    free = generate(language, ["The colour of"], new=30)[0]
    cut = language.encode_prompt(free, framed=False)[3:6]
    path = folder / "generation_config.json"
    path.write_text(json.dumps({"eos_token_id": [cut[0], cut[1]]}))
    text = generate(language_model(folder), ["The colour of"], new=30)[0]
    assert len(text) < len(free) and free.startswith(text)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    read = tokenizer("The colour of", return_tensors="pt", truncation=False)
    wrote = theirs.generate(**read, max_new_tokens=30, do_sample=False)[
        0, read["input_ids"].shape[1] :
    ]
    assert tokenizer.decode(wrote[:-1]).strip() == text.strip()
