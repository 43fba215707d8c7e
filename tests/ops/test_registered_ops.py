"""What torch.library asks of an op: schema, fake, autograd registration, tracing."""

import pytest
import torch
from helpers import make_video, random_positions
from torch.library import opcheck

import vmae_fast.ops  # noqa: F401 (registers them)

OPS = torch.ops.vmae_fast
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)
SIZE = (2, 4, 4)


class Given:
    """Two clips of 2 x 2 x 2 tubelets of 96 values."""

    def __init__(self, device):
        self.device = device
        self.uint8 = make_video((2, 3, 4, 8, 8), torch.uint8, "decoder").to(device)
        self.floating = make_video((2, 3, 4, 8, 8), torch.float32, "cropped").to(device)
        order = random_positions(2, 8, 8).to(device)
        self.visible, self.decode = order[:, :3], order[:, 3:]
        self.narrow = order.int()[:, 3:]
        self.scored = torch.tensor([[1.0, 0, 2, 1, 0], [0, 1, 1, 1, 3]], device=device)
        self._drawn = 0

    def normal(self, *shape, grad=True, dtype=torch.float32):
        self._drawn += 1
        generator = torch.Generator().manual_seed(self._drawn)
        values = torch.randn(shape, generator=generator).to(self.device, dtype)
        return values.requires_grad_(grad)


def gather_tokens(given):
    x = given.normal(2, 8, 6)
    yield x, given.visible
    yield x.transpose(1, 2).contiguous().transpose(1, 2), given.narrow
    yield given.normal(2, 8, 6, dtype=torch.bfloat16), given.visible
    yield x, given.visible[:, :0]


def gather_tokens_backward(given):
    yield given.normal(2, 3, 6, grad=False), given.visible, 8
    yield given.normal(2, 6, 5, grad=False).transpose(1, 2), given.narrow, 8


def decoder_tokens(given):
    visible, mask_token, pos = given.normal(2, 3, 6), given.normal(6), given.normal(8, 6)
    index = (given.visible, given.decode)
    yield visible, mask_token, pos, *index
    yield visible, mask_token, pos.detach(), *index
    yield visible.detach().bfloat16().requires_grad_(), mask_token, pos, *index
    yield visible, mask_token, pos, given.visible, given.narrow[:, :0]


def decoder_tokens_backward(given):
    grad = given.normal(2, 8, 6, grad=False)
    for needs in ((True, True), (True, False), (False, True)):
        yield grad, given.visible, given.decode, 8, *needs
    yield grad.bfloat16(), given.visible, given.narrow, 8, True, True


def shared_tokens(given):
    visible, shared = given.normal(2, 3, 6), given.normal(8, 6)
    yield visible, shared, given.decode
    yield visible.detach(), shared, given.narrow
    yield transposed(visible), transposed(shared[None])[0].detach(), given.narrow[:, :0]
    low = {"dtype": torch.bfloat16}
    yield given.normal(2, 0, 6, **low), given.normal(8, 6, **low), given.decode


def shared_tokens_backward(given):
    grad = given.normal(2, 8, 6, grad=False)
    yield grad, given.decode, 3, 8
    yield grad.bfloat16(), given.narrow, 3, 8
    yield grad.double().transpose(1, 2).contiguous().transpose(1, 2), given.narrow[:, :0], 8, 8


def tubelet_embed(given):
    weight, bias, pos = given.normal(10, 3, *SIZE), given.normal(10), given.normal(8, 10)
    rest = (MEAN, STD, torch.float32)
    for video in (given.uint8, given.floating.detach().requires_grad_()):
        yield video, weight, bias, pos, given.visible, *rest
        yield video, weight, None, None, None, *rest
        yield video, weight, bias, None, given.narrow, *rest
        # Under autocast.
        yield video, weight, bias, pos, given.visible, MEAN, STD, torch.bfloat16


