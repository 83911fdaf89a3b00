"""Models: each file reads from top to bottom."""

from growjax.models.gpt import GPT as GPT
from growjax.models.gpt import GPTConfig as GPTConfig
