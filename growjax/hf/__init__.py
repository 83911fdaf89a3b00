"""Hugging Face checkpoints in and out: one table a family, `safetensors` and JSON, nothing else."""

from growjax.hf.convert import config as config
from growjax.hf.convert import load as load
from growjax.hf.convert import save as save
