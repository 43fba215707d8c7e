"""Every benchmark's share of a ceiling, the published tables, README's headline, the pictures."""

import json
from pathlib import Path
from types import SimpleNamespace

import headline
import plot
import pytest
import report
import rows
import test_linear_cpu
import timing
import torch
from benchmark_figures import without_count_or_share
from timing import Timing
from words import cell, in_words

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
CPU = torch.device("cpu")
# Measured before each entry carried its share of a ceiling, by the commit they are from.
OLDER = {
    "linear_fp32_avx512": "c088d3e",
    "step_base_bf16_avx512": "c088d3e",
    "step_base_fp32_against_a58abb5": "2257991",
    "step_base_fp32_avx512": "c088d3e",
}


# ---- ceilings -----------------------------------------------------------------------------


def test_a_cpu_has_both_ceilings_and_the_product_is_one():
    best = timing.ceilings(CPU)
    assert best["copy_gb_per_s"] > 0
    assert best["matmul_tflop_per_s"] > 0
    assert best["matmul_dtype"] == "float32"
    both = torch.randn(2, 48, 48)
    found = {name: way(both)() for name, way in timing._products(CPU).items()}
    torch.testing.assert_close(found["matmul"], both[0] @ both[1])
    torch.testing.assert_close(found["convolution"][0, :, :, 0].t(), both[0] @ both[1].t())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_has_a_share_of_the_product_of_its_own_precision(monkeypatch, dtype):
    best = {"copy_gb_per_s": 8.0, "matmul_tflop_per_s": 0.5, "matmul_dtype": "float32"}
    monkeypatch.setattr(rows, "ceilings", lambda _: best)
    ours, copy = Timing(2.0, "perf_counter"), Timing(1.0, "perf_counter")
    row = rows.row_of("op", rows.forward, ours, copy, {}, 8 * 10**6, 10**8, dtype)
    assert row["percent_of_copy"] == pytest.approx(50)
    assert row["tflop_per_s"] == pytest.approx(0.05)
    shares = {torch.float32: pytest.approx(10), torch.bfloat16: None}
    assert row.get("percent_of_matmul") == shares[dtype]
    assert not without_count_or_share({"ceilings": best, "rows": [row]})


def test_linear_layers_carry_their_share(monkeypatch):
    monkeypatch.setattr(test_linear_cpu, "SHAPES", [(64, 32, 48)])
    monkeypatch.setattr(test_linear_cpu, "ROUNDS", 3)
    kept = {}
    benchmark = SimpleNamespace(extra_info={}, pedantic=lambda call, rounds: call())
    test_linear_cpu.test_linear(benchmark, lambda name, figures: kept.update(figures))
    assert benchmark.extra_info == kept
    (row,) = kept["shapes"]
    assert row["gflop"] == pytest.approx(6 * 64 * 32 * 48 / 1e9, rel=1e-3)
    share = 100 * row["matmul_gflop_per_s"] / 1e3 / kept["ceilings"]["matmul_tflop_per_s"]
    assert row["matmul_percent_of_matmul"] == pytest.approx(share, rel=2e-3)
    assert not without_count_or_share(kept)


def test_every_result_file_carries_counts_and_shares():
    # No product is measured in bf16 on a CPU.
    files = {
        file: json.loads(file.read_text())
        for file in sorted(RESULTS.glob("*/*.json"))
        if not file.match("cpu/step_*_bf16.json")
    }
    lacking = {
        f"{file.parent.name}/{file.name}": without_count_or_share(figures)
        for file, figures in files.items()
        if OLDER.get(file.stem) != figures["environment"]["commit"]
    }
    assert not {name: entries for name, entries in lacking.items() if entries}


def test_what_lacks_a_count_or_a_share_is_found():
    whole = {"time_ms": 1.0, "bytes": 8, "percent_of_copy": 50.0}
    best = {"copy_gb_per_s": 8.0}
    assert without_count_or_share({"ceilings": best, "rows": [whole]}) == []
    for missing in ("bytes", "percent_of_copy"):
        row = {key: value for key, value in whole.items() if key != missing}
        assert without_count_or_share({"ceilings": best, "rows": [whole, row]}) == ["rows 1"]
    assert without_count_or_share({"rows": [whole]}) == ["ceilings"]
    assert without_count_or_share({"ours_s": 2.0, "losses": [1.0]}) == ["scalars", "ceilings"]
    # Counted, not timed.
    assert without_count_or_share({"table": [{"gmacs": 35.5}]}) == []


