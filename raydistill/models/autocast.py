"""The precision in which a network computes."""

from __future__ import annotations

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Matrix products and convolutions in this precision, during a `with` block. Weights stay in fp32, and so do
    softmax, losses and the statistics of norms."""
    return torch.autocast(device.type, DTYPES[precision], enabled=precision != "fp32")
