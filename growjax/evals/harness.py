"""Every task of EleutherAI's lm-evaluation-harness, for models of growjax.

Importing this needs the harness: `pip install 'growjax[eval]'`. Neither PyTorch nor transformers is used.
Gao et al., "The Language Model Evaluation Harness", https://github.com/EleutherAI/lm-evaluation-harness.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from growjax.errors import EvalError
from growjax.evals.generation import generate
from growjax.evals.language import LanguageModel
from growjax.evals.metrics import Scores
from growjax.extras import load


_USER = "a task of the lm-evaluation-harness"
# Any, since the base class comes from a package that may be absent when types are checked
_TemplateLM: Any = load("lm_eval.api.model", _USER).TemplateLM


class HarnessModel(_TemplateLM):
    """A `LanguageModel` with the interface of the harness, for `lm_eval.simple_evaluate(model=...)`.

    Decoders and encoder-decoders answer all three types of requests; encoders answer likelihoods alone,
    with pseudo-log-likelihoods. Texts are tokenized as by the harness's own models, so scores compare
    with theirs.

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
        """The tokens of a text; the `LanguageModel` adds special tokens."""
        del add_special_tokens, kwargs
        return self.language.encode(string)

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
        totals = self.language.rolling([request.args[0] for request in requests])
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


def _options(requested: Mapping[str, Any], window: int) -> dict[str, Any]:
    """A task's options as arguments of `generate`; raises `EvalError` for those it does not have."""
    options = load("lm_eval.models.utils", _USER).normalize_gen_kwargs(
        dict(requested), default_max_gen_toks=min(256, window // 2)
    )
    sampled = options.get("do_sample", False)
    unsupported = []
    if sampled:
        unsupported += [f"{n}={options[n]}" for n in ("top_k", "top_p", "min_p") if n in options]
    if options.get("num_beams", 1) > 1:
        unsupported.append(f"num_beams={options['num_beams']}")
    if unsupported:
        raise EvalError(
            f"generate_until: a task asks for {', '.join(unsupported)}; expected the likeliest token, or "
            "tokens drawn at a temperature"
        )
    temperature = float(options.get("temperature", 1.0)) if sampled else 0.0
    return {"new": options["max_gen_toks"], "until": options["until"], "temperature": temperature}


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
