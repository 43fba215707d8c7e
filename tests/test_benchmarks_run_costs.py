"""What runs cost: measured clips a second in hours, planned ones beside them, the picture."""

import json

import plot_run_costs
import pytest
import run_costs
from run_costs import Published, Recipe

from vmae_fast.plan import Settings, find_gpu, make_plan

TINY = Recipe(
    "tiny run", "step tiny v1", "tiny", 4, 7.2e6,
    published=(Published(100, "4 A5000, theirs", "a5000", "a paper"),),
)  # fmt: skip
UNKNOWN = Recipe("another", "step tiny v2", "tiny", 4, 1e6, {"decoder_mask_ratio": 0.5})


def test_hours_are_clips_over_the_most_clips_a_second_that_were_measured(tmp_path):
    row = {"op": "step tiny v1", "direction": "graph, fp32 residual", "clips_per_s": 1000.0}
    slower = row | {"direction": "launched, fp32 residual", "clips_per_s": 500.0}
    # Not the published residual stream.
    other = row | {"direction": "graph, bf16 residual", "clips_per_s": 4000.0}
    folder = tmp_path / "nvidia-h200"
    folder.mkdir()
    (folder / "step_tiny_v1.json").write_text(json.dumps({"rows": [slower, row, other]}))
    (folder / "step_other.json").write_text(json.dumps({"ours_s": 1}))
    known, unknown = run_costs.costs((TINY, UNKNOWN), tmp_path)
    # 7.2 million clips at 1,000 a second are two hours.
    assert known["measured_nvidia-h200_gpu_hours"] == pytest.approx(2)
    assert (known["published_gpu_hours"], known["clips_m"]) == (100, 7.2)
    assert known["published_on"] == "4 A5000, theirs (a paper)"
    for key, gpu in (("planned_h200_gpu_hours", "h200"), ("planned_same_gpu_gpu_hours", "a5000")):
        plan = make_plan(Settings(TINY.config, 4), find_gpu(gpu), clips=TINY.clips)
        assert known[key] == pytest.approx(plan.hours)
    assert unknown["measured_gpu_hours"] == "not yet measured"
    assert unknown["published_gpu_hours"] is None


def test_the_published_runs_are_those_of_the_papers():
    by_name = {recipe.name.split(",")[0]: recipe for recipe in run_costs.RECIPES[::-1]}
    giant = by_name["V2 giant"]
    # 241 hours of 64 GPUs at some 29 clips a second each, as the paper's throughput has it.
    dual = next(one for one in run_costs.RECIPES if one.settings and one.size == "giant")
    assert dual.published[0].gpu_hours == 241 * 64
    assert dual.clips / (dual.published[0].gpu_hours * 3600) == pytest.approx(29, abs=1)
    assert giant.clips == 1.62e9
    assert by_name["V1 base"].clips in (192e6, 2400 * 169_000)


def test_the_picture(tmp_path):
    rows = run_costs.costs((TINY,), tmp_path)
    file = tmp_path / "run_costs.json"
    file.write_text(json.dumps({"runs": [rows[0] | {"measured_a_gpu_hours": 3.0}]}))
    assert plot_run_costs.draw(file).read_bytes().startswith(b"\x89PNG")
