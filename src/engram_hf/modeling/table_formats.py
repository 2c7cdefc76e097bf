"""Rows in 8 or 4 bits: each row holds its numbers and their scales, so one read brings both.

Formats, by the name in the config's `engram_table_dtype`; a row is `row_bytes(format, width)` bytes long:

* `float8_e4m3fn`: one E4M3 byte a channel, then one E8M0 scale (a power of two) per 32 channels, as DeepSeek-V4.1
  stores its tables;
* `int8`: one signed byte a channel, then one bfloat16 scale;
* `int4`: two channels a byte, the first one in the low half, each plus 8; then one bfloat16 scale.

Pure functions of tensors. Rows are dequantised after they are gathered, so a table stays as it is stored.
"""

import torch


GROUP = 32
E8M0_BIAS = 127
QUANTIZED_FORMATS = ("float8_e4m3fn", "int8", "int4")
SCALE_BYTES = 2


def row_bytes(row_format: str, width: int) -> int:
    """Bytes of a row of `width` channels.

    Example:
        >>> row_bytes("float8_e4m3fn", 80), row_bytes("int4", 80)
        (83, 42)
    """
    if row_format == "float8_e4m3fn":
        return width + -(-width // GROUP)
    return (width if row_format == "int8" else -(-width // 2)) + SCALE_BYTES


def quantize_rows(rows: torch.Tensor, row_format: str) -> torch.Tensor:
    """(rows, width) floats to (rows, row_bytes) uint8, to the nearest number that the format has.

    Raises:
        ValueError: a row holds NaN or infinity.
    """
    rows = rows.float()
    if not torch.isfinite(rows).all():
        raise ValueError("Rows to be quantized hold NaN or infinity; no scale can hold them.")
    if row_format == "float8_e4m3fn":
        groups = torch.nn.functional.pad(rows, (0, -rows.shape[1] % GROUP)).unflatten(1, (-1, GROUP))
        largest = groups.abs().amax(-1, keepdim=True)
        # The least power of two with which the largest number fits; frexp: largest / 448 = mantissa * 2**exponent.
        mantissa, exponent = torch.frexp(largest / torch.finfo(torch.float8_e4m3fn).max)
        exponent = (exponent - (mantissa == 0.5).int()).clamp(-E8M0_BIAS, E8M0_BIAS)
        scaled = torch.ldexp(groups, -exponent).flatten(1)[:, : rows.shape[1]]
        numbers = scaled.to(torch.float8_e4m3fn).view(torch.uint8)
        return torch.cat([numbers, (exponent + E8M0_BIAS).squeeze(-1).to(torch.uint8)], dim=1)
    steps = 127 if row_format == "int8" else 7
    scale = (rows.abs().amax(1, keepdim=True) / steps).to(torch.bfloat16)
    # Rounded to the nearest bfloat16 the scale may be a little short: the largest number is then clamped.
    divisor = scale.float().clamp_min(torch.finfo(torch.float32).tiny)
    numbers = (rows / divisor).round().clamp(-steps, steps).to(torch.int8)
    if row_format == "int4":
        halves = torch.nn.functional.pad(numbers, (0, rows.shape[1] % 2)).add(8).view(torch.uint8)
        numbers = halves[:, 0::2] | (halves[:, 1::2] << 4)
    return torch.cat([numbers.view(torch.uint8), scale.contiguous().view(torch.uint8)], dim=1)


def dequantize_rows(packed: torch.Tensor, row_format: str, width: int) -> torch.Tensor:
    """(..., row_bytes) uint8 to (..., width) float32."""
    if row_format == "float8_e4m3fn":
        numbers = packed[..., :width].contiguous().view(torch.float8_e4m3fn).float()
        exponent = packed[..., width:].int() - E8M0_BIAS
        return torch.ldexp(numbers, exponent.repeat_interleave(GROUP, -1)[..., :width])
    scale = packed[..., -SCALE_BYTES:].contiguous().view(torch.bfloat16).float()
    stored = packed[..., :-SCALE_BYTES]
    if row_format == "int8":
        return stored.contiguous().view(torch.int8).float() * scale
    halves = torch.stack([stored & 15, stored >> 4], dim=-1).flatten(-2)[..., :width]
    return (halves.float() - 8) * scale