# ---- the page -----------------------------------------------------------------------------

ENVIRONMENT = {
    "date": "2026-01-02",
    "commit": "abc",
    "torch": "2.13",
    "device": "AMD EPYC",
    "threads": 2,
    "vector_units": "AVX2",
}


def write(file, **figures):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({"environment": ENVIRONMENT, "what": "counted", **figures}))


def test_published_tables_come_first_and_name_no_device(tmp_path):
    write(tmp_path / "cpu" / "a.json", ours_peak_mib=2048.25)
    forward = [{"model": "base", "plain_gmacs": 1234.5}, {"model": "giant", "h200_ms": None}]
    titled = {"title": "What masks cost", "missing": "not yet measured"}
    write(tmp_path / "published" / "z.json", **titled, forward=forward, step=[{"t": 1568}])
    page = report.render(tmp_path)
    published, cpu = page.index("## Published tables"), page.index("## AMD EPYC (`cpu`)")
    assert published < cpu
    assert "AMD EPYC" not in page[:cpu]
    assert "threads" not in page[published:cpu]
    for part in (
        "### What masks cost (`z`)\n\nCounted. 2026-01-02, commit abc, torch 2.13.\n",
        "Forward:\n\n| model | plain GMACs | H200, ms |\n",
        "| base | 1,234 |  |\n| giant |  | not yet measured |\n",
        "| 1,568 |",
    ):
        assert part in page[published:cpu]
    assert "| ours peak, MiB | 2,048 |" in page[cpu:]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (263.93, "263.93"), (35.4, "35.4"), (1364.0, "1,364"), (1568, "1,568"),
        (0.06761234, "0.067612"), (None, "-"), (True, "yes"), ([320, 3072], "320, 3072"),
        ("a|b", "a\\|b"), (2.0, "2"),
    ],
)  # fmt: skip
def test_figures_are_written_as_people_read_them(value, text):
    assert cell(value) == text


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("forward_ms", "forward, ms"), ("ours_clips_per_s", "ours, clips/s"), ("gflop", "GFLOP"),
        ("huggingface_sdpa_s", "Hugging Face SDPA, s"), ("saved_mib_a_clip", "saved MiB a clip"),
        ("last loss, fast", "last loss, fast"), ("t", "t"), ("s", "s"),
    ],
)  # fmt: skip
def test_names_are_written_with_their_units(name, words):
    assert in_words(name) == words


# ---- README's headline --------------------------------------------------------------------


def block(results):
    """The headline's table as lists of cells."""
    lines = [line for line in headline.headline(results).splitlines() if line.startswith("|")]
    return [[one.strip() for one in line.strip("|").split("|")] for line in lines[2:]]


def cpu_step(file, ours_s=4.0):
    sizes = {"ours_peak_tensors_mib": 362, "huggingface_sdpa_peak_tensors_mib": 598}
    times = {"ours_s": ours_s, "huggingface_sdpa_s": 5.0, "ours_clips_per_s": 2 / ours_s}
    write(file, **sizes, **times, saved_ratio_a_clip=0.585)


def gpu_step(file, device):
    peers = {
        "huggingface_eager": {"time_ms": 200.0, "how": "events", "peak_gib": 60.0},
        "huggingface": {"time_ms": 80.0, "how": "events", "peak_gib": 20.0},
    }
    row = {
        "op": "step base v1", "clips": 64, "time_ms": 32.0, "clips_per_s": 2000.0, "peak_gib": 10.0,
        "peers": peers, "speedup": {"huggingface_eager": 6.25, "huggingface": 2.5},
    }  # fmt: skip
    other = row | {"direction": "graph, bf16 residual", "clips_per_s": 2100.0}
    rows = [other, row | {"direction": "graph, fp32 residual"}]
    write(file, environment=ENVIRONMENT | {"device": device}, rows=rows)


def test_what_the_target_device_has_not_run_is_not_yet_measured(tmp_path):
    gpu_step(tmp_path / "nvidia-a100" / "step_base_v1.json", "NVIDIA A100")
    lines = block(tmp_path)
    assert len(lines) == 4
    for _, _, clips_per_s, _, memory in lines:
        assert clips_per_s == memory == "not yet measured"
    gpu_step(tmp_path / "nvidia-h200" / "step_base_v1.json", "NVIDIA H200")
    lines = block(tmp_path)
    assert lines[0][0].endswith("64 clips")
    assert [line[1:] for line in lines] == [
        ["**vmae-fast**", "2,000", "", "10 GiB"],
        ["Hugging Face, eager", "320", "6.25x", "60 GiB"],
        ["Hugging Face, SDPA", "800", "2.50x", "20 GiB"],
        ["Hugging Face, SDPA, compiled", *["not yet measured"] * 3],
    ]


