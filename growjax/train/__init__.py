"""Training runs: plans, and the loop that runs them."""

from growjax.train.loop import End as End
from growjax.train.loop import Growth as Growth
from growjax.train.loop import Step as Step
from growjax.train.loop import next_token_loss as next_token_loss
from growjax.train.loop import train as train
from growjax.train.plan import Plan as Plan
from growjax.train.plan import Span as Span
from growjax.train.plan import Stage as Stage
