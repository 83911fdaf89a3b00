"""Training runs: plans as data, and the loop that runs, saves and resumes them."""

from growjax.forecast.calibration import calibrate as calibrate
from growjax.parallel import Layout as Layout
from growjax.plan.files import load_plan as load_plan
from growjax.plan.files import save_plan as save_plan
from growjax.plan.losses import cross_entropy as cross_entropy
from growjax.plan.optimizer import Optimizer as Optimizer
from growjax.plan.plan import Plan as Plan
from growjax.plan.schedule import Schedule as Schedule
from growjax.plan.stages import Span as Span
from growjax.plan.stages import Stage as Stage
from growjax.plan.stages import Start as Start
from growjax.runs.feed import CorpusFeed as CorpusFeed
from growjax.runs.feed import Feed as Feed
from growjax.runs.journal import read_journal as read_journal
from growjax.runs.records import Begin as Begin
from growjax.runs.records import End as End
from growjax.runs.records import Growth as Growth
from growjax.runs.records import HeldOut as HeldOut
from growjax.runs.records import Record as Record
from growjax.runs.records import Saved as Saved
from growjax.runs.records import Step as Step
from growjax.runs.run import Run as Run
from growjax.runs.watch import watch as watch
from growjax.train.loop import Training as Training
from growjax.train.loop import train as train
from growjax.train.options import Options as Options
