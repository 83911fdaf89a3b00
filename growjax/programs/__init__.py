"""What is compiled: birth, training step, growth and evaluation, ahead of time."""
