"""Plans: training runs as values, with stages, losses, schedules and optimizers. Computes nothing."""

from growjax.plan.files import load_plan as load_plan
from growjax.plan.files import save_plan as save_plan
from growjax.plan.losses import cross_entropy as cross_entropy
from growjax.plan.optimizer import Optimizer as Optimizer
from growjax.plan.plan import Plan as Plan
from growjax.plan.probe import Decision as Decision
from growjax.plan.probe import Probe as Probe
from growjax.plan.schedule import Rate as Rate
from growjax.plan.schedule import Schedule as Schedule
from growjax.plan.schedule import Warmup as Warmup
from growjax.plan.stages import Fork as Fork
from growjax.plan.stages import Span as Span
from growjax.plan.stages import Stage as Stage
from growjax.plan.stages import Start as Start
from growjax.plan.timing import Mixing as Mixing
from growjax.plan.timing import Plateau as Plateau
from growjax.plan.timing import Trigger as Trigger
from growjax.plan.timing import mixing as mixing
from growjax.plan.timing import plateau as plateau
from growjax.plan.timing import proportional_shares as proportional_shares
from growjax.plan.timing import stacking_tokens as stacking_tokens
