"""What the published runs would cost: measured clips a second in hours, beside the published hours.

Nothing is timed here: the figures come from result files of whole steps and from plans. What is
timed is how long a plan follows one step.
"""

from pathlib import Path

import pytest
from rows import rounded
from run_costs import PLANNED_GPU, RECIPES, costs, measured_clips_per_s

from vmae_fast.plan import trace_step

RESULTS = Path(__file__).parent / "results"


@pytest.mark.counted
def test_run_costs(benchmark, record):
    rows = costs(RECIPES, RESULTS)
    devices = ", ".join(measured_clips_per_s(RESULTS)) or "none yet"
    figures = {
        "title": "What a run costs",
        "what": (
            "published pretraining runs in GPU-hours; planned are roofline times at an assumed "
            "share of it, for GPUs that never wait for clips"
        ),
        "GPUs that steps were measured on": devices,
        "runs": rounded(rows),
    }
    benchmark.extra_info.update(figures)
    record("run_costs", figures, kind="published")

    # What was published took longer than a newer GPU should; a plan that says otherwise is wrong.
    for row in rows:
        if row["published_gpu_hours"]:
            assert row[f"planned_{PLANNED_GPU}_gpu_hours"] < row["published_gpu_hours"]
    first = RECIPES[0]
    benchmark.pedantic(lambda: trace_step(first.config, first.batch), rounds=2)
