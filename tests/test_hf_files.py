"""Folders from anyone: broken, cut off or hostile files end in one kind of error, or in a sound model."""

import json
import os
import shutil
import struct
import weakref
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

import growjax as gj
from growjax.errors import GrowjaxError, HuggingFaceError
from growjax.hf.files import Tensor, write_weights, written_whole
from tests.folders import assert_same, build, rewritten


WEIGHTS = "model.safetensors"


@pytest.fixture
def folder(tmp_path) -> Path:
    gj.hf.save(build("gpt2"), tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def shards(tmp_path) -> Path:
    gj.hf.save(build("gpt2"), tmp_path / "shards", shard=1000)
    return tmp_path / "shards"


def header(folder: Path, change: Any) -> None:
    """Rewrite the header of a file, given as text, and leave its data."""
    data = (folder / WEIGHTS).read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    text = change(data[8 : 8 + size].decode()).encode()
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(text)) + text + data[8 + size :])


def entries(folder: Path, change: Any) -> None:
    """Rewrite the header of a file, given as a dict."""

    def changed(text: str) -> str:
        fields = json.loads(text)
        change(fields)
        return json.dumps(fields)

    header(folder, changed)


def _cut(folder: Path) -> None:
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[:-20])


def _huge(folder: Path) -> None:
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", 2**62) + data[8:])


def _overlap(folder: Path) -> None:
    def move(fields: dict[str, Any]) -> None:
        fields["transformer.ln_f.bias"]["data_offsets"] = fields["transformer.ln_f.weight"][
            "data_offsets"
        ]

    entries(folder, move)


def _twice(folder: Path) -> None:
    header(
        folder, lambda text: text.replace('"transformer.ln_f.bias"', '"transformer.ln_f.weight"')
    )


def _promise(folder: Path) -> None:
    entries(folder, lambda fields: fields["transformer.wte.weight"].update(shape=[2**40, 2**40]))


def _negative(folder: Path) -> None:
    entries(folder, lambda fields: fields["transformer.wte.weight"].update(shape=[-11, -8]))


def _integers(folder: Path) -> None:
    rewritten(folder, lambda t: t | {"transformer.ln_f.bias": np.ones(8, np.int32)})


def _infinite(folder: Path) -> None:
    rewritten(folder, lambda t: t | {"transformer.ln_f.bias": np.full(8, np.inf, np.float32)})


def _nan(folder: Path) -> None:
    rewritten(folder, lambda t: t | {"transformer.ln_f.bias": np.full(8, np.nan, np.float32)})


def _pickle(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "pytorch_model.bin")


def _link(folder: Path) -> None:
    outside = folder.parent / "elsewhere.safetensors"
    (folder / WEIGHTS).rename(outside)
    (folder / WEIGHTS).symlink_to(outside)


