"""Text generation, token by token, with a cache of keys and values and few compiled shapes.

Prompts are padded on the right. The first step reads the last token of a prompt a second time, so that
every step is alike. Padding leaves keys and values behind the prompt, but each step writes its own over
them before any query attends to that position.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from growjax.data import Tokenizer
from growjax.errors import EvalError
from growjax.evals.language import LanguageModel, batch_rows, bucket
from growjax.nn import LongRotary, Rotary


# Steps on the device between two checks on the host whether all texts have ended: enough of them to
# hide the transfer, few enough that little is generated in vain
_STRIDE = 16


def generate(
    language: LanguageModel,
    prompts: Sequence[str],
    *,
    new: int,
    until: Sequence[str] = (),
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    key: PRNGKeyArray | None = None,
) -> list[str]:
    """The continuation of each prompt, without the prompt and without special tokens.

    **Arguments**

    - `language`: a `GPT`, a `Llama` or a `T5`, whose encoder reads the prompt.
    - `prompts`: spellings of special tokens are read as those tokens. One longer than the window less
      `new` loses its beginning.
    - `new`: how many tokens at most. A text ends before that at any of the tokenizer's `ends`, and before
      the first of the strings in `until`.
    - `temperature`: 0 takes the likeliest token; above 0 tokens are drawn with `key`, and those of one
      prompt do not depend on the other prompts.
    - `top_k`, `top_p`: draw among the `top_k` likeliest tokens alone (0: all), and among the fewest
      likeliest ones whose probabilities reach `top_p` (nucleus sampling, Holtzman et al., ICLR 2020).
      As in `transformers`, the temperature comes first, then `top_k`, then `top_p`.

    Raises `EvalError` for an encoder, if `new` leaves the prompt no room, and for another `top_k` or
    `top_p` than these.

    **Example**

        generate(LanguageModel(model, tokenizer), ["Q: 2 + 2?\\nA:"], new=8, until=["\\n"])
    """
    if language.kind == "encoder":
        raise EvalError("generate: an encoder does not write; expected a GPT, a Llama or a T5")
    if not hasattr(language.model, "extend"):
        raise EvalError("generate: the model has no `extend`; see growjax.models.GPT for one")
    # A decoder shares its window between prompt and text. A T5's decoder has relative positions, so
    # only its encoder is limited: to the window, less the `eos` behind the prompt
    room = language.window - new if language.kind == "causal" else language.window - 1
    if new < 1 or room < 1:
        raise EvalError(
            f"new: expected from 1 to {language.window - 1} tokens, the window less one, got {new}"
        )
    if temperature and key is None:
        raise EvalError("temperature: drawing needs a `key`")
    if top_k < 0 or not 0 < top_p <= 1:
        raise EvalError(
            "top_k, top_p: expected an integer from 0 and a number above 0, up to 1; got "
            f"{top_k} and {top_p}"
        )
    encoded = [language.encode_prompt(prompt) for prompt in prompts]
    if language.kind == "causal":
        encoded = [tokens or [language.first] for tokens in encoded]
    encoded = [tokens[-room:] for tokens in encoded]
    is_limited = top_k > 0 or top_p < 1
    draws = _Draws(
        jnp.float32(temperature),
        jnp.int32(top_k) if is_limited else None,
        jnp.float32(top_p) if is_limited else None,
    )
    texts = [""] * len(prompts)
    # Longest first. Steps cost more than padding, so short prompts go along with long ones
    order = sorted(range(len(prompts)), key=lambda i: -len(encoded[i]))
    switch = _switch(language, [len(tokens) for tokens in encoded], new)
    while order:
        longest = len(encoded[order[0]])
        width, far = bucket(longest + 1, language.window), len(order)
        if switch is not None and longest <= switch:
            width = max(longest, min(width, switch))
        elif switch is not None:
            far = sum(len(encoded[i]) > switch for i in order)
        count = batch_rows(far, language.batch_tokens // (width + new))
        members = order[: min(count, far)]
        order = order[len(members) :]
        # Copies of the first prompt fill the batch up to its compiled size
        rows = members + members[:1] * (count - len(members))
        batch = _batch(
            language,
            [encoded[i] for i in rows],
            width,
            new,
            until,
            draws,
            key,
            jnp.array(rows),
        )
        for i, text in zip(members, batch, strict=False):
            texts[i] = text
    return texts


def _switch(language: LanguageModel, lengths: Sequence[int], new: int) -> int | None:
    """The longest sequence with short frequencies of LongRoPE, or None for a model without it.

    Prompts on its two sides are read apart, as padding would make a short one a long one. Raises
    `EvalError` for a text that would cross it: all of its keys would change there.
    """
    nodes = jax.tree.leaves(language.model, is_leaf=lambda node: isinstance(node, Rotary))
    scalings = [node.scaling for node in nodes if isinstance(node, Rotary)]
    switches = [scaling.length for scaling in scalings if isinstance(scaling, LongRotary)]
    if not switches:
        return None
    switch = min(switches)
    crossing = [n for n in lengths if n <= switch < n + new - 1]
    if crossing:
        raise EvalError(
            f"new: a prompt of {crossing[0]} tokens and {new} new ones cross {switch} tokens, where "
            "LongRoPE changes the positions of all tokens; ask for fewer, or give a longer prompt"
        )
    return switch


def _batch(
    language: LanguageModel,
    prompts: Sequence[list[int]],
    width: int,
    new: int,
    until: Sequence[str],
    draws: "_Draws",
    key: PRNGKeyArray | None,
    numbers: Array,
) -> list[str]:
    """The continuations of one batch of prompts, padded to `width` tokens.

    `numbers` are the prompts' indices among all prompts: each is folded into `key`, so that the tokens
    drawn for a prompt are the same in any batch.
    """
    model, special = language.model, language.tokenizer.vocabulary.specials
    steps = -(-new // _STRIDE) * _STRIDE  # rounded up to whole strides
    lengths = np.array([len(tokens) for tokens in prompts])
    padded = np.array([[*tokens, *[0] * (width - len(tokens))] for tokens in prompts], np.int32)
    if language.kind == "seq2seq":
        padded[np.arange(len(prompts)), lengths] = special["eos"]
        mask = np.arange(width) <= lengths[:, None]
        cache = _read_pair(model, jnp.array(padded), jnp.array(mask), bucket(steps))
        # T5's decoder starts with `pad` at position 0
        last, at = jnp.full(len(prompts), special["pad"]), jnp.zeros(len(prompts), jnp.int32)
    else:
        cache = _read(model, jnp.array(padded), bucket(width + steps))
        last = jnp.array(padded[np.arange(len(prompts)), lengths - 1])
        at = jnp.array(lengths - 1, jnp.int32)
    # At temperature 0 the keys are not used, but the program takes them all the same
    key = jax.random.key(0) if key is None else key
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, numbers)

    tokens, texts = np.zeros((len(prompts), 0), np.int32), [""] * len(prompts)
    while tokens.shape[1] < steps:
        stride, cache = _write(model, cache, last, at, keys, draws)
        tokens = np.concatenate([tokens, np.asarray(stride)], 1)
        last, at = stride[:, -1], at + _STRIDE
        decoded = [_text(language.tokenizer, row[:new], until) for row in tokens]
        texts = [text for text, _ in decoded]
        if all(ended for _, ended in decoded):
            break
    return texts


def _text(tokenizer: Tokenizer, tokens: np.ndarray, until: Sequence[str]) -> tuple[str, bool]:
    """The text of some tokens up to an end token or a string of `until`, and whether it has one."""
    vocabulary = tokenizer.vocabulary
    ends = np.flatnonzero(np.isin(tokens, tokenizer.ends))
    tokens = tokens[: ends[0]] if len(ends) else tokens
    # An embedding may have more rows than the vocabulary has tokens; special tokens are not text
    tokens = tokens[tokens < vocabulary.size]
    text = tokenizer.decode(tokens[vocabulary.is_text[tokens]])
    cuts = [text.index(stop) for stop in until if stop and stop in text]
    return text[: min(cuts)] if cuts else text, bool(cuts) or bool(len(ends))


class _Draws(NamedTuple):
    """How tokens are drawn, as arrays, so that one program serves all values.

    Both limits are None if there are none, since they need a sort of all scores.
    """

    temperature: Array
    top_k: Array | None
    top_p: Array | None


def _drawn(scores: Float[Array, " vocab"], draws: _Draws, key: Array) -> Int[Array, ""]:
    """The likeliest token at temperature 0, or one that is drawn; both are computed."""
    warm = scores / jnp.maximum(draws.temperature, 1e-6)
    if draws.top_k is not None and draws.top_p is not None:
        warm = limited(warm, draws.top_k, draws.top_p)
    drawn = jax.random.categorical(key, warm)
    return jnp.where(draws.temperature > 0, drawn, scores.argmax()).astype(jnp.int32)


def limited(
    scores: Float[Array, " vocab"], top_k: Int[Array, ""], top_p: Float[Array, ""]
) -> Float[Array, " vocab"]:
    """Scores with -inf for all tokens but the `top_k` likeliest, and then but the nucleus of `top_p`.

    Tokens that tie with the last one that stays, stay.
    """
    ordered = jnp.sort(scores, descending=True).astype(jnp.float32)
    count = jnp.where(top_k > 0, top_k, len(scores))
    ordered = jnp.where(jnp.arange(len(scores)) < count, ordered, -jnp.inf)
    shares = jax.nn.softmax(ordered)
    # A token is in the nucleus if those before it do not reach top_p. Rounded sums may reach 1 early
    before = jnp.cumsum(shares) - shares
    nucleus = (ordered > -jnp.inf) & ((before < top_p) | (top_p >= 1))
    threshold = jnp.min(ordered, where=nucleus.at[0].set(True), initial=jnp.inf)
    return jnp.where(scores >= threshold, scores, -jnp.inf)


@eqx.filter_jit
def _read(model: Any, prompts: Int[Array, "B T"], size: int) -> Any:
    """The cache of a decoder with `size` positions after reading the prompts."""
    # Nothing uses the logits of the prompt, so the compiler removes them
    cache = jax.vmap(lambda tokens: model.extend(tokens, model.cache(size), 0)[1])(prompts)
    return _layers_first(cache)


@eqx.filter_jit
def _read_pair(model: Any, prompts: Int[Array, "B S"], masks: Array, size: int) -> Any:
    """The cache of a T5's decoder with `size` positions, its encoder having read the prompts."""
    cache = jax.vmap(lambda t, mask: model.cache(t, size, encoder_mask=mask))(prompts, masks)
    return _layers_first(cache)


