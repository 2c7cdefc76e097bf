"""How a row is stored: floating numbers, or 8 or 4 bits with scales. One small class per format.

A quantized row holds its numbers and their scales, so one read brings both. Rows are dequantized after they are
gathered, so a table stays as it is stored. These are pure functions of tensors.
"""

from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F


GROUP = 32
E8M0_BIAS = 127
NAN_BITS = 0x7FC00000
SCALE_BYTES = 2


class RowFormat(ABC):
    """A format.

    name: as in the config's `engram_table_dtype`; None for torch's default type at the time a table is built.
    storage: type of the stored numbers.
    is_trainable: whether rows take gradients.
    """

    name: str | None
    storage: torch.dtype | None
    is_trainable = False

    @abstractmethod
    def row_elements(self, width: int) -> int:
        """Stored elements of a row of `width` channels."""

    @abstractmethod
    def encode(self, rows: torch.Tensor) -> torch.Tensor:
        """(rows, width) floats to (rows, row elements) in the storage type.

        Raises:
            ValueError: a row holds NaN or infinity, which no scale can hold.
        """

    @abstractmethod
    def decode(self, stored: torch.Tensor, width: int) -> torch.Tensor:
        """(..., row elements) as stored to (..., width) floats."""


class FloatRows(RowFormat):
    """Rows of floating numbers, as any parameter."""

    is_trainable = True

    def __init__(self, name: str | None):
        self.name, self.storage = name, None if name is None else getattr(torch, name)

    def row_elements(self, width: int) -> int:
        return width

    def encode(self, rows: torch.Tensor) -> torch.Tensor:
        return rows.to(self.storage or rows.dtype)

    def decode(self, stored: torch.Tensor, width: int) -> torch.Tensor:
        return stored