def _pipe(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    os.mkfifo(folder / WEIGHTS)


def _long_header(folder: Path) -> None:
    with (folder / WEIGHTS).open("wb") as file:
        file.write(struct.pack("<Q", 30_000_000))
        file.truncate(40_000_000)  # nothing of it is on the disk


def _long_config(folder: Path) -> None:
    os.truncate(folder / "config.json", 25_000_001)


def _many_twice(folder: Path) -> None:
    """A search for each name among all would take minutes."""
    names = ",".join(f'"{n}":{{}}' for n in range(200_000))
    header(folder, lambda text: "{" + names + ',"0":{}}')


def _config(text: str) -> Any:
    return lambda folder: (folder / "config.json").write_text(text)


SPOILT: dict[str, tuple[Any, str]] = {
    "cut off": (_cut, "not whole"),
    "a huge header": (_huge, "a header of 4,611,686,018,427,387,904 bytes"),
    "a long header": (_long_header, "a header of 30,000,000 bytes in a file of 40,000,000"),
    "a long config": (_long_config, "25,000,001 bytes are too many for JSON"),
    "many names, one twice": (_many_twice, "repeated keys: '0'"),
    "nothing in it": (
        lambda f: (f / WEIGHTS).write_bytes(b""),
        "the file is cut off, or not safetensors",
    ),
    "overlapping offsets": (_overlap, "not whole"),
    "a name twice": (_twice, "repeated keys: 'transformer.ln_f.weight'"),
    "more than there is": (_promise, "not whole"),
    "a negative shape": (_negative, "transformer.wte.weight: expected a dtype and a shape"),
    "integers": (_integers, "ln_f.bias: is of type I32"),
    "infinite": (_infinite, "transformer.ln_f.bias holds numbers that are not finite"),
    "not a number": (_nan, "transformer.ln_f.bias holds numbers that are not finite"),
    "a pickle": (_pickle, "pytorch_model.bin is a pickle, which can run code"),
    "a link": (_link, "outside the folder; it is not followed"),
    "a pipe": (_pipe, "expected a file"),
    "no config": (lambda f: (f / "config.json").unlink(), "expected config.json in it, got none"),
    "no JSON": (_config("{"), "not readable as JSON"),
    "a list": (_config("[1]"), "expected a JSON object, got a list"),
    "NaN": (_config('{"model_type": NaN}'), "NaN is not a number"),
    "deep JSON": (_config("[" * 200_000), "not readable as JSON"),
    "a long number": (_config('{"n_layer": ' + "9" * 10_000 + "}"), "not readable as JSON"),
    "a key twice": (_config('{"n_layer": 1, "n_layer": 2}'), "repeated keys: 'n_layer'"),
}


@pytest.mark.parametrize("how", SPOILT)
def test_a_spoilt_folder_says_what_is_wrong(how, folder):
    spoil, message = SPOILT[how]
    spoil(folder)
    with pytest.raises(HuggingFaceError) as caught:
        gj.hf.load(folder)
    assert message in str(caught.value)


def test_a_missing_folder_says_how_to_get_one(tmp_path):
    with pytest.raises(HuggingFaceError, match="got no folder; nothing is downloaded"):
        gj.hf.load(tmp_path / "nowhere")


@pytest.mark.parametrize("name", ["../out.safetensors", "/etc/passwd", "a/b", "..", "", "a\\b"])
def test_shards_are_files_of_the_folder(name, shards):
    file = next(shards.glob("*.safetensors"))
    (shards.parent / "out.safetensors").write_bytes(file.read_bytes())
    index = shards / "model.safetensors.index.json"
    mapping = json.loads(index.read_text())
    mapping["weight_map"] = dict.fromkeys(mapping["weight_map"], name)
    index.write_text(json.dumps(mapping))
    with pytest.raises(HuggingFaceError, match="is not the name of a file in it"):
        gj.hf.load(shards)


def test_every_shard_is_there_and_holds_what_the_index_says(shards):
    index, files = shards / "model.safetensors.index.json", sorted(shards.glob("*.safetensors"))
    text, mapping = index.read_text(), json.loads(index.read_text())
    name = next(n for n, file in mapping["weight_map"].items() if file == files[0].name)
    mapping["weight_map"][name] = files[1].name
    index.write_text(json.dumps(mapping))
    with pytest.raises(HuggingFaceError, match=f"{name}: not in {files[1].name}"):
        gj.hf.load(shards)
    index.write_text(text)
    tensors = load_file(files[1])
    save_file(tensors | load_file(files[0]), files[1])
    with pytest.raises(HuggingFaceError, match="in another shard too"):
        gj.hf.load(shards)
    files[1].unlink()
    with pytest.raises(HuggingFaceError, match="does not exist"):
        gj.hf.load(shards)
    index.write_text('{"weight_map": [1]}')
    with pytest.raises(HuggingFaceError, match="expected a weight_map"):
        gj.hf.load(shards)


def test_the_links_of_the_cache_of_the_hub_are_followed(folder, tmp_path):
    snapshot, blobs = tmp_path / "models--a" / "snapshots" / "1", tmp_path / "models--a" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for file in folder.iterdir():
        (blobs / f"0{file.name}").write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(Path("../../blobs") / f"0{file.name}")
    assert gj.sizes(gj.hf.load(snapshot)) == gj.sizes(gj.hf.load(folder))


def test_a_tokenizer_is_not_copied_from_outside(folder, tmp_path):
    (tmp_path / "secret").write_text("mine")
    (folder / "vocab.txt").symlink_to(tmp_path / "secret")
    with pytest.raises(HuggingFaceError, match="outside the folder"):
        gj.hf.save(build("gpt2"), tmp_path / "copy", source=folder)
    assert not (tmp_path / "copy").exists()


@pytest.fixture(scope="module")
def bytes_of(tmp_path_factory) -> tuple[Path, bytes, dict[str, Any]]:
    path = tmp_path_factory.mktemp("fuzz") / "model"
    gj.hf.save(build("gpt2"), path)
    return path, (path / WEIGHTS).read_bytes(), json.loads((path / "config.json").read_text())


def sound_or_refused(path: Path) -> None:
    """Either an error of ours, or a model of the right shapes and finite numbers."""
    try:
        model = gj.hf.load(path)
    except GrowjaxError:
        return
    assert isinstance(model, gj.models.GPT)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(model))


