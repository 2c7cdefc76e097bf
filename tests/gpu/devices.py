"""Devices of the tests of this folder. Everything a CPU can run of them runs there too."""

import pytest
import torch


TABLES = ("model.layers.0.engram.table", "model.layers.2.engram.table")
TIERS = ("resident", "host", "disk", "mixed")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU, and torch finds none here")
DEVICES = ["cpu", pytest.param("cuda", marks=needs_gpu)]
# About 5 milliseconds of a GPU at 2 GHz.
SLEEP_CYCLES = 10_000_000


def device_map(device: str, tier: str) -> dict:
    """The backbone on a device, and the tables on a tier; "mixed" is one table on each."""
    places = {"mixed": ("host", "disk")}.get(tier, (tier, tier))
    return {"": device, **dict(zip(TABLES, places, strict=True))}