class Float8Rows(RowFormat):
    """One E4M3 byte a channel, then one E8M0 scale (a power of two) per 32 channels, as DeepSeek-V4.1's tables."""

    name, storage = "float8_e4m3fn", torch.uint8

    def row_elements(self, width: int) -> int:
        return width + -(-width // GROUP)

    def encode(self, rows: torch.Tensor) -> torch.Tensor:
        rows = _finite(rows)
        groups = F.pad(rows, (0, -rows.shape[1] % GROUP)).unflatten(1, (-1, GROUP))
        largest = groups.abs().amax(-1, keepdim=True)
        # The least power of two with which the largest number fits; frexp: largest / 448 = mantissa * 2**exponent.
        mantissa, exponent = torch.frexp(largest / torch.finfo(torch.float8_e4m3fn).max)
        exponent = (exponent - (mantissa == 0.5).int()).clamp(-E8M0_BIAS, E8M0_BIAS)
        scaled = (groups * _power_of_two(-exponent)).flatten(1)[:, : rows.shape[1]]
        numbers = scaled.to(torch.float8_e4m3fn).view(torch.uint8)
        return torch.cat([numbers, (exponent + E8M0_BIAS).squeeze(-1).to(torch.uint8)], dim=1)

    def decode(self, stored: torch.Tensor, width: int) -> torch.Tensor:
        numbers = stored[..., :width].contiguous().view(torch.float8_e4m3fn).float()
        scales = _power_of_two(stored[..., width:].int() - E8M0_BIAS)
        return numbers * scales.repeat_interleave(GROUP, -1)[..., :width]


class ByteRows(RowFormat):
    """Bytes as they are: a part of quantized rows that a file keeps in a tensor of its own. No config names it."""

    name, storage = "bytes", torch.uint8

    def row_elements(self, width: int) -> int:
        return width

    def encode(self, rows: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError("Bytes are a part of a row, and no format of it.")

    def decode(self, stored: torch.Tensor, width: int) -> torch.Tensor:
        return stored


class Int8Rows(RowFormat):
    """One signed byte a channel, then one bfloat16 scale."""

    name, storage = "int8", torch.uint8

    def row_elements(self, width: int) -> int:
        return width + SCALE_BYTES

    def encode(self, rows: torch.Tensor) -> torch.Tensor:
        numbers, scale = _round_to_steps(rows, 127)
        return torch.cat([numbers.view(torch.uint8), scale.contiguous().view(torch.uint8)], dim=1)

    def decode(self, stored: torch.Tensor, width: int) -> torch.Tensor:
        return stored[..., :-SCALE_BYTES].contiguous().view(torch.int8).float() * _scales(stored)


class Int4Rows(RowFormat):
    """Two channels a byte, the first in the low half, each plus 8; then one bfloat16 scale."""

    name, storage = "int4", torch.uint8

    def row_elements(self, width: int) -> int:
        return -(-width // 2) + SCALE_BYTES

    def encode(self, rows: torch.Tensor) -> torch.Tensor:
        numbers, scale = _round_to_steps(rows, 7)
        halves = F.pad(numbers, (0, numbers.shape[1] % 2)).add(8).view(torch.uint8)
        return torch.cat([halves[:, 0::2] | (halves[:, 1::2] << 4), scale.contiguous().view(torch.uint8)], dim=1)

    def decode(self, stored: torch.Tensor, width: int) -> torch.Tensor:
        numbers = stored[..., :-SCALE_BYTES]
        halves = torch.stack([numbers & 15, numbers >> 4], dim=-1).flatten(-2)[..., :width]
        return (halves.float() - 8) * _scales(stored)


def _power_of_two(exponent: torch.Tensor) -> torch.Tensor:
    """2**exponent in float32, exactly, for int32 in [-127, 128]; of 128, which stands for the byte 255, NaN.

    Made of its bits: `ldexp` computes a power, which a GPU need not round exactly.
    """
    # 2**-127 is below the normal numbers: half of the least of them.
    bits = torch.where(exponent == -E8M0_BIAS, 1 << 22, (exponent + E8M0_BIAS) << 23)
    bits = torch.where(exponent > E8M0_BIAS, NAN_BITS, bits)
    return bits.int().view(torch.float32)


def _finite(rows: torch.Tensor) -> torch.Tensor:
    rows = rows.float()
    if not torch.isfinite(rows).all():
        raise ValueError("Rows to be quantized hold NaN or infinity; no scale can hold them.")
    return rows


def _round_to_steps(rows: torch.Tensor, steps: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(rows, width) int8 in [-steps, steps], and (rows, 1) bfloat16 scales."""
    rows = _finite(rows)
    scale = (rows.abs().amax(1, keepdim=True) / steps).to(torch.bfloat16)
    # Rounded to the nearest bfloat16 the scale may be a little short: the largest number is then clamped.
    divisor = scale.float().clamp_min(torch.finfo(torch.float32).tiny)
    return (rows / divisor).round().clamp(-steps, steps).to(torch.int8), scale


def _scales(stored: torch.Tensor) -> torch.Tensor:
    return stored[..., -SCALE_BYTES:].contiguous().view(torch.bfloat16).float()


QUANTIZED = {each.name: each for each in (Float8Rows(), Int8Rows(), Int4Rows())}
QUANTIZED_FORMATS = tuple(QUANTIZED)


def row_format(name: str | torch.dtype | None) -> RowFormat:
    """The format that a config names in `engram_table_dtype`, or that of a floating type.

    Example:
        >>> row_format("int4").row_elements(80), row_format("bfloat16").row_elements(80)
        (42, 80)
    """
    if isinstance(name, torch.dtype):
        name = str(name).removeprefix("torch.")
    return QUANTIZED[name] if name in QUANTIZED else FloatRows(name)


def row_bytes(name: str, width: int) -> int:
    """Bytes of a quantized row of `width` channels.

    Example:
        >>> row_bytes("float8_e4m3fn", 80), row_bytes("int4", 80)
        (83, 42)
    """
    return QUANTIZED[name].row_elements(width)


def quantize_rows(rows: torch.Tensor, name: str) -> torch.Tensor:
    """(rows, width) floats to (rows, row_bytes) uint8, to the nearest number that the format has."""
    return QUANTIZED[name].encode(rows)


def dequantize_rows(stored: torch.Tensor, name: str, width: int) -> torch.Tensor:
    """(..., row_bytes) uint8 to (..., width) float32."""
    return QUANTIZED[name].decode(stored, width)