def tubelet_embed_backward(given):
    weight = given.normal(10, 3, *SIZE, grad=False)
    grad, every = given.normal(2, 3, 10, grad=False), given.normal(2, 8, 10, grad=False)
    rest = (MEAN, STD, torch.float32)
    yield grad, given.uint8, weight, given.visible, *rest, [True, True, True, False]
    yield every, given.floating, weight, None, *rest, [True, True, True, True]
    for place in range(4):
        needs = [place == one for one in range(4)]
        yield grad, given.floating, weight, given.visible, *rest, needs
    rest = (MEAN, STD, torch.bfloat16)
    yield grad, given.uint8, weight, given.visible, *rest, [True, True, True, False]


def masked_mse(given):
    pred = given.normal(2, 5, 96)
    for norm_pix in (True, False):
        for video in (given.uint8, given.floating):
            yield pred, video, given.decode, SIZE, norm_pix, MEAN, STD, True
    yield given.normal(2, 5, 96, dtype=torch.bfloat16), given.uint8, given.narrow, *masked_mse.rest
    yield pred.detach(), given.uint8, given.decode, SIZE, True, MEAN, STD, False
    yield None, given.uint8, given.decode, SIZE, True, MEAN, STD, False


masked_mse.rest = (SIZE, True, MEAN, STD, True)


def masked_mse_backward(given):
    kept = given.normal(10, 96, grad=False)
    yield given.normal(2, 5, grad=False), kept, 3
    yield torch.ones((), device=given.device).expand(2, 5), kept.bfloat16(), 3


def linear_masked_mse(given):
    x, weight, bias = given.normal(2, 5, 7), given.normal(96, 7), given.normal(96)
    rest = (SIZE, True, MEAN, STD)
    for scored in (None, given.scored, given.scored > 0):
        yield x, weight, bias, scored, given.uint8, given.decode, *rest, True
    yield x, weight, None, None, given.floating, given.narrow, *rest, True
    yield x, weight.detach(), None, None, given.uint8, given.decode, *rest, True
    yield x.detach(), weight.detach(), bias.detach(), None, given.uint8, given.decode, *rest, False
    # Under autocast.
    low = x.detach().bfloat16().requires_grad_()
    yield low, weight, bias, given.scored, given.uint8, given.decode, *rest, True


def linear_masked_mse_backward(given):
    kept = [given.normal(*shape, grad=False) for shape in ((10, 7), (96, 7), (96,))]
    grad = given.normal(grad=False)
    yield grad, *kept, None
    yield grad, kept[0].bfloat16(), *kept[1:], given.scored
    yield grad, *kept, given.scored > 0


# A head width for the kernels of a GPU; one of 5 is the reference's there.
HEADS, COLUMNS = 2, 2 * 32
LOW_TO_WIDE = (torch.bfloat16, torch.float32, torch.float64)
SCALE = 0.3


def transposed(x):
    """The same values with columns far apart; a leaf."""
    wants = x.requires_grad
    return x.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_(wants)


def attention(given):
    for dtype in LOW_TO_WIDE:
        yield given.normal(2, 5, 3 * COLUMNS, dtype=dtype), HEADS, SCALE
    yield transposed(given.normal(2, 5, 3 * COLUMNS)), HEADS, SCALE
    # Every second token of a longer clip, without a gradient.
    yield given.normal(2, 10, 3 * COLUMNS, grad=False)[:, ::2], HEADS, SCALE
    yield given.normal(0, 5, 3 * COLUMNS), HEADS, SCALE
    yield given.normal(2, 0, 3 * COLUMNS), HEADS, SCALE
    yield given.normal(1, 1, 3 * 3 * 5), 3, SCALE


