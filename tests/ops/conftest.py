"""Memory that an op allocates and does not write shows as NaN."""

import pytest
import torch


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Fill ``torch.empty`` with NaN for the time of a test."""
    before = torch.are_deterministic_algorithms_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(before)
    torch.utils.deterministic.fill_uninitialized_memory = filled
