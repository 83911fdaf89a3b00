"""Fine-tuning by growjax and by PyTorch: the same rows, head and rates end in the same outputs."""

import jax
import numpy as np
import pytest

import tests.hf.oracle  # noqa: F401  # transformers is told to be quiet there
from experiments.downstream import peer
from experiments.downstream.made_up import make_up
from growjax.evals import GLUE, Recipe, read_task
from growjax.evals import finetune as room
from growjax.evals.commands import open_model


@pytest.mark.parametrize("name", ["glue/rte", "glue/cola"])
def test_two_epochs_of_fine_tuning_end_in_the_same_outputs(name, tmp_path):
    data, folder = make_up(tmp_path)
    model, tokenizer, _ = open_model(folder)
    task, recipe = GLUE[name], Recipe(rate=3e-3, epochs=2, length=16, weight_decay=0.1)
    train, dev = (read_task(task, data, split) for split in ("train", "dev"))
    fresh = room.Classifier(model, task.outputs, key=jax.random.key(7))
    encode = lambda examples: [room._encoded(tokenizer, x, task, 16) for x in examples]  # noqa: E731
    *_, ours = room.train_epochs(fresh, encode(train), recipe, 7, room._collated, room._label_loss)
    outputs = room._outputs(ours, task, encode(dev), 16)
    before = room._outputs(fresh, task, encode(dev), 16)
    theirs = peer.fine_tuned(folder, task, train, dev, recipe, 7, np.asarray(fresh.weight))
    print(np.abs(outputs - theirs).max(), np.abs(outputs - before).max())
    assert np.abs(outputs - theirs).max() <= 1e-4
    assert np.abs(outputs - before).max() > 1e-2
