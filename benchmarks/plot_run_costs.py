"""Draw results/published/run_costs.json: GPU-hours published, planned and measured."""

import json
from pathlib import Path

from matplotlib import pyplot as plt
from plot_style import BLUE, GREEN, ORANGE, save

SIZE_INCHES = (11, 5.6)
# Stands where nothing is measured.
NOT_YET = "measured_gpu_hours"


def draw(file: Path) -> Path:
    """Draw the runs that have a published cost."""
    kept = json.loads(file.read_text())
    bars = []
    for row in kept["runs"]:
        if not row["published_gpu_hours"]:
            continue
        on = row["published_on"].split(" (")[0]
        bars.append((f"{row['run']}\npublished: {on}", row["published_gpu_hours"], ORANGE))
    for row in {row["run"]: row for row in kept["runs"] if row["published_gpu_hours"]}.values():
        same = row["published_on"].split(",")[0].split(" (")[0].split(" ", 1)[1]
        planned = {"planned_same_gpu_gpu_hours": same, "planned_h200_gpu_hours": "H200"}
        for key, gpu in planned.items():
            bars.append((f"{row['run']}\nplanned: {gpu}, not yet measured", row[key], BLUE))
        for key in (key for key in row if key.startswith("measured_") and key != NOT_YET):
            gpu = key.removeprefix("measured_").removesuffix("_gpu_hours")
            bars.append((f"{row['run']}\nmeasured: {gpu}", row[key], GREEN))
    bars.sort(key=lambda bar: (bar[0].split("\n")[0], -bar[1]))
    figure, axes = plt.subplots(figsize=SIZE_INCHES, layout="constrained")
    names, hours, colours = zip(*bars[::-1], strict=True)
    axes.barh(range(len(bars)), hours, color=colours)
    for place, value in enumerate(hours):
        axes.text(value, place, f" {value:,.0f}", va="center")
    axes.set_yticks(range(len(bars)), names, fontsize="small")
    axes.set_xscale("log")
    axes.set_xlim(left=1, right=4 * max(hours))
    axes.set_xlabel("GPU-hours of each run (logarithmic)")
    axes.set_title("What a published run costs, in hours of the GPUs named")
    return save(figure, file)
