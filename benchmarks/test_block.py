"""The transformer block and the ops it is made of, against plain PyTorch, eager and compiled.

On a GPU at the sizes of VideoMAE's models, on a CPU small, to see that everything runs. Products
and what comes from them are in bf16, the residual stream in the dtype that the row says. Bytes are
those that must move at least: each input read once, each result written once; of a block, what
goes in and out and its parameters. A missed target is recorded, not asserted.
"""

from functools import partial

import block_peers
import pytest
import torch
from block_cases import DECODER, ENCODER, GIANT, NORMS, Batch, Blocks, Placement
from block_peers import EPS, PlainBlock, compiled
from rows import DEVICE, backward, forward, row_of, timed
from timing import num_sets

from vmae_fast import ops
from vmae_fast.nn import JointSpaceTimeBlock

CUDA = DEVICE.type == "cuda"
WHAT = "transformer blocks, 64 clips (giant 16) of 16x224x224, bf16 products, V1 masks"
if not CUDA:
    WHAT = "transformer blocks, 2 clips, an eighth of the tokens, a quarter of the widths, bf16"
# Compiling for a CPU takes longer than all else here.
NOT_COMPILED = {} if CUDA else {"compiled": "not timed on a CPU"}


def sized(size):
    return size if CUDA else size.small()


def products_in(dtype):
    """Autocast to a dtype, none to fp32."""
    return torch.autocast(DEVICE.type, dtype, enabled=dtype != torch.float32)


def layer_norm(batch):
    with products_in(batch.low):
        return ops.layer_norm(batch.x, batch.weight, batch.bias, EPS, for_product=True)


def add_layer_norm(batch):
    given = (batch.x, batch.branch, batch.weight, batch.bias, EPS)
    with products_in(batch.low):
        return ops.add_layer_norm(*given, for_product=True)


def bias_gelu(batch):
    return ops.bias_gelu(batch.inner, batch.inner_bias)


def shared_tokens(batch):
    return ops.shared_tokens(batch.visible, batch.shared, batch.decode_idx)


# In plain PyTorch, with what that takes of a batch: what gets gradients, and the rest.
PEERS = {
    layer_norm: (block_peers.layer_norm, ("x", "weight", "bias"), ("low",)),
    add_layer_norm: (block_peers.add_layer_norm, ("x", "branch", "weight", "bias"), ("low",)),
    bias_gelu: (block_peers.bias_gelu, ("inner", "inner_bias"), ()),
    shared_tokens: (block_peers.shared_tokens, ("visible", "shared"), ("decode_idx",)),
}


def peer_of(op, compiler=None):
    """The op in plain PyTorch as a function of a batch, compiled if so asked."""
    plain, leaves, rest = PEERS[op]
    function = compiler(plain) if compiler else plain
    return lambda batch: function(*(getattr(batch, name) for name in (*leaves, *rest)))


def measure(op, name, make, moved):
    """Rows of both passes of an op: ``moved`` has the bytes of each."""
    ways, leaves = {"ours": op, "eager": peer_of(op)}, PEERS[op][1]
    if CUDA:
        ways["compiled"] = peer_of(op, compiled)
    taken = {word: (way, leaves) for word, way in ways.items()}
    return [
        measure_pass(direction, name, taken, make, moved[direction.__name__])
        for direction in (forward, backward)
    ]


def measure_pass(direction, name, ways, make, moved_bytes, flops=0, dtype=None):
    """A row: ours, the peers, each with its leaves, and a copy of as many bytes, interleaved."""
    sets = [make() for _ in range(num_sets(moved_bytes, DEVICE))]
    taken = {word: direction(way, leaves) for word, (way, leaves) in ways.items()}
    times = timed(taken, sets, moved_bytes)
    ours, copy = times.pop("ours"), times.pop("copy")
    row = row_of(name, direction, ours, copy, times, moved_bytes, flops, dtype)
    return row | {"left_out": NOT_COMPILED}


def norm_bytes(size, added):
    """Of a norm's two passes, with an addition before it or without."""
    stream, low, vector = size.stream.itemsize, size.low.itemsize, size.width * size.stream.itemsize
    # What is read and written a value: input and norm; then the norm's gradient and the input's.
    read_and_written = {"forward": stream + low, "backward": low + stream + stream}
    if added:
        read_and_written["forward"] += low + stream
        # The branch's gradient is the stream's where the dtype is the same.
        read_and_written["backward"] += stream + (low if low != stream else 0)
    vectors = {"forward": 2 * vector, "backward": 3 * vector}
    return {
        name: size.values * value_bytes + vectors[name]
        for name, value_bytes in read_and_written.items()
    }


