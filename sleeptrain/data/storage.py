"""Storage of a data set's files: a local folder, an object store, or the output of a shell command.

Remote files are fetched whole into a folder on this machine, under the sha256 of their content as name. All processes
of the machine share that folder: one process fetches a file, the others wait.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol, TypeVar

import fsspec
from braceexpand import braceexpand

from sleeptrain.config.environment import expand
from sleeptrain.data.pipes import PIPE, open_pipe
from sleeptrain.errors import ConfigError, DataError
from sleeptrain.files import whole_file
from sleeptrain.plain_files import require_plain
from sleeptrain.remote import Retries, check_protocol
from sleeptrain.terminal import hide_credentials

Result = TypeVar("Result")

CHUNK = 2**20
NUM_LOCKS = 256
ABANDONED = 3600  # seconds after which a partial file counts as abandoned
OWN_FILE = re.compile(r"\.?[0-9a-f]{64}(\.partial-[0-9a-f]{8})?")
# A file name with a list or a range in braces. Its characters have no special meaning in a shell or a URL.
NAME_CHARACTERS = r"[\w.,@%+={}-]*"
SLOT = re.compile(NAME_CHARACTERS + r"\{[\w-]*(?:\.\.|,)[\w.,-]*\}" + NAME_CHARACTERS)


@dataclass(frozen=True)
class Cache:
    """The local copies of remote files: at most `gib` GiB in `folder`; the least recently used are removed first.

    folder: empty for $SLEEPTRAIN_CACHE or, if that is not set, ~/.cache/sleeptrain/shards.
    """

    folder: str | Path = ""
    gib: float = 64

    @property
    def path(self) -> Path:
        named = self.folder or os.environ.get("SLEEPTRAIN_CACHE")
        return Path(named) if named else Path.home() / ".cache" / "sleeptrain" / "shards"


DEFAULT_RETRIES = Retries()
DEFAULT_CACHE = Cache()


class Storage(Protocol):
    """The files of one folder, by name. sha256: that of the file's content, if it is known."""

    def where(self, name: str) -> str:
        """The file's path, URL or command, for a message."""

    def read(self, name: str) -> bytes:
        """The content of a file whose sha256 is unknown. Raises OSError, or DataError if a retry is useless."""

    def open(self, name: str, sha256: str) -> int:
        """A descriptor for reading; the caller closes it. Raises OSError, or DataError if a retry is useless."""

    def discard(self, name: str, sha256: str) -> None:
        """Remove a damaged local copy, so that the next `open` fetches the file again."""

    def prefetch(self, name: str, sha256: str) -> None:
        """Fetch the file, so that `open` and reading do not wait. Raises the errors of `open`."""


