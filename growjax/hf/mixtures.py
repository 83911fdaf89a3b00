"""Mixtures of experts in config.json: how many, of how many units, and the names of their tensors."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from growjax.hf.family import ConfigFile
from growjax.models import DecoderConfig
from growjax.nn import Experts


# The parts of a mixture, with one tensor for each expert
EXPERTS = {
    "mlp.router": "layers.{}.mlp.gate",
    "mlp.glu": "layers.{}.mlp.experts.{}.gate_proj",
    "mlp.up": "layers.{}.mlp.experts.{}.up_proj",
    "mlp.down": "layers.{}.mlp.experts.{}.down_proj",
}
# Those of experts that every token uses, and of the gate that says how much
SHARED = {
    "mlp.shared.glu": "layers.{}.mlp.shared_expert.gate_proj",
    "mlp.shared.up": "layers.{}.mlp.shared_expert.up_proj",
    "mlp.shared.down": "layers.{}.mlp.shared_expert.down_proj",
    "mlp.shared_gate": "layers.{}.mlp.shared_expert_gate",
}

_SHARED = "shared_expert_intermediate_size"


@dataclasses.dataclass(frozen=True)
class Mixture:
    """How a family says the numbers of its experts: the defaults of its keys.

    `units` is the key of the hidden units of one expert, `shared` the default number of those of the
    experts that every token uses (None: there are none). The loss that balances experts is computed by
    transformers for all layers at once, and by growjax for each sequence and layer; its coefficient is
    taken over as it stands. That of the router's z-loss has no key.
    """

    count: int
    per_token: int
    balance: float = 0.001
    units: str = "intermediate_size"
    shared: int | None = None

    # Old and new files have one of them each, and old and new readers as well
    spellings: ClassVar[tuple[str, ...]] = ("num_experts", "num_local_experts")

    def read(self, file: ConfigFile) -> dict[str, Any]:
        """The fields of the configuration."""
        count = file.layers(*self.spellings, default=self.count, noun="experts")
        per_token = file.size("num_experts_per_tok", default=self.per_token)
        if per_token > count:
            file.complaints.append(
                f"num_experts_per_tok: {per_token} cannot be chosen from {count} experts"
            )
        file.get("intermediate_size")  # of layers without experts, and there are none
        balance = file.number("router_aux_loss_coef", default=self.balance, zero=True)
        shared: dict[str, Any] = {}
        if self.shared is not None:
            shared = {"shared_mlp": file.size(_SHARED, default=self.shared), "shared_gate": True}
        return {
            **shared,
            "experts": count,
            "experts_per_token": per_token,
            "aux_loss_coef": balance,
            "z_loss_coef": 0.0,
        }

    def write(self, config: DecoderConfig) -> dict[str, Any]:
        """The keys of config.json."""
        return {
            **({} if self.shared is None else {_SHARED: config.shared_mlp}),
            **dict.fromkeys(self.spellings, config.experts),
            "num_experts_per_tok": config.experts_per_token,
            "router_aux_loss_coef": config.aux_loss_coef,
        }

    def limits(self, config: DecoderConfig) -> list[str]:
        """What of its experts the family cannot say."""
        c = config
        shared = c.shared_mlp or c.shared_experts
        if self.shared is None:
            return (
                [f"shared_experts: in this family there are none, got {shared}"] if shared else []
            )
        if not shared:
            return ["shared_experts: in this family every token uses some, got none"]
        return [] if c.shared_gate else ["shared_gate: in this family they have one, got none"]


def experts_of(mlp: Any, n: Mapping[str, int]) -> dict[str, Any]:
    """The fields of a configuration about experts, from a feed-forward and the sizes of a model."""
    if not isinstance(mlp, Experts):
        return {}
    shared, gated = n.get("shared_mlp", 0), mlp.shared_gate is not None
    whole = not gated and shared % n["mlp"] == 0
    return dict(
        experts=n["experts"],
        experts_per_token=mlp.per_token,
        shared_experts=shared // n["mlp"] if whole else 0,
        shared_mlp=None if whole else shared,
        shared_gate=gated,
        norm_topk_prob=mlp.norm_topk_prob,
        aux_loss_coef=mlp.aux_loss_coef,
        z_loss_coef=mlp.z_loss_coef,
        expert_body=mlp.body,
    )
