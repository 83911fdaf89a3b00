"""Text from a model, token by token: keys and values are kept, and shapes are few.

Prompts are padded on the right. The last token of a prompt is read again in the first step, so that
every step is alike, and what padding left in the cache is written over before anything can see it.
"""

from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, PRNGKeyArray

from growjax.data import Tokenizer
from growjax.errors import EvalError
from growjax.evals.language import LanguageModel, batch_rows, bucket


# Steps between two looks at the text: enough to keep the host out of the way, few enough not to waste
_STRIDE = 16


def generate(
    language: LanguageModel,
    prompts: Sequence[str],
    *,
    new: int,
    until: Sequence[str] = (),
    temperature: float = 0.0,
    key: PRNGKeyArray | None = None,
) -> list[str]:
    """What a decoder writes after each prompt, without the prompt and without special tokens.

    **Arguments**

    - `language`: a `GPT`, a `Llama` or a `T5`, whose encoder reads the prompt.
    - `prompts`: if longer than the window less `new` they lose their beginning.
    - `new`: how many tokens at most. A text ends before that at the end-of-text token, and before the
      first of the strings in `until`.
    - `temperature`: 0 takes the likeliest token; above, tokens are drawn, with `key`: what is drawn for
      a prompt does not depend on the others.

    Raises `EvalError` for an encoder, and if there is no room for the prompt.

    **Example**

        generate(LanguageModel(model, tokenizer), ["Q: 2 + 2?\\nA:"], new=8, until=["\\n"])
    """
    if language.kind == "encoder":
        raise EvalError("generate: an encoder does not write; expected a GPT, a Llama or a T5")
    if not hasattr(language.model, "extend"):
        raise EvalError("generate: the model has no `extend`; see growjax.models.GPT for one")
    # The decoder of a pair has no positions of its own to run out of
    room = language.window - new if language.kind == "causal" else language.window - 1
    if new < 1 or room < 1:
        raise EvalError(
            f"new: expected from 1 to {language.window - 1} tokens, the window less one, got {new}"
        )
    if temperature and key is None:
        raise EvalError("temperature: drawing needs a `key`")
    encoded = [language.encode(prompt) for prompt in prompts]
    if language.kind == "causal":
        encoded = [language.begun(tokens) for tokens in encoded]
    encoded = [tokens[-room:] for tokens in encoded]
    written = [""] * len(prompts)
    # Longest first. Steps cost more than padding, so short prompts go along with long ones
    order = sorted(range(len(prompts)), key=lambda i: -len(encoded[i]))
    while order:
        width = bucket(len(encoded[order[0]]) + 1)
        count = batch_rows(len(order), language.batch_tokens // (width + new))
        chosen, order = order[:count], order[count:]
        filled = [encoded[i] for i in chosen + chosen[:1] * (count - len(chosen))]
        draws = jnp.array(chosen + chosen[:1] * (count - len(chosen)))
        found = _batch(language, filled, width, new, until, temperature, key, draws)
        for i, text in zip(chosen, found, strict=False):
            written[i] = text
    return written


def _batch(
    language: LanguageModel,
    prompts: Sequence[list[int]],
    width: int,
    new: int,
    until: Sequence[str],
    temperature: float,
    key: PRNGKeyArray | None,
    draws: Array,
) -> list[str]:
    model, special = language.model, language.tokenizer.vocabulary.specials
    steps = -(-new // _STRIDE) * _STRIDE
    lengths = np.array([len(tokens) for tokens in prompts])
    padded = np.array([[*tokens, *[0] * (width - len(tokens))] for tokens in prompts], np.int32)
    if language.kind == "seq2seq":
        padded[np.arange(len(prompts)), lengths] = special["eos"]
        real = np.arange(width) <= lengths[:, None]
        cache = _read_pair(model, jnp.array(padded), jnp.array(real), bucket(steps))
        last, at = jnp.full(len(prompts), special["pad"]), jnp.zeros(len(prompts), jnp.int32)
    else:
        cache = _read(model, jnp.array(padded), bucket(width + steps))
        last = jnp.array(padded[np.arange(len(prompts)), lengths - 1])
        at = jnp.array(lengths - 1, jnp.int32)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(0) if key is None else key, draws)

    tokens, texts = np.zeros((len(prompts), 0), np.int32), [""] * len(prompts)
    while tokens.shape[1] < steps:
        more, cache = _write(model, cache, last, at, keys, jnp.float32(temperature))
        tokens = np.concatenate([tokens, np.asarray(more)], 1)
        last, at = more[:, -1], at + _STRIDE
        ends = [_text(language.tokenizer, row[:new], until) for row in tokens]
        texts = [text for text, _ in ends]
        if all(ended for _, ended in ends):
            break
    return texts


def _text(tokenizer: Tokenizer, tokens: np.ndarray, until: Sequence[str]) -> tuple[str, bool]:
    """The text of some tokens up to where it ends, and whether it does end."""
    vocabulary = tokenizer.vocabulary
    ends = np.flatnonzero(np.isin(tokens, [vocabulary.specials.get(n, -1) for n in ("eos", "sep")]))
    tokens = tokens[: ends[0]] if len(ends) else tokens
    # A model may have more rows than there are tokens; and special ones are no text
    tokens = tokens[tokens < vocabulary.size]
    text = tokenizer.decode(tokens[vocabulary.is_text[tokens]])
    cuts = [text.index(stop) for stop in until if stop and stop in text]
    return text[: min(cuts)] if cuts else text, bool(cuts) or bool(len(ends))


@eqx.filter_jit
def _read(model: Any, prompts: Int[Array, "B T"], size: int) -> Any:
    # Logits of the prompt are compiled away
    cache = jax.vmap(lambda tokens: model.extend(tokens, model.cache(size), 0)[1])(prompts)
    return _layers_first(cache)


@eqx.filter_jit
def _read_pair(model: Any, prompts: Int[Array, "B S"], real: Array, size: int) -> Any:
    cache = jax.vmap(lambda t, mask: model.cache(t, size, encoder_mask=mask))(prompts, real)
    return _layers_first(cache)


def _layers_first(cache: Any) -> Any:
    """A batch of caches, the batch behind the layers: a scan would move it there for every token."""
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, _batch_axis(x)), cache)


def _batch_axis(x: Array) -> int:
    # What has no layers has places alone, such as a mask
    return int(x.ndim > 2)


@eqx.filter_jit
def _write(
    model: Any, cache: Any, last: Int[Array, " B"], at: Int[Array, " B"], keys: Array, heat: Array
) -> tuple[Int[Array, "B stride"], Any]:
    """The next tokens of every text, and the cache with all but the last of them in it."""

    def one(token, cache, at, key):
        scores, cache = model.extend(token[None], cache, at)
        drawn = jax.random.categorical(
            jax.random.fold_in(key, at), scores[0] / jnp.maximum(heat, 1e-6)
        )
        return jnp.where(heat > 0, drawn, scores[0].argmax()).astype(jnp.int32), cache

    axes = jax.tree.map(_batch_axis, cache)

    def step(carry, _):
        token, at, cache = carry
        token, cache = jax.vmap(one, (0, axes, 0, 0), (0, axes))(token, cache, at, keys)
        return (token, at + 1, cache), token

    carry = (last.astype(jnp.int32), at, cache)
    (_, _, cache), tokens = jax.lax.scan(step, carry, length=_STRIDE)
    return tokens.T, cache
