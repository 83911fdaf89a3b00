"""Mixture of experts: a router chooses a few feed-forward parts for every token, and no token is dropped.

The experts of a token are those with the highest router logits, and their outputs are added up with the
weights of a softmax: over the chosen logits (`norm_topk_prob=True`, top-k and then softmax, as in
Mixtral), so that the weights of a token sum to 1; or over all logits (`norm_topk_prob=False`, softmax and
then top-k, as in Switch and OLMoE), so that they sum to less. Shared experts see every token, and may
have a gate of their own, a number between 0 and 1 for every token (Qwen 2).

Three bodies compute the same sums, and cost the same: the FLOPs of the chosen experts (`growjax.cost`).
"dense" runs every expert on every token and multiplies by the weights, in plain matrix products. "ragged"
sorts the choices of tokens by expert and runs each expert on its own, by `jax.lax.ragged_dot`, a grouped
product of TPUs and GPUs (with 8 experts, 2 a token, on two CPU cores: 2.6 times the time of "dense", and
3.5 times for its gradient). "gathered" gives every token a copy of the weights of its experts; it takes
memory, and is for a few tokens, or to count FLOPs.

Shazeer et al., "Outrageously Large Neural Networks", ICLR 2017; Fedus et al., "Switch Transformers", JMLR
2022; Zoph et al., "ST-MoE", 2022 (router z-loss); Dai et al., "DeepSeekMoE", ACL 2024 (shared experts).
"""

import dataclasses
import functools
import math
from typing import Any, Literal, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int, PRNGKeyArray

from growjax import axes
from growjax.axes import param
from growjax.errors import AxisError, raise_all
from growjax.gates import Gate, gated
from growjax.nn.linear import normal
from growjax.nn.mlp import ACTIVATIONS, MLP
from growjax.nn.place import CONTEXT


ExpertBody = Literal["auto", "dense", "ragged", "gathered"]


