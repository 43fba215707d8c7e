"""pytest plugin of the GPU suite: the tests worth most come first, since the time may run out.

What the compiler takes long over comes after the rest of tests/gpu, tests of other folders last.
"""

# By a part of their paths.
FIRST = (
    "gpu/test_gpu_cuda",
    "cuda",
    "gpu/test_gpu_ops",
    "gpu/test_gpu_norm",
    "gpu/test_gpu_attention",
    "gpu/test_gpu_step",
    "gpu/test_gpu_parity",
    "gpu/test_gpu_large",
    "gpu/test_gpu_memory",
    "gpu/test_gpu_scaler",
    "gpu/test_gpu_train",
    "gpu/",
)


def pytest_collection_modifyitems(items):
    items.sort(key=place)


def place(item):
    """Where a test comes among all."""
    path = item.nodeid.split("::")[0]
    found = next((i for i, part in enumerate(FIRST) if part in path), len(FIRST))
    if "compile" in item.name:
        return max(found, len(FIRST) - 1)
    return found