def cross_attention(given):
    for dtype in LOW_TO_WIDE:
        kv = given.normal(2, 7, 2 * COLUMNS, dtype=dtype)
        yield given.normal(2, 3, COLUMNS, dtype=dtype), kv, HEADS, SCALE
    q, kv = given.normal(2, 3, COLUMNS), given.normal(2, 7, 2 * COLUMNS)
    yield transposed(q), transposed(kv), HEADS, SCALE
    yield q.detach(), kv, HEADS, SCALE
    yield q, kv.detach(), HEADS, SCALE
    yield given.normal(0, 3, COLUMNS), given.normal(0, 7, 2 * COLUMNS), HEADS, SCALE
    yield given.normal(2, 0, COLUMNS), kv, HEADS, SCALE
    yield given.normal(2, 3, 3 * 5), given.normal(2, 2, 2 * 3 * 5), 3, SCALE


def divided_attention(given):
    for axis in ("time", "space"):
        for class_token in (False, True):
            rest = (HEADS, 2, 3, axis, class_token, SCALE)
            shape = (2, 6 + class_token, 3 * COLUMNS)
            yield given.normal(*shape), *rest
            yield transposed(given.normal(*shape, dtype=torch.bfloat16)), *rest
        yield given.normal(*shape, dtype=torch.float64), *rest
        yield given.normal(0, *shape[1:]), *rest
    yield given.normal(2, 6, 3 * 3 * 5), 3, 1, 6, "space", False, SCALE
    yield given.normal(2, 6, 3 * 3 * 5, grad=False), 3, 6, 1, "space", False, SCALE


def attention_backward(given):
    return _attention_backward(given, attention, 1)


def cross_attention_backward(given):
    return _attention_backward(given, cross_attention, 2)


def divided_attention_backward(given):
    return _attention_backward(given, divided_attention, 1)


def _attention_backward(given, case, tensors):
    """What the op returned goes in again; once the upstream gradient is no dense tensor."""
    op = getattr(OPS, case.__name__).default
    for arguments in case(given):
        given_tensors = [one.detach() for one in arguments[:tensors]]
        results = op(*given_tensors, *arguments[tensors:])
        grad = given.normal(*results[0].shape, grad=False, dtype=results[0].dtype)
        yield grad, *given_tensors, *results, *arguments[tensors:]
    grad = torch.ones((), dtype=grad.dtype, device=grad.device).expand(grad.shape)
    yield grad, *given_tensors, *results, *arguments[tensors:]


def layer_norm_linear(given):
    x, branch, scale = given.normal(2, 5, 6), given.normal(2, 5, 6), given.normal(2, grad=False)
    norm = (given.normal(6), given.normal(6), 1e-3)
    weight, bias = given.normal(18, 6), given.normal(18)
    narrow = weight.detach().clone()
    yield x, None, None, *norm, weight, narrow, bias, -1, 0
    yield x, branch, scale, *norm, weight, narrow, None, -1, 0
    yield transposed(x), branch.bfloat16(), None, *norm, weight, narrow.bfloat16(), bias, -1, 0
    yield x, branch, None, *norm, weight, narrow, bias, 2, 6
    yield x, None, None, *norm, weight, narrow, None, 5, 6
    yield x[:0], branch[:0], scale[:0], *norm, weight, narrow, bias, -1, 0


def layer_norm_linear_backward(given):
    x, scale = given.normal(2, 5, 6, grad=False), given.normal(2, grad=False)
    norm = (given.normal(6, grad=False), given.normal(6, grad=False), 1e-3)
    narrow, out = given.normal(18, 6, grad=False), given.normal(2, 5, 18, grad=False)
    tail, kept = given.normal(2, 2, 6, grad=False), given.normal(2, 2, 6, grad=False)
    yield out, None, None, x, None, *norm, narrow, None, True, True
    yield out, None, x, x, scale, *norm, narrow, torch.float32, False, True
    yield out, None, x, x, None, *norm, narrow, torch.bfloat16, True, False
    yield out[..., 6:], tail, kept, x, None, *norm, narrow, torch.bfloat16, True, True
    yield out[:0], None, None, x[:0], None, *norm, narrow, None, True, False


