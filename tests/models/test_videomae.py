"""VideoMAE as a module: arguments, V2's loss, compile, autocast, copies."""

import copy
import dataclasses
import io
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from einops import rearrange
from helpers import EXACT_RTOL, make_video, random_mask, randomise, relative_error

from vmae_fast import Mask, Masking, VideoMAE, clip_keys

SMALL = {
    "frames": 8, "image_size": (24, 32), "patch_size": 4, "tubelet_size": 1,
    "width": 24, "depth": 2, "heads": 3, "mlp_dim": 37,
    "decoder_width": 20, "decoder_depth": 2, "decoder_heads": 2, "decoder_mlp_dim": 31,
    "mask_ratio": 0.8,
}  # fmt: skip


def small_model(**settings):
    torch.manual_seed(0)
    model = VideoMAE("tiny", **{**SMALL, **settings})
    randomise(model)
    return model


def small_video(model, batch=3, dtype=torch.uint8):
    config = model.config
    shape = (batch, config.in_channels, config.frames, *config.size)
    return make_video(shape, dtype)


# ---- the published loss, run by hand ------------------------------------------------------


def published_attention(x, attn):
    heads = attn.num_heads
    bias = 0
    if attn.q_bias is not None:
        bias = torch.cat([attn.q_bias, torch.zeros_like(attn.q_bias), attn.v_bias])
    qkv = x @ attn.qkv.weight.t() + bias
    q, k, v = rearrange(qkv, "b n (three h k) -> three b h n k", three=3, h=heads)
    weights = (q @ k.transpose(2, 3) / math.sqrt(q.shape[3])).softmax(dim=3)
    return attn.proj(rearrange(weights @ v, "b h n k -> b n (h k)"))


def published_block(x, block):
    x = x + published_attention(block.norm1(x), block.attn)
    return x + block.mlp.fc2(F.gelu(block.mlp.fc1(block.norm2(x))))


def published_loss(model, video, visible, decoded):
    """The V2 paper's loss from booleans ``(B, N)``: what is seen and what is decoded.

    Every block runs on every token, and the loss of decoded tokens that were seen is struck out
    at the end. For V1 decoded is the complement of visible.
    """
    config = model.config
    batch = len(video)
    mean, std = (
        torch.tensor(s, dtype=torch.float64).view(-1, 1, 1, 1) for s in (config.mean, config.std)
    )
    pixels = video.double() / 255
    conv = model.encoder.patch_embed
    tokens = F.conv3d((pixels - mean) / std, conv.weight, conv.bias, stride=config.tubelet)
    tokens = tokens.flatten(2).transpose(1, 2) + model.encoder.pos_embed
    x = tokens[visible].view(batch, -1, config.width)
    for block in model.encoder.blocks:
        x = published_block(x, block)
    x = model.encoder_to_decoder(model.encoder.norm(x))

    pos = model.decoder.pos_embed.expand(batch, -1, -1)
    pos_visible = pos[visible].view(batch, -1, config.decoder_width)
    pos_decoded = pos[decoded].view(batch, -1, config.decoder_width)
    x = torch.cat([x + pos_visible, model.mask_token + pos_decoded], dim=1)
    for block in model.decoder.blocks:
        x = published_block(x, block)
    pred = model.decoder.head(model.decoder.norm(x[:, -pos_decoded.shape[1] :]))

    pt, ph, pw = config.tubelet
    target = rearrange(
        pixels, "b c (t p0) (h p1) (w p2) -> b (t h w) (p0 p1 p2) c", p0=pt, p1=ph, p2=pw
    )
    if config.norm_pix:
        variance = target.var(dim=2, unbiased=True, keepdim=True)
        target = (target - target.mean(dim=2, keepdim=True)) / (variance.sqrt() + 1e-6)
    target = target.flatten(2)[decoded].view(batch, pos_decoded.shape[1], -1)
    loss = (pred - target).square().mean(dim=2)
    scored = (~visible)[decoded].view(batch, -1).double()
    return (loss * scored).sum() / scored.sum(), pred


def booleans(mask):
    visible = ~mask.to_bool()
    return visible, torch.zeros_like(visible).scatter_(1, mask.decode_idx, True)


V2_CASES = {
    "v1_tube": {},
    "v1_random": {"mask_kind": "random"},
    "half": {"decoder_mask_ratio": 0.5},
    "three_quarters": {"decoder_mask_ratio": 0.75},
    "decoder_frame": {"decoder_mask_ratio": 0.25, "decoder_mask_kind": "frame"},
    "decoder_random": {"decoder_mask_ratio": 0.5, "decoder_mask_kind": "random"},
    "random_half": {"mask_kind": "random", "decoder_mask_ratio": 0.5},
    "random_three_quarters": {"mask_kind": "random", "decoder_mask_ratio": 0.75},
    "six_rows": {"frames": 6, "decoder_mask_ratio": 0.5},
    "raw_pixels": {"decoder_mask_ratio": 0.5, "norm_pix": False},
    "one_decoder_block": {"decoder_mask_ratio": 0.5, "decoder_depth": 1},
    "no_bias": {"decoder_mask_ratio": 0.75, "qkv_bias": False},
    "no_final_norm": {"decoder_mask_ratio": 0.5, "final_norm": False},
    "two_channels": {"decoder_mask_ratio": 0.5, "in_channels": 2, "tubelet_size": 2},
}


