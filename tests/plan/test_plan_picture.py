"""Plans as pictures: which panels there are, and what stands in them."""

from dataclasses import replace

import matplotlib.figure
import pytest

from vmae_fast import VideoMAEConfig
from vmae_fast.plan import Settings, find_gpu, make_plan
from vmae_fast.plan.picture import save_picture

TINY = VideoMAEConfig.of("tiny", frames=4, image_size=32)


@pytest.fixture
def drawn(monkeypatch, tmp_path):
    """The panels of a plan's picture."""
    found = []
    save = matplotlib.figure.Figure.savefig

    def kept(self, *args, **kwargs):
        found.append(self)
        return save(self, *args, **kwargs)

    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", kept)

    def draw(plan):
        save_picture(plan, tmp_path / "plan.png")
        return found[-1].axes

    return draw


def widths(axes):
    names = [label.get_text() for label in axes.get_yticklabels()]
    return dict(zip(names, (bar.get_width() for bar in axes.patches), strict=True))


def test_one_gpu_has_no_exchange(drawn):
    plan = make_plan(Settings(TINY, 2), find_gpu("l4"))
    _, step = drawn(plan)
    assert set(widths(step)) == {"products", "attention", "passes over memory", "AdamW"}
    assert sum(widths(step).values()) == pytest.approx(plan.step_ms)


def test_several_gpus_wait_and_scale(drawn):
    plan = make_plan(Settings(TINY, 2, 16, parallel="fsdp"), find_gpu("l4"))
    # All but one and two GPUs hold a part that is small enough.
    two, four = (row.memory_bytes / 2**30 for row in plan.scaling[1:3])
    plan = replace(plan, gpu=replace(plan.gpu, memory_gib=(two + four) / 2))
    _, step, scaling = drawn(plan)
    assert widths(step)["waiting for exchange"] == plan.exchange.exposed_ms > 0
    assert sum(widths(step).values()) == pytest.approx(plan.step_ms)

    lines = {line.get_label(): line for line in scaling.lines}
    rows = plan.scaling
    times = [rows[0].clips_per_s * row.settings.gpus for row in rows]
    assert list(lines["one GPU's, so many times"].get_ydata()) == pytest.approx(times)
    fits = {label: list(lines[label].get_xdata()) for label in ("predicted", "does not fit")}
    assert fits == {"predicted": [2, 3, 4, 5, 6], "does not fit": [0, 1]}
    found = list(lines["predicted"].get_ydata())
    assert found == pytest.approx([row.clips_per_s for row in rows[2:]])
    labels = [label.get_text() for label in scaling.get_xticklabels()]
    assert labels == [f"{row.settings.gpus}\n{row.scaling_efficiency:.0%}" for row in rows]
    low, high = scaling.get_ylim()
    assert all(low < value < high for value in [*found, *times])
