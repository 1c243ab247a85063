"""Speeds that are easy to reckon with."""

from __future__ import annotations

from typing import Any

from tightfit.plan.schema import Numerics
from tightfit.plan.speeds import AttentionSpeed, DiskSpeed, FormatSpeed, Speeds

NUMERICS = Numerics(gemm="bfloat16", kv="bfloat16")
PER_BYTE, PER_WEIGHT = 1e-10, 4e-10  # seconds: of matrices when decoding one token, and of chunks of 512
LAYER, ANEW, STEP = 1e-5, 5e-5, 2e-4
PER_KEY, PER_QUERY, PER_PAIR, ATTENTION = 1e-8, 1e-7, 1e-10, 2e-6
NUMBER = 1e-10  # of a prompt's activations
DISK = DiskSpeed(streamed=2e9, copied=1e9, blocks={1 << 20: 1e9}, overlap=0.25)


def of_format(bytes_per_weight: float) -> FormatSpeed:
    return FormatSpeed(
        bytes_per_weight=bytes_per_weight,
        vector={1: PER_BYTE, 2: 1.5 * PER_BYTE},
        product={16: PER_WEIGHT / 4, 512: PER_WEIGHT},
    )


def of_cache() -> AttentionSpeed:
    def flat(value: float) -> dict[int, dict[int, float]]:
        return {256: {1: value}}

    return AttentionSpeed(layer=ATTENTION, decode=flat(PER_KEY), query=flat(PER_QUERY), prefill=flat(PER_PAIR))


def speeds(**changes: Any) -> Speeds:
    made = Speeds(
        threads=2,
        numerics=NUMERICS,
        padded=False,
        read={1: 1e10, 2: 2e10},
        formats={name: of_format(width) for name, width in {"bf16": 2, "int8": 17 / 16, "int4": 9 / 16}.items()},
        attention={name: of_cache() for name in ("none", "int8", "int4")},
        norm=NUMBER,
        glu=NUMBER,
        rotate=NUMBER,
        lookup=NUMBER,
        layer={64: LAYER},
        anew=ANEW,
        step=STEP,
        disk=DISK,
    )
    return made.model_copy(update=changes)