class LocalFolder:
    """Files of a local folder, without copies."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def where(self, name: str) -> str:
        return str(self.folder / name)

    def read(self, name: str) -> bytes:
        require_plain(self.folder / name)
        return (self.folder / name).read_bytes()

    def open(self, name: str, sha256: str) -> int:
        require_plain(self.folder / name)
        try:
            return os.open(self.folder / name, os.O_RDONLY | os.O_CLOEXEC)
        except (FileNotFoundError, PermissionError) as error:
            raise DataError(f"{self.where(name)}: {error.strerror}") from error

    def discard(self, name: str, sha256: str) -> None:
        """Do nothing, because the file is the original."""

    def prefetch(self, name: str, sha256: str) -> None:
        if hasattr(os, "posix_fadvise"):
            descriptor = self.open(name, sha256)
            try:
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_WILLNEED)
            finally:
                os.close(descriptor)


class RemoteFolder:
    """Files at `prefix` + name + `suffix`: a URL for fsspec, or `pipe:` and a shell command that writes the file.

    A local copy appears only if it is whole and has the right sha256. hide: removes the secrets of the location from a
    message. Raises DataError: no such protocol, or the cache folder cannot be made.
    """

    def __init__(
        self, prefix: str, suffix: str, cache: Cache, retries: Retries, hide: Callable[[str], str] = hide_credentials
    ) -> None:
        self._prefix = prefix
        self._suffix = suffix
        self._hide = hide
        self._folder = cache.path
        self._limit = int(cache.gib * 2**30)
        self._retries = retries
        if not prefix.startswith(PIPE):
            check_protocol(prefix, hide)
        try:
            (self._folder / "locks").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DataError(
                f"{self._folder}: remote shards cannot be kept here ({error.strerror}); set data.shards.cache or "
                "SLEEPTRAIN_CACHE to a folder that can be written"
            ) from error

    def where(self, name: str) -> str:
        return self._hide(self._url(name))

    def read(self, name: str) -> bytes:
        def read_once() -> bytes:
            with self._stream(name) as stream:
                return stream.read()

        return self._retried(read_once, name)

    def open(self, name: str, sha256: str) -> int:
        path = self._folder / sha256
        for _ in range(self._retries.attempts):  # another process may remove the copy between `prefetch` and `os.open`
            with contextlib.suppress(FileNotFoundError):
                descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
                with contextlib.suppress(OSError):  # the time of use; a copy that was removed meanwhile needs none
                    os.utime(path)
                return descriptor
            self.prefetch(name, sha256)
        raise DataError(f"{self.where(name)}: its copy in {self._folder} vanishes; raise data.shards.cache_gib")

    def discard(self, name: str, sha256: str) -> None:
        (self._folder / sha256).unlink(missing_ok=True)

    def prefetch(self, name: str, sha256: str) -> None:
        path = self._folder / sha256
        with self._locked(sha256):
            if path.exists():
                return
            self._retried(lambda: self._download(name, sha256, path), name)
        self._make_room(path)

    def _url(self, name: str) -> str:
        return f"{self._prefix}{name}{self._suffix}"

    def _stream(self, name: str) -> contextlib.AbstractContextManager[BinaryIO]:
        url = self._url(name)
        return open_pipe(url) if url.startswith(PIPE) else fsspec.open(url, "rb")

    def _retried(self, action: Callable[[], Result], name: str) -> Result:
        def hidden() -> Result:
            try:
                return action()
            except Exception as error:  # each protocol has its own error types, and their messages may hold the URL
                raise OSError(self._hide(str(error) or type(error).__name__)) from error

        try:
            return self._retries.run(hidden, self.where(name), OSError)
        except Exception as error:
            raise DataError(
                f"{self.where(name)}: cannot be fetched in {self._retries.attempts} attempts "
                f"({error}); check the location and that this machine may read it"
            ) from error

    def _download(self, name: str, sha256: str, path: Path) -> None:
        digest = hashlib.sha256()
        with whole_file(path) as file:
            with self._stream(name) as stream:
                while chunk := stream.read(CHUNK):
                    digest.update(chunk)
                    file.write(chunk)
            if digest.hexdigest() != sha256:
                raise OSError(f"the {file.tell()} bytes that came do not match the sha256 in the index: cut or changed")

    @contextlib.contextmanager
    def _locked(self, sha256: str) -> Iterator[None]:
        """Allow one process and thread at a time. Lock files are never removed: removing one in use would free it."""
        with open(self._folder / "locks" / f"{int(sha256[:8], 16) % NUM_LOCKS:02x}", "wb") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _make_room(self, keep: Path) -> None:
        """Remove the least recently used copies until the cache is within its limit. Open files stay readable.

        Other files in the folder are never removed, because `data.shards.cache` may name a wrong folder. keep: a copy
        that has just been written. Its time is the current time of the file system, even if this machine's clock is
        wrong.
        """
        try:
            now = keep.stat().st_mtime
        except FileNotFoundError:  # another process makes room at the same time
            return
        copies: list[tuple[float, int, str]] = []  # (time of use, bytes, name)
        with os.scandir(self._folder) as entries:
            for entry in entries:
                with contextlib.suppress(FileNotFoundError):
                    stat = entry.stat()
                    partial = entry.name.startswith(".") and now - stat.st_mtime < ABANDONED
                    if OWN_FILE.fullmatch(entry.name) and entry.is_file() and not partial:
                        copies.append((stat.st_mtime, stat.st_size, entry.name))
        excess = sum(size for _, size, _ in copies) - self._limit
        for _, size, name in sorted(copies):
            if excess <= 0:
                return
            if name != keep.name:
                (self._folder / name).unlink(missing_ok=True)
                excess -= size


def locate(location: str | Path, cache: Cache, retries: Retries) -> tuple[Storage, list[str] | None]:
    """(the storage at `location`, the names that a pattern with braces stands for; None without braces).

    location: a folder, the fsspec URL of a folder (`s3://bucket/train`), or a pattern in the style of webdataset:
    `/data/train/shard-{000000..000127}.tar`, `s3://bucket/train/shard-{000000..000127}.tar`,
    `pipe:aws s3 cp s3://bucket/train/shard-{000000..000127}.tar -`. The name of any file in the folder can replace the
    file name with the braces. `${oc.env:NAME}` stands for the value of an environment variable, which no message shows.
    Raises ConfigError: a pattern that cannot be read. DataError: no such folder or protocol.
    """
    expanded = expand(str(location))
    text, hide = expanded.value, expanded.hide
    remote = text.startswith(PIPE) or "://" in text
    slots = list(SLOT.finditer(text))
    if not slots and text.startswith(PIPE):
        raise ConfigError(f"{hide(text)}: a command needs a file name with braces, as shard-{{000000..000127}}.tar")
    if not slots:
        url = text.rstrip("/") + "/"
        return (RemoteFolder(url, "", cache, retries, hide) if remote else _local(Path(text), hide)), None
    prefix, suffix = text[: slots[0].start()], text[slots[0].end() :]
    if len(slots) > 1 or suffix.startswith("/") or (suffix and not remote):
        raise ConfigError(f"{hide(text)}: braces must be in one file name only, such as shard-{{000000..000127}}.tar")
    try:
        names = list(braceexpand(slots[0].group()))
    except ValueError as error:
        raise ConfigError(f"{hide(text)}: {error}") from error
    return (RemoteFolder(prefix, suffix, cache, retries, hide) if remote else _local(Path(prefix), hide)), names


def _local(folder: Path, hide: Callable[[str], str]) -> LocalFolder:
    if folder.is_file():
        raise DataError(f"{hide(str(folder))} is a file; name its folder, or a pattern with braces")
    if not folder.is_dir():
        raise DataError(f"{hide(str(folder))}: no such folder of token shards; make it with tools/prepare.py")
    return LocalFolder(folder)
