"""How the stored weights of a checkpoint are already quantised: recognised, or refused by name, never misread."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from tightfit.checkpoints.config import Config
from tightfit.errors import CheckpointError

HINT = (
    "Checkpoints in bf16, f16, f32, block-scaled fp8 and mxfp4 open. Take the model's unquantised checkpoint: "
    "it is rounded to int8 or int4 while loading where the budget asks for it."
)


@dataclass(frozen=True)
class Fp8Blocks:
    """DeepSeek's fp8: a matrix ``X.weight`` of F8_E4M3 (rows, cols), and ``X.weight_scale_inv`` with one scale for each
    block of ``block`` (rows, cols), the last blocks possibly smaller. value = stored * scale.

    Matrices without a ``weight_scale_inv`` are stored plainly.
    """

    block: tuple[int, int]


@dataclass(frozen=True)
class Mxfp4:
    """gpt_oss' experts: ``X_blocks`` of U8 (..., groups, 16), two E2M1 codes a byte, low nibble first, and ``X_scales``
    of U8 (..., groups), the exponent plus 127 of a power of two for each group of 32 values. OCP Microscaling Formats
    specification, 2023. Everything without ``_blocks`` is stored plainly.
    """

    group: int = 32


Quantization = Fp8Blocks | Mxfp4


def read_quantization(config: Mapping[str, Any], tensors: Iterable[str], name: str) -> Quantization | None:
    """The scheme that config.json declares, or None for plain weights.

    ``tensors`` are the checkpoint's tensor names: packed weights that no key declares are refused too.
    Raises CheckpointError for every method but block-scaled fp8 and mxfp4.
    """
    model = Config(config, name)
    holders = [model] + ([model.text()] if isinstance(config.get("text_config"), dict) else [])
    for holder in holders:
        for key in ("quantization_config", "compression_config"):
            if holder.get(key):
                return _read(holder.section(key), name)
    for tensor in tensors:
        if tensor.endswith((".qweight", ".qzeros", ".weight.absmax", ".weight.quant_state", ".weight_packed")):
            raise CheckpointError(
                f"{name} holds packed weights ('{tensor}') of a quantisation that config.json does not declare", HINT
            )
    return None


def _read(section: Config, name: str) -> Quantization:
    method = section.get("quant_method")
    if method is None and (section.get("load_in_4bit") or section.get("load_in_8bit")):
        method = "bitsandbytes"  # its form before quant_method existed
    if method == "mxfp4":
        return Mxfp4()
    if method == "fp8":
        block = section.integers("weight_block_size", ())
        if len(block) == 2:
            return Fp8Blocks((block[0], block[1]))
        raise CheckpointError(f"{name} is quantised with fp8 without 'weight_block_size', which is not supported", HINT)
    raise CheckpointError(f"{name} is quantised with {method or 'an unnamed method'}, which is not supported", HINT)
