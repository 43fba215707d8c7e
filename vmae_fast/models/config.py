"""Configuration of a VideoMAE and the table of published sizes."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from vmae_fast.masking import Masking

_IMAGENET_MEAN = (0.485, 0.456, 0.406)
_IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class VideoMAEConfig:
    """Everything that decides a VideoMAE's shapes and its pretraining task.

    Attributes:
        frames: T, frames of a clip.
        image_size: pixels, one number or (height, width).
        in_channels: C.
        patch_size: pixels of a tubelet, one number or (height, width).
        tubelet_size: frames of a tubelet.
        width, depth, heads: the encoder's.
        mlp_dim: inner width of the encoder's MLPs; None is 4 * width.
        decoder_width, decoder_depth, decoder_heads, decoder_mlp_dim: the decoder's;
            ``decoder_depth=0`` leaves the decoder out (an encoder alone).
        qkv_bias: biases on queries and values.
        init_values: layer scale's start; 0 has none.
        drop_path: rate in the last block, rising linearly with depth.
        norm_eps: epsilon of every LayerNorm but the next two.
        decoder_norm_eps: epsilon of the norm before the pixel head.
        fc_norm_eps: epsilon of the norm before the classifier.
        final_norm: a norm after the encoder's last block (fine-tuned models have none).
        num_classes: 0, or the classes of a fine-tuned model's head.
        norm_pix: normalise each target tubelet per channel.
        mask_kind: "tube", "random" or "frame".
        mask_ratio: share of tokens hidden from the encoder.
        decoder_mask_ratio: 0 (V1), or the share of tokens that is not decoded (V2).
        decoder_mask_kind: "running_cell" (ratio 0.5 or 0.75), "frame" or "random".
        image_mean, image_std: per channel, in units of [0, 1], of normalised video; None is
            ImageNet's for 3 channels and 0 and 1 (plain [0, 1] pixels) for any other number.
        positions_from: (t, h, w), the grid whose position tables are interpolated to this one;
            None where they are this grid's own.
        license: of the weights, as the checkpoint they come from states it; None where nothing is
            known to restrict them. Changes nothing that is computed.

    Raises:
        ValueError: a size that does not divide; the message names the nearest that would.
    """

    frames: int = 16
    image_size: int | tuple[int, int] = 224
    in_channels: int = 3
    patch_size: int | tuple[int, int] = 16
    tubelet_size: int = 2
    width: int = 768
    depth: int = 12
    heads: int = 12
    mlp_dim: int | None = None
    decoder_width: int = 384
    decoder_depth: int = 4
    decoder_heads: int = 6
    decoder_mlp_dim: int | None = None
    qkv_bias: bool = True
    init_values: float = 0.0
    drop_path: float = 0.0
    norm_eps: float = 1e-6
    decoder_norm_eps: float = 1e-6
    fc_norm_eps: float = 1e-6
    final_norm: bool = True
    num_classes: int = 0
    norm_pix: bool = True
    mask_kind: str = "tube"
    mask_ratio: float = 0.9
    decoder_mask_ratio: float = 0.0
    decoder_mask_kind: str = "running_cell"
    image_mean: tuple[float, ...] | None = None
    image_std: tuple[float, ...] | None = None
    positions_from: tuple[int, int, int] | None = None
    license: str | None = None

    def __post_init__(self) -> None:
        imagenet = self.in_channels == 3
        defaults: dict[str, Any] = {
            "image_size": _pair(self.image_size),
            "patch_size": _pair(self.patch_size),
            "image_mean": _channels(
                self.image_mean, _IMAGENET_MEAN if imagenet else (0.0,) * self.in_channels
            ),
            "image_std": _channels(
                self.image_std, _IMAGENET_STD if imagenet else (1.0,) * self.in_channels
            ),
        }
        for name, value in defaults.items():
            object.__setattr__(self, name, value)
        self._check()
        if self.positions_from is not None:
            # The same grid's table is no other table, however it was asked for.
            trained = tuple(self.positions_from)
            object.__setattr__(self, "positions_from", None if trained == self.grid else trained)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of a clip in pixels."""
        return _pair(self.image_size)

    @property
    def tubelet(self) -> tuple[int, int, int]:
        """(pt, ph, pw)."""
        return (self.tubelet_size, *_pair(self.patch_size))

    @property
    def grid(self) -> tuple[int, int, int]:
        """Tokens along time, height and width, (t, h, w)."""
        pt, ph, pw = self.tubelet
        return (self.frames // pt, self.size[0] // ph, self.size[1] // pw)

    @property
    def num_tokens(self) -> int:
        """N."""
        t, h, w = self.grid
        return t * h * w

    @property
    def tubelet_values(self) -> int:
        """P, values predicted for a token: C * pt * ph * pw."""
        pt, ph, pw = self.tubelet
        return self.in_channels * pt * ph * pw

    @property
    def masking(self) -> Masking:
        """How masks are drawn; a ValueError where these settings leave nothing to do."""
        return Masking(
            self.grid, self.mask_kind, self.mask_ratio,
            self.decoder_mask_ratio, self.decoder_mask_kind,
        )  # fmt: skip

    @property
    def encoder_hidden(self) -> int:
        """Inner width of the encoder's MLPs."""
        return 4 * self.width if self.mlp_dim is None else self.mlp_dim

    @property
    def decoder_hidden(self) -> int:
        """Inner width of the decoder's MLPs."""
        return 4 * self.decoder_width if self.decoder_mlp_dim is None else self.decoder_mlp_dim

    @property
    def mean(self) -> tuple[float, ...]:
        """Per-channel mean of normalised video."""
        return _channels(self.image_mean, ())

    @property
    def std(self) -> tuple[float, ...]:
        """Per-channel standard deviation of normalised video."""
        return _channels(self.image_std, ())

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> VideoMAEConfig:
        """Inverse of :meth:`to_dict`; an unknown key is a ValueError."""
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise ValueError(f"unknown model settings {unknown}; known are {sorted(known)}")
        settings: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in values.items()
        }
        return cls(**settings)

    @classmethod
    def of(cls, size: str | VideoMAEConfig, **overrides: Any) -> VideoMAEConfig:
        """A published size by name (or a config), with overrides.

        Raises:
            ValueError: no such size.
            TypeError: no such setting.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(set(overrides) - known)
        if unknown:
            raise TypeError(f"unknown model settings {unknown}; known are {sorted(known)}")
        if isinstance(size, VideoMAEConfig):
            return dataclasses.replace(size, **overrides)
        if size not in SIZES:
            raise ValueError(f"size must be one of {', '.join(SIZES)}, got {size!r}")
        return cls(**{**SIZES[size], **overrides})

    def _check(self) -> None:
        least = dict.fromkeys(
            ("frames", "in_channels", "tubelet_size", "width", "depth", "heads", "decoder_width"),
            1,
        )
        least |= {"mlp_dim": 1, "decoder_mlp_dim": 1}
        least |= {"decoder_depth": 0, "num_classes": 0}
        for name, smallest in least.items():
            value = getattr(self, name)
            if value is not None and value < smallest:
                raise ValueError(f"{name} must be at least {smallest}, got {value}")
        for name, value, step_name, step in (
            ("frames", self.frames, "tubelet_size", self.tubelet[0]),
            ("image height", self.size[0], "patch_size", self.tubelet[1]),
            ("image width", self.size[1], "patch_size", self.tubelet[2]),
            ("width", self.width, "heads", self.heads),
            ("decoder_width", self.decoder_width, "decoder_heads", self.decoder_heads),
        ):
            if step < 1 or value < 1 or value % step:
                raise ValueError(
                    f"{name}={value} is not a multiple of {step_name}={step}{_nearest(value, step)}"
                )
        if self.positions_from is not None and (
            len(self.positions_from) != 3 or min(self.positions_from) < 1
        ):
            raise ValueError(
                f"positions_from must be a grid of tokens (t, h, w), got {self.positions_from}"
            )
        for name, values in (("image_mean", self.mean), ("image_std", self.std)):
            if len(values) != self.in_channels:
                raise ValueError(
                    f"{name} must hold one value for each of {self.in_channels} channels, "
                    f"got {len(values)}"
                )


def _pair(value: int | tuple[int, int]) -> tuple[int, int]:
    if isinstance(value, int):
        return (value, value)
    height, width = value
    return (height, width)


def _channels(value: tuple[float, ...] | None, default: tuple[float, ...]) -> tuple[float, ...]:
    return default if value is None else tuple(value)


def _nearest(value: int, step: int) -> str:
    if step < 1:
        return ""
    below = max(value // step, 1) * step
    return f"; {below} would do" if below > value else f"; {below} or {below + step} would do"


# Sources: VideoMAE (arXiv 2203.12602) and VideoMAE V2 (arXiv 2303.16727), tables of architectures
# and their public training scripts. Large and huge have V1's decoders; V2's are 4 blocks deep
# (and 512 wide with 8 heads for huge). Giant's MLP ratio of 48/11 holds in its decoder too.
# "tiny" is the demonstration model of the default run, published nowhere.
SIZES: dict[str, dict[str, Any]] = {
    "tiny": {
        "frames": 8, "image_size": 64, "patch_size": 8,
        "width": 128, "depth": 3, "heads": 2,
        "decoder_width": 64, "decoder_heads": 1, "decoder_depth": 1,
    },
    "small": {
        "width": 384, "depth": 12, "heads": 6,
        "decoder_width": 192, "decoder_heads": 3, "decoder_depth": 4,
    },
    "base": {
        "width": 768, "depth": 12, "heads": 12,
        "decoder_width": 384, "decoder_heads": 6, "decoder_depth": 4,
    },
    "large": {
        "width": 1024, "depth": 24, "heads": 16,
        "decoder_width": 512, "decoder_heads": 8, "decoder_depth": 12,
    },
    "huge": {
        "width": 1280, "depth": 32, "heads": 16,
        "decoder_width": 640, "decoder_heads": 8, "decoder_depth": 12,
    },
    "giant": {
        "patch_size": 14, "width": 1408, "depth": 40, "heads": 16, "mlp_dim": 6144,
        "decoder_width": 512, "decoder_heads": 8, "decoder_depth": 4, "decoder_mlp_dim": 2234,
    },
}  # fmt: skip
