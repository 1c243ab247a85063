"""Which types a model is computed in here."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tightfit.engine.numerics import gemm_dtype, kv_dtype
from tightfit.kernels import cpu


@pytest.fixture
def processor(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """One without instructions for bfloat16, as far as torch can tell."""
    before = cpu.features()["chosen"]
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    yield monkeypatch
    cpu.use(before)


@pytest.mark.parametrize("level", cpu.supported())
def test_prompts_are_multiplied_in_bytes_where_there_are_instructions_for_no_more(
    processor: pytest.MonkeyPatch, level: str
) -> None:
    cpu.use(level)
    if level == "amx":
        return  # has both
    assert gemm_dtype({"BF16"}, "int8") == ("int8" if level.startswith("avx") else "float32")
    assert gemm_dtype({"BF16"}, "float32") == "float32"
    processor.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    assert (gemm_dtype({"BF16"}, "int8") == "bfloat16") == (level not in ("portable", "avx2", "avxvnni"))


def test_a_checkpoint_in_float32_is_computed_in_it() -> None:
    assert gemm_dtype({"F32"}, "int8") == kv_dtype({"F32"}) == "float32"
    assert kv_dtype({"F32", "BF16"}) == "bfloat16"
    assert kv_dtype({"F16"}) == "float16"
    assert kv_dtype({"F32", "Q4_K"}) == "bfloat16"  # GGUF: vectors in float32
