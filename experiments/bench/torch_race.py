"""Training tokens per second over PyTorch's, on the same decoder and the same cores.

6 layers, embed 384, 6 heads of 64, mlp 1536, 8192 words tied, 8 sequences of 256, float32, AdamW. Against
PyTorch eager (its own attention, fused AdamW), the same under `torch.compile`, and the GPT-2 of
`transformers`. All in one process, in turn, that keeps its memory (`_race.keep_memory`): clearing pages
is a good part of growjax's step otherwise. `of_peak` is each one's share of the speed of a large matrix
product, the faster library's: no step can have all of it. Needs `pip install 'growjax[bench]'`.
"""

import importlib
import sys
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax

import growjax as gj
from experiments.bench._race import keep_memory, medians, product_speed, race
from growjax.cost import training_flops_per_token
from growjax.models import GPT, GPTConfig
from growjax.optim import adamw


LAYERS, EMBED, HEADS, WORDS, LENGTH, BATCH = 6, 384, 6, 8192, 256, 8


def run() -> dict:
    """Race all four; the ratio is over the fastest of the other three."""
    try:
        torch, transformers = map(importlib.import_module, ("torch", "transformers"))
    except ImportError as error:
        sys.exit(f"torch_race: {error}; pip install 'growjax[bench]'")
    keep_memory("torch_race")
    torch.manual_seed(0)
    rows = np.random.default_rng(0).integers(0, WORDS, (BATCH, LENGTH + 1))
    config = transformers.GPT2Config(
        vocab_size=WORDS,
        n_positions=LENGTH,
        n_embd=EMBED,
        n_layer=LAYERS,
        n_head=HEADS,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        use_cache=False,
    )
    eager = _decoder(torch)
    runners = {
        "growjax": _growjax(rows),
        "torch": _torch(torch, eager, rows),
        "torch.compile": _torch(torch, torch.compile(_decoder(torch)), rows),
        "transformers": _torch(torch, transformers.GPT2LMHeadModel(config), rows, logits=True),
    }
    times = race(runners, rounds=12)
    ms = medians(times)
    others = {name: t for name, t in ms.items() if name != "growjax"}
    best = min(others, key=lambda name: others[name])
    ratios = times[best].wall / times["growjax"].wall
    speed = {name: round(BATCH * LENGTH / (t / 1e3)) for name, t in ms.items()}
    print(f"tokens per second: {speed}")
    peak = _peak(torch)
    work = training_flops_per_token(_model(), LENGTH) * BATCH * LENGTH
    return {
        "ratio": round(float(np.median(ratios)), 3),
        "goal": 1.2,
        "quartiles": np.quantile(ratios, [0.25, 0.75]).round(3).tolist(),
        "best_other": best,
        "of_peak": {name: round(work / (t / 1e3) / peak, 2) for name, t in ms.items()},
        "peak_gigaflops": round(peak / 1e9),
        "tokens_per_second": speed,
        "torch_version": torch.__version__,
        "threads": torch.get_num_threads(),
    }


def _peak(torch: Any, size: int = 2048) -> float:
    """FLOPs a second of a large matrix product, the faster library's."""
    a = jnp.ones((size, size))
    b, product = torch.ones(size, size), jax.jit(jnp.matmul)
    return product_speed(size, lambda: product(a, a), lambda: b @ b)


def _model() -> GPT:
    config = GPTConfig(
        layers=LAYERS,
        embed=EMBED,
        heads=HEADS,
        head_dim=EMBED // HEADS,
        mlp=4 * EMBED,
        vocab=WORDS,
        positions=LENGTH,
    )
    return GPT(config, key=jax.random.key(0))


def _growjax(rows: np.ndarray) -> Callable[[], object]:
    trained, rest = gj.partition(_model())
    tx = adamw(1e-3, weight_decay=0.01)
    tokens = jnp.asarray(rows, jnp.int32)

    def step(trained, state):
        def loss(trained):
            logits = jax.vmap(eqx.combine(trained, rest))(tokens[:, :-1])
            wanted = tokens[:, 1:]
            return optax.softmax_cross_entropy_with_integer_labels(logits, wanted).mean()

        value, gradient = jax.value_and_grad(loss)(trained)
        updates, state = tx.update(gradient, state, trained)
        return optax.apply_updates(trained, updates), state, value

    jitted = jax.jit(step, donate_argnums=(0, 1))
    carry = [trained, tx.init(trained)]

    def go() -> object:
        carry[0], carry[1], value = jitted(carry[0], carry[1])
        return value

    return go


def _torch(
    torch: Any, model: Any, rows: np.ndarray, *, logits: bool = False
) -> Callable[[], object]:
    tokens = torch.from_numpy(rows)
    tx = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01, fused=True)

    def go() -> object:
        out = model(tokens[:, :-1])
        scores = out.logits if logits else out
        loss = torch.nn.functional.cross_entropy(
            scores.reshape(-1, WORDS), tokens[:, 1:].reshape(-1)
        )
        tx.zero_grad(set_to_none=True)
        loss.backward()
        tx.step()
        return float(loss)

    return go


def _decoder(torch: Any) -> Any:
    nn = torch.nn

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm1, self.norm2 = nn.LayerNorm(EMBED), nn.LayerNorm(EMBED)
            self.qkv, self.out = nn.Linear(EMBED, 3 * EMBED), nn.Linear(EMBED, EMBED)
            self.up, self.down = nn.Linear(EMBED, 4 * EMBED), nn.Linear(4 * EMBED, EMBED)

        def forward(self, x):
            b, t, _ = x.shape
            qkv = self.qkv(self.norm1(x)).view(b, t, 3, HEADS, EMBED // HEADS)
            q, k, v = qkv.permute(2, 0, 3, 1, 4)
            read = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + self.out(read.transpose(1, 2).reshape(b, t, EMBED))
            hidden = nn.functional.gelu(self.up(self.norm2(x)), approximate="tanh")
            return x + self.down(hidden)

    class Decoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.words, self.places = nn.Embedding(WORDS, EMBED), nn.Embedding(LENGTH, EMBED)
            self.blocks, self.norm = (
                nn.ModuleList(Block() for _ in range(LAYERS)),
                nn.LayerNorm(EMBED),
            )

        def forward(self, tokens):
            x = self.words(tokens) + self.places(torch.arange(tokens.shape[1]))
            for block in self.blocks:
                x = block(x)
            return self.norm(x) @ self.words.weight.T

    return Decoder()
