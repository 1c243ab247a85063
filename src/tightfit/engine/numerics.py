"""Which types a model is computed in on this machine."""

from __future__ import annotations

from collections.abc import Collection

import torch

from tightfit.plan.schema import ActivationType, GemmType, KvType, Numerics


def numerics(stored: Collection[str], activations: ActivationType) -> Numerics:
    """What a checkpoint of types ``stored`` is computed in here."""
    return Numerics(gemm=gemm_dtype(stored), activations=activations, kv=kv_dtype(stored))


def gemm_dtype(stored: Collection[str]) -> GemmType:
    """The type that prefill multiplies in: float32 where the checkpoint holds float32 or the processor has no
    instructions for bfloat16 products, else bfloat16. ``stored`` are the checkpoint's types."""
    if "F32" in stored and not {"BF16", "F16"} & set(stored):
        return "float32"
    return "bfloat16" if torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported() else "float32"


def kv_dtype(stored: Collection[str]) -> KvType:
    """The type of cached keys and values: that of the checkpoint."""
    if "F32" in stored and not {"BF16", "F16"} & set(stored):
        return "float32"
    return "float16" if "F16" in stored and "BF16" not in stored else "bfloat16"
