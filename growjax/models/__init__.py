"""GPT, Llama, BERTs, T5 and a decoder of choices, each in a file that reads from top to bottom."""

from growjax.models.bert import BERT as BERT
from growjax.models.bert import BERTConfig as BERTConfig
from growjax.models.bert import BERTOutput as BERTOutput
from growjax.models.causal import Labels as Labels
from growjax.models.decoder import Decoder as Decoder
from growjax.models.decoder import DecoderConfig as DecoderConfig
from growjax.models.decoder import Sight as Sight
from growjax.models.exporting import exported as exported
from growjax.models.gpt import GPT as GPT
from growjax.models.gpt import GPTConfig as GPTConfig
from growjax.models.llama import Llama as Llama
from growjax.models.llama import LlamaConfig as LlamaConfig
from growjax.models.modernbert import ModernBERT as ModernBERT
from growjax.models.modernbert import ModernBERTConfig as ModernBERTConfig
from growjax.models.protocol import Config as Config
from growjax.models.protocol import Model as Model
from growjax.models.protocol import predictions as predictions
from growjax.models.protocol import read_tokens as read_tokens
from growjax.models.protocol import read_with_auxiliary as read_with_auxiliary
from growjax.models.t5 import T5 as T5
from growjax.models.t5 import T5Config as T5Config
from growjax.models.t5 import T5Encoder as T5Encoder
from growjax.models.t5 import T5EncoderConfig as T5EncoderConfig
