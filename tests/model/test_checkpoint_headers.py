"""Headers of safetensors files that contradict themselves or the file: refused by name, whatever the damage."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moray.configs.errors import CheckpointError
from moray.model.safetensors_file import MAX_HEADER_BYTES, read_header


def write(path: Path, header: object, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


@pytest.mark.parametrize(
    ("described", "why"),
    [
        (3, "not by an object"),
        ({"dtype": 1, "shape": [1], "data_offsets": [0, 4]}, "dtype is 1"),
        ({"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}, "shape is"),
        ({"dtype": "F32", "shape": [True], "data_offsets": [0, 4]}, "shape is"),
        ({"dtype": "F32", "shape": None, "data_offsets": [0, 4]}, "shape is"),
        ({"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}, "data_offsets are"),
        ({"dtype": "F32", "shape": [1], "data_offsets": [0]}, "data_offsets are"),
        ({"dtype": "F32", "shape": [1], "data_offsets": [0.0, 4]}, "data_offsets are"),
        ({"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}, "takes 8 bytes as F32"),
        ({"dtype": "F32", "shape": [10**30], "data_offsets": [0, 4 * 10**30]}, "truncated"),
    ],
)
def test_bad_entry(tmp_path: Path, described: object, why: str) -> None:
    file = write(tmp_path / "x.safetensors", {"some.weight": described}, bytes(4))
    with pytest.raises(CheckpointError, match=f"x.safetensors.*some.weight.*{why}|x.safetensors.*{why}.*some.weight"):
        read_header(file)


def test_overlap(tmp_path: Path) -> None:
    entry = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    file = write(tmp_path / "x", {"a": entry, "b": entry | {"data_offsets": [4, 12]}}, bytes(12))
    with pytest.raises(CheckpointError, match="tensors a and b overlap"):
        read_header(file)


@pytest.mark.parametrize("header", [b"{", b"[]", b"\xff\xfe", b"[" * 100_000])
def test_not_an_object(tmp_path: Path, header: bytes) -> None:
    with pytest.raises(CheckpointError, match="its header is"):
        read_header(write(tmp_path / "x", header))


def test_an_absurd_header_is_not_read(tmp_path: Path) -> None:
    file = tmp_path / "x"
    with file.open("wb") as stream:
        stream.write((1 << 40).to_bytes(8, "little"))
        stream.truncate(MAX_HEADER_BYTES + 100)  # sparse
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        read_header(file)


def test_dtypes_nobody_asks_for_are_let_be(tmp_path: Path) -> None:
    entries = {
        "a": {"dtype": "I64", "shape": [1], "data_offsets": [0, 8]},
        "b": {"dtype": "F4_OF_TOMORROW", "shape": [3], "data_offsets": [8, 10]},
    }
    header = read_header(write(tmp_path / "x", {"__metadata__": {"format": "pt"}} | entries, bytes(10)))
    assert [entry.nbytes for entry in header.entries.values()] == [8, 2]


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cut=st.integers(0, 400), flips=st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), max_size=4))
def test_any_damage_is_a_checkpoint_error_or_harmless(tmp_path: Path, cut: int, flips: list[tuple[int, int]]) -> None:
    entries = {
        f"t{index}": {"dtype": "F32", "shape": [2], "data_offsets": [8 * index, 8 * index + 8]} for index in range(3)
    }
    damaged = bytearray(write(tmp_path / "good", entries, bytes(24)).read_bytes())
    for position, value in flips:
        damaged[position % len(damaged)] = value
    file = tmp_path / "damaged"
    file.write_bytes(damaged[: max(0, len(damaged) - cut)] if cut < 200 else damaged)
    try:
        header = read_header(file)
    except CheckpointError:
        return
    size = file.stat().st_size
    assert all(entry.offset + entry.nbytes <= size for entry in header.entries.values())