def test_older_steps_are_left_to_the_page(tmp_path):
    cpu_step(tmp_path / "cpu" / "step_base_fp32.json")
    for name in ("step_base_fp32_avx512", "step_base_fp32_against_abc"):
        cpu_step(tmp_path / "cpu" / f"{name}.json", ours_s=1.0)
    assert [line[1:] for line in block(tmp_path)[4:]] == [
        ["**vmae-fast**", "0.5", "", "362 MiB"],
        ["Hugging Face, SDPA", "0.4", "1.25x", "598 MiB"],
    ]
    assert "0.585" in headline.headline(tmp_path)


def test_the_picture_is_the_first_that_was_drawn(tmp_path):
    results = tmp_path / "results"
    for name, folder in (("mask_ratio", "cpu"), ("flops_decoder_masking", "published")):
        write(results / folder / f"{name}.json", title=f"the {name}")
        assert "![" not in headline.headline(results).splitlines()[-1]
    for name in ("cpu/mask_ratio", "published/flops_decoder_masking"):
        (results / f"{name}.png").touch()
        line = headline.headline(results).splitlines()[-1]
        assert line == f"![The {name.split('/')[1]}](benchmarks/results/{name}.png)"


def test_a_changed_figure_changes_readme(tmp_path, capsys):
    results, page, readme = (tmp_path / name for name in ("results", "RESULTS.md", "README.md"))
    file = results / "cpu" / "step_base_fp32.json"
    cpu_step(file)
    readme.write_text(f"# Mine\n{headline.BEGIN}\nold\n{headline.END}\nrest\n")
    assert report.main([], results, page, readme) == 0
    text = readme.read_text()
    assert text.startswith(f"# Mine\n{headline.BEGIN}\n| a training step")
    assert text.endswith(f"{headline.END}\nrest\n")
    assert "old" not in text
    assert report.main(["--check"], results, page, readme) == 0
    cpu_step(file, ours_s=2.5)
    assert report.main(["--check"], results, page, readme) == 1
    assert f"{readme} is not what" in capsys.readouterr().err
    assert readme.read_text() == text
    assert report.main([], results, page, readme) == 0
    assert "| 2.00x |" in readme.read_text()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (f"{headline.END}\n", f"has 0 lines {headline.BEGIN}"),
        (f"{headline.BEGIN}\n", f"has 0 lines {headline.END}"),
        (f"{headline.BEGIN}\n{headline.BEGIN}\n{headline.END}\n", "has 2 lines"),
        (f"{headline.END}\n{headline.BEGIN}\n", f"has {headline.END} before"),
    ],
)
def test_a_missing_marker_is_a_clear_error(tmp_path, capsys, text, said):
    results, page, readme = (tmp_path / name for name in ("results", "RESULTS.md", "README.md"))
    readme.write_text(text)
    assert report.main([], results, page, readme) == 2
    assert said in capsys.readouterr().err
    assert readme.read_text() == text
    assert not page.exists()


# ---- pictures -----------------------------------------------------------------------------


def test_pictures_are_drawn_by_name(tmp_path):
    pytest.importorskip("matplotlib")
    file = tmp_path / "cpu" / "attention_curves.json"
    file.parent.mkdir()
    file.write_text((RESULTS / "cpu" / "attention_curves.json").read_text())
    write(tmp_path / "cpu" / "of_no_picture.json", ours_s=1.0)
    assert plot.main(tmp_path) == [file.with_suffix(".png")]
    assert file.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_every_picture_has_what_draws_it_and_the_other_way_round():
    drawn = {file.stem for file in RESULTS.glob("*/*.png")} - {"training_curves"}
    assert drawn <= set(plot.DRAWN_BY)
    held = {file.stem for file in RESULTS.glob("*/*.json")}
    assert held & set(plot.DRAWN_BY) == drawn
    for name in held & set(plot.DRAWN_BY):
        assert (ROOT / "benchmarks" / f"{plot.DRAWN_BY[name]}.py").exists()
