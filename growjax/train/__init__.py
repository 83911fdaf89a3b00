"""Training runs: plans as data, and the loop that runs, saves and resumes them."""

from growjax.budget import Schedule as Schedule
from growjax.optim.recipe import Optimizer as Optimizer
from growjax.parallel import Layout as Layout
from growjax.train.as_json import load_plan as load_plan
from growjax.train.as_json import save_plan as save_plan
from growjax.train.calibration import calibrate as calibrate
from growjax.train.feed import CorpusFeed as CorpusFeed
from growjax.train.feed import Feed as Feed
from growjax.train.loop import Options as Options
from growjax.train.loop import train as train
from growjax.train.losses import cross_entropy as cross_entropy
from growjax.train.metrics import read_journal as read_journal
from growjax.train.metrics import watch as watch
from growjax.train.plan import Plan as Plan
from growjax.train.records import Begin as Begin
from growjax.train.records import End as End
from growjax.train.records import Growth as Growth
from growjax.train.records import Record as Record
from growjax.train.records import Saved as Saved
from growjax.train.records import Step as Step
from growjax.train.stages import Span as Span
from growjax.train.stages import Stage as Stage
from growjax.train.stages import Start as Start
