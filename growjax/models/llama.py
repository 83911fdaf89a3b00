"""Llama: a decoder with RMS norms, rotary positions, a gated MLP and grouped queries."""

import dataclasses
from typing import Annotated

from jaxtyping import PRNGKeyArray

from growjax.models.causal import Head
from growjax.models.config import (
    Activation,
    Coefficient,
    Depth,
    Dtype,
    Eps,
    Number,
    Remat,
    born,
    check_config,
    odd_rotary,
)
from growjax.models.decoder import Decoder, DecoderConfig, Sight
from growjax.nn import Body, ExpertBody, Scaling
from growjax.values import Size, positive, register


@register
@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """Sizes and choices of a `Llama`; `heads` are query heads, `bias` is that of attention alone.

    `theta` and `scaling` (such as a `growjax.nn.RotaryScaling`) set the frequencies of the rotary
    positions.
    `dtype` is that of the activations (None: the parameters'); norms, softmax and logits stay in
    float32 at least. With `experts`, every feed-forward is a mixture of that many experts of `mlp` units
    (`growjax.nn.Experts`, which explains the options); 0 is one dense MLP. `head` is what is computed in
    the end, as in a `DecoderConfig`.
    """

    layers: Depth
    embed: Size
    heads: Size
    kv_heads: Size
    head_dim: Size
    mlp: Size
    vocab: Size
    theta: Annotated[float, positive()] = 10000.0
    scaling: Scaling | None = None
    eps: Eps = 1e-5
    tied: bool = False
    head: Head = "words"
    bias: bool = False
    qk_norm: bool = False
    activation: Activation = "silu"
    dtype: Dtype = None
    attention: Body = "auto"
    remat: Remat = "dots"
    experts: Number = 0
    experts_per_token: Size = 2
    shared_experts: Number = 0
    norm_topk_prob: bool = True
    aux_loss_coef: Coefficient = 0.01
    z_loss_coef: Coefficient = 0.001
    expert_body: ExpertBody = "auto"

    def __post_init__(self):
        check_config(self, odd_rotary(self))

    def decoder(self) -> DecoderConfig:
        """The same choices in the table of all decoders."""
        given = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        sight = Sight(theta=given.pop("theta"), scaling=given.pop("scaling"))
        qk_norm = "head" if given.pop("qk_norm") else None
        return DecoderConfig(**given, pattern=(sight,), o_bias=self.bias, qk_norm=qk_norm)

    def build(self, key: PRNGKeyArray) -> "Llama":
        """A `Llama` of this configuration, its parameters drawn with this key by one compiled program."""
        return born(Llama, self, key=key)


class Llama(Decoder):
    """A decoder-only language model on one sequence: `model(tokens) -> logits [T, vocab]`.

    Rotary positions turn neighbouring coordinates (2i, 2i + 1), as in the published weights of
    Touvron et al., "LLaMA: Open and Efficient Foundation Language Models", 2023.

    **Example**

        model = Llama(LlamaConfig(layers=6, embed=256, heads=8, kv_heads=2, head_dim=32, mlp=688,
                                  vocab=384), key=jax.random.key(0))
        logits = jax.vmap(model)(tokens)          # tokens [B, T]
    """

    def __init__(self, config: LlamaConfig, *, key: PRNGKeyArray):
        super().__init__(config.decoder(), key=key)
