"""Mixture of experts: a router chooses a few feed-forward parts for every token, and no token is dropped.

The experts of a token are those with the highest router logits, and their outputs are added up with the
weights of a softmax: over the chosen logits (`norm_topk_prob=True`, top-k and then softmax, as in
Mixtral), so that the weights of a token sum to 1; or over all logits (`norm_topk_prob=False`, softmax and
then top-k, as in Switch and OLMoE), so that they sum to less. Shared experts see every token.

Two bodies compute the same sums. "dense" runs every expert on every token and multiplies by the weights,
in plain matrix products; "ragged" sorts the choices of tokens by expert and runs each expert on its own
(`jax.lax.ragged_dot`, a grouped product of TPUs and GPUs; on CPUs it takes twice the time of "dense" with
8 experts, 2 a token). FLOPs are charged alike: those of the chosen experts (`growjax.cost`).

Shazeer et al., "Outrageously Large Neural Networks", ICLR 2017; Fedus et al., "Switch Transformers", JMLR
2022; Zoph et al., "ST-MoE", 2022 (router z-loss); Dai et al., "DeepSeekMoE", ACL 2024 (shared experts).
"""

import functools
from typing import Any, Literal, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array, Float, Int, PRNGKeyArray

from growjax import axes
from growjax.axes import param
from growjax.errors import AxisError, raise_all
from growjax.gates import Gate, gated
from growjax.nn.linear import normal
from growjax.nn.mlp import ACTIVATIONS, MLP


ExpertBody = Literal["auto", "dense", "ragged"]
# Deviation of a router's weights, as in Komatsuzaki et al., "Sparse Upcycling", ICLR 2023
ROUTER = 0.02


class Routes(NamedTuple):
    """The experts of every token, the weight of each, and the auxiliary loss (None: there is none)."""

    chosen: Int[Array, "T k"]
    weights: Float[Array, "T k"]
    auxiliary: Float[Array, ""] | None


