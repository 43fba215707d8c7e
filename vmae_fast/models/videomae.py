"""VideoMAE: masked video pretraining as one module."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple, get_args

import torch
import torch.nn as nn
from torch import Tensor

from vmae_fast import ops
from vmae_fast.masking import Mask
from vmae_fast.nn import JointSpaceTimeBlock, Linear, MaskedMSELoss
from vmae_fast.nn.block import Checkpointing

from .config import VideoMAEConfig
from .parts import ClassifierHead, Decoder, Encoder


class VideoMAEOutput(NamedTuple):
    """What a pretraining step gives.

    Attributes:
        loss: scalar, mean squared error over the scored tokens.
        pred: ``(B, M, P)`` predictions for ``mask.target_idx``, or None unless asked for. M
            counts the scored tokens: all masked ones in V1.
        mask: the mask that was used.
    """

    loss: Tensor
    pred: Tensor | None
    mask: Mask


class VideoMAE(nn.Module):
    """Masked autoencoder for video (V1, and V2 with ``decoder_mask_ratio``).

    Example:
        >>> import torch
        >>> from vmae_fast import VideoMAE
        >>> model = VideoMAE("small", frames=4, image_size=64)
        >>> video = torch.randint(0, 256, (2, 3, 4, 64, 64), dtype=torch.uint8)
        >>> loss = model(video).loss
        >>> loss.backward()
        >>> model.encode(video).shape
        torch.Size([2, 32, 384])

    Args:
        size: "tiny", "small", "base", "large", "huge" or "giant", or a config.
        **overrides: any setting of :class:`VideoMAEConfig`: ``frames=32``, ``image_size=112``,
            ``patch_size=8``, ``tubelet_size=1``, ``in_channels=1``, ``decoder_depth=2``,
            ``decoder_mask_ratio=0.5``, ...

    Attributes:
        config: the resolved settings.
        encoder: reads the visible tokens.
        decoder: predicts the masked ones; None in an encoder alone or a fine-tuned model.
        classifier: head of a fine-tuned model, else None.
        residual_dtype: dtype of the residual stream: None (as published: that of the weights, so
            fp32 under autocast), or torch.bfloat16, which under bf16 autocast halves its memory and
            rounds every addition.
        checkpointing: what is computed again in the backward pass to save memory: "none" (norms
            and GELU only), "mlp" or "block".

    Raises:
        ValueError: no such size, or numbers that do not divide (the message names ones that do).
        TypeError: no such setting.

    Sources: VideoMAE (arXiv 2203.12602), VideoMAE V2 (arXiv 2303.16727).
    """

    def __init__(self, size: str | VideoMAEConfig = "base", **overrides: Any) -> None:
        """Build the model with fresh weights, drawn from torch's global generator."""
        super().__init__()
        self.config = config = VideoMAEConfig.of(size, **overrides)
        self.encoder = Encoder(config)
        self.classifier = ClassifierHead(config) if config.num_classes else None
        self.decoder: Decoder | None = None
        if config.decoder_depth:
            # These two keep torch's default start for the linear, as published.
            self.encoder_to_decoder = Linear(config.width, config.decoder_width, bias=False)
            self.mask_token = nn.Parameter(torch.zeros(1, 1, config.decoder_width))
            nn.init.trunc_normal_(self.mask_token, std=0.02, a=-0.02, b=0.02)
            self.decoder = Decoder(config)
            self.masking = config.masking
            self.loss = MaskedMSELoss(
                config.tubelet, norm_pix=config.norm_pix, mean=config.mean, std=config.std
            )
        self.checkpointing = "none"

    @property
    def residual_dtype(self) -> torch.dtype | None:
        return self.encoder.residual_dtype

    @residual_dtype.setter
    def residual_dtype(self, dtype: torch.dtype | None) -> None:
        for part in (self.encoder, self.decoder):
            if part is not None:
                part.residual_dtype = dtype

    @property
    def checkpointing(self) -> Checkpointing:
        return self._checkpointing

    @checkpointing.setter
    def checkpointing(self, what: Checkpointing) -> None:
        if what not in get_args(Checkpointing):
            raise ValueError(
                f"checkpointing must be one of {', '.join(get_args(Checkpointing))}, got {what!r}"
            )
        self._checkpointing: Checkpointing = what
        for module in self.modules():
            if isinstance(module, JointSpaceTimeBlock):
                module.checkpointing = what

    def forward(
        self, video: Tensor, mask: Tensor | Mask | None = None, *, return_pred: bool = False
    ) -> VideoMAEOutput:
        """Reconstruct the masked tokens of a batch of clips.

        Args:
            video: ``(B, C, T, H, W)``, any strides; uint8 RGB 0..255 (normalised inside), or
                floating point and normalised already.
            mask: ``(B, N)`` boolean, True = masked, every clip masking as many; or a
                :class:`~vmae_fast.Mask`; None draws one on the video's device.
            return_pred: also return the predictions, which otherwise never exist in full. The
                loss is the same but for rounding.

        Returns:
            :class:`VideoMAEOutput`.

        Raises:
            ValueError: video or mask has another shape, dtype or count than the config says.
            RuntimeError: this model has no decoder.
        """
        if self.decoder is None:
            raise RuntimeError(
                "this model has no decoder (decoder_depth=0): it encodes"
                + (" and classifies" if self.classifier is not None else "")
                + ", but cannot be pretrained"
            )
        self._check_video(video)
        mask = self._mask(video, mask)
        tokens_BVE = self.encoder_to_decoder(self.encoder(video, mask.visible_idx))
        features_BSE = self.decoder.features(tokens_BVE, self.mask_token.view(-1), mask)
        head, scored = self.decoder.head, (video, mask.target_idx, mask.scored)
        if not return_pred:
            return VideoMAEOutput(self.loss.of_features(features_BSE, head, *scored), None, mask)
        pred_BSP = head(features_BSE)
        return VideoMAEOutput(self.loss(pred_BSP, *scored), pred_BSP, mask)

    def encode(self, video: Tensor) -> Tensor:
        """Features of all tokens, ``(B, N, D)``, t-major; nothing is masked.

        Args:
            video: as in :meth:`forward`.
        """
        self._check_video(video)
        return self.encoder(video)

    def classify(self, video: Tensor) -> Tensor:
        """Logits ``(B, classes)`` of a fine-tuned model.

        Args:
            video: as in :meth:`forward`.

        Raises:
            RuntimeError: the model has no classifier.
        """
        if self.classifier is None:
            raise RuntimeError("this model has no classifier: it was not fine-tuned")
        return self.classifier(self.encode(video))

    def zero_prediction(self, video: Tensor, mask: Mask) -> Tensor:
        """Loss of predicting zeros for the same tokens (scalar): a useful model is below it."""
        config = self.config
        return ops.zero_prediction_mse(
            video,
            mask.target_idx,
            config.tubelet,
            norm_pix=config.norm_pix,
            scored=mask.scored,
            mean=config.mean,
            std=config.std,
        )

    def no_weight_decay(self) -> set[str]:
        """Names of parameters of two or more dimensions that take no weight decay."""
        return {"mask_token"} if self.decoder is not None else set()

    @classmethod
    def from_pretrained(
        cls, path: str | Path, *, interpolate_positions: bool = False, **overrides: Any
    ) -> VideoMAE:
        """Load a checkpoint, all of it or nothing.

        Args:
            path: a folder of ours or of Hugging Face's, a ``.pth`` of MCG-NJU's or OpenGVLab's
                (pretraining or fine-tuned), or a hub id where huggingface_hub is installed.
            interpolate_positions: take ``frames=`` and ``image_size=`` other than the trained ones,
                and interpolate the tables of positions to their grid (trilinear, always from the
                trained grid's); ``config.positions_from`` says so from then on. Of a ``.pth`` that
                does not say its grid, ``positions_from=(t, h, w)`` does.
            **overrides: settings that do not change what the weights mean (``drop_path=0.1``,
                ``mask_ratio=0.75``, ``norm_pix=False``, ...), and what a ``.pth`` does not say
                of itself (``heads=``, ``frames=``, ``image_size=``, ``license=``).

        Raises:
            CheckpointError: tensors are missing, unexpected or of another shape (all are
                listed); the checkpoint was trained on another grid and no interpolation was
                asked for; the file is not a checkpoint, or holds objects other than tensors and
                plain values.
            FileNotFoundError: no such file, folder or hub id.
        """
        from .checkpoint import load_model

        return load_model(cls, path, interpolate_positions=interpolate_positions, **overrides)

    def save_pretrained(self, path: str | Path, *, dialect: str = "vmae-fast") -> Path:
        """Write the weights with their settings.

        Args:
            path: a folder ("vmae-fast", "huggingface") or a ``.pth`` file ("videomae").
            dialect: "vmae-fast"; "huggingface", which ``transformers`` loads; or "videomae",
                the names of MCG-NJU's and OpenGVLab's code.

        Returns:
            The path written.

        Raises:
            CheckpointError: the dialect cannot express this model.
        """
        from .checkpoint import save_model

        return save_model(self, path, dialect)

    def _mask(self, video: Tensor, mask: Tensor | Mask | None) -> Mask:
        batch, num_tokens = video.shape[0], self.config.num_tokens
        if mask is None or isinstance(mask, Tensor):
            key = torch.randint(2**32, (batch,), device=video.device)
            if mask is None:
                return self.masking(key)
            visible = Mask.from_bool(mask.to(video.device))
            if self.config.decoder_mask_ratio and visible.num_tokens == num_tokens:
                visible = self.masking.decode_part(visible.visible_idx, key, static=False)
            mask = visible
        if mask.num_tokens != num_tokens or mask.batch_size != batch:
            raise ValueError(
                f"mask is for {mask.batch_size} clips of {mask.num_tokens} tokens, "
                f"but video has {batch} clips of {num_tokens}"
            )
        return mask

    def _check_video(self, video: Tensor) -> None:
        config = self.config
        expected = (config.in_channels, config.frames, *config.size)
        if video.dim() == 5 and tuple(video.shape[1:]) == expected:
            return
        hint = ""
        if video.dim() == 5 and (video.shape[2], video.shape[1], *video.shape[3:]) == expected:
            hint = "; it looks like (B, T, C, H, W): pass video.transpose(1, 2)"
        elif video.dim() == 4:
            hint = "; add a batch dimension: video.unsqueeze(0)"
        raise ValueError(
            f"video must be (B, C, T, H, W) = (B, {', '.join(map(str, expected))}) for this "
            f"model, got {tuple(video.shape)}{hint}"
        )
