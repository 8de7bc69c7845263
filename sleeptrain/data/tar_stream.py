"""A tar writer with the same output as the standard library's, in a tenth of the time for each member."""

from __future__ import annotations

import tarfile
from functools import lru_cache
from typing import Any

from sleeptrain.data.tar_index import CHECKSUM, padding

NAME = tarfile.LENGTH_NAME


class TarStream(tarfile.TarFile):
    """A `TarFile` that writes the same headers faster, and keeps no list of members, which a writer does not need."""

    def addfile(self, tarinfo: tarfile.TarInfo, fileobj: Any = None) -> None:
        """Append a plain file. fileobj: its content, read at once.

        The standard library builds each header from a copy of `tarinfo`. Here the header is a template for all members
        of one size, and only the name and the checksum are filled in. The standard library still writes the members
        that need an extended header.
        """
        assert fileobj is not None and self.fileobj is not None
        content = fileobj.read()
        name = tarinfo.name.encode()
        template = _template(tarinfo.size, tarinfo.mode, tarinfo.mtime, tarinfo.uname, tarinfo.gname)
        if template is not None and len(name) <= NAME and name.isascii():
            before, after, checksum = template
            # The checksum of a header is the sum of its bytes.
            header = name.ljust(NAME, b"\0") + before + b"%06o\0 " % (checksum + sum(name)) + after
        else:
            header = tarinfo.tobuf(self.format, self.encoding or "utf-8", self.errors or "strict")
        block = header + content + bytes(padding(len(content)))
        self.fileobj.write(block)
        self.offset += len(block)


@lru_cache(2**14)
def _template(size: int, mode: int, mtime: int, user: str, group: str) -> tuple[bytes, bytes, int] | None:
    """The header of a member without a name: (bytes between name and checksum, bytes after the checksum, checksum).

    None if the member needs an extended header.
    """
    member = tarfile.TarInfo("")
    member.size, member.mode, member.mtime, member.uname, member.gname = size, mode, mtime, user, group
    header = member.tobuf(tarfile.PAX_FORMAT)
    if len(header) != tarfile.BLOCKSIZE:
        return None
    return header[NAME : CHECKSUM.start], header[CHECKSUM.stop :], int(header[CHECKSUM].strip(b"\0 "), 8)
