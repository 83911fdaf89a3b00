"""EleutherAI's lm-evaluation-harness over a growjax model: every task that it knows.

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
_TemplateLM: Any = load("lm_eval.api.model", _USER).TemplateLM


class HarnessModel(_TemplateLM):
    """A `LanguageModel` as the harness wants it, for `lm_eval.simple_evaluate(model=...)`.

    Decoders and encoder-decoders, with all three types of requests, and encoders with
    pseudo-log-likelihoods, which do not write. Texts are cut into tokens as the harness's own models cut
    them, so that the numbers can stand next to theirs.

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
        """The tokens of a text; special ones are put in by the `LanguageModel`."""
        del add_special_tokens, kwargs
        return self.language.encode(string)

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        # The harness has a prefix of its own where there is no context
        bare = self.backend == "seq2seq" or self.language.kind == "encoder"
        empty = [self.prefix_token_id]
        pairs = [([] if bare and c == empty else c, x) for _, c, x in requests]
        found = [(s.logprob, s.greedy) for s in self.language.loglikelihoods_of_tokens(pairs)]
        for (key, _, _), answer in zip(requests, found, strict=True):
            if key is not None:
                self.cache_hook.add_partial("loglikelihood", key, answer)
        return found

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[float]:
        found = self.language.rolling([request.args[0] for request in requests])
        for request, answer in zip(requests, found, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, answer)
        return found

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        groups: dict[str, list[int]] = {}
        for i, request in enumerate(requests):
            groups.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(i)
        written = [""] * len(requests)
        for members in groups.values():
            texts = [requests[i].args[0] for i in members]
            options = _options(requests[members[0]].args[1], self.language.window)
            found = generate(self.language, texts, key=jax.random.key(self.seed), **options)
            for i, text in zip(members, found, strict=True):
                written[i] = text
                self.cache_hook.add_partial("generate_until", requests[i].args, text)
        return written


def _options(asked: Mapping[str, Any], window: int) -> dict[str, Any]:
    """The arguments of `generate` for what a task asks; raises `EvalError` for what it cannot do."""
    asked = load("lm_eval.models.utils", _USER).normalize_gen_kwargs(
        dict(asked), default_max_gen_toks=min(256, window // 2)
    )
    sampled = asked.get("do_sample", False)
    odd = [f"{n}={asked[n]}" for n in ("top_k", "top_p", "min_p") if sampled and n in asked]
    odd += [f"num_beams={asked['num_beams']}"] if asked.get("num_beams", 1) > 1 else []
    if odd:
        raise EvalError(
            f"generate_until: a task asks for {', '.join(odd)}; expected the likeliest token, or tokens "
            "drawn at a temperature"
        )
    temperature = float(asked.get("temperature", 1.0)) if sampled else 0.0
    return {"new": asked["max_gen_toks"], "until": asked["until"], "temperature": temperature}


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

    - `tasks`: names, of groups and tags too, or whole definitions.
    - `shots`: how many examples stand before each question; None is each task's own number.
    - `limit`: how many documents of each task.
    - `include`: a folder of task definitions of your own. The harness's are not read, which takes ten
        seconds, if `tasks` are all single tasks of that folder.
    - `seed`: of the choice of examples and of what is drawn.

    Its own tasks are downloaded by the library `datasets`. Raises `EvalError` for an unknown task.

    **Example**

        run_harness(LanguageModel(model, tokenizer), ["piqa", "lambada_openai"], shots=0)
    """
    manager = _manager(tasks, include)
    known = set(manager.all_tasks)
    unknown = [name for name in tasks if isinstance(name, str) and name not in known]
    if unknown:
        raise EvalError(
            f"tasks: growjax and the harness know nothing of {', '.join(unknown)}; `lm-eval ls tasks` "
            "lists the harness's own"
        )
    found = load("lm_eval", _USER).simple_evaluate(
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
    return {name: _scores(metrics) for name, metrics in found["results"].items()}


def _manager(tasks: Sequence[str | dict], include: str | Path | None) -> Any:
    """What knows the tasks. There are thousands of the harness's own, which groups and tags may reach."""
    manager: Any = load("lm_eval.tasks", _USER).TaskManager
    if include is not None:
        own = manager(include_path=str(include), include_defaults=False)
        if all(isinstance(name, str) and name in own.all_subtasks for name in tasks):
            return own
    return manager(include_path=None if include is None else str(include))


def _scores(metrics: Mapping[str, Any]) -> Scores:
    """The numbers among what the harness says of a task; `acc,none` is `acc`."""
    return {
        name.removesuffix(",none"): float(value)
        for name, value in metrics.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and "stderr" not in name
    }
