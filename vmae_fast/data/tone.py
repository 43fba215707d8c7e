"""High dynamic range to standard: PQ and HLG pictures in BT.2020 as 8-bit BT.709.

Light is worked out by the transfer functions of ITU-R BT.2100, brought into the range of a
standard picture by the curve of Report ITU-R BT.2390 section 5.4 (EETF), turned into BT.709
primaries by the matrix of ITU-R BT.2087, and encoded for the display of ITU-R BT.1886, gamma 2.4.
Reference white, 203 cd/m2 by Report ITU-R BT.2408, is the brightest that a standard picture
shows; highlights up to 1000 cd/m2, the peak that BT.2100 sets for HLG and the one that most PQ
video is made for, are rolled off below it, and what is brighter still is white. Metadata of a
single file is not looked at: the same picture always comes out the same.
"""

from __future__ import annotations

from functools import cache
from typing import Any, Final

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]

# FFmpeg's numbers of transfer characteristics and primaries, which are those of ITU-T H.273.
TRANSFERS: Final = {16: "PQ", 18: "HLG"}
_PRIMARIES_BT709: Final = 1

_WHITE_NITS: Final = 203.0  # BT.2408, table 1
_PEAK_NITS: Final = 1000.0  # BT.2100, table 5, note 5e
_PQ_PEAK_NITS: Final = 10000.0  # BT.2100, table 4
_HLG_GAMMA: Final = 1.2  # BT.2100, table 5, at 1000 cd/m2
_DISPLAY_GAMMA: Final = 2.4  # BT.1886

# BT.2087, section 3.1.1: linear BT.2020 to linear BT.709 is the inverse of what it prints.
_BT709_TO_BT2020: Final = np.array(
    [[0.6274, 0.3293, 0.0433], [0.0691, 0.9195, 0.0114], [0.0164, 0.0880, 0.8956]]
)
_LUMA_BT2020: Final = (0.2627, 0.6780, 0.0593)
_LUMA_BT709: Final = (0.2126, 0.7152, 0.0722)

# swscale's 16-bit RGB is its 8-bit RGB with more digits: white is 255 * 256, not 65535.
_CODE_WHITE: Final = 255 * 256

_ROWS: Final = 64  # pictures are worked on in strips, which stay in the cache
_STEPS: Final = 1 << 14  # entries of the tables that are looked up by light


def tone_map(
    picture: npt.NDArray[np.uint16], transfer: str, primaries: int, channels: int
) -> npt.NDArray[np.uint8]:
    """Turn a high dynamic range picture into a standard one.

    Args:
        picture: full-range R'G'B' or R'G'B'A ``(H, W, 3 or 4)``, white at 255 * 256.
        transfer: "PQ" or "HLG".
        primaries: number of H.273; BT.709's are left alone, all others are taken for BT.2020's.
        channels: 1 for grey (BT.709 luma), 3 for RGB, 4 for RGB and alpha.

    Returns:
        uint8 ``(H, W, channels)``.
    """
    height, width = picture.shape[:2]
    result = np.empty((height, width, channels), np.uint8)
    to_light, roll_off, encode = _light_of_code(transfer), _roll_off(), _encoding()
    matrix = np.eye(3) if primaries == _PRIMARIES_BT709 else np.linalg.inv(_BT709_TO_BT2020)
    for top in range(0, height, _ROWS):
        strip, shown = picture[top : top + _ROWS], result[top : top + _ROWS]
        # A plane a colour: several times as quick as the three side by side.
        light = [to_light[strip[..., colour]] for colour in range(3)]
        if transfer == "HLG":  # the display's part, by the luminance of the scene
            gain = _mixed(_LUMA_BT2020, light) ** np.float32(_HLG_GAMMA - 1)
            light = [plane * gain for plane in light]
        # One factor for a pixel's three colours keeps its hue.
        gain = roll_off[_index(np.maximum(np.maximum(light[0], light[1]), light[2]))]
        light = [plane * gain for plane in light]
        mapped = [np.maximum(_mixed(row, light), 0) for row in matrix]
        codes = [encode[_index(np.sqrt(plane))] for plane in mapped]
        if channels == 1:
            codes = [_mixed(_LUMA_BT709, codes)]
        for colour, code in enumerate(codes):
            shown[..., colour] = np.rint(code)
        if channels == 4:
            shown[..., 3] = np.minimum((strip[..., 3] + 128.0) / 256, 255)
    return result


