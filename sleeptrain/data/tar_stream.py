"""A tar file to write to that has the bytes of the standard library's and takes a tenth of its time for a member."""

from __future__ import annotations

import tarfile
from functools import lru_cache
from typing import Any

from sleeptrain.data.tar_index import CHECKSUM, padding

NAME = tarfile.LENGTH_NAME


class TarStream(tarfile.TarFile):
    """As `TarFile`, whose headers it writes; it keeps no list of members, which nobody asks for while it is written."""

    def addfile(self, tarinfo: tarfile.TarInfo, fileobj: Any = None) -> None:
        """Append a plain file, whose content `fileobj` gives whole.

        The standard library makes each header anew, with a copy of `tarinfo`; here it is a template for all members of
        one size, in which the name and the checksum are filled in. Members that need an extended header go its way.
        """
        assert fileobj is not None and self.fileobj is not None
        content = fileobj.read()
        name = tarinfo.name.encode()
        template = _template(tarinfo.size, tarinfo.mode, tarinfo.mtime, tarinfo.uname, tarinfo.gname)
        if template is not None and len(name) <= NAME and name.isascii():
            before, after, checksum = template
            # The checksum is the sum of all bytes, so that of the name is added.
            header = name.ljust(NAME, b"\0") + before + b"%06o\0 " % (checksum + sum(name)) + after
        else:
            header = tarinfo.tobuf(self.format, self.encoding or "utf-8", self.errors or "strict")
        block = header + content + bytes(padding(len(content)))
        self.fileobj.write(block)
        self.offset += len(block)


@lru_cache(2**14)
def _template(size: int, mode: int, mtime: int, user: str, group: str) -> tuple[bytes, bytes, int] | None:
    """The header of a member without a name: what is before the checksum, what is after it, and the checksum.

    None where the rest needs an extended header.
    """
    member = tarfile.TarInfo("")
    member.size, member.mode, member.mtime, member.uname, member.gname = size, mode, mtime, user, group
    header = member.tobuf(tarfile.PAX_FORMAT)
    if len(header) != tarfile.BLOCKSIZE:
        return None
    return header[NAME : CHECKSUM.start], header[CHECKSUM.stop :], int(header[CHECKSUM].strip(b"\0 "), 8)