@pytest.fixture(autouse=True)
def nothing_compiled():
    """Code is compiled for so many sizes only."""
    torch.compiler.reset()


@pytest.mark.parametrize("op", [layer_norm, add_layer_norm], ids=lambda op: op.__name__)
def test_norm(finish_rows, op):
    rows = []
    for size in map(sized, NORMS):
        moved = norm_bytes(size, op is add_layer_norm)
        name = f"{op.__name__} {size.row}"
        rows += measure(op, name, partial(Batch, size, DEVICE), moved)
    finish_rows(op.__name__, WHAT, rows, partial(op, Batch(sized(ENCODER), DEVICE)))


def test_bias_gelu(finish_rows):
    rows = []
    for size in map(sized, (ENCODER, DECODER, GIANT)):
        values = size.clips * size.tokens * size.hidden
        moved = {
            "forward": size.low.itemsize * (2 * values + size.hidden),
            "backward": size.low.itemsize * (3 * values + 2 * size.hidden),
        }
        rows += measure(bias_gelu, f"bias_gelu {size.name}", partial(Batch, size, DEVICE), moved)
    finish_rows("bias_gelu", WHAT, rows, partial(bias_gelu, Batch(sized(ENCODER), DEVICE)))


def test_shared_tokens(finish_rows):
    make = partial(Placement, sized(DECODER), DEVICE)
    one = make()
    visible, table, index = one.visible.nbytes, one.shared.nbytes, one.decode_idx.nbytes
    decoded = one.decode_idx.numel() * one.shared[0].nbytes
    moved = {
        "forward": 2 * visible + table + index + decoded,
        # The gradient of visible is a part of the upstream one, as it lies.
        "backward": table + index + decoded,
    }
    rows = measure(shared_tokens, "shared_tokens", make, moved)
    finish_rows("shared_tokens", WHAT, rows, partial(shared_tokens, one))


def blocks_of(size):
    """Ours, plain and compiled as functions of a batch, each with its leaves; and what makes one.

    Ours makes its last addition in a pass of its own, which in a model the next norm takes along.
    """
    ours = JointSpaceTimeBlock(size.width, size.heads, size.hidden, eps=EPS).to(DEVICE)
    plain = PlainBlock(ours).to(DEVICE)

    def way(word, module, function):
        def run(batch):
            with products_in(size.low):
                return function(batch.x)

        return run, ("x", *(f"{word}.{name}" for name, _ in module.named_parameters()))

    ways = {"ours": way("ours", ours, ours), "eager": way("plain", plain, plain)}
    if CUDA:
        ways["compiled"] = way("plain", plain, compiled(plain))
    return ways, partial(Blocks, size, ours, plain, DEVICE)


def kept_bytes(function, batch, module):
    """What a function keeps for its backward pass, its input included.

    Without what has a parameter's number of values, which nothing else has at these sizes: the
    parameters and their copies in bf16.
    """
    own = {parameter.numel() for parameter in module.parameters()}
    kept = {}

    def note(tensor):
        storage = tensor.untyped_storage()
        if tensor.numel() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        # Held, so that no address is used twice.
        out = function(batch)
    del out
    return sum(kept.values())


@pytest.mark.parametrize("size", [ENCODER, DECODER], ids=lambda size: size.name)
def test_block(finish_rows, size):
    size = sized(size)
    ways, make = blocks_of(size)
    batch = make()
    stream, parameters = batch.x.nbytes, sum(one.nbytes for one in batch.ours.parameters())
    matrices = 4 * size.width**2 + 2 * size.width * size.hidden
    linear, pairs = 2 * size.clips * size.tokens * matrices, 2 * size.values * size.tokens
    counted = {
        forward: (2 * stream + parameters, linear + 2 * pairs),
        backward: (3 * stream + 2 * parameters, 2 * linear + 5 * pairs),
    }
    rows = [
        measure_pass(direction, f"block {size.name}", ways, make, *each, size.low)
        for direction, each in counted.items()
    ]
    kept = {word: kept_bytes(way, batch, batch.ours) for word, (way, _) in ways.items()}
    rows[0]["kept_mib"] = {word: size_bytes / 2**20 for word, size_bytes in kept.items()}
    finish_rows(f"block_{size.name}", WHAT, rows, partial(ways["ours"][0], batch))
