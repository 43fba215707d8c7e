"""Operations of a model as the papers count them."""

from vmae_fast.models import VideoMAEConfig

# A forward pass multiplies and adds once for each of the papers' "FLOPs", a backward pass twice.
FLOP_PER_MAC = 6


def published_macs(config: VideoMAEConfig) -> int:
    """Multiply-accumulates of a forward pass over a clip, as the papers count them.

    Matrix products alone, those of attention included; all tubelets embedded, and all decoded
    tokens taken to the end, so that a step that leaves some of it out gets the credit.

    Sources: VideoMAE V2 (arXiv 2303.16727), tables of pretraining costs.
    """
    tokens, masking = config.num_tokens, config.masking
    seen, decoded = masking.num_visible, masking.num_decoded

    def blocks(depth: int, count: int, width: int, hidden: int) -> int:
        linears = count * (4 * width * width + 2 * width * hidden)
        return depth * (linears + 2 * count * count * width)

    narrow = config.decoder_width
    return (
        tokens * config.tubelet_values * config.width
        + blocks(config.depth, seen, config.width, config.encoder_hidden)
        + seen * config.width * narrow
        + blocks(config.decoder_depth, seen + decoded, narrow, config.decoder_hidden)
        + decoded * narrow * config.tubelet_values
    )
