"""What a checkpoint computes in the end: words, labels or hidden states, by its tensors and its class."""

import dataclasses
from collections.abc import Callable
from typing import Any

from growjax.hf.family import ConfigFile, is_tied
from growjax.hf.table import Row, linear
from growjax.models import Labels


def labelled(file: ConfigFile, otherwise: str) -> str:
    """Whether a classifier scores a "sequence" or each "token", by the class that config.json names.

    `otherwise` is returned for a class that does not tell. One with other scores is a fault.
    """
    for kind, end in (
        ("sequence", "ForSequenceClassification"),
        ("token", "ForTokenClassification"),
    ):
        if file.architecture.endswith(end):
            return kind
    if file.architecture.endswith(("ForQuestionAnswering", "ForMultipleChoice")):
        file.complaints.append(
            f"architectures: scores of a {file.architecture} are neither a sequence's nor a token's; "
            "pass ignore=['classifier.*'] to read the model without them"
        )
    return otherwise


@dataclasses.dataclass(frozen=True)
class DecoderHeads:
    """What the heads of a family of decoders are called.

    **Fields**

    - `stem`: how the names of its classes begin.
    - `causal`: its class with a head of words, if that is not the usual name.
    - `words`, `lm`: the embedding, and the head of words.
    - `sequence`, `token`: the heads that score labels; None where transformers has no such class.
    - `tied`: the default of `tie_word_embeddings`.
    - `padding`: the default of `pad_token_id`.
    """

    stem: str
    causal: str | None = None
    words: str = "embed_tokens"
    lm: str = "lm_head"
    sequence: str | None = "score"
    token: str | None = "score"
    tied: bool = False
    padding: int | None = None

    @property
    def prefixes(self) -> tuple[str, ...]:
        """How the names of their tensors begin, which have no prefix of the whole model."""
        names = (self.lm, self.sequence, self.token)
        return tuple(f"{name}." for name in dict.fromkeys(names) if name is not None)

    @property
    def base(self) -> str:
        """The class without a head."""
        return f"{self.stem}Model"

    def architecture(self, config: Any) -> str:
        """The class that computes what a configuration says."""
        if isinstance(config.head, Labels):
            return self._classifier(config.head.of)
        return self.base if config.head == "none" else self.causal or f"{self.stem}ForCausalLM"

    def _classifier(self, of: str) -> str:
        return f"{self.stem}For{of.title()}Classification"

    def rows(self, config: Any) -> tuple[Row, ...]:
        """The rows of the embedding and of the head that a model has."""
        words, lm = f"{self.words}.weight", f"{self.lm}.weight"
        tied = config.tied and config.head == "words"
        rows = [Row(words, "embedding.table: vocab embed", others=(lm,) if tied else ())]
        if isinstance(config.head, Labels):
            name = self.sequence if config.head.of == "sequence" else self.token
            assert name is not None
            rows += linear(name, "classifier.weight", "embed", "labels")
        elif config.head == "words" and not config.tied:
            rows.append(Row(lm, "head: vocab embed"))
        return tuple(rows)

    def read(self, file: ConfigFile, same: Callable[[str, str], bool]) -> dict[str, Any]:
        """The fields `head` and `tied` of the configuration.

        A file is that of a classifier if it has the tensor that scores labels, and of a model without a
        head if it has none of words and names a class without them. Anything else reads words.
        """
        words, lm = f"{self.words}.weight", f"{self.lm}.weight"
        scores = {
            of: name
            for of, name in (("sequence", self.sequence), ("token", self.token))
            if name is not None and f"{name}.weight" in file.names
        }
        headless = lm not in file.names
        if headless and scores:
            of = next(iter(scores))
            if len(scores) > 1:
                # They have one name, and the scores of tokens have a bias
                biased = f"{scores['token']}.bias" in file.names
                of = labelled(file, "token" if biased else "sequence")
            file.get("tie_word_embeddings")
            return {"head": Labels(file.labels(), of, self._padding(file, of)), "tied": False}  # type: ignore[arg-type]
        others = ("SequenceClassification", "TokenClassification", "QuestionAnswering")
        named = (self.base, *(f"{self.stem}For{other}" for other in others))
        if headless and file.architecture in named:
            file.get("tie_word_embeddings")
            return {"head": "none", "tied": False}
        return {
            "head": "words",
            "tied": is_tied(file, same, head=lm, words=[words], default=self.tied),
        }

    def _padding(self, file: ConfigFile, of: str) -> int | None:
        """The id of padding, by which the last token of a sequence is known."""
        if of == "token":
            return None
        # Null says that there is none, whatever the default
        default = None if "pad_token_id" in file.values else self.padding
        value = file.get("pad_token_id", default=default)
        if value is not None and (not isinstance(value, int) or isinstance(value, bool)):
            file.complaints.append(f"pad_token_id: expected an integer or null, got {value!r}")
            return None
        return value

    def write(self, config: Any) -> dict[str, Any]:
        """The keys of config.json."""
        head = config.head
        if not isinstance(head, Labels):
            return {"tie_word_embeddings": config.tied} if head == "words" else {}
        padding = {} if head.of == "token" else {"pad_token_id": head.padding}
        return {"num_labels": head.count, **padding}

    def limits(self, config: Any) -> list[str]:
        """What of its head the family cannot say."""
        head = config.head
        if not isinstance(head, Labels):
            return []
        if (self.sequence if head.of == "sequence" else self.token) is None:
            return [f"head: transformers has no {self._classifier(head.of)}"]
        return []


def head_of(model: Any) -> Any:
    """The field `head` of the configuration of a decoder."""
    if model.classifier is None:
        return "words" if model.lm else "none"
    scores = model.classifier
    return Labels(scores.weight.shape[1], scores.of, scores.padding)
