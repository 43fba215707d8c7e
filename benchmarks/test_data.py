"""Clips a second of one core: ours, plain and packed, with and without repeats, beside decord.

All in one run on the same files, the same clips and the same crops, on one pinned core, the ways
in turn round after round; by CPU time, because other processes may share the core. The ceiling of
each kind of file is libavcodec alone on one thread, from the keyframe before a clip to its last
frame, nothing converted.
"""

import statistics

import data_files
from data_loaders import (
    DECODE,
    DECORD,
    LENGTH,
    SIZE,
    STRIDE,
    measure,
    median_ratio,
    packed_ways,
    versions,
    ways,
)
from rows import rounded
from targets import DATA_TARGETS

from vmae_fast.data import VideoFile, read_source
from vmae_fast.data.pack import pack

FILES, ROUNDS = 8, 9


def test_data(benchmark, record, tmp_path):
    figures = loading(FILES, ROUNDS, data_files.FRAMES, tmp_path)
    for row in figures["kinds"]:
        if "packed" not in row["files"]:
            low, high = data_files.KBIT_PER_S
            assert low <= row["kbit_a_second"] <= high, row
    benchmark.extra_info.update(figures)
    record("data_loading", figures)
    found, _ = ways([VideoFile(str(path)) for path in data_files.videos(30, 1)])
    ours = next(way for way in found if way.name == "ours")
    benchmark.pedantic(lambda: ours.call(0, 0), rounds=3)


def loading(count, rounds, frames, folder):
    """All figures, for so many files of each kind with so many frames."""
    found, kinds, left_out, seconds = {}, [], {}, frames / data_files.RATE
    for gop in data_files.GOPS:
        kind = f"GOP {gop}"
        paths = data_files.videos(gop, count, frames)
        here, left_out = ways([VideoFile(str(path)) for path in paths])
        found |= {(kind, way.name): way for way in here}
        kinds.append(about(kind, sum(path.stat().st_size for path in paths), count, seconds))
        packed = folder / f"packed{gop}"
        written = pack([VideoFile(str(path)) for path in paths], packed, stride=STRIDE)
        kind = f"packed {kind}"
        found |= {(kind, way.name): way for way in packed_ways(read_source(packed).files)}
        kinds.append(about(kind, written.size_bytes, count, seconds))
    times = measure(found, count, rounds)
    return rounded(
        {
            "title": "Loading video",
            "what": (
                f"clips of {LENGTH} frames at stride {STRIDE}, cropped and scaled to "
                f"{SIZE[0]}x{SIZE[1]}, out of {count} files of {seconds:g} s of "
                f"{data_files.WIDTH}x{data_files.HEIGHT} H.264 at {data_files.RATE} fps with "
                "B-frames and film grain, as they are and packed by vmae-fast pack's defaults; "
                f"{rounds} rounds of a clip a file, medians; CPU time on one pinned core"
            ),
            "versions": versions(),
            "ceilings": {
                f"{kind}, decode_ms": 1e3 * median_of(each, 0)
                for (kind, name), each in times.items()
                if name == DECODE
            },
            "kinds": kinds,
            "left_out": left_out,
            "loaders": [row_of(key, way, times, kinds) for key, way in found.items()],
        }
    )


def about(kind, size_bytes, count, seconds):
    """What a kind of files is; of packed ones by the videos that they were made of."""
    return {
        "files": kind,
        "kbit_a_second": size_bytes * 8 / 1000 / seconds / count,
        "mean_file_bytes": round(size_bytes / count),
    }


def row_of(key, way, times, kinds):
    """One way's figures: by clip, where a decoding gives several of them by crop."""
    kind, name = key
    # A packed set stands beside decord on the files that it was made of.
    source = kind.removeprefix("packed ")
    per_clip = 1 / way.crops
    cpu_s = median_of(times[key], 0) * per_clip
    row = {
        "files": kind,
        "loader": name,
        "crops_a_decoding": way.crops,
        "cpu_ms": 1e3 * cpu_s,
        "wall_ms": 1e3 * median_of(times[key], 1) * per_clip,
        "clips_per_s": 1 / cpu_s,
        "over_decode": median_ratio(times[key], times[kind, DECODE]),
        "percent_of_decode": 100 * median_ratio(times[kind, DECODE], times[key]),
        "file_bytes": next(one["mean_file_bytes"] for one in kinds if one["files"] == kind),
    }
    if (source, DECORD) in times:
        row["speedup_over_decord"] = way.crops * median_ratio(times[source, DECORD], times[key])
    targets = DATA_TARGETS.get((kind, name), ())
    judged = [target.judge(row) for target in targets if target.figure in row]
    return row | {"targets": judged}


def median_of(times, which):
    return statistics.median(one[which] for one in times)