@pytest.mark.parametrize("boolean", [False, True], ids=["drawn", "passed"])
@pytest.mark.parametrize("settings", V2_CASES.values(), ids=V2_CASES)
def test_loss_and_gradients_are_the_published_ones(settings, boolean):
    """Both with predictions, and as training takes them: head and loss together in chunks."""
    model = small_model(**settings).double()
    video = small_video(model)
    n = model.config.num_tokens
    mask = random_mask(3, n, n * 3 // 4) if boolean else None
    torch.manual_seed(1)
    got = model(video, mask, return_pred=True)
    visible, decoded = booleans(got.mask)
    if boolean:
        assert torch.equal(~visible, mask)
    ratio = model.config.decoder_mask_ratio
    if ratio:
        assert (decoded.sum(dim=1) == n * (1 - ratio)).all()
        assert (visible & decoded).any()
    expected, pred = published_loss(model, video, visible, decoded)
    assert got.loss.dtype == torch.float64
    assert relative_error(got.loss, expected) < EXACT_RTOL
    # Predictions are those of the scored tokens, in the order of target_idx.
    everywhere = torch.zeros(3, n, pred.shape[2], dtype=torch.float64)
    everywhere[decoded] = pred.detach().flatten(0, 1)
    theirs = torch.stack([everywhere[b, idx] for b, idx in enumerate(got.mask.target_idx)])
    assert relative_error(got.pred, theirs) < EXACT_RTOL

    names, parameters = zip(*model.named_parameters(), strict=True)
    truth = torch.autograd.grad(expected, parameters)
    in_training = model(video, got.mask).loss
    assert relative_error(in_training, expected) < EXACT_RTOL
    for loss in (got.loss, in_training):
        mine = torch.autograd.grad(loss, parameters)
        for name, gradient, true_gradient in zip(names, mine, truth, strict=True):
            assert relative_error(gradient, true_gradient) < 10 * EXACT_RTOL, name


def test_zero_prediction_is_the_loss_of_zeros():
    model = small_model(decoder_mask_ratio=0.5, mask_kind="random").double()
    video = small_video(model)
    with torch.no_grad():
        model.decoder.head.weight.zero_()
        model.decoder.head.bias.zero_()
    out = model(video)
    assert relative_error(model.zero_prediction(video, out.mask), out.loss) < 1e-6


# ---- arguments ----------------------------------------------------------------------------


def test_video_in_the_other_order_gets_a_hint():
    model = small_model()
    video = small_video(model)
    with pytest.raises(ValueError, match=r"\(B, 3, 8, 24, 32\) .* got \(3, 8, 3, 24, 32\); it "
                       r"looks like \(B, T, C, H, W\): pass video.transpose\(1, 2\)"):  # fmt: skip
        model(video.transpose(1, 2))
    with pytest.raises(ValueError, match=r"got \(3, 8, 24, 32\); add a batch dimension"):
        model.encode(video[0])
    with pytest.raises(ValueError, match=r"got \(3, 3, 8, 24, 24\)$"):
        model(video[..., :24])
    with pytest.raises(ValueError, match=r"got \(3, 1, 8, 24, 32\)$"):
        model.encode(video[:, :1])
    with pytest.raises(ValueError, match=r"video must be uint8 .* got torch.int64"):
        model(video.long())


def test_mask_errors():
    model = small_model()
    video = small_video(model)
    n = model.config.num_tokens
    unequal = random_mask(3, n, 300)
    unequal[2, unequal[2].nonzero()[0]] = False
    with pytest.raises(ValueError, match="300 tokens in clip 0 but 299 in clip 2"):
        model(video, unequal)
    for wrong in (random_mask(2, n, 300), random_mask(3, n - 8, 300)):
        message = (
            f"mask is for {len(wrong)} clips of {wrong.shape[1]} tokens, but video has 3 clips "
            f"of {n}"
        )
        with pytest.raises(ValueError, match=message):
            model(video, wrong)
        with pytest.raises(ValueError, match=message):
            model(video, Mask.from_bool(wrong))
    with pytest.raises(ValueError, match=r"mask must be \(B, N\)"):
        model(video, random_mask(3, n, 300).view(3, 8, -1))
    with pytest.raises(ValueError, match="mask must be boolean"):
        model(video, torch.arange(n).expand(3, n))


def test_mask_of_the_wrong_size_under_decoder_masking():
    model = small_model(decoder_mask_ratio=0.5)
    with pytest.raises(ValueError, match="mask is for 3 clips of 376 tokens"):
        model(small_video(model), random_mask(3, 376, 300))


def test_without_decoder():
    model = small_model(decoder_depth=0)
    video = small_video(model)
    assert model.decoder is None
    assert model.encode(video).shape == (3, 384, 24)
    with pytest.raises(RuntimeError, match="no decoder"):
        model(video)
    with pytest.raises(RuntimeError, match="no classifier"):
        model.classify(video)
    assert model.no_weight_decay() == set()


def test_odd_grid_for_running_cell_is_an_error_of_the_model():
    with pytest.raises(ValueError, match="2x2 cells, but it is 19x19"):
        VideoMAE("tiny", image_size=266, patch_size=14, decoder_mask_ratio=0.5)


def test_return_pred_and_output_fields():
    model = small_model()
    video = small_video(model)
    out = model(video)
    assert out.pred is None
    assert out.loss.shape == ()
    assert isinstance(out.mask, Mask)
    pred = model(video, return_pred=True).pred
    assert pred.shape == (3, out.mask.num_scored, model.config.tubelet_values)


def test_strides_and_inputs():
    model = small_model().double()
    video = small_video(model)
    mask = random_mask(3, model.config.num_tokens, 300)
    copies = video.clone(), mask.clone(), copy.deepcopy(model.state_dict())
    expected = model(video, mask).loss
    permuted = video.permute(0, 2, 3, 4, 1).contiguous().permute(0, 4, 1, 2, 3)
    assert relative_error(model(permuted, mask).loss, expected) < EXACT_RTOL
    assert relative_error(model(video, mask.long()).loss, expected) < EXACT_RTOL
    assert relative_error(model(video, Mask.from_bool(mask)).loss, expected) < EXACT_RTOL
    assert torch.equal(video, copies[0])
    assert torch.equal(mask, copies[1])
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, copies[2][name])