def bias_gelu_linear(given):
    x, gelu_bias, bias = given.normal(5, 6), given.normal(6), given.normal(3)
    weight = given.normal(3, 6)
    narrow = weight.detach().clone()
    yield x, gelu_bias, weight, narrow, bias
    yield x, None, weight, narrow, None
    yield x.bfloat16(), gelu_bias, weight, narrow.bfloat16(), bias
    yield x[:0], gelu_bias, weight, narrow, bias


def bias_gelu_linear_backward(given):
    x, narrow = given.normal(5, 6, grad=False), given.normal(3, 6, grad=False)
    grad, gelu_bias = given.normal(5, 3, grad=False), given.normal(6, grad=False)
    yield grad, x, gelu_bias, narrow, True
    yield grad, x, None, narrow, False
    yield grad[:0], x[:0], gelu_bias, narrow, True


def add_layer_norm(given):
    x, branch, weight, bias = (given.normal(*s) for s in ((2, 5, 6), (2, 5, 6), (6,), (6,)))
    low = given.normal(2, 5, 6, dtype=torch.bfloat16)
    scale = given.normal(2, grad=False)
    rest = (1e-6, torch.float32)
    yield x, None, None, weight, bias, *rest
    yield x, branch, None, weight, bias, *rest
    yield transposed(x), transposed(branch), scale, weight, bias.detach(), *rest
    yield low, low, scale, weight, bias, 1e-6, torch.bfloat16
    # Under autocast.
    yield x, low, scale, weight.bfloat16().detach(), bias, 1e-6, torch.bfloat16
    for shape in ((0, 5, 6), (2, 0, 6)):
        yield given.normal(*shape), given.normal(*shape), None, weight, bias, *rest
        yield given.normal(*shape), None, None, weight, bias, *rest


def add_layer_norm_backward(given):
    grad, x = given.normal(2, 5, 6, grad=False), given.normal(2, 5, 6, grad=False)
    vectors = (given.normal(6, grad=False), given.normal(6, grad=False), 1e-6)
    scale = given.normal(2, grad=False)
    yield grad, None, x, None, *vectors, None
    yield grad, grad[:, 2:], x, None, *vectors, torch.float32
    yield grad.bfloat16(), transposed(grad), x, scale, *vectors, torch.bfloat16
    yield grad, grad, x.bfloat16(), None, *vectors, torch.bfloat16
    yield grad[:, :0], None, x[:, :0], scale, *vectors, torch.float32


def bias_gelu(given):
    x, bias = given.normal(7, 6), given.normal(6)
    yield x, bias
    yield x, None
    yield x.detach().t().contiguous().t(), bias
    yield given.normal(7, 6, dtype=torch.bfloat16), bias
    yield given.normal(0, 6), bias


def bias_gelu_backward(given):
    grad, x, bias = (given.normal(*s, grad=False) for s in ((7, 6), (7, 6), (6,)))
    yield grad, x, bias
    yield grad[::2], x[:4].bfloat16(), bias
    yield grad.t().contiguous().t(), x, None
    yield grad[:0], x[:0], bias


CASES = [
    gather_tokens, gather_tokens_backward, decoder_tokens, decoder_tokens_backward,
    shared_tokens, shared_tokens_backward,
    tubelet_embed, tubelet_embed_backward, masked_mse, masked_mse_backward,
    linear_masked_mse, linear_masked_mse_backward, attention, attention_backward,
    cross_attention, cross_attention_backward, divided_attention, divided_attention_backward,
    layer_norm_linear, layer_norm_linear_backward,
    bias_gelu_linear, bias_gelu_linear_backward,
    add_layer_norm, add_layer_norm_backward, bias_gelu, bias_gelu_backward,
]  # fmt: skip


def test_every_op_is_checked():
    registered = {
        name.partition("::")[2].partition(".")[0]
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("vmae_fast::")
    }
    assert registered == {case.__name__ for case in CASES}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_opcheck(case, device):
    op = getattr(OPS, case.__name__).default
    for arguments in case(Given(device)):
        assert set(opcheck(op, arguments).values()) == {"SUCCESS"}