def _layers_first(cache: Any) -> Any:
    """A batch of caches with axes `[layers, batch, ...]`.

    The models scan over layers, which must come first; with the batch first they would transpose the
    whole cache for every token.
    """
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, _batch_axis(x)), cache)


def _batch_axis(x: Array) -> int:
    # Keys and values have layers, so the batch is axis 1; a mask `[batch, positions]` has none
    return int(x.ndim > 2)


@eqx.filter_jit
def _write(
    model: Any,
    cache: Any,
    last: Int[Array, " B"],
    at: Int[Array, " B"],
    keys: Array,
    draws: _Draws,
) -> tuple[Int[Array, "B stride"], Any]:
    """The next `_STRIDE` tokens of every text, and the cache with all but the last of them in it.

    `last` is the last token of each text, which is not yet in the cache, and `at` its position.
    """

    def one(token, cache, at, key):
        scores, cache = model.extend(token[None], cache, at)
        return _drawn(scores[0], draws, jax.random.fold_in(key, at)), cache

    axes = jax.tree.map(_batch_axis, cache)

    def step(carry, _):
        token, at, cache = carry
        token, cache = jax.vmap(one, (0, axes, 0, 0), (0, axes))(token, cache, at, keys)
        return (token, at + 1, cache), token

    carry = (last.astype(jnp.int32), at, cache)
    (_, _, cache), tokens = jax.lax.scan(step, carry, length=_STRIDE)
    return tokens.T, cache
