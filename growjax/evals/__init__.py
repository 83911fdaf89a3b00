"""Evaluation: a table of tasks (likelihood, questions, fine-tuning, lm-eval), and their metrics."""

from growjax.evals.finetune import FineTuned as FineTuned
from growjax.evals.finetune import Recipe as Recipe
from growjax.evals.finetune import fine_tune as fine_tune
from growjax.evals.generation import generate as generate
from growjax.evals.glue import GLUE as GLUE
from growjax.evals.glue import Example as Example
from growjax.evals.glue import GlueTask as GlueTask
from growjax.evals.glue import read_task as read_task
from growjax.evals.language import LanguageModel as LanguageModel
from growjax.evals.language import Scored as Scored
from growjax.evals.language import bits_per_byte as bits_per_byte
from growjax.evals.language import masked_bits as masked_bits
from growjax.evals.minimal_pairs import blimp as blimp
from growjax.evals.questions import Question as Question
from growjax.evals.questions import closed_book as closed_book
from growjax.evals.questions import read_questions as read_questions
from growjax.evals.questions import read_squad as read_squad
from growjax.evals.reasoning import PRIMITIVES as PRIMITIVES
from growjax.evals.reasoning import primitives as primitives
from growjax.evals.spans import SpanRecipe as SpanRecipe
from growjax.evals.spans import fine_tune_spans as fine_tune_spans
from growjax.evals.tasks import TASKS as TASKS
from growjax.evals.tasks import Settings as Settings
from growjax.evals.tasks import Task as Task
from growjax.evals.tasks import evaluate as evaluate
