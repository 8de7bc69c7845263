"""Folders and files of an object store, named by URLs for fsspec, with the methods of `pathlib.Path` that are used.

A path of a local disk stays a `Path`: `named_place` tells them apart. Every failure of a store is an OSError, whatever
its own library raises; short operations are tried again. Credentials come from where the store's library looks for
them (environment, files of its own), and no message shows those of a URL.
"""

from __future__ import annotations

import errno
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from posixpath import basename, dirname
from typing import Any, BinaryIO, NamedTuple, TypeVar

import fsspec
from fsspec.core import url_to_fs

from sleeptrain.errors import DataError
from sleeptrain.terminal import hide_credentials, log_printable

logger = log_printable(__name__)
Result = TypeVar("Result")
# Kinds of OSError that another try does not change.
FINAL = (FileNotFoundError, PermissionError)


@dataclass(frozen=True)
class Retries:
    """Retries of a failing read. attempts: number of tries. first_wait: first pause in seconds, doubled each time."""

    attempts: int = 6
    first_wait: float = 0.5

    def run(self, action: Callable[[], Result], what: str, errors: type[Exception]) -> Result:
        """The result of `action`, which is retried after errors of type `errors`. Raises the last error."""
        for attempt in range(self.attempts - 1):
            try:
                return action()
            except FINAL:
                raise
            except errors as error:
                wait = self.first_wait * 2**attempt
                logger.warning("%s: %s; trying again in %g s", what, error or type(error).__name__, wait)
                time.sleep(wait)
        return action()


RETRIES = Retries(4)


class Status(NamedTuple):
    st_size: int
    st_mode: int = stat.S_IFREG


@dataclass(frozen=True)
class UrlPath:
    """A file or folder of an object store. Raises DataError, when it is first used, if fsspec cannot open its URL."""

    url: str

    def __str__(self) -> str:
        return hide_credentials(self.url)

    def __truediv__(self, name: str) -> UrlPath:
        return UrlPath(f"{self.url.rstrip('/')}/{name}")

    @property
    def name(self) -> str:
        return basename(self.url.rstrip("/"))

    @property
    def parent(self) -> UrlPath:
        return UrlPath(dirname(self.url.rstrip("/")))

    def with_name(self, name: str) -> UrlPath:
        return self.parent / name

    def exists(self) -> bool:
        return self._run(lambda: bool(self._fs.exists(self._path)))

    def is_file(self) -> bool:
        return self._run(lambda: bool(self._fs.isfile(self._path)))

    def is_dir(self) -> bool:
        return self._run(lambda: bool(self._fs.isdir(self._path)))

    def stat(self) -> Status:
        return Status(self._run(lambda: int(self._fs.info(self._path)["size"])))

    def glob(self, pattern: str) -> list[UrlPath]:
        """The files whose path below this folder matches; none if there is no such folder."""
        names = self._run(lambda: self._fs.glob(f"{self._path}/{pattern}"))
        start = len(self._path.rstrip("/")) + 1
        return [self / str(name)[start:] for name in names]

    def read_bytes(self) -> bytes:
        return self._run(lambda: bytes(self._fs.cat_file(self._path)))

    def read_range(self, offset: int, size: int) -> bytes:
        """The bytes [offset, offset + size). Raises OSError if the file ends before."""
        content = self._run(lambda: bytes(self._fs.cat_file(self._path, start=offset, end=offset + size)))
        if len(content) != size:
            raise OSError(errno.EIO, f"ends after {offset + len(content)} bytes", str(self))
        return content

    def write_bytes(self, content: bytes) -> None:
        """Write a file, which others see whole or not at all; it replaces an existing one."""
        self._run(lambda: self._fs.pipe_file(self._path, content))

    @contextmanager
    def create(self) -> Iterator[BinaryIO]:
        """A file to write to, which appears when the block ends without an error."""
        with self._errors():
            file = self._fs.open(self._path, "wb")
            try:
                yield file
            except BaseException:
                with suppress(Exception):  # files of some stores cannot be discarded
                    file.discard()
                raise
            file.close()

    def unlink(self, missing_ok: bool = False) -> None:
        try:
            self._run(lambda: self._fs.rm_file(self._path))
        except FileNotFoundError:
            if not missing_ok:
                raise

    def remove_tree(self) -> None:
        """Remove all files below this folder; it may have none."""

        def remove() -> None:
            if self._fs.exists(self._path):
                self._fs.rm(self._path, recursive=True)

        self._run(remove)

    def copy_tree(self, target: UrlPath) -> None:
        """Copy all files below this folder, inside the store."""
        for path in self._run(lambda: self._fs.find(self._path)):
            name = str(path)[len(self._path.rstrip("/")) + 1 :]
            self._run(lambda path=path, name=name: self._fs.cp_file(path, (target / name)._path))  # type: ignore[misc]

    def _open(self) -> tuple[Any, str]:
        check_protocol(self.url, hide_credentials)
        # fsspec keeps one client for each process, so this costs nothing. Without a cache of listings, since other
        # processes write into the same folders.
        return url_to_fs(self.url, use_listings_cache=False)

    @property
    def _fs(self) -> Any:
        return self._open()[0]

    @property
    def _path(self) -> str:
        """The path as the store's file system names it."""
        return self._open()[1]

    def _run(self, action: Callable[[], Result]) -> Result:
        def once() -> Result:
            with self._errors():
                return action()

        return RETRIES.run(once, str(self), OSError)

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """Raise the errors of any library as OSError, with the URL as its file name."""
        try:
            yield
        except FileNotFoundError as error:
            raise FileNotFoundError(errno.ENOENT, "No such file or directory", str(self)) from error
        except PermissionError as error:
            raise PermissionError(errno.EACCES, hide_credentials(str(error)), str(self)) from error
        except DataError:
            raise
        except Exception as error:
            text = hide_credentials(str(error)) or type(error).__name__
            raise OSError(errno.EIO, " ".join(text.split()), str(self)) from error


Location = Path | UrlPath


def named_place(text: str) -> Location:
    """The place that a setting or an argument names: a URL of an object store, or a local path."""
    return UrlPath(text.rstrip("/")) if "://" in text else Path(text)


def check_protocol(url: str, hide: Callable[[str], str]) -> None:
    """Raises DataError if fsspec cannot open the protocol of a URL here. hide: removes secrets from a message."""
    protocol = url.split("://")[0]
    try:
        fsspec.get_filesystem_class(protocol)
    except (ImportError, ValueError) as error:
        raise DataError(f"{hide(url)}: fsspec cannot open {protocol}:// here ({error})") from error
