"""Training tokens per second over PyTorch's, on the same decoder and the same cores.

6 layers, embed 384, 6 heads of 64, mlp 1536, 8192 words tied, 8 sequences of 256, float32, AdamW. Against
PyTorch eager (its own attention, fused AdamW), the same under `torch.compile`, and the GPT-2 of
`transformers`. All in one process, in turn, that keeps its memory (`_race.keep_memory`): clearing pages
is a good part of growjax's step otherwise.

PyTorch's matrix products are MKL's, which leaves AVX-512 alone on processors of AMD: the race would
then measure that. So MKL is told to use it (`full_mkl`, by a function that is loaded before it), as
long as a C compiler is there; `peak_gigaflops` are the speeds of a large product of both libraries so,
and of PyTorch `as installed`. `of_own_peak` is each one's share of its own library's, which no step can
have all of: where the shares are equal, the libraries' products decide the race. Needs `pip install
'growjax[bench]'`.
"""

import importlib
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax

import growjax as gj
from experiments.bench._race import keep_memory, machine, medians, product_speed, race
from growjax.cost import training_flops_per_token
from growjax.models import GPT, GPTConfig
from growjax.optim import adamw
from growjax.train import cross_entropy


class Sizes(NamedTuple):
    """A decoder, and the batches that it is trained on."""

    layers: int
    embed: int
    heads: int
    words: int
    length: int
    batch: int
    dtype: str | None = None

    @property
    def rows(self) -> np.ndarray:
        """Random tokens, of which each predicts the next: `[batch, length + 1]`."""
        draw = np.random.default_rng(0)
        return draw.integers(0, self.words, (self.batch, self.length + 1))


SIZES = Sizes(layers=6, embed=384, heads=6, words=8192, length=256, batch=8)


def run() -> dict:
    """Race all four; the ratio is over the fastest of the other three."""
    try:
        torch, transformers = map(importlib.import_module, ("torch", "transformers"))
    except ImportError as error:
        sys.exit(f"torch_race: {error}; pip install 'growjax[bench]'")
    keep_memory(full_mkl=True)
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=SIZES.words,
        n_positions=SIZES.length,
        n_embd=SIZES.embed,
        n_layer=SIZES.layers,
        n_head=SIZES.heads,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        use_cache=False,
    )
    stock = transformers.GPT2LMHeadModel(config)
    runners = {
        "growjax": growjax_step(SIZES),
        "torch": torch_step(torch, decoder(torch, SIZES), SIZES),
        "torch.compile": torch_step(torch, torch.compile(decoder(torch, SIZES)), SIZES),
        "transformers": torch_step(torch, stock, SIZES, logits=True),
    }
    times = race(runners, rounds=12)
    ms = medians(times)
    others = {name: t for name, t in ms.items() if name != "growjax"}
    best = min(others, key=lambda name: others[name])
    ratios = times[best].wall / times["growjax"].wall
    speed = {name: round(SIZES.batch * SIZES.length / (t / 1e3)) for name, t in ms.items()}
    print(f"tokens per second: {speed}")
    peaks = _peaks(torch)
    flops = training_flops_per_token(model(SIZES), SIZES.length)
    work = flops * SIZES.batch * SIZES.length
    own = {name: peaks["growjax" if name == "growjax" else "torch"] for name in ms}
    return {
        "ratio": round(float(np.median(ratios)), 3),
        "goal": 0.85,
        "quartiles": np.quantile(ratios, [0.25, 0.75]).round(3).tolist(),
        "best_other": best,
        "of_own_peak": {name: round(work / (t / 1e3) / own[name], 2) for name, t in ms.items()},
        "peak_gigaflops": {name: round(peak / 1e9) for name, peak in peaks.items()},
        "full_mkl": "LD_PRELOAD" in os.environ,
        "machine": machine(),
        "tokens_per_second": speed,
        "torch_version": torch.__version__,
        "threads": torch.get_num_threads(),
    }


