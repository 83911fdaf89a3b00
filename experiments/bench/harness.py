"""Time of the lm-evaluation-harness over its own Hugging Face model, over that over growjax.

One decoder (6 layers, embed 256, 4 heads of 64, mlp 1024, 1024 words, 256 positions, float32), exported
and loaded by both. 128 log-likelihoods, 8 rolling texts of 600 words and 16 texts of 32 new tokens, in
batches of 16 on its side. `ratio` is of the sums once both are warm, `cpu_ratio` that of the cores' time,
and `first` of the first pass, which includes our compilation; pairs are the clock's and the cores'.
Needs `pip install 'growjax[eval,parity]'`.
"""

import importlib
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax
import numpy as np

import growjax as gj
from growjax.data import load_tokenizer
from growjax.evals import LanguageModel
from growjax.models import GPT, GPTConfig


WORDS, POSITIONS, BATCH, NEW, ROUNDS = 1024, 256, 16, 32, 5
NEEDED = ("accelerate", "lm_eval.models.huggingface", "tokenizers", "torch", "transformers")


def run() -> dict:
    """Ask both the same, in turn; nothing counts unless they answer the same."""
    try:
        modules = {name: importlib.import_module(name) for name in NEEDED}
    except ImportError as error:
        sys.exit(f"harness: {error}; pip install 'growjax[eval,parity]'")
    asked = requests()
    with tempfile.TemporaryDirectory() as folder:
        ours, theirs = models(Path(folder), modules)
        runners = {
            f"{side} {kind}": _runner(model, kind, asked[kind])
            for kind in asked
            for side, model in (("growjax", ours), ("harness", theirs))
        }
        first, answers = {}, {}
        for name, go in runners.items():
            first[name], answers[name] = _timed(go)
        gap = _largest_gap(answers, asked)
        times: dict[str, list] = {name: [] for name in runners}
        names = list(runners)
        for i in range(ROUNDS):
            for name in names[i % len(names) :] + names[: i % len(names)]:
                times[name].append(_timed(runners[name])[0])
    taken = {name: np.array(t) for name, t in times.items()}
    ratios = _ratio(taken, asked)
    return {
        "ratio": round(float(np.median(ratios[:, 0])), 3),
        "goal": 1.0,
        "quartiles": np.quantile(ratios[:, 0], [0.25, 0.75]).round(3).tolist(),
        "cpu_ratio": round(float(np.median(ratios[:, 1])), 3),
        "first": _ratio(first, asked).round(3).tolist(),
        "by_request": {k: np.median(_ratio(taken, [k]), 0).round(3).tolist() for k in asked},
        "seconds": {name: np.median(t, 0).round(2).tolist() for name, t in taken.items()},
        "largest_gap": gap,
        "torch_version": modules["torch"].__version__,
        "threads": modules["torch"].get_num_threads(),
    }


def _ratio(times: dict[str, np.ndarray], kinds: Iterable[str]) -> np.ndarray:
    """The harness's time over ours, on the clock and of all cores, of the sum over some requests."""
    theirs, ours = (
        np.sum([times[f"{side} {kind}"] for kind in kinds], axis=0)
        for side in ("harness", "growjax")
    )
    return theirs / ours


def requests() -> dict[str, list[tuple]]:
    """The arguments of made-up requests of each type."""
    rng = np.random.default_rng(0)

    def text(words: int) -> str:
        return " ".join(str(n) for n in rng.integers(0, 10_000, words))

    contexts = [text(int(n)) for n in rng.integers(10, 60, 32)]
    options = {"until": ["\n\n"], "max_gen_toks": NEW, "do_sample": False}
    return {
        "loglikelihood": [(c, f" {text(2)}") for c in contexts for _ in range(4)],
        "loglikelihood_rolling": [(text(600),) for _ in range(8)],
        "generate_until": [(text(int(n)), options) for n in rng.integers(10, 40, 16)],
    }


def models(folder: Path, modules: dict[str, Any]) -> tuple[Any, Any]:
    """The same weights as a model of growjax for the harness, and as its own."""
    # growjax.evals.harness needs the harness too
    ours = importlib.import_module("growjax.evals.harness").HarnessModel
    tokenizer = folder / "tokenizer.json"
    _tokenizer(modules["tokenizers"]).save(str(tokenizer))
    config = GPTConfig(
        layers=6, embed=256, heads=4, head_dim=64, mlp=1024, vocab=WORDS, positions=POSITIONS
    )
    model = GPT(config, key=jax.random.key(0))
    gj.hf.save(model, folder / "model")
    theirs = modules["lm_eval.models.huggingface"].HFLM(
        pretrained=str(folder / "model"),
        tokenizer=modules["transformers"].PreTrainedTokenizerFast(
            tokenizer_file=str(tokenizer), eos_token="<|endoftext|>", pad_token="<pad>"
        ),
        max_length=POSITIONS,
        device="cpu",
        batch_size=BATCH,
        dtype="float32",
    )
    return ours(LanguageModel(model, load_tokenizer(tokenizer))), theirs


def _tokenizer(tokenizers: Any) -> Any:
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=WORDS,
        special_tokens=["<|endoftext|>", "<pad>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator([" ".join(map(str, range(10_000)))], trainer)
    return made


def _runner(model: Any, kind: str, arguments: list[tuple]) -> Callable[[], list]:
    asked = [type("Instance", (), {"args": a})() for a in arguments]
    return lambda: getattr(model, kind)(asked, disable_tqdm=True)


def _timed(go: Callable[[], list]) -> tuple[np.ndarray, list]:
    """Seconds on the clock and of all cores, and the answer."""
    wall, cpu = time.perf_counter(), time.process_time()
    answers = go()
    return np.array([time.perf_counter() - wall, time.process_time() - cpu]), answers


def _largest_gap(answers: dict[str, list], asked: dict[str, list]) -> float:
    """Between log-likelihoods, per 1,000 nats where there are more; texts have to be equal."""
    gap = 0.0
    for kind in asked:
        a, b = (answers[f"{side} {kind}"] for side in ("growjax", "harness"))
        if kind == "generate_until":
            same = sum(x == y for x, y in zip(a, b, strict=True))
            if same < len(a):
                sys.exit(
                    f"harness: {len(a) - same} of {len(a)} texts differ; there is nothing to race"
                )
            continue
        one, other = (np.array([x[0] if isinstance(x, tuple) else x for x in y]) for y in (a, b))
        gap = max(gap, float((np.abs(one - other) / np.maximum(1, np.abs(other) / 1e3)).max()))
    if gap > 1e-3:
        sys.exit(f"harness: log-likelihoods differ by {gap:.1e}; there is nothing to race")
    return round(gap, 7)
