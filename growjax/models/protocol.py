"""What training and evaluation ask of a model, growjax's own or anybody else's.

- A *configuration* has `build(key) -> model`. `Model` is the one of a model that growjax did not write.
- A *model* is a pytree whose axes are declared (`gj.param`) or annotated (`gj.annotate`).
- `model.predict(example) -> logits [T, vocab]`, where there is one, reads what an objective makes; the
  keys of an example say what there is to read. A model without it is called, `model(tokens) -> logits`,
  with those of `positions`, `mask`, `prefix` and `documents` that its `__call__` takes.
- `model.readout(example) -> growjax.nn.Readout`, where there is one besides, gives hidden states and the
  head instead of logits, so that a loss never has all logits in memory. Its logits are those of `predict`
  (or of the call). A subclass with another `predict` or `__call__`, and no `readout` of its own, is read
  by these.
- `model.kind` is "causal" (the default), "encoder" (it sees both sides of a token) or "seq2seq" (it reads
  one sequence and writes another).
"""

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal, Protocol, get_args

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from growjax import annotation, values
from growjax.errors import GrowjaxError, PlanError
from growjax.models.config import Dtype
from growjax.nn import Readout, per_token
from growjax.trace import Read, reads


Kind = Literal["causal", "encoder", "seq2seq"]
# What an example may hold besides its tokens, and the names of these as arguments of a call
READ = {"positions": "positions", "mask": "mask", "prefix": "prefix", "segments": "documents"}


@values.base("a configuration such as GPTConfig(...), or Model('my_pkg.models:build', {...})")
class Config(Protocol):
    """Describes a model, and builds it."""

    def build(self, key: PRNGKeyArray) -> Any:
        """The model, its parameters drawn with this key. Must be traceable by JAX."""
        ...


@values.register
@dataclasses.dataclass(frozen=True)
class Model:
    """A model that growjax did not write, as a function and its arguments: what a plan holds of it.

    **Fields**

    - `factory`: the function, or its import path. Called with the arguments and `key=`, it returns a
      model whose axes are declared or annotated.
    - `arguments`: by name; numbers, strings, tuples, dicts and values.
    - `dtype`: the type that the model computes in, where it is not that of its parameters. It says how
      exactly a growth can be seen to keep the function, and changes nothing.

    Raises `PlanError` for a factory that cannot be imported.

    **Example**

        Plan("mine", Model("my_pkg.models:build", {"layers": 6, "width": 256}), stages, ...)
    """

    factory: Annotated[
        Callable[..., Any] | str, values.Range("a function, by its import path", callable)
    ]
    arguments: dict[str, Any] = dataclasses.field(default_factory=dict)
    dtype: Dtype = None

    def __post_init__(self):
        try:
            if isinstance(self.factory, str):
                function = values.resolve_function(self.factory, code=True)
                object.__setattr__(self, "factory", function)
        except GrowjaxError as error:
            raise PlanError(f"factory: {error}") from error
        values.check(self, PlanError, f"model {values.short(self.factory)} cannot be built:")

    def __hash__(self):
        return hash((self.factory, *self.arguments))

    def __repr__(self) -> str:
        """As it would be written, the factory by its import path."""
        try:
            factory = repr(values.path_of(self.factory))
        except GrowjaxError:
            factory = getattr(self.factory, "__qualname__", type(self.factory).__name__)
        dtype = "" if self.dtype is None else f", dtype={self.dtype!r}"
        return f"Model({factory}, {self.arguments!r}{dtype})"

    def build(self, key: PRNGKeyArray) -> Any:
        """The model that the factory makes."""
        assert callable(self.factory)
        return self.factory(**self.arguments, key=key)


def kind_of(model: Any) -> Kind:
    """How a model (or its shapes) reads; see the top of this page."""
    kind: Any = getattr(unwrapped(model), "kind", "causal")
    if kind not in get_args(Kind):
        raise PlanError(
            f"{type(model).__name__}.kind: expected one of {get_args(Kind)}, got {kind!r}"
        )
    return kind


