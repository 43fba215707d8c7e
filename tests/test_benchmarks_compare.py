"""Comparing result files: what is matched, which kind is better, the exit status."""

import json

import compare
import pytest

ENVIRONMENT = {"date": "2026-01-02", "commit": "abc", "torch": "2.13", "device": "AMD EPYC"}
ROW = {
    "op": "masked_mse", "direction": "forward", "time_ms": 1.0, "how": "graph", "bytes": 800,
    "gb_per_s": 100.0, "percent_of_copy": 50.0, "copy_of_as_many_bytes_ms": 0.5,
    "peers": {"eager": {"time_ms": 4.0, "how": "events"}}, "speedup": {"eager": 4.0},
    "peak_mib": {"masked_mse": 10.0, "eager": 40.0}, "targets": [],
}  # fmt: skip
SCALARS = {"ours_s": 2.0, "plain_s": 3.0, "huggingface_sdpa_s": 4.0, "mask_ratio": 0.9}
TABLE = [
    {"t": t, "attention": name, "gflop": 1.0 * t, "forward_ms": 10.0 * t}
    for t in (4, 8)
    for name in ("joint", "divided")
]
KEPT = {
    "environment": ENVIRONMENT, "what": "base, fp32", "ceilings": {"copy_gb_per_s": 200.0},
    **SCALARS, "rows": [ROW, ROW | {"direction": "backward"}], "over_rows": TABLE,
}  # fmt: skip


def write(file, kept):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(kept))
    return file


def changed(path, value):
    """KEPT with one figure changed, by keys and indices."""
    # Not deepcopy: rows of KEPT share what is inside of them.
    kept = json.loads(json.dumps(KEPT))
    inside = kept
    for key in path[:-1]:
        inside = inside[key]
    inside[path[-1]] = value
    return kept


@pytest.fixture
def run(tmp_path, capsys):
    """Compare two files' contents; the exit status, the lines and what is an error."""

    def call(before, after, *options):
        files = write(tmp_path / "A.json", before), write(tmp_path / "B.json", after)
        status = compare.main([*map(str, files), *options])
        said = capsys.readouterr()
        return status, said.out.splitlines(), said.err

    return call


def test_equal_files_have_no_regression(run):
    status, lines, errors = run(KEPT, KEPT)
    assert (status, errors) == (0, "")
    # 4 scalars, the ceiling, 9 figures of each row, gflop and forward_ms of each line of the table.
    assert lines[-1] == "31 figures, 0 worse in B by more than 5%"
    assert not [line for line in lines if "is better" in line]


@pytest.mark.parametrize(
    ("path", "value", "name"),
    [
        (("ours_s",), 2.2, "ours_s"),
        (("rows", 1, "time_ms"), 1.06, "masked_mse, backward: time_ms"),
        (("rows", 0, "gb_per_s"), 94.0, "masked_mse, forward: gb_per_s"),
        (("rows", 0, "percent_of_copy"), 47.0, "masked_mse, forward: percent_of_copy"),
        (("rows", 0, "speedup", "eager"), 3.0, "masked_mse, forward: speedup.eager"),
        (("rows", 0, "peak_mib", "masked_mse"), 11.0, "masked_mse, forward: peak_mib.masked_mse"),
        (("rows", 0, "bytes"), 1000, "masked_mse, forward: bytes"),
        (("over_rows", 3, "forward_ms"), 99.0, "over_rows, divided, t 8: forward_ms"),
        (("ours_s",), float("nan"), "ours_s"),
    ],
)
def test_a_worse_figure_is_a_regression_and_a_better_one_is_not(run, path, value, name):
    worse = changed(path, value)
    status, lines, _ = run(KEPT, worse)
    assert status == 1
    assert lines[-2].endswith("1 worse in B by more than 5%")
    assert lines[-1].startswith(f"  B.json: {name} ")
    assert run(KEPT, worse, "--threshold", "90")[0] == (value != value)
    if value == value:
        status, lines, _ = run(worse, KEPT)
        assert status == 0
        assert len([line for line in lines if line.endswith("B is better")]) == 1


