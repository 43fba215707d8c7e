"""torch.compile: every op and the model whole, without a break, by inductor and its CUDA graphs."""

import pytest
import torch
from helpers import joined, loss_and_gradients, make_video, relative_error

from vmae_fast import VideoMAE, clip_keys, ops

MASKS = {
    "v1": {},
    "v2": {"decoder_mask_ratio": 0.5},
    "v2_random": {"decoder_mask_ratio": 0.5, "mask_kind": "random"},
}
FP32_RTOL = 1e-4
# Inductor keeps in fp32 what eager rounds to bf16 between two operations.
BF16_RTOL = 5e-2

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


def make_batch(model, seed, device, batch=2):
    config = model.config
    shape = (batch, config.in_channels, config.frames, *config.size)
    video = make_video(shape, torch.uint8, "decoder", seed).to(device)
    return video, model.masking(clip_keys(seed, 0, torch.arange(batch, device=device)))


def make_model(device, **settings):
    torch.manual_seed(0)
    return VideoMAE("tiny", **settings).to(device)


@pytest.mark.parametrize("geometry", ["base", "odd"])
def test_ops(make_case, geometry):
    case = make_case(geometry, torch.float32)

    def between(*inputs):
        """The op with something before and after it that inductor writes kernels for."""
        return tuple(out.square() for out in case.outputs(*(torch.sin(x) for x in inputs)))

    with ops.backend("triton"):
        expected = case(between)
        got = case(torch.compile(between, fullgraph=True))
    for a, b in zip(got, expected, strict=True):
        assert a.dtype == b.dtype
        assert a.stride() == b.stride()
        assert relative_error(a, b) < 1e-5


@pytest.mark.parametrize("return_pred", [False, True], ids=["loss", "pred"])
@pytest.mark.parametrize("settings", MASKS.values(), ids=MASKS)
def test_model(device, settings, return_pred):
    model = make_model(device, **settings)
    video, mask = make_batch(model, 0, device)
    expected = loss_and_gradients(model, video, mask, return_pred=return_pred)
    model.compile(fullgraph=True)
    got = loss_and_gradients(model, video, mask, return_pred=return_pred)
    for name, tensor in got.items():
        assert relative_error(tensor, expected[name]) < FP32_RTOL, name


def test_model_in_bf16_with_masks_of_its_own(device):
    model = make_model(device, decoder_mask_ratio=0.5)
    video, _ = make_batch(model, 0, device)
    found = []
    for compiled in (False, True):
        if compiled:
            model.compile(fullgraph=True)
        torch.manual_seed(1)
        with torch._inductor.config.patch(fallback_random=True):
            found.append(loss_and_gradients(model, video, None, torch.bfloat16))
    assert relative_error(found[1]["loss"], found[0]["loss"]) < BF16_RTOL
    assert relative_error(joined(found[1]), joined(found[0])) < BF16_RTOL


@pytest.mark.parametrize("settings", MASKS.values(), ids=MASKS)
def test_cuda_graphs_of_the_compiler(device, settings):
    """mode="reduce-overhead": other pixels and masks at every step, from the first one on."""
    counters = torch._dynamo.utils.counters
    counters.clear()
    model = make_model(device, **settings)
    batches = [make_batch(model, seed, device) for seed in range(5)]
    with ops.backend("reference"):
        expected = [loss_and_gradients(model, *batch, torch.bfloat16) for batch in batches]
    model.compile(fullgraph=True, mode="reduce-overhead")
    for batch, truth in zip(batches, expected, strict=True):
        torch.compiler.cudagraph_mark_step_begin()
        got = loss_and_gradients(model, *batch, torch.bfloat16)
        # Copies: the next step may write into the memory of this one's results.
        got = {name: tensor.clone() for name, tensor in got.items()}
        assert relative_error(got["loss"], truth["loss"]) < BF16_RTOL
        assert relative_error(joined(got), joined(truth)) < BF16_RTOL
    assert counters["inductor"]["cudagraph_skips"] == 0
    assert relative_error(joined(expected[0]), joined(expected[1])) > 2 * BF16_RTOL
