"""Processes of one start, and what earlier ones left in the store that torchrun keeps."""

import threading

import pytest
import torch

from vmae_fast.train.distributed import is_of_group
from vmae_fast.train.meeting import agent_store, meet


@pytest.fixture
def store():
    return torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def together(store, ranks, world_size, timeout_s=5.0):
    """What each of the processes gets; None for one that gave up."""
    names = dict.fromkeys(ranks)

    def come(rank):
        # Each has a connection of its own, as a process has.
        mine = torch.distributed.TCPStore(
            "127.0.0.1", store.port, is_master=False, wait_for_workers=False
        )
        try:
            names[rank] = meet(mine, rank, world_size, timeout_s)
        except RuntimeError as error:
            errors[rank] = error

    errors = {}
    threads = [threading.Thread(target=come, args=(rank,)) for rank in ranks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return names, errors


def test_all_get_one_name_and_every_start_another(store):
    seen = set()
    for _ in range(4):
        names, errors = together(store, range(4), 4)
        assert not errors
        assert len(set(names.values())) == 1
        seen.add(names[0])
    assert len(seen) == 4


def test_what_an_earlier_start_left_is_not_taken(store):
    """Of which some had come, and some had not, when it was ended."""
    together(store, range(3), 3)
    for left in ([0], [1, 2], [0, 1], [2]):
        names, errors = together(store, left, 3, timeout_s=0.3)
        assert set(errors) == set(left)
        assert set(names.values()) == {None}
        names, errors = together(store, range(3), 3)
        assert not errors
        assert len(set(names.values())) == 1


def test_who_did_not_come_is_named(store):
    _, errors = together(store, [0, 2], 4, timeout_s=0.3)
    assert "processes [1, 3] did not come" in str(errors[0])
    assert "process 0 did not come" not in str(errors[0])
    _, errors = together(store, [3], 4, timeout_s=0.3)
    assert "process 0 did not come" in str(errors[3])
    assert is_of_group(errors[3])


def test_only_the_store_of_an_agent_is_shared(store, monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(store.port))
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    assert agent_store(1.0) is None
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    store.set("there", "yes")
    assert agent_store(1.0).get("there") == b"yes"
