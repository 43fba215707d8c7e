"""The residual stream's dtype, checkpointing, shared mask tokens, and blocks that are not ours."""

import pytest
import torch
import torch.nn as nn
from helpers import make_video, randomise, relative_error

from vmae_fast import VideoMAE, clip_keys, ops
from vmae_fast.nn import JointSpaceTimeBlock, Residual

LOW = torch.bfloat16


def small_model(**settings):
    model = VideoMAE("tiny", frames=4, image_size=32, **{"decoder_depth": 2, **settings})
    randomise(model)
    return model


def batch_of(model, clips=6):
    video = make_video((clips, 3, 4, 32, 32), torch.uint8)
    return video, model.masking(clip_keys(0, 0, torch.arange(clips)))


def step(model, dtype=LOW):
    model.zero_grad()
    with torch.autocast("cpu", LOW, enabled=dtype == LOW):
        loss = model(*batch_of(model)).loss
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters())]


def test_the_residual_stream_has_the_dtype_that_is_asked_for(monkeypatch):
    model, seen = small_model(), []
    forward = JointSpaceTimeBlock.forward

    def noting(self, x, *rest):
        out = forward(self, x, *rest)
        seen.extend(stream.x.dtype for stream in (x, out))
        return out

    monkeypatch.setattr(JointSpaceTimeBlock, "forward", noting)
    assert model.residual_dtype is None
    for model.residual_dtype, expected in ((None, torch.float32), (LOW, LOW)):
        seen.clear()
        step(model)
        assert seen == [expected] * 2 * (3 + 2)


def test_a_narrow_stream_is_as_good_as_its_rounding():
    model = small_model()
    truth = step(model, torch.float32)
    published = [relative_error(*pair) for pair in zip(step(model), truth, strict=True)]
    model.residual_dtype = LOW
    narrow = [relative_error(*pair) for pair in zip(step(model), truth, strict=True)]
    assert narrow != published
    # Five blocks round two additions each, to 8 bits.
    assert narrow[0] < 2e-3
    assert sorted(narrow)[len(narrow) // 2] < 3 * sorted(published)[len(published) // 2]


def test_a_narrow_stream_needs_autocast():
    model = small_model()
    model.residual_dtype = LOW
    message = "residual_dtype torch.bfloat16 goes with autocast to it, .* torch.float32"
    with pytest.raises(ValueError, match=message):
        model(*batch_of(model))
    with pytest.raises(ValueError, match=message):
        model.encode(batch_of(model)[0])


@pytest.mark.parametrize("what", ["mlp", "block"])
def test_checkpointing_changes_nothing(what):
    model = small_model(drop_path=0.3, decoder_mask_ratio=0.5)
    found = []
    for model.checkpointing in ("none", what):
        torch.manual_seed(4)
        found.append(step(model, torch.float32))
    blocks = [*model.encoder.blocks, *model.decoder.blocks]
    assert {block.checkpointing for block in blocks} == {what}
    for got, expected in zip(*found, strict=True):
        assert torch.equal(got, expected)


def test_checkpointing_of_what_there_is():
    with pytest.raises(ValueError, match="checkpointing must be one of none, mlp, block, got 'al"):
        small_model().checkpointing = "all"


@pytest.mark.parametrize("depth", [1, 2])
def test_mask_tokens_are_shared_where_that_is_less(depth, monkeypatch):
    model, rows = small_model(decoder_depth=depth), []
    run = ops.shared_tokens

    def noting(visible, shared, decode_idx):
        rows.append((visible.shape[:2].numel(), len(shared)))
        return run(visible, shared, decode_idx)

    monkeypatch.setattr(ops, "shared_tokens", noting)
    num_tokens, visible = model.config.num_tokens, model.masking.num_visible
    model(*batch_of(model, clips=1))
    assert rows == []
    model(*batch_of(model, clips=2))
    # Once, in the first block.
    assert rows == [(2 * visible, num_tokens)]


class Wrapped(nn.Module):
    """A block that knows tokens only, as one around ours does."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x, num_queries=None):
        assert not isinstance(x, Residual)
        return self.inner(x, num_queries)


@pytest.mark.parametrize("which", [0, 1, -1])
def test_other_blocks_take_tokens(which):
    model = small_model()
    expected = step(model, torch.float32)
    for blocks in (model.encoder.blocks, model.decoder.blocks):
        blocks[which] = Wrapped(blocks[which])
    for got, truth in zip(step(model, torch.float32), expected, strict=True):
        assert relative_error(got, truth) < 1e-5


def test_another_norm_takes_tokens():
    model = small_model().eval()
    video, _ = batch_of(model)
    model.encoder.norm = nn.LayerNorm(128, eps=model.encoder.norm.eps)
    plain = model.encode(video)
    model.encoder.norm = nn.Identity()
    x = model.encode(video)
    assert relative_error(nn.functional.layer_norm(x, (128,), eps=1e-6), plain) < 1e-5
