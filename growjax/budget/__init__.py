"""What runs cost, on a clock that is the same for everybody, and the learning rates that follow it."""

from growjax.budget.clock import A100_T5 as A100_T5
from growjax.budget.clock import RTX3090_BERT as RTX3090_BERT
from growjax.budget.clock import RTX3090_BERT_AS_RELEASED as RTX3090_BERT_AS_RELEASED
from growjax.budget.clock import Budget as Budget
from growjax.budget.clock import Clock as Clock
from growjax.budget.clock import DepthClock as DepthClock
from growjax.budget.clock import FlopsClock as FlopsClock
from growjax.budget.clock import MeasuredClock as MeasuredClock
from growjax.budget.clock import Op as Op
from growjax.budget.clock import Timing as Timing
from growjax.budget.clock import load_clock as load_clock
from growjax.budget.clock import recharge as recharge
from growjax.budget.clock import save_clock as save_clock
from growjax.budget.paired import Comparison as Comparison
from growjax.budget.paired import Outcome as Outcome
from growjax.budget.paired import Reach as Reach
from growjax.budget.paired import SpeedUp as SpeedUp
from growjax.budget.paired import compare as compare
from growjax.budget.paired import cost_to_reach as cost_to_reach
from growjax.budget.paired import sign_flip as sign_flip
from growjax.budget.paired import speed_up as speed_up
from growjax.budget.paired import t_interval as t_interval
