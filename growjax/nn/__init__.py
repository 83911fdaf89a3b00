"""The parts that the models are built from, each with its axes declared beside its arrays."""

from growjax.nn.assembly import causal as causal
from growjax.nn.assembly import check_sequence as check_sequence
from growjax.nn.assembly import empty_cache as empty_cache
from growjax.nn.assembly import logits as logits
from growjax.nn.assembly import make_block as make_block
from growjax.nn.attention import Attention as Attention
from growjax.nn.attention import Cache as Cache
from growjax.nn.attention import Rotary as Rotary
from growjax.nn.attention import RotaryScaling as RotaryScaling
from growjax.nn.attention import rotate as rotate
from growjax.nn.block import Block as Block
from growjax.nn.bodies import Bias as Bias
from growjax.nn.bodies import Body as Body
from growjax.nn.bodies import attend as attend
from growjax.nn.embedding import Embedding as Embedding
from growjax.nn.embedding import RelativeBias as RelativeBias
from growjax.nn.head import Readout as Readout
from growjax.nn.head import cross_entropies as cross_entropies
from growjax.nn.head import per_token as per_token
from growjax.nn.linear import affine as affine
from growjax.nn.linear import normal as normal
from growjax.nn.mask import Mask as Mask
from growjax.nn.mlp import ACTIVATIONS as ACTIVATIONS
from growjax.nn.mlp import MLP as MLP
from growjax.nn.norm import Norm as Norm
from growjax.nn.stacked import Stacked as Stacked
