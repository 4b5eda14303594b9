"""Ways to store log-odds and features: float32 -> what is written -> float32.

The shipped ones are roundings, whose decoding is the identity. The 8-bit codes are here to be
compared with: they would need a table, and a code for "not seen".
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.special import expit

from pipeline.cache.schema import round_bits

FloatArray = npt.NDArray[np.float32]
Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Encoding:
    """One way to store an array.

    Attributes:
        name: as tables show it.
        encode: float32 -> what is written, and a scale to be kept beside it (None: no scale).
        decode: what was read, and the scale -> float32.
        bits: mantissa bits of float16 that are kept; None for anything else.
    """

    name: str
    encode: Callable[[FloatArray], tuple[Array, FloatArray | None]]
    decode: Callable[[Array, FloatArray | None], FloatArray]
    bits: int | None = None


def rounded(bits: int) -> Encoding:
    """float16 with that many mantissa bits: what the cache stores."""
    name = "float16" if bits == 10 else f"float16, {bits} bits"
    return Encoding(name, lambda values: (round_bits(values, bits), None), _as_float32, bits)


def log_odds_encodings() -> list[Encoding]:
    """What is offered, or compared with, for log-odds."""
    exact = Encoding("float32", lambda values: (values, None), _as_float32)
    arcsine = Encoding(
        "uint8 arcsine", lambda v: (arcsine_code(v), None), lambda code, _: arcsine_value(code)
    )
    return [exact, *(rounded(bits) for bits in (10, 6, 5, 4, 3)), arcsine]


def feature_encodings() -> list[Encoding]:
    """What is offered, or compared with, for features."""
    scaled = Encoding("int8 per channel", int8_code, int8_value)
    return [*(rounded(bits) for bits in (10, 6, 5, 4, 3, 2)), scaled]


def arcsine_code(values: FloatArray) -> npt.NDArray[np.uint8]:
    """`1 + round(254 * 2/pi * asin(sqrt(sigmoid(d / 3))))`, 128 for d = 0 alone; NaN becomes 0."""
    angle = np.arcsin(np.sqrt(expit(np.nan_to_num(values) / 3)))
    code = 1 + np.rint(254 * 2 / np.pi * angle)
    code = np.where(values > 0, np.maximum(code, 129), code)
    code = np.where(values < 0, np.minimum(code, 127), code)
    return np.where(np.isnan(values), 0, code).astype(np.uint8)


def arcsine_value(code: npt.NDArray[np.uint8]) -> FloatArray:
    """The inverse; the two outermost codes stand for a quarter step inside."""
    step = np.clip((np.arange(256) - 1) / 254, 0.25 / 254, 1 - 0.25 / 254)
    table = (6 * np.log(np.tan(step * np.pi / 2))).astype(np.float32)
    table[0], table[128] = np.nan, 0
    return table[code]


def int8_code(values: FloatArray) -> tuple[npt.NDArray[np.int8], FloatArray]:
    """(F, d, h, w) in steps of the channel's largest magnitude / 127, and those steps
    (F, 1, 1, 1); NaN becomes -128."""
    largest = np.nanmax(np.abs(values), axis=(1, 2, 3), keepdims=True, initial=0)
    steps = np.where(largest > 0, largest / 127, 1).astype(np.float32)
    code = np.rint(values / steps)
    return np.where(np.isnan(code), -128, code).astype(np.int8), steps


def int8_value(code: Array, steps: FloatArray | None) -> FloatArray:
    """The inverse."""
    assert steps is not None
    return np.where(code == -128, np.float32(np.nan), code.astype(np.float32) * steps)


def _as_float32(stored: Array, scale: FloatArray | None) -> FloatArray:
    return stored.astype(np.float32)
