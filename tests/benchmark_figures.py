"""What every benchmark's figures must say of themselves."""

from typing import Any

TIMES = ("_ms", "_s")
COUNTS = ("bytes", "flop")
# Not an entry's own: the peers of a row, what it is judged by, and what the machine reaches.
ASIDE = ("environment", "ceilings", "peers", "speedup", "targets")


def without_count_or_share(figures: dict[str, Any]) -> list[str]:
    """Timed entries of a result file without bytes or FLOPs, or without a percentage of a ceiling.

    An entry is a row of a list, or what stands beside the lists. Its own times count, not those of
    the peers in it.
    """
    lists = {key: value for key, value in figures.items() if isinstance(value, list)}
    entries = {"scalars": {key: value for key, value in figures.items() if key not in lists}}
    for key, rows in lists.items():
        entries |= {f"{key} {i}": row for i, row in enumerate(rows) if isinstance(row, dict)}
    found = []
    for name, entry in entries.items():
        names = [key for key in entry if key not in ASIDE]
        if not any(key.endswith(TIMES) for key in names):
            continue
        counted = any(word in key for key in names for word in COUNTS)
        if not (counted and any("percent_of_" in key for key in names)):
            found.append(name)
    shares = any("percent_of_" in key for entry in entries.values() for key in entry)
    # A file may name the one ceiling that it uses by itself.
    if (found or shares) and not ("ceilings" in figures or "matmul_gflop_per_s" in figures):
        found.append("ceilings")
    return found
