"""Several objectives for one model: each example is made by one of them, drawn at random."""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Annotated

import jax
import numpy as np

from growjax.data.denoising import drawn_part, weight_faults
from growjax.data.objectives import Example, Objective, Window, batch_shapes
from growjax.data.vocabulary import Vocabulary
from growjax.errors import DataError
from growjax.values import at_least, check, register


@register
@dataclasses.dataclass(frozen=True)
class Mixture:
    """A mixture of objectives for one kind of model, such as causal, prefix and denoising for a decoder.

    Examples of all parts have the same keys and shapes: shorter ones are padded with zeros, whose weight
    is 0, and a part without a prefix has an empty one. A part with a shorter `raw_length` than the
    mixture reads the beginning of each window.

    **Arguments**

    - `parts`: the objectives; all for decoders, or all for encoder-decoders.
    - `weights`: their relative frequencies; None is equal frequencies.

    **Example**

        spans = UL2(100, 28, (Denoiser("R", 0.15, 3.0),), form="decoder")
        Mixture((Causal(127), PrefixLM(127), spans), (0.6, 0.2, 0.2))     # as MIDAS trains UL2
    """

    parts: tuple[Objective, ...]
    weights: tuple[Annotated[float, at_least(0)], ...] | None = None

    def __post_init__(self):
        check(self, DataError, "this mixture cannot be used:", self._faults)

    def _faults(self) -> Iterator[str]:
        if not self.parts:
            yield "parts: expected objectives such as Causal(128), got none"
            return
        # The keys of its examples tell whether a part is for encoder-decoders
        if len({"encoder_tokens" in batch_shapes(part, 1) for part in self.parts}) > 1:
            yield (
                "parts: some make examples for decoders and some for encoder-decoders; one model reads "
                "one kind"
            )
        yield from weight_faults(self.weights, len(self.parts))

    @property
    def raw_length(self) -> int:
        return max(part.raw_length for part in self.parts)

    @property
    def lookahead(self) -> int:
        # A window has to hold the tokens of every part, and the longest part may have no lookahead
        longest = max(part.raw_length + part.lookahead for part in self.parts)
        return longest - self.raw_length

    @property
    def needs(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(name for part in self.parts for name in part.needs))

    @property
    def sentinels(self) -> int:
        return max(part.sentinels for part in self.parts)

    @functools.cached_property
    def _shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        """The longest array of each name over all parts, with an axis of 1 row in front."""
        shapes: dict[str, jax.ShapeDtypeStruct] = {}
        for part in self.parts:
            for name, x in batch_shapes(part, 1).items():
                if name not in shapes or x.shape > shapes[name].shape:
                    shapes[name] = x
        return shapes

    def __call__(self, window: Window, vocabulary: Vocabulary, rng: np.random.Generator) -> Example:
        part = self.parts[drawn_part(self.weights, len(self.parts), rng)]
        # A part may read less of the window than the longest one
        beginning = Window(*(x[: part.raw_length + part.lookahead] for x in window))
        example = part(beginning, vocabulary, rng)
        out: Example = {name: np.zeros(x.shape[1:], x.dtype) for name, x in self._shapes.items()}
        if "positions" in out:
            # Padding gets positions that go on, as if the example were as long as the longest
            out["positions"] = np.arange(len(out["positions"])).astype(np.int32)
        for name, x in example.items():
            out[name][: len(x)] = x
        return out
