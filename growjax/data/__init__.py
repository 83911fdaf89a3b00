"""Text to train on: tokenizers, sources, corpora, objectives, and batches in a promised order."""

# ruff: noqa: E402 - a missing package is named before it is imported

from growjax.extras import require


require("growjax.data", "grain")

from growjax.data.batches import Batches as Batches
from growjax.data.batches import Stream as Stream
from growjax.data.batches import held_out_batch as held_out_batch
from growjax.data.blend import Blend as Blend
from growjax.data.blend import Blended as Blended
from growjax.data.corpus import Corpus as Corpus
from growjax.data.corpus import Prepared as Prepared
from growjax.data.corpus import load as load
from growjax.data.denoising import UL2 as UL2
from growjax.data.denoising import Denoiser as Denoiser
from growjax.data.denoising import SpanCorruption as SpanCorruption
from growjax.data.denoising import restore as restore
from growjax.data.given import source_at as source_at
from growjax.data.mixture import Mixture as Mixture
from growjax.data.objectives import MLM as MLM
from growjax.data.objectives import Causal as Causal
from growjax.data.objectives import Objective as Objective
from growjax.data.objectives import PrefixLM as PrefixLM
from growjax.data.objectives import Window as Window
from growjax.data.objectives import batch_shapes as batch_shapes
from growjax.data.order import blocks_of as blocks_of
from growjax.data.order import blocks_used as blocks_used
from growjax.data.order import windows_per_block as windows_per_block
from growjax.data.preparation import Progress as Progress
from growjax.data.preparation import prepare as prepare
from growjax.data.sources import JSONL as JSONL
from growjax.data.sources import Document as Document
from growjax.data.sources import Source as Source
from growjax.data.sources import StandardLibrary as StandardLibrary
from growjax.data.sources import Text as Text
from growjax.data.sources import Tokens as Tokens
from growjax.data.tables import HuggingFace as HuggingFace
from growjax.data.tables import Parquet as Parquet
from growjax.data.tokenizers import ByteTokenizer as ByteTokenizer
from growjax.data.tokenizers import Tokenizer as Tokenizer
from growjax.data.tokenizers import load_tokenizer as load_tokenizer
from growjax.data.vocabulary import Vocabulary as Vocabulary
