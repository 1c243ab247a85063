"""What codes of pages make of numbers, where methods are fitted."""

from __future__ import annotations

import torch

from tightfit.kernels.codec import PAGE, Codec


def rounded(x: torch.Tensor, codec: Codec) -> torch.Tensor:
    """Numbers (n, heads, dim) of whole pages as they are read when ``codec`` stored them."""
    pages, axis = x.unflatten(0, (-1, PAGE)), 1 if codec.per_channel else 3
    found = []
    for part in [pages] if codec.per_channel else pages.split(codec.group, 3):
        low, high = part.amin(axis, keepdim=True), part.amax(axis, keepdim=True)
        scale, low = ((high - low) / (2**codec.bits - 1)).half().float(), low.half().float()
        codes = torch.where(scale > 0, ((part - low) / scale).round().clamp(0, 2**codec.bits - 1), 0)
        found.append(codes * scale + low)
    return torch.cat(found, 3).flatten(0, 1)
