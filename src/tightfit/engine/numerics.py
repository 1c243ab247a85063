"""Which types a model is computed in on this machine."""

from __future__ import annotations

from collections.abc import Collection

import torch

from tightfit.kernels import cpu
from tightfit.plan.schema import ActivationType, GemmType, KvType, Numerics


def numerics(stored: Collection[str], activations: ActivationType) -> Numerics:
    """What a checkpoint of types ``stored`` is computed in here."""
    return Numerics(gemm=gemm_dtype(stored, activations), activations=activations, kv=kv_dtype(stored))


def gemm_dtype(stored: Collection[str], activations: ActivationType) -> GemmType:
    """The type that prefill multiplies in: float32 for a checkpoint of float32, else bfloat16 where the processor has
    instructions for its products. Elsewhere products of bytes are faster than those of floats, where they are allowed
    and made with instructions. ``stored`` are the checkpoint's types."""
    if set(stored) == {"F32"}:
        return "float32"
    kernels = cpu.features()["chosen"]
    small = kernels in ("portable", "avx2", "avxvnni")  # kernels for lesser processors stand for these processors
    if not small and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()):
        return "bfloat16"
    return "int8" if activations == "int8" and kernels.startswith("avx") else "float32"


def kv_dtype(stored: Collection[str]) -> KvType:
    """The type of cached keys and values: that of the checkpoint, or bfloat16 for one of few bits."""
    if set(stored) == {"F32"}:
        return "float32"
    return "float16" if "F16" in stored and "BF16" not in stored else "bfloat16"