class Experts(eqx.Module):
    """A feed-forward of `experts` parts, `per_token` of which each token uses.

    With `glu`, each expert is a gated linear unit as `MLP` is (SwiGLU with `activation="silu"`). The
    router computes in float32 at least. The auxiliary loss of one sequence is

        aux_loss_coef * E * sum_e f_e P_e  +  z_loss_coef * mean(logsumexp(logits)^2)

    where `f_e` is the share of the sequence's choices that fell on expert e and `P_e` its mean
    probability: the load-balancing loss of Switch and GShard, 1 if balanced, and the router z-loss of
    ST-MoE. All positions of a sequence count, padding too.

    A gate on `experts` is the bias `log(level)` of the router: at level 0 a new expert is never chosen,
    and at level l its weight in the softmax is multiplied by l. The auxiliary loss counts a gated expert
    as `level` experts, so it does not jump either.

    **Fields**

    - `router`, `up`, `glu`, `down` and biases: as in `MLP`, one of each for every expert.
    - `shared`: the shared experts as one `MLP` on an axis of its own, `shared_mlp`; None without any.
    - `body`: "auto" is "dense" on CPUs and "ragged" elsewhere.

    Raises `AxisError` for more experts a token than there are experts.

    **Example**

        layer = Experts(256, 512, 8, per_token=2, glu=True, activation="silu", key=key)
        y, auxiliary = layer.with_auxiliary(x)                # x [T, 256]
    """

    router: Float[Array, "embed experts"] = param("embed -> experts", init="normal")
    up: Float[Array, "experts embed mlp"] = param("[experts] embed -> mlp")
    up_bias: Float[Array, "experts mlp"] | None = param("[experts] -> mlp", init="zeros")
    glu: Float[Array, "experts embed mlp"] | None = param("[experts] embed -> mlp")
    down: Float[Array, "experts mlp embed"] = param("[experts] mlp -> embed")
    down_bias: Float[Array, "experts embed"] | None = param("[experts] -> embed", init="zeros")
    shared: MLP | None
    gate: Gate | None = axes.gate("mlp")
    expert_gate: Gate | None = axes.gate("experts")
    activation: str = eqx.field(static=True, default="gelu")
    per_token: int = eqx.field(static=True, default=2)
    norm_topk_prob: bool = eqx.field(static=True, default=True)
    aux_loss_coef: float = eqx.field(static=True, default=0.01)
    z_loss_coef: float = eqx.field(static=True, default=0.001)
    body: ExpertBody = eqx.field(static=True, default="auto")

    def __init__(
        self,
        embed: int,
        mlp: int,
        experts: int,
        *,
        per_token: int = 2,
        shared: int = 0,
        norm_topk_prob: bool = True,
        aux_loss_coef: float = 0.01,
        z_loss_coef: float = 0.001,
        activation: str = "gelu",
        glu: bool = False,
        bias: bool = True,
        body: ExpertBody = "auto",
        key: PRNGKeyArray,
    ):
        k_router, k_up, k_glu, k_down, k_shared = jax.random.split(key, 5)
        self.router = ROUTER * jax.random.normal(k_router, (embed, experts))
        self.up = normal(k_up, (experts, embed, mlp), embed)
        self.up_bias = jnp.zeros((experts, mlp)) if bias else None
        self.glu = normal(k_glu, (experts, embed, mlp), embed) if glu else None
        self.down = normal(k_down, (experts, mlp, embed), mlp)
        self.down_bias = jnp.zeros((experts, embed)) if bias else None
        self.shared = None
        if shared:
            self.shared = MLP(
                embed,
                shared * mlp,
                axis="shared_mlp",
                activation=activation,
                glu=glu,
                bias=bias,
                key=k_shared,
            )
        self.gate = self.expert_gate = None
        self.activation, self.per_token, self.norm_topk_prob = activation, per_token, norm_topk_prob
        self.aux_loss_coef, self.z_loss_coef, self.body = aux_loss_coef, z_loss_coef, body

    def __check_init__(self):
        count = self.router.shape[-1]
        raise_all(
            AxisError,
            "these experts cannot be used:",
            [f"per_token: expected 1 to {count}, the number of experts, got {self.per_token}"]
            if not 1 <= self.per_token <= count
            else [],
        )

    def __call__(self, x: Float[Array, "T embed"]) -> Float[Array, "T embed"]:
        return self.with_auxiliary(x)[0]

    def with_auxiliary(
        self, x: Float[Array, "T embed"]
    ) -> tuple[Float[Array, "T embed"], Float[Array, ""] | None]:
        """The output, and the auxiliary loss of this layer (None if both coefficients are 0)."""
        routes = self.route(x)
        gate_up = gated(self.up, self.gate)
        bias = None if self.up_bias is None else gated(self.up_bias, self.gate)
        weights = _Weights(gate_up, self.down, self.glu, bias, self.down_bias)
        weights = jax.tree.map(lambda w: w.astype(x.dtype), weights)
        mix = routes.weights.astype(x.dtype)
        y = expert_feed_forward(x, routes.chosen, mix, weights, self.activation, self.body)
        if self.shared is not None:
            y = y + self.shared(x)
        return y, routes.auxiliary

    def route(self, x: Float[Array, "T embed"]) -> Routes:
        """The experts of every token, highest logit first; of equal logits the first expert's."""
        wide = jnp.promote_types(x.dtype, jnp.float32)
        # Without HIGHEST, matrix units would round the logits to bfloat16
        logits = jnp.einsum(
            "te,en->tn",
            x.astype(wide),
            self.router.astype(wide),
            precision=jax.lax.Precision.HIGHEST,
        )
        if self.expert_gate is not None:
            level = jax.lax.stop_gradient(self.expert_gate.value).astype(wide)
            logits = logits + jnp.log(level)  # -inf at level 0: never chosen, weight 0
        top, chosen = jax.lax.top_k(logits, self.per_token)
        probabilities = jax.nn.softmax(logits, axis=-1)
        if self.norm_topk_prob:
            weights = jax.nn.softmax(top, axis=-1)
        else:
            weights = jnp.take_along_axis(probabilities, chosen, axis=-1)
        return Routes(chosen, weights, self._auxiliary(logits, probabilities, chosen))

    def _auxiliary(self, logits: Array, probabilities: Array, chosen: Array) -> Array | None:
        if not (self.aux_loss_coef or self.z_loss_coef):
            return None
        count: Any = logits.shape[-1]
        if self.expert_gate is not None:
            count = jnp.sum(jax.lax.stop_gradient(self.expert_gate.value)).astype(logits.dtype)
        chosen_share = jnp.mean(
            jax.nn.one_hot(chosen, logits.shape[-1], dtype=logits.dtype), axis=(0, 1)
        )
        balance = count * jnp.sum(chosen_share * jnp.mean(probabilities, axis=0))
        z = jnp.mean(jax.nn.logsumexp(logits, axis=-1) ** 2)
        return self.aux_loss_coef * balance + self.z_loss_coef * z


class _Weights(NamedTuple):
    """The matrices and biases of all experts."""

    up: Float[Array, "experts embed mlp"]
    down: Float[Array, "experts mlp embed"]
    glu: Float[Array, "experts embed mlp"] | None
    up_bias: Float[Array, "experts mlp"] | None
    down_bias: Float[Array, "experts embed"] | None


