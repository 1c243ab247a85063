"""Small operations on rows of float32 numbers: compiled where that was built, else the torch references.

They are many and short in a decoding step, so they pass addresses and check nothing that the decoder ensures: tensors
are float32 with whole rows of consecutive numbers.
"""

from __future__ import annotations

import torch

from tightfit.kernels import cpu, reference
from tightfit.kernels.reference import Parts

COMPILED_ACTIVATIONS = ("silu", "gelu_pytorch_tanh", "relu", "clamped_swiglu")


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, out: torch.Tensor) -> None:
    """``out = x / rms(x) * weight`` over the last dimension (https://arxiv.org/abs/1910.07467); it may be ``x``.

    ``x`` is (tokens, features) or (tokens, heads, features).
    """
    if not cpu.available():
        reference.rms_norm(x, weight, eps, out)
        return
    if x.ndim == 2:
        outer, cols = x.shape
        inner, x_inner, out_inner = 1, 0, 0
    else:
        outer, inner, cols = x.shape
        x_inner, out_inner = x.stride(1), out.stride(1)
    cpu.module.rms_norm(
        x.data_ptr(),
        x.stride(0),
        x_inner,
        outer,
        inner,
        cols,
        weight.data_ptr(),
        eps,
        out.data_ptr(),
        out.stride(0),
        out_inner,
        cpu.threads(),
    )


def add_(x_: torch.Tensor, y: torch.Tensor, scale: float = 1.0) -> None:
    """``x += scale * y`` for ``x`` (rows, features) and ``y`` of the same shape or (features,)."""
    if not cpu.available():
        reference.add_(x_, y, scale)
        return
    rows, cols = x_.shape
    y_stride = y.stride(0) if y.ndim == 2 else 0
    cpu.module.add(x_.data_ptr(), x_.stride(0), y.data_ptr(), y_stride, rows, cols, scale, cpu.threads())


def glu(gate_: torch.Tensor, up_: torch.Tensor, activation: str, out: torch.Tensor, parts: Parts) -> None:
    """``out = activation(gate) * up`` on (rows, features); ``gate`` and ``up`` are used as scratch, ``out`` may be
    ``gate``. See :func:`tightfit.kernels.reference.glu`."""
    if not cpu.available() or activation not in COMPILED_ACTIVATIONS:
        reference.glu(gate_, up_, activation, out, parts)
        return
    rows, cols = gate_.shape
    cpu.module.glu(
        gate_.data_ptr(),
        gate_.stride(0),
        up_.data_ptr(),
        up_.stride(0),
        rows,
        cols,
        activation,
        out.data_ptr(),
        out.stride(0),
        cpu.threads(),
    )


def softcap_(x_: torch.Tensor, cap: float, parts: Parts) -> None:
    """``x = cap * tanh(x / cap)``"""
    if not cpu.available():
        reference.softcap_(x_, cap, parts)
        return
    cpu.module.softcap(x_.data_ptr(), x_.stride(0), *x_.shape, cap, cpu.threads())
