"""The studies at the papers' own sizes: every program fits the slice that it is meant for.

Slow, so `make test-tpu` leaves it out: GROWJAX_PROFILE=deep make test-tpu ARGS="-s -k every_program_fits"
"""

import pytest

from experiments.msg import run as msg
from experiments.no_train_no_gain import run as ntng
from experiments.raptr import run as raptr
from growjax.forecast.pod import compile_for
from tests.conftest import DEEP


PRESETS = [
    (msg, "bert", "msg", "v5e:4x4"),
    (msg, "bert-large", "msg", "v5e:4x4"),
    (msg, "gpt", "msg", "v5e:4x4"),
    (raptr, "bert", "raptr", "v5e:4x4"),
    (raptr, "ul2", "raptr", "v5e:16x16"),
    (ntng, "bert", "stacking", "v5e:4x4"),
    (ntng, "bert", "RHO", "v5e:4x4"),
    (ntng, "t5", "stacking", "v5e:4x4"),
    (ntng, "t5", "sophia", "v5e:4x4"),
]


@pytest.mark.skipif(not DEEP, reason="minutes a preset: the deep profile runs it")
@pytest.mark.parametrize("study, workload, arm, slice_", PRESETS)
def test_every_program_fits(study, workload, arm, slice_):
    cells = study.cells("paper", workload, 0)
    plan = next(cell.plan for cell in cells if cell.plan.name == arm)
    forecast = compile_for(plan, slice_)
    print(f"{study.STUDY.name} {workload} {arm} on {slice_}:")
    for program in forecast.programs:
        print(f"  stage {program.stage} {program.name}: {program.memory / 2**30:.2f} GiB")
    assert forecast.refusals == ()
    assert {p.stage for p in forecast.programs} == {span.index for span in plan.spans}
