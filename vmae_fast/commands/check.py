"""vmae-fast check."""

from __future__ import annotations

import csv
import json
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tyro.conf import Positional

from vmae_fast.train import ConfigError, DataSettings, ModelSettings, PretrainConfig

from ._arguments import parse, shown_of_model
from ._looking import lay_over, model_of, settings_before_flags, shown_source

if TYPE_CHECKING:
    from vmae_fast.data import VideoFile
    from vmae_fast.data.check import Report

# Bad files that are printed; the report has all.
_PRINTED = 20


@dataclass
class CheckArgs:
    """What is read, and what for."""

    videos: Positional[str | None] = None
    """Folder, list or file, as --data of pretrain. None: that of --config, else made videos."""
    out: str = "check"
    """Where the report goes: OUT.json; OUT.csv, a row for each file; OUT-good.txt, for --data."""
    workers: int | None = None
    """Processes that read. None: one for each core."""
    step_time: float | None = None
    """Seconds of a training step, to say how long it will wait for clips."""
    batch_size: int = 64
    """Clips of that step on one GPU."""
    model: ModelSettings = field(default_factory=ModelSettings)
    data: DataSettings = field(default_factory=DataSettings)


def run(args: list[str]) -> int:
    """Read every file once and say what was found; the exit status.

    Raises:
        ConfigError, DataError: settings or data that cannot be used.
        OSError: the report cannot be written.
    """
    from vmae_fast.data.check import check_files
    from vmae_fast.train.distributed import alone
    from vmae_fast.train.inputs import Inputs

    config, options = _settings(args)
    inputs = Inputs(config, model_of(config), alone())
    print("\n".join(inputs.notes), flush=True)
    workers = min(options.workers or os.cpu_count() or 1, len(inputs.files))
    from tqdm import tqdm

    with tqdm(total=len(inputs.files), unit="file", disable=not sys.stderr.isatty()) as bar:
        report = check_files(inputs.dataset(train=True), workers=workers, progress=bar.update)
    report.source = "; ".join(inputs.notes)
    written = _write(report, inputs.files, Path(options.out).expanduser())
    print("\n".join(_describe(report, options)))
    print(f"wrote {', '.join(map(str, written))}")
    if len(report.bad) == len(report.files):
        print("vmae-fast: no file can be trained on", file=sys.stderr)
        return 1
    return 0


def _settings(args: list[str]) -> tuple[PretrainConfig, CheckArgs]:
    base, source, rest = settings_before_flags(args)
    options = parse(
        CheckArgs,
        prog="vmae-fast check",
        description=(
            "Read every file's headers and one clip, several side by side: what the data set "
            "holds, which files are bad and why, and how many clips a second load."
        ),
        args=rest,
        default=CheckArgs(model=base.model, data=base.data),
        usual=("videos", "out", "workers", "step_time", "batch_size", "stride", "model"),
        examples=(
            "vmae-fast check /my/videos",
            "vmae-fast check --config v1-base-k400 list.csv --step-time 0.035 --batch-size 64",
        ),
        config=True,
        shown=shown_source(source) | shown_of_model(base.model, rest),
    )
    for name in ("workers", "step_time", "batch_size"):
        value = getattr(options, name)
        if value is not None and value <= 0:
            raise ConfigError(f"{name} must be above 0, got {value}")
    lay_over(base, options)
    # A file is read once, whatever it counts for.
    for part in base.sources:
        part.clips_per_video = 1
    base.optim.batch_size = max(part.repeats for part in base.sources)
    base.check()
    return base, options


def _write(report: Report, files: list[VideoFile], stem: Path) -> list[Path]:
    """The report, a row for each file, and a list of the good ones for --data."""
    from vmae_fast._files import atomic_file

    paths = [Path(f"{stem}{suffix}") for suffix in (".json", ".csv", "-good.txt")]
    with atomic_file(paths[0]) as temporary:
        temporary.write_text(json.dumps(report.summary(), indent=2) + "\n")
    rows = report.rows()
    with atomic_file(paths[1]) as temporary, temporary.open("w", newline="") as file:
        names = list(dict.fromkeys([*(name for row in rows for name in row), "notes"]))
        table = csv.DictWriter(file, names)
        table.writeheader()
        table.writerows({**row, "notes": "; ".join(row.get("notes", ()))} for row in rows)
    good = [file for file, row in zip(files, rows, strict=True) if not row["reason"]]
    with atomic_file(paths[2]) as temporary, temporary.open("w", newline="") as file:
        if any(part.count is not None for part in good):
            # V2's form: the one that says which frames.
            file.writelines(_numbered(part) for part in good)
        else:
            listing = csv.writer(file)
            listing.writerow(["path", "label"])
            listing.writerows([os.path.abspath(part.path), part.label or ""] for part in good)
    return paths


def _numbered(file: VideoFile) -> str:
    numbers = (file.first or 0, -1 if file.count is None else file.count)
    label = "" if file.label is None else f" {file.label}"
    return f"{os.path.abspath(file.path)} {numbers[0]} {numbers[1]}{label}\n"


def _describe(report: Report, options: CheckArgs) -> list[str]:
    found = report.summary()
    lines = [f"files: {found['files']}, {found['good']} good, {len(found['bad'])} bad"]
    if found["seconds"]:
        lines.append(f"length: {_hours(found['hours'])} in all, {_range(found['seconds'], ' s')}")
    if found["fps"]:
        lines.append(f"rate: {_range(found['fps'], ' frames/s')}")
    if found["width"]:
        lines.append(f"size: {_range(found['width'], ' wide')}; {_range(found['height'], ' high')}")
    for name, called in (
        ("container", "containers"), ("codec", "codecs"), ("pixel_format", "pixels"),
        ("notes", "notes"),
    ):  # fmt: skip
        if found[name]:
            lines.append(f"{called}: " + ", ".join(f"{k} ({n})" for k, n in found[name].items()))
    lines += [f"bad: {bad['path']}: {bad['reason']}" for bad in found["bad"][:_PRINTED]]
    if len(found["bad"]) > _PRINTED:
        lines.append(f"bad: and {len(found['bad']) - _PRINTED} more")
    return lines + _loading(report, options)


def _loading(report: Report, options: CheckArgs) -> list[str]:
    """How quick clips load, and what a step would wait."""
    if report.clip_s is None:
        return []
    rate = report.clips_per_s(report.workers)
    lines = [
        f"loading: {1e3 * report.clip_s:.1f} ms a clip and process, {rate:.1f} clips/s by "
        f"{report.workers} of them"
    ]
    if options.step_time is None:
        lines.append("add --step-time SECONDS (and --batch-size) to see what a step would wait")
        return lines
    share = report.waiting(options.step_time, options.batch_size, report.workers) or 0.0
    needed = options.batch_size / options.step_time
    lines.append(
        f"a step of {options.batch_size} clips in {options.step_time:g} s needs {needed:.1f} "
        f"clips/s: it would wait {share:.0%} of the time; {needed * report.clip_s:.1f} processes "
        "keep up"
    )
    if share > 0:
        lines.append(
            "more workers, --repeats (one decode, several crops), smaller files or more keyframes "
            "help"
        )
    return lines


def _hours(hours: float) -> str:
    return f"{hours:.1f} hours" if hours >= 1 else f"{60 * hours:.1f} minutes"


def _range(spread: dict[str, Any], unit: str) -> str:
    least, median, most = (f"{spread[name]:.4g}" for name in ("least", "median", "most"))
    return f"{least}{unit}" if least == most else f"{least} to {most}{unit} (median {median})"