class Placement(NamedTuple):
    """The mesh that a mixture runs on, and its axes that split the rows of a batch."""

    mesh: Any
    rows: tuple[str, ...]

    def size(self, axis: str) -> int:
        """The size of an axis; 1 if the mesh lacks it."""
        return self.mesh.shape.get(axis, 1)

    @property
    def parts(self) -> int:
        """The number of parts that rows are split into."""
        return math.prod(map(self.size, self.rows))


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
    - `shared_gate`: if there is one, a token `x` takes `sigmoid(x @ shared_gate)` of what they put out.
    - `body`: "auto" is "dense" on CPUs and "ragged" elsewhere.
    - `placement`: the mesh of a run on several devices, set by `growjax.parallel.gathered`.

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
    shared: MLP | None = None
    shared_gate: Float[Array, " embed"] | None = param("embed ->")
    gate: Gate | None = axes.gate("mlp")
    expert_gate: Gate | None = axes.gate("experts")
    activation: str = eqx.field(static=True, default="gelu")
    per_token: int = eqx.field(static=True, default=2)
    norm_topk_prob: bool = eqx.field(static=True, default=True)
    aux_loss_coef: float = eqx.field(static=True, default=0.01)
    z_loss_coef: float = eqx.field(static=True, default=0.001)
    body: ExpertBody = eqx.field(static=True, default="auto")
    placement: Placement | None = eqx.field(static=True, default=None)

    def __init__(
        self,
        embed: int,
        mlp: int,
        experts: int,
        *,
        per_token: int = 2,
        shared: int = 0,
        shared_mlp: int | None = None,
        shared_gate: bool = False,
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
        shared_mlp = shared * mlp if shared_mlp is None else shared_mlp
        self.router = normal(k_router, (embed, experts), embed)
        self.up = normal(k_up, (experts, embed, mlp), embed)
        self.up_bias = jnp.zeros((experts, mlp)) if bias else None
        self.glu = normal(k_glu, (experts, embed, mlp), embed) if glu else None
        self.down = normal(k_down, (experts, mlp, embed), mlp)
        self.down_bias = jnp.zeros((experts, embed)) if bias else None
        self.shared = None
        self.shared_gate = None
        if shared_mlp:
            self.shared_gate = jnp.zeros(embed) if shared_gate else None
            self.shared = MLP(
                embed,
                shared_mlp,
                axis="shared_mlp",
                activation=activation,
                glu=glu,
                bias=bias,
                key=k_shared,
            )
        self.gate = self.expert_gate = None
        self.activation, self.per_token, self.norm_topk_prob = activation, per_token, norm_topk_prob
        self.aux_loss_coef, self.z_loss_coef, self.body = aux_loss_coef, z_loss_coef, body
        self.placement = None

    @classmethod
    def of(cls, mlp: Any, *, granularity: int = 1, **options: Any) -> "Experts":
        """One expert for every shard of the hidden units of an `MLP`, with a router of zeros.

        With equal weights, which sum to 1, the experts compute what the `MLP` does: those that read the
        hidden units are multiplied by the number of shards, `granularity`. The arrays may have leading
        axes of a stack. `options` are the static fields; `per_token` may be more than the number of
        shards, for experts that growth adds. Raises `AxisError` for units that cannot be split so.
        """
        if not isinstance(mlp, MLP):
            raise AxisError(
                f"mlp: expected a dense MLP to make experts of, got {type(mlp).__name__}"
            )
        shards, (*lead, embed, units) = granularity, mlp.up.shape
        if units % shards:
            raise AxisError(f"granularity: {units} hidden units cannot be split into {shards}")
        if mlp.gate is not None and shards > 1:
            raise AxisError(f"{mlp.axis} is still ramping; ramp it to 1 and settle it first")

        def produced(x):
            # [..., embed, units] to [..., shards, embed, units / shards]
            split = x.reshape(*lead, embed, shards, units // shards)
            return jnp.moveaxis(split, -2, -3)

        bias, out_bias = mlp.up_bias, mlp.down_bias
        if out_bias is not None:
            out_bias = jnp.broadcast_to(out_bias[..., None, :], (*lead, shards, embed))
        fields = dict(
            router=jnp.zeros((*lead, embed, shards), mlp.up.dtype),
            up=produced(mlp.up),
            up_bias=None if bias is None else bias.reshape(*lead, shards, units // shards),
            glu=None if mlp.glu is None else produced(mlp.glu),
            down=shards * mlp.down.reshape(*lead, shards, units // shards, embed),
            down_bias=out_bias,
            shared=None,
            shared_gate=None,
            gate=mlp.gate,
            activation=mlp.activation,
        )
        made = object.__new__(cls)  # no __check_init__: `per_token` is that of the grown model
        for field in dataclasses.fields(cls):
            value = (fields | options).get(field.name, field.default)
            object.__setattr__(made, field.name, value)
        return made

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
        how = self.activation, self.body, self.placement
        y = expert_feed_forward(x, routes.chosen, mix, weights, *how)
        if self.shared is not None:
            every = self.shared(x)
            if self.shared_gate is not None:
                level = jax.nn.sigmoid(x @ self.shared_gate.astype(x.dtype))
                every = every * level[:, None]
            y = y + every
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
    """The matrices and biases of all experts, or a value for each (its partition)."""

    up: Any  # [experts, embed, mlp]
    down: Any  # [experts, mlp, embed]
    glu: Any  # as `up`, or None
    up_bias: Any  # [experts, mlp], or None
    down_bias: Any  # [experts, embed], or None


# Under this name `growjax.cost` counts its FLOPs, whatever the body: those of the chosen experts
@functools.partial(jax.jit, static_argnums=(4, 5, 6))
def expert_feed_forward(x, chosen, mix, weights, activation, body, placement):
    """The outputs of the chosen experts, added up with the weights `mix`: `[T, embed]`."""
    dense = functools.partial(_dense, activation)
    ragged = functools.partial(_ragged, activation, placement)
    if body == "gathered":
        return _gathered(activation, x, chosen, mix, weights)
    if body != "auto":
        return (dense if body == "dense" else ragged)(x, chosen, mix, weights)
    return jax.lax.platform_dependent(x, chosen, mix, weights, cpu=dense, default=ragged)


def _dense(activation, x, chosen, mix, weights):
    """All experts on all tokens. Weights multiply the hidden units, so the sum is one product.

    Where devices share the experts, the compiler chooses what they exchange.
    """
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


def _gathered(activation, x, chosen, mix, weights):
    """Each token with copies of the weights of its experts, `[T, k, ...]`."""
    act, own = ACTIVATIONS[activation], jax.tree.map(lambda w: w[chosen], weights)
    h = jnp.einsum("te,tkem->tkm", x, own.up)
    if own.up_bias is not None:
        h = h + own.up_bias
    h = act(h) if own.glu is None else act(jnp.einsum("te,tkem->tkm", x, own.glu)) * h
    y = jnp.einsum("tkm,tkme->tke", h, own.down)
    if own.down_bias is not None:
        y = y + own.down_bias
    return jnp.sum(y * mix[..., None], axis=1)


def _sorted(activation, x, chosen, mix, weights):
    """Each expert on its own tokens: choices sorted by expert, grouped products, and back.

    Choices of experts beyond those of the weights come last, and add nothing.
    """
    act, (tokens, k) = ACTIVATIONS[activation], chosen.shape
    expert, count = chosen.reshape(-1), weights.up.shape[0]
    order = jnp.argsort(expert, stable=True)
    sizes = jnp.zeros(count, jnp.int32).at[expert].add(1, mode="drop")
    own = jnp.minimum(expert[order], count - 1)
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


def _ragged(activation, placement, x, chosen, mix, weights):
    leaves, structure = jax.tree.flatten(weights)
    return _experts_p.bind(
        x, chosen, mix, *leaves, activation=activation, structure=structure, placement=placement
    )


def _impl(x, chosen, mix, *leaves, activation, structure, placement):
    del placement  # one sequence is on one device
    return _sorted(activation, x, chosen, mix, jax.tree.unflatten(structure, leaves))


def _batched(args, dims, **params):
    (size,) = {x.shape[d] for x, d in zip(args, dims, strict=True) if d is not None}

    def leading(x, dim):
        return jnp.broadcast_to(x, (size, *x.shape)) if dim is None else jnp.moveaxis(x, dim, 0)

    if any(d is not None for d in dims[3:]):
        # Each has weights of its own (a stack of models): one after the other
        each = tuple(map(leading, args, dims))
        return jax.lax.map(lambda args: _experts_p.bind(*args, **params), each), 0
    rows = [leading(a, d) for a, d in zip(args[:3], dims[:3], strict=True)]
    placement = params["placement"]
    if placement is not None and size % placement.parts == 0:
        weights = jax.tree.unflatten(params["structure"], args[3:])
        x, chosen, mix = rows
        return _split(params["activation"], placement, x, chosen, mix, weights), 0
    # The tokens of all sequences as one list
    out = _experts_p.bind(*map(_flat, rows), *args[3:], **params)
    return out.reshape(size, -1, out.shape[-1]), 0


def _flat(x):
    """The tokens of several sequences as one list."""
    return x.reshape(-1, *x.shape[2:])


def _split(activation, placement: Placement, x, chosen, mix, weights: _Weights):
    """The tokens of all sequences, each device sorting its own, so that a sort never leaves a device.

    Devices that share the experts exchange their tokens, run their own experts on all of them, and add up
    the outputs; those that share the hidden units add up theirs.
    """
    share, tensor = placement.size("experts"), placement.size("tensor")
    experts = "experts" if share > 1 and weights.up.shape[0] % share == 0 else None
    units = "tensor" if tensor > 1 and weights.up.shape[-1] % tensor == 0 else None

    def of_device(x, chosen, mix, weights):
        shape = x.shape
        x, chosen, mix = map(_flat, (x, chosen, mix))
        if experts:
            x, chosen, mix = (jax.lax.all_gather(a, experts, tiled=True) for a in (x, chosen, mix))
            first = jax.lax.axis_index(experts) * weights.up.shape[0]
            mine = (chosen >= first) & (chosen < first + weights.up.shape[0])
            chosen = jnp.where(mine, chosen - first, weights.up.shape[0])
            mix = jnp.where(mine, mix, 0)
        if units and weights.down_bias is not None:
            once = jax.lax.axis_index(units) == 0
            weights = weights._replace(down_bias=jnp.where(once, weights.down_bias, 0))
        y = _sorted(activation, x, chosen, mix, weights)
        y = jax.lax.psum(y, units) if units else y
        y = jax.lax.psum_scatter(y, experts, tiled=True) if experts else y
        return y.reshape(shape)

    rows = PartitionSpec(placement.rows, CONTEXT if placement.size(CONTEXT) > 1 else None)
    partitions = _Weights(
        up=(experts, None, units),
        down=(experts, units, None),
        glu=(experts, None, units),
        up_bias=(experts, units),
        down_bias=(experts, None),
    )
    pairs = zip(weights, partitions, strict=True)
    specs = _Weights(*(None if w is None else PartitionSpec(*names) for w, names in pairs))
    return jax.shard_map(
        of_device, mesh=placement.mesh, in_specs=(rows, rows, rows, specs), out_specs=rows
    )(x, chosen, mix, weights)


def _differentiated(primals, tangents, **params):
    moving = [i for i, t in enumerate(tangents) if not isinstance(t, ad.Zero)]

    def function(*some):
        args = list(primals)
        for i, x in zip(moving, some, strict=True):
            args[i] = x
        return _impl(*args, **params)

    return jax.jvp(function, [primals[i] for i in moving], [tangents[i] for i in moving])


_experts_p.def_impl(jax.jit(_impl, static_argnames=("activation", "structure", "placement")))
_experts_p.def_abstract_eval(lambda x, *_, **__: x)
batching.primitive_batchers[_experts_p] = _batched
ad.primitive_jvps[_experts_p] = _differentiated
mlir.register_lowering(_experts_p, mlir.lower_fun(_impl, multiple_results=False))
