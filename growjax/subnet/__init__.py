"""Sub-networks: train a random part of the model at each step, and always keep the whole.

A sub-network is the same kind of value as a growth operator, but its maps select: parameters in, fewer
parameters out (or, of a loop, some of them again), in the same tree, so one loss serves both.
Drawing is a function of the key; the number of selected layers or units is static, so one compilation
serves every draw, and a step at k of L layers costs k of L. Gradients flow back into the whole model;
parameters that were left out get exact zeros.

RaPTr: Panigrahi et al., "Efficient Stagewise Pretraining via Progressive Subnetworks", ICLR 2025.
Progressive layer dropping: Zhang & He, NeurIPS 2020. Constant `random_path(mode="bernoulli")` is
stochastic depth (Huang et al. 2016) or LayerDrop (Fan et al. 2020).
"""

from growjax.subnet.base import Coins as Coins
from growjax.subnet.base import Subnet as Subnet
from growjax.subnet.base import step_key as step_key
from growjax.subnet.drops import ProgressiveLayerDrop as ProgressiveLayerDrop
from growjax.subnet.drops import progressive_layer_drop as progressive_layer_drop
from growjax.subnet.exits import LayerSkip as LayerSkip
from growjax.subnet.exits import layer_skip as layer_skip
from growjax.subnet.loops import Loop as Loop
from growjax.subnet.loops import loop as loop
from growjax.subnet.matformer import Nested as Nested
from growjax.subnet.matformer import nested as nested
from growjax.subnet.parts import RandomPart as RandomPart
from growjax.subnet.parts import random_part as random_part
from growjax.subnet.paths import PathSchedule as PathSchedule
from growjax.subnet.paths import PathStage as PathStage
from growjax.subnet.paths import RandomPath as RandomPath
from growjax.subnet.paths import Scale as Scale
from growjax.subnet.paths import path_schedule as path_schedule
from growjax.subnet.paths import random_path as random_path
from growjax.subnet.thinned import RandomTokens as RandomTokens
from growjax.subnet.thinned import random_tokens as random_tokens
