"""Every task of EleutherAI's lm-evaluation-harness, for models of growjax.

Importing this needs the harness: `pip install 'growjax[eval]'`. Neither PyTorch nor transformers is used.
Its command line, as of lm-eval 0.4.13, knows no models from elsewhere until they are imported, so it runs
from here:

    python -m growjax.evals.harness --model growjax --model_args pretrained=runs/first --tasks piqa

`growjax-lm-eval` is the same command. Versions with plugins find the entry point in `lm_eval.models`.
Gao et al., "The Language Model Evaluation Harness", https://github.com/EleutherAI/lm-evaluation-harness.
"""

import dataclasses
import importlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from growjax.errors import DataError, EvalError
from growjax.evals.commands import language_model
from growjax.evals.generation import generate
from growjax.evals.language import LanguageModel
from growjax.evals.metrics import Scores
from growjax.extras import load
from growjax.hf.files import window_of


_USER = "a task of the lm-evaluation-harness"
# Any, since the base class comes from a package that may be absent when types are checked
_TemplateLM: Any = load("lm_eval.api.model", _USER).TemplateLM


class HarnessModel(_TemplateLM):
    """A `LanguageModel` with the interface of the harness, for `lm_eval.simple_evaluate(model=...)`.

    Decoders and encoder-decoders answer all three types of requests; encoders answer likelihoods alone,
    with pseudo-log-likelihoods. Texts are tokenized as by the harness's own models, so scores compare
    with theirs: special tokens in a text are read, and what the tokenizer's files put before one is put
    there if the `LanguageModel` is `framed`.

    **Example**

        lm_eval.simple_evaluate(model=HarnessModel(LanguageModel(model, tokenizer)), tasks=["piqa"])
    """

    def __init__(self, language: LanguageModel, *, seed: int = 0):
        super().__init__()
        self.language, self.seed = language, seed
        self.backend = "seq2seq" if language.kind == "seq2seq" else "causal"

    @property
    def eot_token_id(self) -> int:
        return self.language.tokenizer.vocabulary.separator

    @property
    def prefix_token_id(self) -> int:
        return self.language.first

    @property
    def max_length(self) -> int:
        return self.language.window

    @property
    def tokenizer_name(self) -> str:
        return self.language.tokenizer.vocabulary.digest

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """The tokens of a text; `add_special_tokens` None is as the `LanguageModel` reads prompts."""
        del kwargs
        return self.language.encode_prompt(string, framed=add_special_tokens)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The template of conversations, if one is asked for."""
        return self._template if chat_template else None

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """A conversation as a prompt; raises `DataError` for a tokenizer without a chat template."""
        if self._template is None:
            raise DataError("chat: the files of this tokenizer have no chat template")
        # Without a reply to come, the last message is the beginning of one
        turn = {"reply": add_generation_prompt, "continued": not add_generation_prompt}
        return self.language.tokenizer.chat(chat_history, **turn)  # type: ignore[attr-defined]

    @property
    def _template(self) -> str | None:
        return getattr(self.language.tokenizer, "chat_template", None)

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        # In place of an empty context the harness sends the prefix token. Decoders read it; the other
        # kinds were not trained with one, so their context becomes empty again
        drop_prefix = self.language.kind != "causal"
        pairs = []
        for _, context, continuation in requests:
            if drop_prefix and context == [self.prefix_token_id]:
                context = []
            pairs.append((context, continuation))
        scored = [(s.logprob, s.greedy) for s in self.language.loglikelihoods_of_tokens(pairs)]
        # The harness caches answers by request; it sends no key for those that it does not cache
        for (key, _, _), answer in zip(requests, scored, strict=True):
            if key is not None:
                self.cache_hook.add_partial("loglikelihood", key, answer)
        return scored

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[float]:
        texts = [self.tok_encode(request.args[0]) for request in requests]
        totals = self.language.rolling_of_tokens(texts)
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        # Requests with equal options are generated together
        groups: dict[str, list[int]] = {}
        for i, request in enumerate(requests):
            groups.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(i)
        texts = [""] * len(requests)
        for members in groups.values():
            prompts = [requests[i].args[0] for i in members]
            options = _options(requests[members[0]].args[1], self.language.window)
            generated = generate(self.language, prompts, key=jax.random.key(self.seed), **options)
            for i, text in zip(members, generated, strict=True):
                texts[i] = text
                self.cache_hook.add_partial("generate_until", requests[i].args, text)
        return texts


class Checkpoint(HarnessModel):
    """`--model growjax`: the model in a folder, with its tokenizer.

    **Arguments**

    - `pretrained`: a run, one checkpoint, a Hugging Face folder, or the id of a repository in the cache.
    - `tokenizer`: another tokenizer than the one in the folder.
    - `max_length`: how many tokens the model reads at once; by default as many as it has positions, or as
      the `config.json` of a Hugging Face folder says.
    - `batch_size`: how many texts of a whole window go through the model at once; "auto" is 8.
    - `seed`: decides tokens that are drawn.

    Parameters have the type of the file, on JAX's default device. Raises `EvalError` for arguments other
    than these.
    """

    def __init__(
        self,
        pretrained: str,
        tokenizer: str | None = None,
        max_length: int | None = None,
        batch_size: int | str | None = None,
        seed: int = 0,
        **others: Any,
    ):
        # The harness always passes these two, and leaves them without a value by default
        others = {name: value for name, value in others.items() if value is not None}
        if others.pop("device", "cpu") != "cpu" or others:
            raise EvalError(
                "model_args: expected pretrained, tokenizer, max_length, batch_size and seed; got "
                f"{', '.join(others) or 'a device'}: JAX's default device is used (JAX_PLATFORMS)"
            )
        longest = max_length or window_of(pretrained)
        language = language_model(pretrained, tokenizer, longest=longest)
        if str(batch_size or "auto") != "auto":
            rows = int(str(batch_size))
            language = dataclasses.replace(language, batch_tokens=rows * language.window)
        super().__init__(language, seed=int(seed))


def main() -> None:
    """The command line of the harness, which has `--model growjax` besides its own."""
    load("lm_eval.__main__", _USER).cli_evaluate()


def _options(requested: Mapping[str, Any], window: int) -> dict[str, Any]:
    """A task's options as arguments of `generate`; raises `EvalError` for those it does not have."""
    options = load("lm_eval.models.utils", _USER).normalize_gen_kwargs(
        dict(requested), default_max_gen_toks=min(256, window // 2)
    )
    sampled = options.get("do_sample", False)
    unsupported = []
    if sampled:
        unsupported += [
            f"{name}={options[name]}" for name in ("min_p", "typical_p") if name in options
        ]
    if options.get("num_beams", 1) > 1:
        unsupported.append(f"num_beams={options['num_beams']}")
    if unsupported:
        raise EvalError(
            f"generate_until: a task asks for {', '.join(unsupported)}; expected the likeliest token, or "
            "tokens drawn at a temperature, with top_k and top_p"
        )
    temperature = float(options.get("temperature", 1.0)) if sampled else 0.0
    return {
        "new": options["max_gen_toks"],
        "until": options["until"],
        "temperature": temperature,
        "top_k": int(options.get("top_k") or 0) if sampled else 0,
        "top_p": float(options.get("top_p") or 1.0) if sampled else 1.0,
    }


def run_harness(
    language: LanguageModel,
    tasks: Sequence[str | dict],
    *,
    shots: int | None = None,
    limit: int | None = None,
    include: str | Path | None = None,
    seed: int = 0,
) -> dict[str, Scores]:
    """The metrics of some tasks of the harness, by the names of the tasks.

    **Arguments**

    - `tasks`: names of tasks, groups or tags, or whole definitions.
    - `shots`: how many examples stand before each question; None is each task's own number.
    - `limit`: how many documents of each task; None is all.
    - `include`: a folder of task definitions of your own. If `tasks` are all single tasks of that
      folder, the harness's own definitions are not read, which saves ten seconds.
    - `seed`: decides the examples before a question, and drawn tokens.

    The library `datasets` downloads the harness's own tasks. Raises `EvalError` for an unknown task.

    **Example**

        run_harness(LanguageModel(model, tokenizer), ["piqa", "lambada_openai"], shots=0)
    """
    manager = _manager(tasks, include)
    known = set(manager.all_tasks)
    unknown = [name for name in tasks if isinstance(name, str) and name not in known]
    if unknown:
        raise EvalError(
            f"tasks: neither growjax nor the harness has {', '.join(unknown)}; `lm-eval ls tasks` lists "
            "the harness's own"
        )
    report = load("lm_eval", _USER).simple_evaluate(
        model=HarnessModel(language, seed=seed),
        tasks=list(tasks),
        num_fewshot=shots,
        limit=limit,
        bootstrap_iters=0,
        log_samples=False,
        task_manager=manager,
        random_seed=seed,
        numpy_random_seed=seed,
        torch_random_seed=seed,
        fewshot_random_seed=seed,
    )
    return {name: _scores(metrics) for name, metrics in report["results"].items()}


def _manager(tasks: Sequence[str | dict], include: str | Path | None) -> Any:
    """The harness's index of tasks: those of `include` alone if they suffice, or all.

    Groups and tags may refer to any of the harness's thousands of tasks, so only single tasks suffice.
    """
    manager: Any = load("lm_eval.tasks", _USER).TaskManager
    if include is not None:
        included = manager(include_path=str(include), include_defaults=False)
        if all(isinstance(name, str) and name in included.all_subtasks for name in tasks):
            return included
    return manager(include_path=None if include is None else str(include))


def _scores(metrics: Mapping[str, Any]) -> Scores:
    """The harness's metrics of a task that are numbers, without standard errors; `acc,none` is `acc`."""
    return {
        name.removesuffix(",none"): float(value)
        for name, value in metrics.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and "stderr" not in name
    }


if __name__ == "__main__":
    # The module under its own name, which the tasks of growjax import too
    importlib.import_module("growjax.evals.harness").main()
else:
    # The harness fills its table of models when this is imported, but only while the table is empty
    load("lm_eval.models", _USER)
    _registry: Any = load("lm_eval.api.registry", _USER)
    # A version with plugins may have the entry point in the table, and refuses the name a second time
    if "growjax" not in _registry.model_registry:
        _registry.register_model("growjax")(Checkpoint)
