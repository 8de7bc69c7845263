from __future__ import annotations

import io
import tarfile

import pytest

from sleeptrain.data.tar_stream import TarStream

NAMES = [
    "a",
    "b/c",
    "/d",
    "e" * 99,
    "e" * 100,
    "e" * 101,
    "f" * 90 + "/" + "f" * 90,
    "é" * 50,
    "\N{GRINNING FACE}",
    " \n",
]


def members() -> list[tuple[tarfile.TarInfo, bytes]]:
    found = []
    for number, name in enumerate(NAMES):
        member = tarfile.TarInfo(name)
        member.size = 511 * number  # none, less and more than a block
        member.mode, member.mtime, member.uname, member.gname = (
            0o600 + number % 2,
            number // 3,
            "user",
            "é" if number == 1 else "group",
        )
        found.append((member, bytes([number]) * member.size))
    return found


@pytest.mark.parametrize("count", [0, 1, len(NAMES)])
def test_bytes_are_those_of_the_standard_library(count: int) -> None:
    files = {kind: io.BytesIO() for kind in (tarfile.TarFile, TarStream)}
    for kind, file in files.items():
        tar = kind(fileobj=file, mode="w")
        for member, content in members()[:count] * 2:
            tar.addfile(member, io.BytesIO(content))
        tar.close()
    assert files[TarStream].getvalue() == files[tarfile.TarFile].getvalue()


def test_members_do_not_stay_in_memory() -> None:
    with TarStream(fileobj=io.BytesIO(), mode="w") as tar:
        for member, content in members():
            tar.addfile(member, io.BytesIO(content))
        assert not tar.members