def _peaks(torch: Any, size: int = 2048) -> dict[str, float]:
    """FLOPs a second of a large matrix product: of both libraries, and of PyTorch as it is installed."""
    a = jnp.ones((size, size))
    b, product = torch.ones(size, size), jax.jit(jnp.matmul)
    plain = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    code = (
        "import torch; from experiments.bench._race import product_speed; "
        f"b = torch.ones({size}, {size}); print(product_speed({size}, lambda: b @ b))"
    )
    child = subprocess.run(
        [sys.executable, "-c", code], env=plain, capture_output=True, text=True, check=True
    )
    return {
        "growjax": product_speed(size, lambda: product(a, a)),
        "torch": product_speed(size, lambda: b @ b),
        "torch as installed": float(child.stdout),
    }


def model(sizes: Sizes) -> GPT:
    """The decoder as a growjax model."""
    config = GPTConfig(
        layers=sizes.layers,
        embed=sizes.embed,
        heads=sizes.heads,
        head_dim=sizes.embed // sizes.heads,
        mlp=4 * sizes.embed,
        vocab=sizes.words,
        positions=sizes.length,
        dtype=sizes.dtype,
    )
    return eqx.filter_jit(GPT)(config, key=jax.random.key(0))


def growjax_step(sizes: Sizes) -> Callable[[], object]:
    """A step of training by growjax: its model, loss and optimizer, on one batch."""
    trained, rest = gj.partition(model(sizes))
    tx = adamw(1e-3, weight_decay=0.01)
    tokens = jnp.asarray(sizes.rows, jnp.int32)
    weights = jnp.ones((sizes.batch, sizes.length), jnp.float32)
    examples = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "weights": weights}

    def step(trained, state):
        def loss(trained):
            whole = eqx.combine(trained, rest)
            return jax.vmap(lambda example: cross_entropy(whole, example)[0])(examples).mean()

        value, gradient = jax.value_and_grad(loss)(trained)
        updates, state = tx.update(gradient, state, trained)
        return optax.apply_updates(trained, updates), state, value

    jitted = jax.jit(step, donate_argnums=(0, 1))
    carry = [trained, tx.init(trained)]

    def go() -> object:
        carry[0], carry[1], value = jitted(carry[0], carry[1])
        return value

    return go


def torch_step(
    torch: Any, model: Any, sizes: Sizes, *, logits: bool = False
) -> Callable[[], object]:
    """A step of training by PyTorch, on the same batch; `logits` says that they are in a field."""
    tokens = torch.from_numpy(sizes.rows)
    tx = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01, fused=True)

    def go() -> object:
        out = model(tokens[:, :-1])
        scores = out.logits if logits else out
        loss = torch.nn.functional.cross_entropy(
            scores.reshape(-1, sizes.words), tokens[:, 1:].reshape(-1)
        )
        tx.zero_grad(set_to_none=True)
        loss.backward()
        tx.step()
        return float(loss)

    return go


def decoder(torch: Any, sizes: Sizes) -> Any:
    """The decoder as a PyTorch module, with its fused attention."""
    nn, embed, heads = torch.nn, sizes.embed, sizes.heads

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm1, self.norm2 = nn.LayerNorm(embed), nn.LayerNorm(embed)
            self.qkv, self.out = nn.Linear(embed, 3 * embed), nn.Linear(embed, embed)
            self.up, self.down = nn.Linear(embed, 4 * embed), nn.Linear(4 * embed, embed)

        def forward(self, x):
            b, t, _ = x.shape
            qkv = self.qkv(self.norm1(x)).view(b, t, 3, heads, embed // heads)
            q, k, v = qkv.permute(2, 0, 3, 1, 4)
            read = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + self.out(read.transpose(1, 2).reshape(b, t, embed))
            hidden = nn.functional.gelu(self.up(self.norm2(x)), approximate="tanh")
            return x + self.down(hidden)

    class Decoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.words = nn.Embedding(sizes.words, embed)
            self.places = nn.Embedding(sizes.length, embed)
            self.blocks = nn.ModuleList(Block() for _ in range(sizes.layers))
            self.norm = nn.LayerNorm(embed)

        def forward(self, tokens):
            x = self.words(tokens) + self.places(torch.arange(tokens.shape[1]))
            for block in self.blocks:
                x = block(x)
            return self.norm(x) @ self.words.weight.T

    return Decoder()
