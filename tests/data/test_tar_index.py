from __future__ import annotations

import hashlib
import io
import tarfile
from pathlib import Path

import numpy as np
import pytest

from sleeptrain.data.tar_index import TarArrays

LONG = "k" * 120


def npy(array: np.ndarray) -> bytes:
    content = io.BytesIO()
    np.save(content, array)
    return content.getvalue()


def tar_bytes(
    members: dict[str, bytes], format: int = tarfile.PAX_FORMAT, mtime: float = 0, kind: bytes = tarfile.REGTYPE
) -> bytes:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w", format=format) as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size, info.mtime, info.type = len(data), mtime, kind
            tar.addfile(info, io.BytesIO(data))
    return content.getvalue()


ARRAYS = {f"{key}.npy": npy(np.arange(size, dtype="<u2")) for key, size in (("a", 5), ("b/c", 0), (LONG, 700))}
SOUND = tar_bytes({"a.npy": npy(np.arange(5, dtype="<u2")), "b.npy": npy(np.arange(300, dtype="<u2"))})


def read(content: bytes) -> list:
    return list(TarArrays(io.BytesIO(content)))


# A time with a fraction and a long name take extended headers of each format's own kind.
@pytest.mark.parametrize("format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
@pytest.mark.parametrize("mtime", [0, 1.5])
def test_members_of_every_format(format: int, mtime: float) -> None:
    arrays = dict(ARRAYS)
    if format == tarfile.USTAR_FORMAT:
        arrays[f"{'d' * 90}/{'k' * 40}.npy"] = arrays.pop(f"{LONG}.npy")  # split into prefix and name
    content = tar_bytes(arrays, format, mtime)
    members = TarArrays(io.BytesIO(content))
    found = list(members)
    assert [f"{member.key}.npy" for member in found] == list(arrays)
    for member, data in zip(found, arrays.values(), strict=True):
        expected = np.load(io.BytesIO(data))
        assert member.array.dtype == expected.dtype
        assert member.array.tolist() == expected.tolist()
        assert content[member.offset :][: member.array.nbytes] == expected.tobytes()
    assert (members.size, members.sha256) == (len(content), hashlib.sha256(content).hexdigest())


def test_one_member_after_an_extended_header_for_all() -> None:
    with tarfile.open(fileobj=(content := io.BytesIO()), mode="w", pax_headers={"comment": "x"}) as tar:
        info = tarfile.TarInfo("a.npy")
        info.size = len(ARRAYS["a.npy"])
        tar.addfile(info, io.BytesIO(ARRAYS["a.npy"]))
    assert [member.key for member in read(content.getvalue())] == ["a"]


@pytest.mark.parametrize("position", range(0, 512, 5))
def test_flipped_byte_in_a_header(position: int) -> None:
    content = bytearray(SOUND)
    content[position] ^= 0x11
    with pytest.raises(ValueError, match="at byte 0: "):
        read(bytes(content))


@pytest.mark.parametrize("size", [0, 100, 512, 700, 1024, 1536, 2500])
def test_cut_file(size: int) -> None:
    with pytest.raises(ValueError, match=rf"ends early, at byte {size}\b"):
        read(SOUND[:size])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (tar_bytes({"a.txt": b"text"}), "'a.txt' is no .npy file"),
        (tar_bytes({"a.b.npy": npy(np.arange(3))}), r"'a\.b\.npy' is no .npy file"),
        (tar_bytes({".npy": npy(np.arange(3))}), "is no .npy file"),
        (tar_bytes({"a.npy": b"text"}), "no .npy array"),
        (tar_bytes({"a.npy": npy(np.arange(5))[:-1]}), "or cut"),
        (tar_bytes({"a.npy": npy(np.zeros((2, 2)))}), r"\[2, 2\] is not one-dimensional"),
        (tar_bytes({"a.npy": npy(np.array(3))}), "not one-dimensional"),
        (tar_bytes({"folder": b""}, kind=tarfile.DIRTYPE), "'folder.*' is no file"),
        (tar_bytes({"link": b""}, kind=tarfile.SYMTYPE), "'link' is no file"),
        (b"no tar" * 512, "no USTAR header"),
    ],
)
def test_members_that_are_no_arrays_are_refused(content: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=rf"at byte 0: .*{message}"):
        read(content)


def test_members_are_read_one_at_a_time(tmp_path: Path) -> None:
    content = io.BytesIO(tar_bytes({f"{number:03d}.npy": npy(np.arange(500)) for number in range(100)}))
    next(iter(TarArrays(content)))
    assert content.tell() < 10_000