@pytest.mark.parametrize(
    "path",
    [
        ("plain_s",), ("huggingface_sdpa_s",), ("mask_ratio",), ("ceilings", "copy_gb_per_s"),
        ("rows", 0, "copy_of_as_many_bytes_ms"), ("rows", 0, "peers", "eager", "time_ms"),
        ("rows", 0, "peak_mib", "eager"), ("over_rows", 0, "gflop"),
    ],
)  # fmt: skip
def test_what_is_not_ours_or_of_no_known_kind_is_not_judged(run, path):
    for value in (1e-3, 1e3):
        status, lines, _ = run(KEPT, changed(path, value))
        assert status == 0
        assert not [line for line in lines if "is better" in line]


@pytest.mark.parametrize(
    ("name", "better"),
    [
        ("ours_clips_per_s", "more"), ("tflop_per_s", "more"), ("speedup_over_plain", "more"),
        ("ours_percent_of_matmul", "more"), ("ours_saved_mib_a_clip", "less"),
        ("peak_gib", "less"), ("joint_over_divided_forward_ms_t16", ""), ("tokens", ""),
        ("eager_mib", ""), ("s", "less"), ("encoder_speedup", "more"), ("matmul_gflop_per_s", ""),
    ],
)  # fmt: skip
def test_kinds_by_name(name, better):
    assert compare.kind_of((name,)) == better


def test_the_threshold_is_met_at_its_value(run):
    assert run(KEPT, changed(("ours_s",), 2.1), "--threshold", "5.0000001")[0] == 0
    assert run(KEPT, changed(("ours_s",), 2.1), "--threshold", "4.9")[0] == 1


def test_what_differs_around_the_figures_is_said_first(run):
    after = changed(("rows", 0, "how"), "events")
    after["environment"] = ENVIRONMENT | {"torch": "2.14", "driver": "580"}
    after["what"] = "base, bf16"
    del after["over_rows"][1]
    lines = run(KEPT, after)[1]
    assert [line.strip() for line in lines[:6]] == [
        "B.json",
        "torch: A 2.13, B 2.14",
        "driver: A nothing, B 580",
        "what: A base, fp32, B base, bf16",
        "masked_mse, forward: how: A graph, B events",
        "over_rows, divided, t 4: in A only",
    ]
    assert lines[6].split() == ["figure", "A", "B", "B/A"]


def test_rows_that_nothing_tells_apart_are_not_compared(run):
    rounds = [{"before_s": 4.0 + i, "now_s": 3.0} for i in range(2)]
    slower = [{"before_s": 4.0 + i, "now_s": 9.0} for i in range(2)]
    status, lines, _ = run(KEPT | {"rounds": rounds}, KEPT | {"rounds": slower})
    assert status == 0
    assert "  rounds: nothing tells its rows apart, not compared" in lines


def test_folders_are_matched_by_path(tmp_path, capsys):
    for name in ("cpu/a.json", "nvidia-h200/a.json", "cpu/b.json"):
        write(tmp_path / "A" / name, KEPT)
    write(tmp_path / "B/cpu/a.json", KEPT)
    write(tmp_path / "B/nvidia-h200/a.json", changed(("ours_s",), 3.0))
    assert compare.main([str(tmp_path / "A"), str(tmp_path / "B")]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "cpu/b.json: in A only"
    assert lines[-2:] == [
        "62 figures, 1 worse in B by more than 5%",
        "  nvidia-h200/a.json: ours_s 2 -> 3, 1.500x",
    ]


def test_bad_input_is_one_clear_line(tmp_path, capsys):
    good = write(tmp_path / "A" / "a.json", KEPT)
    lacking = write(tmp_path / "lacking.json", {"ours_s": 1.0})
    broken = tmp_path / "broken.json"
    broken.write_text('{"environment"')
    other = write(tmp_path / "B" / "b.json", KEPT)
    alone = write(tmp_path / "alone.json", {"environment": ENVIRONMENT, "another": 1.0})
    for pair, said in (
        ((good, tmp_path / "none.json"), "none.json does not exist"),
        ((good, lacking), "lacking.json is not a result file"),
        ((good, broken), "broken.json cannot be read"),
        ((good, good.parent), "are a folder and a file"),
        ((good.parent, other.parent), "no result file of the same name"),
        ((good, alone), "no figure in common"),
        ((good, good, "--threshold", "-1"), "--threshold is -1"),
    ):
        assert compare.main(list(map(str, pair))) == 2
        out, error = capsys.readouterr()
        assert (out, len(error.splitlines())) == ("", 1)
        assert said in error