# Under this name `growjax.cost` counts its FLOPs, whatever the body: those of the chosen experts
@functools.partial(jax.jit, static_argnums=(4, 5))
def expert_feed_forward(x, chosen, mix, weights, activation, body):
    """The outputs of the chosen experts, added up with the weights `mix`: `[T, embed]`."""
    if body == "dense":
        return _dense(activation, x, chosen, mix, weights)
    if body == "ragged":
        return _ragged(activation, x, chosen, mix, weights)
    return jax.lax.platform_dependent(
        x,
        chosen,
        mix,
        weights,
        cpu=functools.partial(_dense, activation),
        default=functools.partial(_ragged, activation),
    )


def _dense(activation, x, chosen, mix, weights):
    """All experts on all tokens. Weights multiply the hidden units, so the sum is one product."""
    act, count = ACTIVATIONS[activation], weights.up.shape[0]
    # [T, experts]: the weight of every expert, 0 where it is not chosen
    spread = jnp.sum(jax.nn.one_hot(chosen, count, dtype=mix.dtype) * mix[..., None], axis=-2)
    h = jnp.einsum("te,xem->xtm", x, weights.up)
    if weights.up_bias is not None:
        h = h + weights.up_bias[:, None]
    if weights.glu is None:
        h = act(h)
    else:
        h = act(jnp.einsum("te,xem->xtm", x, weights.glu)) * h
    y = jnp.einsum("xtm,xme->te", h * spread.T[..., None], weights.down)
    if weights.down_bias is not None:
        y = y + jnp.einsum("tx,xe->te", spread, weights.down_bias)
    return y


def _sorted(activation, x, chosen, mix, weights):
    """Each expert on its own tokens: choices sorted by expert, grouped products, and back."""
    act, (tokens, k) = ACTIVATIONS[activation], chosen.shape
    expert = chosen.reshape(-1)
    order = jnp.argsort(expert, stable=True)
    sizes = jnp.zeros(weights.up.shape[0], jnp.int32).at[expert].add(1)
    own = expert[order]
    rows = jnp.repeat(x, k, axis=0)[order]
    h = jax.lax.ragged_dot(rows, weights.up, sizes)
    if weights.up_bias is not None:
        h = h + weights.up_bias[own]
    if weights.glu is None:
        h = act(h)
    else:
        h = act(jax.lax.ragged_dot(rows, weights.glu, sizes)) * h
    y = jax.lax.ragged_dot(h, weights.down, sizes)
    if weights.down_bias is not None:
        y = y + weights.down_bias[own]
    back = jnp.zeros_like(order).at[order].set(jnp.arange(tokens * k, dtype=order.dtype))
    return jnp.einsum("tke,tk->te", y[back].reshape(tokens, k, -1), mix)


# `ragged_dot` cannot be batched while its weights are not (JAX 0.10). So it stands in a primitive of its
# own, whose batching rule sorts the tokens of all sequences together, in one call. A gradient replaces
# the primitive by its operations: under `grad(vmap(...))` there is one sequence then. `vmap(grad(...))`
# is refused by JAX ("NYI"); body="dense" serves there.
_experts_p = Primitive("experts")


def _ragged(activation, x, chosen, mix, weights):
    leaves, structure = jax.tree.flatten(weights)
    return _experts_p.bind(x, chosen, mix, *leaves, activation=activation, structure=structure)


def _impl(x, chosen, mix, *leaves, activation, structure):
    return _sorted(activation, x, chosen, mix, jax.tree.unflatten(structure, leaves))


def _batched(args, dims, **params):
    (size,) = {x.shape[d] for x, d in zip(args, dims, strict=True) if d is not None}

    def leading(x, dim):
        return jnp.broadcast_to(x, (size, *x.shape)) if dim is None else jnp.moveaxis(x, dim, 0)

    if any(d is not None for d in dims[3:]):
        # Each has weights of its own (a stack of models): one after the other
        each = tuple(map(leading, args, dims))
        return jax.lax.map(lambda args: _experts_p.bind(*args, **params), each), 0
    rows = [leading(x, d) for x, d in zip(args[:3], dims[:3], strict=True)]
    rows = [x.reshape(-1, *x.shape[2:]) for x in rows]
    out = _experts_p.bind(*rows, *args[3:], **params)
    return out.reshape(size, -1, out.shape[-1]), 0


def _differentiated(primals, tangents, **params):
    moving = [i for i, t in enumerate(tangents) if not isinstance(t, ad.Zero)]

    def function(*some):
        args = list(primals)
        for i, x in zip(moving, some, strict=True):
            args[i] = x
        return _impl(*args, **params)

    return jax.jvp(function, [primals[i] for i in moving], [tangents[i] for i in moving])


_experts_p.def_impl(jax.jit(_impl, static_argnames=("activation", "structure")))
_experts_p.def_abstract_eval(lambda x, *_, **__: x)
batching.primitive_batchers[_experts_p] = _batched
ad.primitive_jvps[_experts_p] = _differentiated
mlir.register_lowering(_experts_p, mlir.lower_fun(_impl, multiple_results=False))
