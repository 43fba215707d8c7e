"""Attention over packed projections against a softmax written out head by head."""

import pytest
import torch
from helpers import EXACT_RTOL, assert_as_accurate_as_eager, relative_error
from torch.autograd.graph import saved_tensors_hooks

from vmae_fast.ops import attention, cross_attention, divided_attention

# A gradient's error in a low precision, in those of the same computation done eagerly in it.
GRADIENT_FACTOR = 3.0


def normal(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def written_out(q, k, v, heads, scale):
    """``(B, M, HK)``, ``(B, N, HK)``, ``(B, N, HK)``: one softmax a head, by exp and sum."""
    outs = []
    for qh, kh, vh in zip(*(x.chunk(heads, dim=2) for x in (q, k, v)), strict=True):
        logits = qh @ kh.transpose(1, 2) * (qh.shape[2] ** -0.5 if scale is None else scale)
        weights = (logits - logits.amax(dim=2, keepdim=True)).exp()
        outs.append(weights / weights.sum(dim=2, keepdim=True) @ vh)
    return torch.cat(outs, dim=2)


@pytest.mark.parametrize("scale", [None, 0.3], ids=str)
@pytest.mark.parametrize(
    ("num_tokens", "heads", "head_width"), [(1, 1, 1), (1, 3, 5), (17, 1, 7), (29, 3, 13)]
)
def test_attention(num_tokens, heads, head_width, scale):
    width = heads * head_width
    stored = normal(3 * width, num_tokens, 2).requires_grad_()
    qkv = stored.permute(2, 1, 0)
    before = stored.detach().clone()
    got = attention(qkv, heads, scale)
    expected = written_out(*qkv.chunk(3, dim=2), heads, scale)
    assert got.shape == (2, num_tokens, width)
    assert relative_error(got, expected) < EXACT_RTOL
    upstream = normal(*got.shape, seed=1)
    mine = torch.autograd.grad(got, stored, upstream)[0]
    truth = torch.autograd.grad(expected, stored, upstream)[0]
    # One token: the gradients to q and k are zero, hence a norm over all of qkv.
    assert relative_error(mine, truth) < EXACT_RTOL
    assert torch.equal(stored, before)


@pytest.mark.parametrize("scale", [None, 0.3], ids=str)
@pytest.mark.parametrize(
    ("num_queries", "num_keys", "heads", "head_width"),
    [(1, 1, 1, 1), (1, 19, 2, 5), (7, 1, 2, 5), (11, 23, 3, 9), (23, 11, 1, 16)],
)
def test_cross_attention(num_queries, num_keys, heads, head_width, scale):
    width = heads * head_width
    q = normal(2, num_queries, 2 * width, seed=2)[..., ::2].requires_grad_()
    kv = normal(2, num_keys, 2 * width, seed=3).requires_grad_()
    got = cross_attention(q, kv, heads, scale)
    expected = written_out(q, *kv.chunk(2, dim=2), heads, scale)
    assert got.shape == (2, num_queries, width)
    assert relative_error(got, expected) < EXACT_RTOL
    upstream = normal(*got.shape, seed=4)
    mine = torch.autograd.grad(got, (q, kv), upstream)
    truth = torch.autograd.grad(expected, (q, kv), upstream)
    together = [torch.cat([g.flatten() for g in grads]) for grads in (mine, truth)]
    assert relative_error(*together) < EXACT_RTOL


def test_five_dimensions():
    five = normal(2, 17, 3, 3, 5).requires_grad_()
    got = attention(five, 3)
    expected = written_out(*five.flatten(2).chunk(3, dim=2), 3, None)
    assert relative_error(got, expected) < EXACT_RTOL
    upstream = normal(*got.shape, seed=1)
    mine, truth = (torch.autograd.grad(out, five, upstream)[0] for out in (got, expected))
    assert mine.shape == five.shape
    assert relative_error(mine, truth) < EXACT_RTOL


def test_one_set_of_queries_for_all_clips():
    """Expanded: all clips at one place in memory, whose gradient is the sum over clips."""
    queries = normal(5, 12, seed=2).requires_grad_()
    kv = normal(3, 7, 24, seed=3).requires_grad_()
    results = []
    for function in (cross_attention, lambda q, kv, h: written_out(q, *kv.chunk(2, 2), h, None)):
        out = function(queries.expand(3, 5, 12), kv, 3)
        results.append((out, *torch.autograd.grad(out, (queries, kv), normal(3, 5, 12, seed=4))))
    for mine, truth in zip(*results, strict=True):
        assert relative_error(mine, truth) < EXACT_RTOL


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("num_queries", [37, 5], ids=["joint", "cross"])
def test_low_precision_is_as_accurate_as_eager(dtype, num_queries):
    given = normal(2, 37, 3 * 4 * 13).to(dtype)
    upstream = normal(2, num_queries, 4 * 13, seed=1).to(dtype)
    results = []
    for kind, eager in ((dtype, False), (dtype, True), (torch.float64, True)):
        qkv = given.to(kind).requires_grad_()
        q, kv = qkv[:, :num_queries, : 4 * 13], qkv[..., 4 * 13 :]
        if eager:
            out = written_out(q, *kv.chunk(2, dim=2), 4, None)
        else:
            out = attention(qkv, 4) if num_queries == 37 else cross_attention(q, kv, 4)
        results.append((out, *torch.autograd.grad(out, qkv, upstream.to(kind))))
    got, eager, truth = results
    assert_as_accurate_as_eager(got[0], eager[0], truth[0])
    assert got[1].dtype == dtype
    bound = GRADIENT_FACTOR * relative_error(eager[1], truth[1])
    assert relative_error(got[1], truth[1]) < bound


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_large_logits_pick_one_value(dtype):
    """Far beyond what an exponential holds; the largest logit has all the weight."""
    q, k, v = normal(3, 1, 9, 8).to(dtype)
    qkv = torch.cat([300 * q, 300 * k, v], dim=2).requires_grad_()
    out = attention(qkv, 1)
    logits = (q.double() @ k.double().transpose(1, 2))[0]
    top = logits.topk(2).values
    # 9e4 / sqrt(8) times this between the first and the second.
    assert (top[:, 0] - top[:, 1]).min() > 0.02
    assert relative_error(out[0], v[0, logits.argmax(1)]) <= 1e-7
    out.sum().backward()
    assert qkv.grad.isfinite().all()


def test_small_logits_take_the_mean():
    q, k, v = normal(3, 2, 9, 8)
    out = attention(torch.cat([1e-20 * q, 1e-20 * k, v], dim=2), 2)
    assert relative_error(out, v.mean(1, keepdim=True).expand_as(out)) < EXACT_RTOL


@pytest.mark.parametrize("shape", [(0, 7), (3, 0), (0, 0)])
def test_nothing_to_attend(shape):
    qkv = normal(*shape, 3 * 8).requires_grad_()
    out = attention(qkv, 2)
    assert out.shape == (*shape, 8)
    out.sum().backward()
    assert qkv.grad.shape == qkv.shape


@pytest.mark.parametrize(("batch", "num_queries"), [(0, 3), (2, 0)])
def test_no_queries(batch, num_queries):
    """Keys that nothing asks for have a gradient all the same: zero."""
    q = normal(batch, num_queries, 8).requires_grad_()
    kv = normal(batch, 5, 16).requires_grad_()
    out = cross_attention(q, kv, 2)
    assert out.shape == q.shape
    out.sum().backward()
    assert q.grad.shape == q.shape
    assert torch.equal(kv.grad, torch.zeros_like(kv))


def kept_bytes(function):
    """What autograd keeps for the backward pass, every piece of memory once."""
    storages = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        out = function()
    assert out.requires_grad
    return sum(storages.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_is_kept_is_argument_result_and_log_sum_exp(dtype):
    batch, num_tokens, heads, width = 3, 41, 4, 32
    qkv = normal(batch, num_tokens, 3 * width).to(dtype).requires_grad_()
    kept = kept_bytes(lambda: attention(qkv, heads))
    tokens = batch * num_tokens
    assert kept == (3 + 1) * width * tokens * dtype.itemsize + 4 * heads * tokens
    q = normal(batch, 7, width).to(dtype).requires_grad_()
    kv = normal(batch, num_tokens, 2 * width).to(dtype).requires_grad_()
    kept = kept_bytes(lambda: cross_attention(q, kv, heads))
    values = (2 * tokens + 2 * batch * 7) * width
    assert kept == values * dtype.itemsize + 4 * heads * batch * 7


def test_under_autocast_no_wide_copy_is_kept():
    qkv = normal(2, 11, 3 * 8).float().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        kept = kept_bytes(lambda: attention(qkv, 2))
    assert kept == 4 * 8 * 22 * 2 + 4 * 2 * 22


@pytest.mark.parametrize("name", ["attention", "cross_attention"])
def test_the_backward_op_cannot_be_differentiated(name):
    op = getattr(torch.ops.vmae_fast, name)
    backward = getattr(torch.ops.vmae_fast, f"{name}_backward")
    given = (normal(1, 3, 12),) if name == "attention" else (normal(1, 3, 4), normal(1, 3, 8))
    out, lse = op(*given, 2, 0.5)
    upstream = torch.ones_like(out).requires_grad_()
    found = backward(upstream, *given, out, lse, 2, 0.5)
    first = found if isinstance(found, torch.Tensor) else found[0]
    with pytest.raises(RuntimeError, match=f"^{name} cannot be differentiated twice"):
        first.sum().backward()


CALLS = {
    "attention": lambda qkv: attention(qkv, 2),
    "cross_attention": lambda qkv: cross_attention(qkv[..., :4], qkv[..., 4:], 2),
    "divided_attention": lambda qkv: divided_attention(qkv, 2, (2, 3), "time"),
}


@pytest.mark.parametrize("name", ["attention", "divided_attention"])
def test_the_gradient_is_contiguous_whatever_the_argument_is(name):
    """Kernels write it with its columns dense."""
    qkv = normal(12, 6, 2).permute(2, 1, 0).requires_grad_()
    (grad,) = torch.autograd.grad(CALLS[name](qkv).sum(), qkv)
    assert grad.is_contiguous()


@pytest.mark.parametrize("name", CALLS)
def test_a_graph_of_the_backward_pass_is_refused_at_once(name):
    """Before a second derivative is asked for: what was kept would be taken for a constant."""
    qkv = normal(1, 6, 12).requires_grad_()
    out = CALLS[name](qkv)
    message = rf"^{name} cannot be differentiated twice \(create_graph=True\)$"
    with pytest.raises(RuntimeError, match=message):
        torch.autograd.grad(out.sum(), qkv, create_graph=True)


@pytest.mark.parametrize(
    ("qkv", "message"),
    [
        (torch.zeros(2, 12), r"qkv must be \(B, N, 3 \* 2 heads \* K\) or .* got shape \(2, 12\)"),
        (torch.zeros(2, 5, 14), r"qkv must be .* 2 heads .* got shape \(2, 5, 14\)"),
        (torch.zeros(2, 5, 0), r"qkv must be .* got shape \(2, 5, 0\)"),
        (torch.zeros(2, 5, 3, 2, 0), r"qkv must be .* got shape \(2, 5, 3, 2, 0\)"),
        (torch.zeros(2, 5, 3, 3, 4), r"qkv must be .* got shape \(2, 5, 3, 3, 4\)"),
        (torch.zeros(2, 5, 2, 3, 4), r"qkv must be .* got shape \(2, 5, 2, 3, 4\)"),
        (torch.zeros(2, 5, 3, 8), r"qkv must be .* got shape \(2, 5, 3, 8\)"),
        (torch.zeros(2, 5, 12).long(), r"qkv must be floating point, got torch\.int64"),
    ],
)
def test_attention_errors(qkv, message):
    with pytest.raises(ValueError, match=message):
        attention(qkv, 2)


Q, KV = torch.zeros(2, 3, 8), torch.zeros(2, 5, 16)


@pytest.mark.parametrize(
    ("q", "kv", "message"),
    [
        (Q[0], KV, r"q must be \(B, M, 4 heads \* K\), got shape \(3, 8\)"),
        (Q[..., :6], KV, r"q must be \(B, M, 4 heads \* K\), got shape \(2, 3, 6\)"),
        (Q, KV[0], r"kv must be \(2, N, 16\), got shape \(5, 16\)"),
        (Q, KV[:1], r"kv must be \(2, N, 16\), got shape \(1, 5, 16\)"),
        (Q, KV[..., :8], r"kv must be \(2, N, 16\), got shape \(2, 5, 8\)"),
        (Q[..., :0], KV, r"q must be \(B, M, 4 heads \* K\), got shape \(2, 3, 0\)"),
        (Q, KV[:, :0], "kv must hold at least one token"),
        (Q.int(), KV.int(), r"q must be floating point, got torch\.int32"),
        (Q.double(), KV, r"q is torch\.float64 but kv is torch\.float32; cast one of them"),
        (Q, KV.to("meta"), "kv is on meta but q is on cpu; move one of them"),
    ],
)
def test_cross_attention_errors(q, kv, message):
    with pytest.raises(ValueError, match=message):
        cross_attention(q, kv, 4)


@pytest.mark.parametrize("num_heads", [0, -2])
def test_there_must_be_heads(num_heads):
    message = f"num_heads must be positive, got {num_heads}"
    with pytest.raises(ValueError, match=message):
        attention(torch.zeros(2, 5, 12), num_heads)
    with pytest.raises(ValueError, match=message):
        cross_attention(Q, KV, num_heads)


@pytest.mark.parametrize("scale", [0, 0.0, -0.5, float("inf"), float("nan")], ids=str)
def test_the_scale_is_positive_and_finite(scale):
    message = f"scale must be positive and finite, got {scale}"
    with pytest.raises(ValueError, match=message):
        attention(torch.zeros(2, 5, 12), 2, scale)
    with pytest.raises(ValueError, match=message):
        cross_attention(Q, KV, 4, scale)
