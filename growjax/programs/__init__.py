"""The compiled programs of a run: birth, training step, growth and evaluation, ahead of time."""