def _mixed(weights: Any, planes: list[Floats]) -> Floats:
    total = np.float32(weights[0]) * planes[0]
    for weight, plane in zip(weights[1:], planes[1:], strict=True):
        total += np.float32(weight) * plane
    return total


def _index(share: Floats) -> npt.NDArray[np.int32]:
    return (np.minimum(share, 1.0) * np.float32(_STEPS - 1) + np.float32(0.5)).astype(np.int32)


@cache
def _light_of_code(transfer: str) -> Floats:
    """Light of each 16-bit code, 1 at the peak; of the scene for HLG, of the display for PQ."""
    signal = np.minimum(np.arange(1 << 16) / _CODE_WHITE, 1.0)
    if transfer == "PQ":
        return np.minimum(_pq_nits(signal) / _PEAK_NITS, 1.0).astype(np.float32)
    # BT.2100, table 5: the inverse of the HLG OETF.
    a, b, c = 0.17883277, 0.28466892, 0.55991073
    bright = (np.exp((np.maximum(signal, 0.5) - c) / a) + b) / 12
    return np.where(signal <= 0.5, signal**2 / 3, bright).astype(np.float32)


@cache
def _roll_off() -> Floats:
    """By light (1 at 1000 cd/m2): what to multiply it by, so that 1 comes out as full white."""
    nits = np.arange(_STEPS) / (_STEPS - 1) * _PEAK_NITS
    nits[0] = nits[1] / 2  # black stays black whatever the factor
    signal = _pq_signal(nits) / _pq_signal(_PEAK_NITS)
    white = _pq_signal(_WHITE_NITS) / _pq_signal(_PEAK_NITS)
    # BT.2390, 5.4.1: below the knee as it is, above it a Hermite spline that ends at white.
    knee = 1.5 * white - 0.5
    t = np.maximum(signal - knee, 0.0) / (1 - knee)
    spline = (
        (2 * t**3 - 3 * t**2 + 1) * knee
        + (t**3 - 2 * t**2 + t) * (1 - knee)
        + (3 * t**2 - 2 * t**3) * white
    )
    shown = np.where(signal < knee, signal, spline)
    return (_pq_nits(shown * _pq_signal(_PEAK_NITS)) / _WHITE_NITS / (nits / _PEAK_NITS)).astype(
        np.float32
    )


@cache
def _encoding() -> Floats:
    """By the square root of light: the 8-bit code, not rounded. The root spreads the dark out."""
    root = np.arange(_STEPS) / (_STEPS - 1)
    return (255 * root ** (2 / _DISPLAY_GAMMA)).astype(np.float32)


# BT.2100, table 4.
_M1, _M2 = 2610 / 16384, 2523 / 4096 * 128
_C1, _C2, _C3 = 3424 / 4096, 2413 / 4096 * 32, 2392 / 4096 * 32


def _pq_nits(signal: Any) -> Any:
    root = np.asarray(signal, np.float64) ** (1 / _M2)
    return _PQ_PEAK_NITS * (np.maximum(root - _C1, 0) / (_C2 - _C3 * root)) ** (1 / _M1)


def _pq_signal(nits: Any) -> Any:
    power = (np.asarray(nits, np.float64) / _PQ_PEAK_NITS) ** _M1
    return ((_C1 + _C2 * power) / (1 + _C3 * power)) ** _M2
