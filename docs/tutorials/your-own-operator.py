# %% [markdown]
# # Your own operator, and its property
#
# An operator says, along each axis, where every new coordinate comes from. All else follows from the axes of the
# model: weights, optimizer state, gates, certificates. This one copies hidden units with unequal shares, so that copies
# can part; the page about [operators in ten lines](../write-your-own-operator.md) has the rest of the interface.

# %%
import equinox as eqx
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from hypothesis import given, settings
from hypothesis import strategies as st

import growjax as gj
from growjax import testing


class Split(gj.Operator):
    """Every coordinate becomes two, which carry `first` and 1 - `first` of it."""

    axis: str = eqx.field(static=True)
    first: float = eqx.field(static=True, default=0.5)
    exactness = "exact-given-init"

    def maps(self, axes):
        source = np.repeat(np.arange(axes.size(self.axis)), 2)
        share = np.tile([self.first, 1 - self.first], axes.size(self.axis))
        return [gj.AxisMap(self.axis, source, share=share)]


# %% [markdown]
# ## Its property
#
# `exactness` promises that no output changes. A property test draws models and asks each of them. `architectures()`
# draws small models that differ in what decides exactness: norms, biases, tied tables, gated units, grouped keys. Sizes
# come from a short list, so compiled programs are used again.


# %%
@settings(deadline=None, max_examples=4, derandomize=True)
@given(architecture=testing.architectures(), first=st.sampled_from([0.5, 0.7]))
def test_the_function_is_kept(architecture, first):
    testing.assert_preserves(Split("mlp", first), architecture.model(), architecture.batch())


test_the_function_is_kept()

# %% [markdown]
# An operator that breaks its promise is caught, and told by how much:


# %%
class Careless(Split):
    def maps(self, axes):
        return [gj.AxisMap(self.axis, np.repeat(np.arange(axes.size(self.axis)), 2))]


try:
    gpt = testing.Architecture("GPT")
    testing.assert_preserves(Careless("mlp"), gpt.model(), gpt.batch())
except AssertionError as error:
    print(error)
else:
    raise RuntimeError("a copy without a share keeps no function")

# %% [markdown]
# ## Why unequal shares
#
# With equal shares both copies get the same gradient for ever, and the larger model can do no more than the small one.
# The certificate says so (`locked`). Here a small network learns a wave, and the plot follows how far the copies
# of a unit have parted.


# %%
class MLP(eqx.Module):
    up: jax.Array = gj.param("embed -> mlp")
    bias: jax.Array = gj.param("-> mlp")
    down: jax.Array = gj.param("mlp -> out")

    def __call__(self, x):
        return jnp.tanh(x @ self.up + self.bias) @ self.down


draw = np.random.default_rng(0)
small = MLP(*(jnp.asarray(draw.normal(size=s), jnp.float32) for s in [(1, 6), 6, (6, 1)]))
x = jnp.linspace(-3, 3, 64)[:, None]
y = jnp.sin(2 * x)
tx = optax.adam(1e-2)


@jax.jit
def step(model, state):
    gradient = jax.grad(lambda m: jnp.mean((m(x) - y) ** 2))(model)
    updates, state = tx.update(gradient, state)
    return optax.apply_updates(model, updates), state


figure, axes = plt.subplots(figsize=(7, 3.2), layout="constrained")
for first in (0.5, 0.6, 0.7):
    op = Split("mlp", first)
    print(gj.certify(op, small, x).locked or "none locked", "at a share of", first)
    model, apart = gj.grow(op, small), []
    state = tx.init(model)
    for _ in range(150):
        model, state = step(model, state)
        apart.append(float(jnp.linalg.norm(model.up[:, ::2] - model.up[:, 1::2])))
    axes.plot(apart, label=f"{first} and {1 - first:.1f}")
axes.set(xlabel="step after growth", ylabel="distance of copies")
axes.legend(title="shares", frameon=False)
plt.show()
