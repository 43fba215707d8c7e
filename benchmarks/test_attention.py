"""Attention ops against plain PyTorch on the same packed projections.

On a GPU in bf16 at the sizes of VideoMAE's models, on a CPU small and in fp32, to see that
everything runs. Directions are those of rows.py. Bytes are those that must move at least, q, k and
v read and the output written once; operations those of two products of matrices forward and five
backward. A peer that this device refuses is named in the row with the reason, under "left_out";
the speed-ups called "best" are over the quickest of those that run: of all, of SDPA's, of the
repeatable ones. Where there is a CUDA C++ kernel, its row, called "cuda", has the Triton kernel as
a peer, timed in the same run. A missed target is recorded, not asserted.
"""

import warnings
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from attention_cases import CROSS, DECODERS, DIVIDED, LARGER, TWINS, AttentionBatch
from attention_peers import DETERMINISTIC, REPEATABLE, SDPA, deterministic, peers_of
from rows import (
    DEVICE,
    as_figures,
    backward,
    by_backend,
    extension_calls,
    forward,
    forward_and_backward,
    in_context,
    row_of,
    timed,
    without_cuda_kernels,
)
from timing import num_sets

from vmae_fast import ops
from vmae_fast.ops._attention_choice import choose

CUDA = DEVICE.type == "cuda"
DTYPE = torch.bfloat16 if CUDA else torch.float32

# The first are worth most: there may be no time for all.
CASES = (*TWINS, DECODERS[0], DIVIDED[1], *DECODERS[1:], LARGER[2], CROSS)
# FlexAttention takes long to compile.
WITH_FLEX = (TWINS[0], DECODERS[0])
# Over more keys than this the library's kernel may be the choice: ours is a row beside it.
ALWAYS_OURS = 256


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_attention(finish_rows, case):
    kernels, left_out = kernels_for(case)
    flex = CUDA and case in WITH_FLEX
    case = case if CUDA else case.small()
    what = f"attention of packed projections, B={case.clips}, {DTYPE}".replace("torch.", "")
    batch = AttentionBatch(case, 0, DTYPE, DEVICE)
    rows = measure(case, kernels, flex, left_out)
    finish_rows(case.name.replace(" ", "_"), what, rows, lambda: attend(batch))


def kernels_for(case):
    """What is added to the case's name and what that asks for; what is left out, and why."""
    kernels, left_out = {"": "auto"}, {}
    if case.keys > ALWAYS_OURS or case in TWINS:
        kernels[" triton"] = "triton"
    if case in TWINS:
        left_out = {"cuda": why} if (why := why_no_cuda(case)) else {}
    if case in TWINS and not left_out:
        kernels[" cuda"] = "cuda"
    return kernels, left_out


def why_no_cuda(case):
    """Why the CUDA C++ kernels do not compute a case here, in words; "" where they do."""
    if missing := without_cuda_kernels():
        return missing
    with extension_calls() as called:
        way = by_backend(forward_and_backward(attend, case.leaves), "cuda")
        way(AttentionBatch(case, 0, DTYPE, DEVICE))()
    passes = {"short_attention": "forward", "short_attention_backward": "backward"}
    refused = [word for name, word in passes.items() if name not in called]
    return f"it does not take the case, {' and '.join(refused)}" if refused else ""


