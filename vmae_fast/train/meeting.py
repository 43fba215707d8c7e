"""How the processes of one start find each other, though those of an earlier one left their names.

torchrun keeps its store through restarts, and process groups that are made in it anew may read what
was written for those before: addresses at which nobody answers. So each start agrees on a name of
its own first.
"""

from __future__ import annotations

import json
import os
import time
import uuid
from typing import Any, Final

# Seconds between two looks at the store.
_LOOK_S: Final = 0.02
_KEY: Final = "vmae-fast/meeting"


def agent_store(timeout_s: float) -> Any:
    """A connection to the store that torchrun keeps; None where each start has its own."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    import datetime

    import torch.distributed as dist

    return dist.TCPStore(  # type: ignore[attr-defined]
        os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False,
        wait_for_workers=False, timeout=datetime.timedelta(seconds=timeout_s),
    )  # fmt: skip


def meet(store: Any, rank: int, world_size: int, timeout_s: float) -> str:
    """A name that the processes of this start agree on, and none of an earlier start.

    Process 0 puts up a new name, the others answer it with one of their own, and it lists those it
    got. Whoever finds its own in the list has met it.

    Args:
        store: of torch.distributed; may hold what earlier starts left.
        rank: of this process.
        world_size: processes.
        timeout_s: to wait for the others.

    Raises:
        RuntimeError: not all came in time; the message names them.
    """
    mine, end = uuid.uuid4().hex, time.monotonic() + timeout_s
    if rank == 0:
        store.set(f"{_KEY}/asked", mine)
        came: dict[int, str] = {}
        while len(came) < world_size - 1:
            for other in set(range(1, world_size)) - came.keys():
                asked, _, name = _read(store, f"{_KEY}/answer/{other}").partition(" ")
                if asked == mine:
                    came[other] = name
            missing = sorted(set(range(1, world_size)) - came.keys())
            _wait(end, f"processes {missing} did not come" if missing else "")
        store.set(f"{_KEY}/met", json.dumps({"name": mine, "came": came}))
        return mine
    answered = ""
    while True:
        asked = _read(store, f"{_KEY}/asked")
        if asked != answered:
            answered = asked
            store.set(f"{_KEY}/answer/{rank}", f"{asked} {mine}")
        met = json.loads(_read(store, f"{_KEY}/met") or '{"came": {}}')
        if met["came"].get(str(rank)) == mine:
            return str(met["name"])
        _wait(end, "process 0 did not come")


def _read(store: Any, key: str) -> str:
    return store.get(key).decode() if store.check([key]) else ""


def _wait(end: float, complaint: str) -> None:
    if not complaint:
        return
    if time.monotonic() > end:
        raise RuntimeError(f"Timed out while the processes of the run met: {complaint}")
    time.sleep(_LOOK_S)
