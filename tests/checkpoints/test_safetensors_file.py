"""Headers of safetensors files: read as the safetensors library reads them, and refused where they lie."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save, save_file

from tightfit.checkpoints.safetensors_file import DTYPE_BITS, TensorInfo, read_header
from tightfit.errors import CheckpointError


def read(content: bytes, size: int | None = None) -> dict[str, TensorInfo]:
    size = len(content) if size is None else size
    return read_header(io.BytesIO(content), size, "m.safetensors", "/x/m.safetensors").tensors


def test_offsets_point_at_the_bytes_that_the_library_wrote(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    arrays = {
        "matrix": rng.standard_normal((3, 5)).astype(np.float32),
        "half": rng.standard_normal(7).astype(np.float16),
        "long": np.arange(4, dtype=np.int64),
        "flags": np.array([True, False, True]),
        "scalar": np.array(3.5),
        "empty": np.zeros((0, 4), np.float32),
    }
    save_file(arrays, tmp_path / "m.safetensors", metadata={"format": "pt"})
    content = (tmp_path / "m.safetensors").read_bytes()
    found = read(content)
    assert found.keys() == arrays.keys()
    for name, array in arrays.items():
        tensor = found[name]
        assert content[tensor.offset : tensor.offset + tensor.nbytes] == array.tobytes()
        assert tensor.shape == array.shape
        assert tensor.file == "m.safetensors"
    assert [found[name].dtype for name in arrays] == ["F32", "F16", "I64", "BOOL", "F64", "F32"]


@pytest.mark.parametrize(("dtype", "bits"), DTYPE_BITS.items())
def test_every_dtype_has_its_size(raw, dtype: str, bits: int) -> None:
    nbytes = 6 * bits // 8  # six values, also whole bytes at four bits each
    content = raw({"t": {"dtype": dtype, "shape": [2, 3], "data_offsets": [0, nbytes]}}, bytes(nbytes))
    assert read(content)["t"].nbytes == nbytes


def entry(shape=(2,), begin=0, end=2, dtype="U8"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


BAD = {
    "unknown dtype": ({"t": entry(dtype="F7")}, 2, "unknown dtype 'F7'"),
    "dtype is no text": ({"t": entry(dtype=["U8"])}, 2, "unknown dtype"),
    "size of another shape": ({"t": entry(shape=(3,))}, 2, "expected 3 bytes, found 2"),
    "half a byte": ({"t": entry(shape=(3,), dtype="F4")}, 2, "expected 2 bytes, found 2"),
    "overlap": ({"a": entry(), "b": entry(begin=1, end=3)}, 3, "'a' and 'b' in /x/m.safetensors overlap"),
    "same bytes twice": ({"a": entry(), "b": entry()}, 2, "overlap"),
    "hole": ({"a": entry(), "b": entry(begin=3, end=5)}, 5, "1 bytes before tensor 'b'"),
    "backwards": ({"t": entry(begin=2, end=0)}, 2, "offsets"),
    "negative": ({"t": entry(begin=-2, end=0)}, 2, "offsets"),
    "fractional offset": ({"t": entry(end=2.0)}, 2, "offsets"),
    "negative shape": ({"t": entry(shape=(-1, -2))}, 2, "shape"),
    "huge shape": ({"t": entry(shape=(2**60, 2**60))}, 2, "shape"),
    "true as a size": ({"t": entry(shape=(True, 2))}, 2, "shape"),
    "entry without dtype": ({"t": {"shape": [2], "data_offsets": [0, 2]}}, 2, "expected dtype, shape"),
    "entry is a number": ({"t": 5}, 2, "expected dtype, shape"),
    "three offsets": ({"t": {"dtype": "U8", "shape": [2], "data_offsets": [0, 1, 2]}}, 2, "expected dtype, shape"),
    "metadata is a list": ({"__metadata__": []}, 0, "__metadata__"),
    # 8 bytes of length and 60 of header before the data
    "truncated data": ({"t": entry(shape=(9,), end=9)}, 4, "truncated: expected 77 bytes, found 72"),
    "too long": ({"t": entry()}, 3, "too long"),
    "not JSON": (b"{'t': 1}", 0, "not valid JSON"),
    "not UTF-8": (b'{"\xff": 1}', 0, "not valid JSON"),
    "a list": (b"[]", 0, "not a JSON object"),
    "too deep": (b"[" * 100_000, 0, "not valid JSON"),
    "twice the same name": (b'{"t":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},"t":1}', 0, "'t' appears twice"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_header_that_lies_is_refused(raw, case: str) -> None:
    header, data, message = BAD[case]
    with pytest.raises(CheckpointError, match=message) as caught:
        read(raw(header, bytes(data)))
    assert "m.safetensors" in caught.value.message
    assert caught.value.hint


def test_a_truncated_file_is_refused_with_its_sizes(raw) -> None:
    content = save({"t": np.zeros(100, np.float32)})
    with pytest.raises(CheckpointError, match=f"expected {len(content)} bytes, found {len(content) - 1}"):
        read(content[:-1])
    with pytest.raises(CheckpointError, match="expected at least 8 bytes, found 3"):
        read(content[:3])
    with pytest.raises(CheckpointError, match="truncated: expected at least"):
        read(content[:20])
    with pytest.raises(CheckpointError, match="expected a header of"):  # the file shrank after its size was taken
        read(content[:20], size=len(content))
    with pytest.raises(CheckpointError, match="its header would have"):
        read(raw(b"{}", length=2**63))


def test_a_git_lfs_pointer_is_recognised() -> None:
    with pytest.raises(CheckpointError, match="Git LFS pointer") as caught:
        read(b"version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 123\n")
    assert "git lfs pull" in caught.value.hint


WHOLE = save({"a": np.arange(6, dtype=np.float32), "b": np.ones((2, 2), np.int8)}, {"format": "pt"})


@given(st.integers(0, len(WHOLE) - 29), st.binary(min_size=1, max_size=8))
def test_damage_anywhere_in_the_header_is_refused_or_harmless(position: int, noise: bytes) -> None:
    content = WHOLE[:position] + noise + WHOLE[position + len(noise) :]
    try:
        found = read(content)
    except CheckpointError:
        return
    length = 8 + int.from_bytes(content[:8], "little")
    assert sum(tensor.nbytes for tensor in found.values()) == len(content) - length
    assert json.loads(content[8:length]).keys() - {"__metadata__"} == found.keys()