def attend(batch, kernel="auto"):
    """The op that the case is for; "cuda" is a backend, see :func:`way_of`."""
    case = batch.case
    with nullcontext() if kernel == "cuda" else ops.attention_kernel(kernel):
        if case.queries:
            return ops.cross_attention(batch.q, batch.kv, case.heads)
        if case.axis:
            grid = (case.rows, case.tokens // case.rows)
            return ops.divided_attention(batch.qkv, case.heads, grid, case.axis)
        return ops.attention(batch.qkv, case.heads)


def kernel_of(batch, kernel):
    """What :func:`attend` runs then: "op", ours, or the library's by its name."""
    if kernel == "cuda":
        return "CUDA C++"
    case = batch.case
    packed = batch.q if case.queries else batch.qkv
    q = packed.unflatten(2, (-1, case.heads, case.head_width))[:, :, 0]
    with ops.attention_kernel(kernel):
        return choose(q, case.keys, dense=case.axis != "time")


def measure(case, kernels, flex, left_out=()):
    """All rows of a case: ours and the peers interleaved, in each direction."""
    # As many sets as the direction that moves least needs.
    forward_bytes, backward_bytes = (
        count(DTYPE.itemsize) for count in (case.forward_bytes, case.backward_bytes)
    )
    sets = [
        AttentionBatch(case, seed, DTYPE, DEVICE) for seed in range(num_sets(forward_bytes, DEVICE))
    ]
    ours = {case.name + word: partial(attend, kernel=kernel) for word, kernel in kernels.items()}
    ran = {case.name + word: kernel_of(sets[0], kernel) for word, kernel in kernels.items()}
    peers, refused = sorted_out(peers_of(case, flex=flex), sets[0])
    left_out = refused | dict(left_out)
    rows = []
    for direction, moved_bytes, products in (
        (forward, forward_bytes, 2),
        (backward, backward_bytes, 5),
        (forward_and_backward, forward_bytes + backward_bytes, 7),
    ):
        theirs = dict(peers)
        if direction is forward:
            # The same as without the flag.
            theirs.pop(DETERMINISTIC, None)
        ways = {
            name: way_of(name, function, direction, case)
            for name, function in {**ours, **theirs}.items()
        }
        times = timed(ways, sets, moved_bytes)
        of_peers = {name: times[name] for name in theirs}
        flops = case.flops(products)
        for name in ours:
            given = (times[name], times["copy"], of_peers, moved_bytes, flops, DTYPE)
            row = row_of(name, direction, *given)
            row["speedup"] |= over_the_best(row["speedup"])
            if name.endswith(" cuda"):
                twin = times[f"{case.name} triton"]
                row["peers"]["triton"] = as_figures(twin)
                row["speedup"]["triton"] = twin.time_ms / times[name].time_ms
            rows.append(row | {"kernel": ran[name], "left_out": left_out})
    return rows


def way_of(name, function, direction, case):
    """The function in a direction, both passes by what its name asks for.

    That is PyTorch's flag, or a backend of ours; on a CPU there is one only.
    """
    way = direction(function, case.leaves)
    if name == DETERMINISTIC:
        return in_context(way, deterministic)
    backend = name.rpartition(" ")[2]
    return by_backend(way, backend) if CUDA and backend in ("triton", "cuda") else way


def over_the_best(speedup):
    """Speed-ups over the quickest peers of each kind."""
    kinds = {"best": tuple(speedup), "best_sdpa": SDPA, "best_deterministic": REPEATABLE}
    of_kind = {
        kind: [speedup[one] for one in ones if one in speedup] for kind, ones in kinds.items()
    }
    return {kind: min(found) for kind, found in of_kind.items() if found}


def sorted_out(peers, batch):
    """The peers that run here, forward and backward, and why the others do not."""
    left_out = {}
    for name, peer in peers.items():
        way = way_of(name, peer, forward_and_backward, batch.case)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            # Whatever a backend or a compiler raises: the row says so, and the others are timed.
            try:
                way(batch)()
                if CUDA:
                    torch.cuda.synchronize()
            except Exception as error:
                left_out[name] = reason_of(error, [str(one.message) for one in said])
    return {name: peer for name, peer in peers.items() if name not in left_out}, left_out


def reason_of(error, warned):
    """Why a peer does not run: SDPA gives its reasons as warnings before an error without any."""
    first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
    if "kernel" not in first_line:
        return first_line
    # Without those that say which backends were switched off, or where in its source this is.
    reasons = [one.split(" (Triggered")[0] for one in warned]
    reasons = [one for one in reasons if "disabled" not in one and "not used because" not in one]
    return "; ".join([first_line, *reasons])