@given(st.integers(0, 2**32), st.sampled_from(["flip", "cut", "insert", "zero"]), st.booleans())
def test_any_change_of_the_file_is_refused_or_harmless(bytes_of, seed, kind, early):
    path, data, config = bytes_of
    (path / "config.json").write_text(json.dumps(config))
    rng = np.random.default_rng(seed)
    at = int(rng.integers(0, 2000 if early else len(data)))
    byte = bytes([int(rng.integers(0, 256))])
    (path / WEIGHTS).write_bytes(
        {
            "flip": data[:at] + byte + data[at + 1 :],
            "cut": data[:at],
            "insert": data[:at] + byte + data[at:],
            "zero": data[:at] + bytes(len(data) - at),
        }[kind]
    )
    sound_or_refused(path)


VALUES = [
    None,
    True,
    -1,
    0,
    1,
    2,
    7,
    2**40,
    0.5,
    -0.0,
    1e308,
    "",
    "gelu",
    "relu",
    [],
    [1],
    {},
    {"a": 1},
]


@given(st.integers(0, 2**32), st.integers(1, 3))
def test_any_change_of_the_config_is_refused_or_harmless(bytes_of, seed, changes):
    path, data, config = bytes_of
    (path / WEIGHTS).write_bytes(data)
    rng = np.random.default_rng(seed)
    keys = rng.choice(sorted(config), changes)
    changed = config | {str(key): VALUES[rng.integers(len(VALUES))] for key in keys}
    (path / "config.json").write_text(json.dumps(changed))
    sound_or_refused(path)


def test_the_id_of_a_repository_is_looked_up_in_the_local_cache(saved, tmp_path, monkeypatch):
    model, folder = saved("gpt2")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    with pytest.raises(HuggingFaceError, match="run `hf download some-one/tiny.gpt2` first"):
        gj.hf.load("some-one/tiny.gpt2")
    repository = tmp_path / "home" / "hub" / "models--some-one--tiny.gpt2"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0a1b")
    shutil.copytree(folder, repository / "snapshots" / "0a1b")
    assert_same(model, gj.hf.load("some-one/tiny.gpt2"))
    gj.hf.save(model, tmp_path / "again", source="some-one/tiny.gpt2")
    # Ids of old repositories have no owner
    shutil.copytree(repository, repository.with_name("models--tiny-gpt2"))
    assert_same(model, gj.hf.load("tiny-gpt2"))
    (repository / "refs" / "main").write_text("../../../../elsewhere")
    with pytest.raises(HuggingFaceError, match="not in the cache"):
        gj.hf.load("some-one/tiny.gpt2")


def test_weights_are_written_one_tensor_at_a_time(tmp_path):
    """The library would hold a whole shard. What it reads is equal, strided arrays and all."""
    base = np.arange(24, dtype=np.float32).reshape(4, 6)
    arrays = {
        "half": base.astype(np.float16)[:3, ::2],
        "turned": base.T,
        "wide": base.astype(np.float64)[1:],
        "brain": base.astype(jnp.bfloat16),
        "scalar": np.array(3.5, np.float32),
        "empty": np.zeros((0, 3), np.float32),
    }
    latest: list[Any] = []

    def maker(name: str) -> Any:
        def make() -> np.ndarray:
            # The one before is gone by now
            assert not latest or latest.pop()() is None
            array = np.array(arrays[name]).T.copy().T
            latest.append(weakref.ref(array))
            return array

        return make

    tensors = {n: Tensor(np.dtype(x.dtype), x.shape, maker(n)) for n, x in arrays.items()}
    write_weights(tmp_path, tensors, shard=10**9)
    read = load_file(tmp_path / "model.safetensors")
    assert read.keys() == arrays.keys()
    for name, array in arrays.items():
        assert read[name].dtype == array.dtype
        np.testing.assert_array_equal(read[name], array)
    raw = (tmp_path / "model.safetensors").read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    assert length % 8 == 0 and header.pop("__metadata__") == {"format": "pt"}
    for name, entry in header.items():
        assert entry["data_offsets"][0] % arrays[name].dtype.itemsize == 0
    wrong = {"a": Tensor(np.dtype(np.float32), (2,), lambda: np.zeros(3, np.float32))}
    with pytest.raises(HuggingFaceError, match=r"a: expected float32 of shape \(2,\)"):
        write_weights(tmp_path, wrong, shard=10**9)


def test_a_folder_that_cannot_be_made_is_named():
    with (
        pytest.raises(HuggingFaceError, match="/dev/null/a: cannot be made: Not a directory"),
        written_whole("/dev/null/a"),
    ):
        pass


def test_a_full_disk_is_a_typed_error_that_leaves_nothing(tmp_path):
    with pytest.raises(HuggingFaceError, match="grown: cannot be made: No space left"):
        with written_whole(tmp_path / "grown"):
            raise OSError(28, "No space left on device")
    assert not any(tmp_path.iterdir())