def test_manual_seed_reproduces_a_step():
    model = small_model()
    video = small_video(model)
    results = []
    for seed in (7, 7, 8):
        torch.manual_seed(seed)
        out = model(video)
        results.append((out.loss.item(), out.mask.visible_idx))
    assert results[0][0] == results[1][0]
    assert torch.equal(results[0][1], results[1][1])
    assert not torch.equal(results[0][1], results[2][1])


def test_clips_of_a_batch_have_masks_of_their_own():
    model = small_model()
    visible = model(small_video(model)).mask.visible_idx
    assert not torch.equal(visible[0], visible[1])


def test_encode_sees_every_token():
    model = small_model().double()
    video = small_video(model)
    x = F.conv3d(
        (video.double() / 255 - torch.tensor(model.config.mean).double().view(-1, 1, 1, 1))
        / torch.tensor(model.config.std).double().view(-1, 1, 1, 1),
        model.encoder.patch_embed.weight,
        model.encoder.patch_embed.bias,
        stride=model.config.tubelet,
    )
    x = x.flatten(2).transpose(1, 2) + model.encoder.pos_embed
    for block in model.encoder.blocks:
        x = published_block(x, block)
    # The statistics went through float32 above.
    assert relative_error(model.encode(video), model.encoder.norm(x)) < 1e-6


def test_classify_is_the_mean_of_tokens():
    model = small_model(num_classes=5, decoder_depth=0, final_norm=False).double().eval()
    video = small_video(model)
    tokens = model.encode(video)
    pooled = model.classifier.fc_norm(tokens.sum(dim=1) / tokens.shape[1])
    head = model.classifier.head
    expected = pooled @ head.weight.t() + head.bias
    assert model.classify(video).shape == (3, 5)
    assert relative_error(model.classify(video), expected) < EXACT_RTOL


def test_mask_token_takes_no_weight_decay():
    model = small_model()
    assert model.no_weight_decay() == {"mask_token"}
    assert dict(model.named_parameters())["mask_token"].dim() > 1


def test_a_checkpoint_keeps_the_decoders_masks(tmp_path):
    model = small_model(
        mask_kind="frame", decoder_mask_ratio=0.3, decoder_mask_kind="random", patch_size=8
    )
    again = VideoMAE.from_pretrained(model.save_pretrained(tmp_path))
    assert again.masking == Masking((8, 3, 4), "frame", 0.8, 0.3, "random")
    for mine, theirs in zip(*(drawn_mask(each).decode_idx for each in (model, again)), strict=True):
        assert torch.equal(mine, theirs)


# ---- ways to run it -----------------------------------------------------------------------


