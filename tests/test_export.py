"""Runs as folders that transformers loads: weights, tokenizer, special ids, read again."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import growjax as gj
from growjax import train as trainer
from growjax.data import ByteTokenizer, load_tokenizer
from growjax.data.tokenizer_export import stock_files
from growjax.data.tokenizers import ByT5Tokenizer
from growjax.errors import CheckpointError, DataError, HuggingFaceError
from growjax.evals.commands import open_model
from growjax.models import GPT, T5, Llama, LlamaConfig, T5Config
from growjax.runs.lineage import load_model
from growjax.train import Options, Start, export
from growjax.train.export import export_checkpoint
from tests.runs import LENGTH, SMALL, feed, plan, steps


pytest.importorskip("tokenizers")
TEXT = "naïve <eos> 🌳\n\ttwo  spaces </s>"
SPECIAL = ByteTokenizer().vocabulary.specials


def written(folder: Path, files: dict[str, str]) -> Path:
    folder.mkdir(exist_ok=True)
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")
    return folder


@pytest.mark.parametrize("kind", ["causal", "encoder", "seq2seq"])
def test_a_tokenizer_of_bytes_as_files(kind, tmp_path):
    from tokenizers import Tokenizer

    ours = ByteTokenizer()
    folder = written(tmp_path / "files", stock_files(ours, kind=kind, window=64))
    read: Any = load_tokenizer(folder)
    v, specials = read.vocabulary, {**SPECIAL}
    if kind == "causal":
        specials["bos"] = specials["eos"]
    assert v.specials == specials and v.sentinels == ours.vocabulary.sentinels
    assert v.size == ours.vocabulary.size
    for text in (TEXT, "", "<extra_id_3>"):
        assert read.encode(text).tolist() == ours.encode(text).tolist()
        assert read.encode_prompt(text).tolist() == ours.encode_prompt(text).tolist()
        assert read.decode(ours.encode(text)) == text
    assert ours.encode_prompt("a<eos>").tolist() == [97, SPECIAL["eos"]]
    # What stands around a text is what growjax trains with
    frame = {"causal": ([], []), "encoder": ([260], [261]), "seq2seq": ([], [258])}[kind]
    ids = Tokenizer.from_file(str(folder / "tokenizer.json")).encode("ab").ids
    assert ids == [*frame[0], 97, 98, *frame[1]] and [*read.prefix] == frame[0]
    config = json.loads((folder / "tokenizer_config.json").read_text())
    assert config["model_max_length"] == 64 and config["eos_token"] == "<eos>"


def test_a_tokenizer_of_a_file_loses_the_frame_that_was_not_trained(tmp_path):
    from tokenizers import processors

    source: Any = load_tokenizer(
        written(tmp_path / "a", stock_files(ByteTokenizer(), kind="causal"))
    )
    bos = ("<bos>", SPECIAL["bos"])
    inner = source._inner
    inner.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[bos])
    files = written(tmp_path / "b", {"tokenizer.json": inner.to_str()})
    framed = load_tokenizer(files)
    assert framed.prefix == (SPECIAL["bos"],)
    again = load_tokenizer(written(tmp_path / "c", stock_files(framed, kind="causal")))
    assert again.prefix == () and again.vocabulary.specials["bos"] == SPECIAL["eos"]
    assert again.encode(TEXT).tolist() == framed.encode(TEXT).tolist()


def test_an_encoder_of_a_tokenizer_without_cls_and_sep_has_no_frame(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    words = {word: i for i, word in enumerate(("<pad>", "</s>", "[MASK]", "a", "<unk>"))}
    model = tokenizers.models.WordLevel(words, unk_token="<unk>")
    tokenizers.Tokenizer(model).save(str(tmp_path / "tokenizer.json"))
    files = stock_files(load_tokenizer(tmp_path / "tokenizer.json"), kind="encoder")
    again = load_tokenizer(written(tmp_path / "files", files))
    assert again.prefix == () and again.vocabulary.specials == {"pad": 0, "eos": 1, "mask": 2}


def test_byt5_as_files_and_a_tokenizer_that_has_none(tmp_path):
    folder = written(tmp_path / "byt5", stock_files(ByT5Tokenizer(), kind="seq2seq"))
    assert load_tokenizer(folder) == ByT5Tokenizer()
    assert load_tokenizer(folder).encode("a").tolist() == [100]

    class Own(ByT5Tokenizer.__mro__[1]):  # type: ignore[misc, name-defined]
        vocabulary = ByteTokenizer().vocabulary

    with pytest.raises(DataError, match="expected one of growjax.data, got a Own"):
        stock_files(Own(), kind="causal")


def test_a_run_becomes_a_folder(run, tmp_path):
    checkpoint = run[2] / "checkpoints" / "00000003-00"
    code = "import sys; sys.argv[0] = 'growjax'; from growjax.cli import main; main()"
    out = tmp_path / "out"
    arguments = [sys.executable, "-c", code, "export", str(checkpoint), "--out", str(out)]
    done = subprocess.run(arguments, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.strip() == str(out), done.stderr
    model, tokenizer, framed = open_model(out)
    expected, lineage = load_model(checkpoint)
    tokens = jnp.arange(12)
    np.testing.assert_allclose(model(tokens), expected(tokens), atol=1e-6)
    assert framed and tokenizer.prefix == ()
    assert tokenizer.encode(TEXT).tolist() == [*TEXT.encode()]
    generation = json.loads((out / "generation_config.json").read_text())
    ids = {"bos_token_id": 258, "eos_token_id": 258, "pad_token_id": 256}
    assert generation == ids
    config = json.loads((out / "config.json").read_text())
    assert {name: config[name] for name in ids} == ids and config["n_positions"] == 16
    card = (out / "README.md").read_text()
    assert "00000003-00" in card and lineage["data"] in card and "- none" in card
    with pytest.raises(HuggingFaceError, match="exists already"):
        export_checkpoint(checkpoint, out)
    # Heads of another size than GPT-2 derives; and no run at all
    with pytest.raises(HuggingFaceError, match="head_dim"):
        export_checkpoint(run[2], tmp_path / "grown")
    with pytest.raises(CheckpointError, match="there is no such folder"):
        export_checkpoint(tmp_path / "nowhere", tmp_path / "grown")
    assert not (tmp_path / "grown").exists()


def test_a_run_from_a_folder_keeps_its_files(programs, tmp_path):
    config = type(SMALL)(**{**vars(SMALL), "bias": True})
    stock, folder = tmp_path / "stock", tmp_path / "run"
    gj.hf.save(GPT(config, key=jax.random.key(3)), stock)
    written(stock, stock_files(ByteTokenizer(), kind="causal") | {"LICENSE": "mine"})
    written(stock, {"generation_config.json": '{"eos_token_id": [258, 261]}'})
    written(stock, {"README.md": "---\nlicense: mit\ntags:\n- old\nbase_model: older\n---\n"})
    of = plan(steps(1), model=gj.hf.config(stock), start=Start(str(stock)), tokenizer=str(stock))
    list(trainer.train(of, feed(of), options=Options(held_out=4), cache=programs, run=folder))
    export_checkpoint(folder, tmp_path / "out")
    for name in ("LICENSE", "tokenizer.json", "generation_config.json", "tokenizer_config.json"):
        assert (tmp_path / "out" / name).read_text() == (stock / name).read_text()
    card = (tmp_path / "out" / "README.md").read_text()
    assert card.startswith("---\nbase_model: stock\nlicense: mit\ntags:\n- growjax\n---\n")
    model, tokenizer, framed = open_model(folder)
    tokens = jnp.arange(12)
    np.testing.assert_array_equal(open_model(tmp_path / "out")[0](tokens), model(tokens))
    assert framed and {*tokenizer.ends} == {258, 261}
    # Trained with another tokenizer: its own is written, and a source with another one is refused
    export_checkpoint(folder, tmp_path / "bytes", tokenizer="bytes")
    assert not (tmp_path / "bytes" / "LICENSE").exists()
    assert (tmp_path / "bytes" / "tokenizer.json").exists()
    with pytest.raises(CheckpointError, match="is not the one that the model was trained with"):
        export_checkpoint(folder, tmp_path / "no", tokenizer="bytes", source=stock)


def test_models_without_a_limit_get_the_window_they_were_trained_on(run, tmp_path, monkeypatch):
    config = LlamaConfig(layers=1, embed=8, heads=2, kv_heads=2, head_dim=4, mlp=8, vocab=384)
    lineage = load_model(run[2])[1]
    model = Llama(config, key=jax.random.key(0))
    monkeypatch.setattr(export, "load_model", lambda path: (model, lineage))

    def limits(name: str, **options: Any) -> tuple[int, int, str]:
        export_checkpoint(run[2], tmp_path / name, **options)
        read = [
            json.loads((tmp_path / name / f).read_text())
            for f in ("config.json", "tokenizer_config.json")
        ]
        return read[0]["max_position_embeddings"], read[1]["model_max_length"], read[0]["dtype"]

    assert limits("run") == (LENGTH, LENGTH, "float32")
    assert limits("own", window=64, dtype="bfloat16") == (64, 64, "bfloat16")


def test_an_encoder_decoder_is_read_again(run, tmp_path, monkeypatch):
    config = T5Config(
        encoder_layers=1, decoder_layers=1, embed=8, heads=2, head_dim=4, mlp=8, vocab=384
    )
    lineage = load_model(run[2])[1]
    model = T5(config, key=jax.random.key(0))
    monkeypatch.setattr(export, "load_model", lambda path: (model, lineage))
    export_checkpoint(run[2], tmp_path / "t5")
    read, tokenizer, _ = open_model(tmp_path / "t5")
    np.testing.assert_array_equal(read.embedding.table, model.embedding.table)
    assert tokenizer.vocabulary.sentinels == ByteTokenizer().vocabulary.sentinels
    generation = json.loads((tmp_path / "t5" / "generation_config.json").read_text())
    ids = {"decoder_start_token_id": 256, "eos_token_id": 258, "pad_token_id": 256}
    assert generation == ids
