"""The files of a checkpoint besides its weights: tokenizer, licence, modules of sentence-transformers."""

import json
import os
import re
import shutil
from pathlib import Path

from growjax.errors import HuggingFaceError
from growjax.hf.files import inside, located, read_json, write_json


COMPANIONS = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.txt", "vocab.json", "merges.txt", "spiece.model", "tokenizer.model"),
    *("sentencepiece.bpe.model", "chat_template.jinja", "chat_template.json"),
    *("generation_config.json", "config_sentence_transformers.json", "sentence_bert_config.json"),
    *("LICENSE", "LICENSE.md", "LICENSE.txt", "LICENCE", "USE_POLICY.md", "NOTICE", "NOTICE.txt"),
)
MODULES = "modules.json"
# The entries of a model card that also hold for a model grown from it
_METADATA = ("license", "license_name", "license_link", "language", "library_name", "pipeline_tag")


def copy_companions(source: Path, folder: Path, embed: int) -> None:
    """Copy the companion files that a checkpoint has.

    `embed` is the width of the model that is written. The configurations of sentence-transformers'
    modules, which read its outputs, get that width. Raises `HuggingFaceError` for a module with weights
    for another width.
    """
    for name in COMPANIONS:
        # lexists is also true for a broken link, which `inside` then reports
        if os.path.lexists(source / name):
            shutil.copyfile(inside(source, name), folder / name)
    tokenizer = folder / "tokenizer_config.json"
    if tokenizer.is_file() and "auto_map" in (keys := read_json(tokenizer)):
        # Its code is not copied, and transformers would look for it
        write_json(tokenizer, {key: value for key, value in keys.items() if key != "auto_map"})
    if os.path.lexists(source / MODULES):
        _copy_modules(source, folder, embed)


def _copy_modules(source: Path, folder: Path, embed: int) -> None:
    path = inside(source, MODULES)
    for module in read_json(path, list):
        name = module.get("path") if isinstance(module, dict) else None
        if not isinstance(name, str):
            raise HuggingFaceError(f"{path}: expected objects with a path, got {module!r}")
        if not name:
            continue  # the model itself
        if not re.fullmatch(r"\w[\w.-]*", name):
            raise HuggingFaceError(f"{path}: {name!r} is not the name of a folder in it")
        if not os.path.lexists(source / name):
            continue  # a module without a configuration, such as Normalize
        if not (source / name).resolve().is_relative_to(source.resolve()):
            raise HuggingFaceError(f"{source / name}: is a link that leads out of the folder")
        (folder / name).mkdir()
        for file in sorted(os.listdir(source / name)):
            shutil.copyfile(inside(source / name, file), folder / name / file)
        if (folder / name / "config.json").is_file():
            _resize(folder / name / "config.json", embed)
    shutil.copyfile(path, folder / MODULES)


def _resize(path: Path, embed: int) -> None:
    """Set the width in a module's configuration; raises `HuggingFaceError` if its weights fix another."""
    config = read_json(path)
    # The second name since sentence-transformers 6
    widths = {"word_embedding_dimension", "embedding_dimension"} & config.keys()
    with_weights = any(file.suffix in (".safetensors", ".bin") for file in path.parent.iterdir())
    if widths and not with_weights:
        write_json(path, config | dict.fromkeys(widths, embed))
    reads = {"in_features", "in_embedding_dimension", "in_word_embedding_dimension"}
    reads |= widths if with_weights else set()
    for key in reads & config.keys():
        if config[key] != embed:
            raise HuggingFaceError(
                f"{path.parent.name}: its weights read {config[key]} features, and the model has "
                f"embed={embed}; remove the module from {MODULES} of the source, and train a new one"
            )


def base_model(source: str | Path) -> str:
    """What a card calls the model that another one came from, as YAML: a repository, or a folder."""
    folder = Path(source)
    name = str(source)
    if folder.is_dir():
        # Its name may be "." here, and the hash of a commit in the cache of the Hugging Face Hub
        folder = folder.resolve()
        repository = folder.parent.parent.name.partition("models--")[2].replace("--", "/")
        name = repository if folder.parent.name == "snapshots" and repository else folder.name
    return name if re.fullmatch(r"[A-Za-z_][\w./-]*", name) else json.dumps(name)


def card_metadata(source: Path) -> dict[str, str]:
    """The entries of a model card's front matter that also hold for a grown model, as YAML text."""
    return {key: value for key, value in _front_matter(source).items() if key in _METADATA}


def front_matter(source: str | Path) -> str:
    """The front matter of the card of a model made from a Hugging Face folder, or a repository by its id.

    `base_model` is the name of the source; if growjax made that as well, the one that its card names.
    """
    folder = located(source)
    entries = _front_matter(folder)
    made_here = re.search(r"^- growjax$", entries.get("tags", ""), flags=re.MULTILINE)
    base = entries.get("base_model") if made_here else None
    kept = {"base_model": base or f" {base_model(source)}"} | card_metadata(folder)
    return "".join(f"{key}:{value}\n" for key, value in kept.items()) + "tags:\n- growjax\n"


def _front_matter(source: Path) -> dict[str, str]:
    """The entries of a model card's front matter, as YAML text by key; none without a card."""
    if not os.path.lexists(source / "README.md"):
        return {}
    text = inside(source, "README.md").read_text(encoding="utf-8", errors="replace")
    parts = re.split(r"^---\s*$", text, maxsplit=2, flags=re.MULTILINE)
    if len(parts) < 3 or parts[0].strip():
        return {}
    # A key, its value, and the indented or listed lines below it
    entries = re.findall(r"^(\w+):(.*(?:\n(?:[ \t]+|- ).*)*)", parts[1], flags=re.MULTILINE)
    return {key: value.rstrip() for key, value in entries}