def drawn_mask(model, batch=3):
    return model.masking(clip_keys(0, 0, torch.arange(batch)))


@pytest.fixture
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"decoder_mask_ratio": 0.5},
        {"decoder_mask_ratio": 0.5, "mask_kind": "random", "decoder_mask_kind": "frame"},
    ],
    ids=["v1", "v2", "v2_random_frame"],
)
@pytest.mark.parametrize("given", [True, False], ids=["mask", "drawn"])
def test_compiles_whole(settings, given):
    model = small_model(**settings)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    video = small_video(model)
    mask = drawn_mask(model) if given else None
    losses, grads = [], []
    for run in (model, compiled):
        torch.manual_seed(3)
        model.zero_grad()
        loss = run(video, mask).loss
        loss.backward()
        losses.append(loss.detach())
        grads.append([p.grad.clone() for p in model.parameters()])
    assert relative_error(losses[1], losses[0]) < 1e-6
    for eager, whole in zip(*grads, strict=True):
        assert relative_error(whole, eager) < 1e-5


@pytest.mark.usefixtures("fresh_dynamo")
def test_traces_forward_and_backward_ahead_of_time():
    model = small_model(decoder_mask_ratio=0.5)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    video, mask = small_video(model), drawn_mask(model)
    expected = model(video, mask).loss
    expected.backward()
    grads = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    loss = compiled(video, mask).loss
    loss.backward()
    assert relative_error(loss, expected) < 1e-6
    for parameter, truth in zip(model.parameters(), grads, strict=True):
        assert relative_error(parameter.grad, truth) < 1e-5


def test_activation_checkpointing_gives_the_same_gradients():
    model = small_model(decoder_mask_ratio=0.5)
    video, mask = small_video(model), drawn_mask(model)
    model(video, mask).loss.backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    torch.utils.checkpoint.checkpoint(
        lambda v: model(v, mask).loss, video, use_reentrant=False
    ).backward()
    for parameter, truth in zip(model.parameters(), expected, strict=True):
        assert relative_error(parameter.grad, truth) < 1e-6


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch"])
def test_copies(how):
    model = small_model(decoder_mask_ratio=0.5)
    video = small_video(model)
    if how == "deepcopy":
        twin = copy.deepcopy(model)
    elif how == "pickle":
        twin = pickle.loads(pickle.dumps(model))
    else:
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        twin = torch.load(buffer, weights_only=False)
    assert twin.config == model.config
    losses = []
    for each in (model, twin):
        torch.manual_seed(2)
        losses.append(each(video).loss.item())
    assert losses[0] == losses[1]
    with torch.no_grad():
        twin.mask_token.add_(1)
    assert not torch.equal(twin.mask_token, model.mask_token)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32], ids=str)
def test_bfloat16_autocast(dtype):
    torch.manual_seed(0)
    model = VideoMAE("tiny")
    video = make_video((2, 3, 8, 64, 64), dtype)
    mask = drawn_mask(model, 2)
    expected = model(video, mask)
    expected.loss.backward()
    truth = torch.cat([p.grad.flatten() for p in model.parameters()])
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        out = model(video, mask, return_pred=True)
    out.loss.backward()
    assert out.loss.dtype == torch.float32
    assert out.pred.dtype == torch.bfloat16
    # bf16 has 8 bits: 4e-3 a rounding, averaged in the loss and added up in the gradients.
    assert relative_error(out.loss, expected.loss) < 4e-3
    got = torch.cat([p.grad.flatten() for p in model.parameters()])
    assert got.isfinite().all()
    assert relative_error(got, truth) < 5e-2


def test_a_whole_model_in_bfloat16():
    torch.manual_seed(0)
    model = VideoMAE("tiny")
    video = make_video((2, 3, 8, 64, 64), torch.uint8)
    mask = drawn_mask(model, 2)
    expected = model(video, mask).loss
    loss = model.bfloat16()(video, mask).loss
    assert loss.dtype == torch.float32
    assert relative_error(loss, expected) < 1e-2


def test_a_few_steps_lower_the_loss():
    torch.manual_seed(0)
    model = VideoMAE("tiny", frames=2, image_size=32, width=32, heads=2, norm_pix=False)
    video = make_video((4, 3, 2, 32, 32), torch.uint8)
    video[:] = torch.arange(4).view(4, 1, 1, 1, 1) * 60
    mask = drawn_mask(model, 4)
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(30):
        optimiser.zero_grad()
        loss = model(video, mask).loss
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]


def test_mask_is_a_plain_dataclass_to_the_model():
    model = small_model()
    mask = drawn_mask(model)
    narrow = dataclasses.replace(
        mask, visible_idx=mask.visible_idx.int(), decode_idx=mask.decode_idx.int()
    )
    video = small_video(model)
    assert model(video, narrow).loss.item() == model(video, mask).loss.item()
