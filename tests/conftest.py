"""What holds for all tests."""

import pytest


def pytest_collection_modifyitems(config, items):
    """What is slow runs where it is asked for."""
    if "slow" in config.getoption("markexpr"):
        return
    for item in items:
        if item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.skip(reason="takes minutes; run with -m slow"))
