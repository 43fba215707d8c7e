"""Inputs of the token benchmarks: sizes, and batches of random numbers."""

from dataclasses import dataclass

import token_peers
import torch
from torch import Tensor

from vmae_fast import Masking

TUBELET = (2, 16, 16)


@dataclass(frozen=True)
class Size:
    """Dimensions of a batch under V1's masks.

    Attributes:
        what: the size in words.
        clips: B, of 16 frames.
        image: pixels a side.
        width, decoder_width: D and E.
        dtype: of everything but the video and the indices.
        device: where it is made.
    """

    what: str
    clips: int
    image: int
    width: int
    decoder_width: int
    dtype: torch.dtype
    device: torch.device

    @property
    def masking(self) -> Masking:
        """Tube masks of nine tenths."""
        side = self.image // TUBELET[1]
        return Masking((16 // TUBELET[0], side, side))


def size_for(device: torch.device) -> Size:
    """What the targets are for on a GPU; on a CPU small enough for a test of everything."""
    if device.type == "cuda":
        what = "base, 64 clips of 16x224x224, uint8 video, bf16, V1 masks"
        return Size(what, 64, 224, 768, 384, torch.bfloat16, device)
    what = "2 clips of 16x112x112, widths 192 and 96, uint8 video, fp32, V1 masks"
    return Size(what, 2, 112, 192, 96, torch.float32, device)


class Batch:
    """Everything that one call of an op or of a peer reads; tensors are made when first asked for.

    Attributes:
        mask: :class:`vmae_fast.Mask`.
        video: uint8; ``pixels`` and ``pixels_fp32`` are the same, normalised.
        hidden: the mask as booleans.
        weight, bias, pos_embed: of the embedding; ``tokens`` are all of a clip.
        visible, mask_token, decoder_pos_embed: what the decoder's input is made of.
        decoded, head_weight, head_bias: what the predictions ``pred`` are made of.
    """

    def __init__(self, size: Size, seed: int) -> None:
        self._size = size
        self.mask = size.masking(torch.arange(size.clips, device=size.device) + seed * size.clips)
        clips, tokens = size.clips, self.mask.num_tokens
        values = 3 * TUBELET[0] * TUBELET[1] * TUBELET[2]
        visible, decoded = self.mask.visible_idx.shape[1], self.mask.decode_idx.shape[1]
        self._shapes = {
            "weight": (size.width, 3, *TUBELET),
            "bias": (size.width,),
            "pos_embed": (tokens, size.width),
            "tokens": (clips, tokens, size.width),
            "visible": (clips, visible, size.decoder_width),
            "mask_token": (size.decoder_width,),
            "decoder_pos_embed": (tokens, size.decoder_width),
            "decoded": (clips, decoded, size.decoder_width),
            "head_weight": (values, size.decoder_width),
            "head_bias": (values,),
            "pred": (clips, decoded, values),
        }

    def __getattr__(self, name: str) -> Tensor:
        """Called for what is not there yet."""
        made = self._make(name)
        setattr(self, name, made)
        return made

    def _make(self, name: str) -> Tensor:
        size = self._size
        if name == "video":
            shape = (size.clips, 3, 16, size.image, size.image)
            return torch.randint(0, 256, shape, device=size.device, dtype=torch.uint8)
        if name == "pixels":
            return token_peers.normalised(self.video, size.dtype)
        if name == "pixels_fp32":
            return token_peers.normalised(self.video, torch.float32)
        if name == "hidden":
            return self.mask.to_bool()
        if name not in self._shapes:
            raise AttributeError(f"a batch has no {name!r}")
        made = torch.randn(self._shapes[name], device=size.device, dtype=size.dtype)
        # Position tables are fixed in VideoMAE.
        return made.requires_grad_(not name.endswith("pos_embed"))