def predictions(model: Any, example: Mapping[str, Array]) -> Float[Array, "T vocab"]:
    """The model's logits on one example of an objective.

    Raises `PlanError` for an example that the model does not read: nothing in it is ever ignored.
    """
    inside = unwrapped(model)
    name = type(inside).__name__
    if hasattr(inside, "predict"):
        scores = inside.predict(example)
    elif not callable(inside):
        raise PlanError(f"a {name} cannot be called; give the plan a loss of its own")
    else:
        scores = model(example["tokens"], **_readable(inside, example))
    shape = getattr(scores, "shape", None)
    if shape is None or len(shape) != 2:
        raise PlanError(
            f"{name}: expected logits [T, vocab] of one example, got "
            f"{type(scores).__name__ if shape is None else list(shape)}; give the model a "
            "`predict(example) -> logits`, or the plan a loss of its own"
        )
    if not jnp.issubdtype(scores.dtype, jnp.floating):
        raise PlanError(
            f"{name}: expected logits of a floating-point type, got {scores.dtype}, through which no "
            "gradient flows"
        )
    return scores


def read_tokens(
    function: Callable[..., Any], model: Any, example: Mapping[str, Array], *rows: Any
) -> Any:
    """`function(logits, *rows)` of one example, a chunk of its tokens at a time.

    `function` is that of `growjax.nn.per_token`. A model without a `readout` gives all logits at once.
    Raises what `predictions` raises, and `PlanError` for a `readout` that gives anything else.

    **Example**

        read_tokens(growjax.nn.cross_entropies, model, example, example["targets"])
    """
    return read_with_auxiliary(function, model, example, *rows)[0]


def read_with_auxiliary(
    function: Callable[..., Any], model: Any, example: Mapping[str, Array], *rows: Any
) -> tuple[Any, Float[Array, ""] | None]:
    """The same, and the auxiliary loss of the sequence: that of the model's `Readout`, or None.

    **Example**

        losses, auxiliary = read_with_auxiliary(cross_entropies, model, example, example["targets"])
    """
    inside = unwrapped(model)
    if not _has_readout(type(inside)):
        return function(predictions(model, example), *rows), None
    readout = inside.readout(example)
    if not isinstance(readout, Readout):
        raise PlanError(
            f"{type(inside).__name__}.readout: expected a growjax.nn.Readout, got "
            f"{type(readout).__name__}"
        )
    return per_token(function, readout, *rows), readout.auxiliary


def reads_beyond(
    run: Callable[[Any, Any], Any],
    model: Any,
    last: Mapping[str, Any],
    first: Mapping[str, Any],
) -> list[Read]:
    """Reads of `run(model, example)` beyond the end of an array, which depend on tokens.

    JAX would read another row without an error. `last` is an example of the largest token of a tokenizer,
    and `first` is the same example of token 0. Nothing is run; the model may be shapes.
    """
    is_leaf = lambda x: eqx.is_array(x) or isinstance(x, jax.ShapeDtypeStruct)  # noqa: E731
    arrays, static = eqx.partition(model, is_leaf)

    def read(example: Mapping[str, Any]) -> list[Read]:
        return reads(lambda arrays, x: run(eqx.combine(arrays, static), x), arrays, example)

    def beyond(read: Read) -> bool:
        return read.index is not None and read.index >= read.size

    largest = read(last)
    if not any(map(beyond, largest)):
        return []
    # What is beyond the end for any token is no matter of the tokenizer
    return [a for a, b in zip(largest, read(first), strict=True) if beyond(a) and not beyond(b)]


def _has_readout(cls: type) -> bool:
    """Whether `readout` is as new as what it stands for."""
    for each in cls.__mro__:
        if "readout" in vars(each):
            return True
        if "predict" in vars(each) or "__call__" in vars(each):
            return False
    return False


def _readable(model: Any, example: Mapping[str, Array]) -> dict[str, Array]:
    """What an example holds besides its tokens, as keyword arguments of a model's `__call__`."""
    name, expected = type(model).__name__, "its `__call__` takes no such argument"
    given = {READ[key]: x for key, x in example.items() if key in READ}
    parameters = inspect.signature(type(model).__call__).parameters
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    unread = [key for key in given if key not in parameters and not takes_all]
    if "tokens" not in example:
        unread, expected = ["encoder_tokens"], "it is called with one sequence"
    if unread:
        raise PlanError(
            f"{name} does not read {', '.join(unread)}, which the objective's examples have: {expected}. "
            "Take an objective without (Causal(..., packing='concat')), or write "
            "`predict(example) -> logits`"
        )
    return given


def unwrapped(model: Any) -> Any:
    """The model itself, of one that is annotated."""
    return model.model if isinstance(model, annotation.Annotated) else model
