"""Text corpora: one document a file, in a fixed order, split by name into train and validation."""

from __future__ import annotations

import fnmatch
import hashlib
import os
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from sleeptrain.errors import DataError

STDLIB_SUFFIXES = (".py", ".txt", ".rst")
# Third-party code, tests (their data is often deliberately broken text) and what a build writes for its own machine.
STDLIB_EXCLUDED = (
    "site-packages",
    "dist-packages",
    "__pycache__",
    "test",
    "tests",
    "idlelib",
    "config-*",
    "_sysconfigdata_*",
)


@dataclass(frozen=True)
class Corpus:
    """Text files below a folder; the text itself is read anew by each `text` or `texts`.

    names: paths relative to `root`, with forward slashes, sorted: the order of the documents.
    undecodable: files left out because they are not UTF-8. empty: the number of files left out because they are empty.
    sha256: of all names and contents, in order.
    """

    root: Path
    names: tuple[str, ...]
    undecodable: tuple[str, ...]
    empty: int
    sha256: str

    def text(self, name: str) -> str:
        """The document, character for character (line ends are kept). Raises DataError if it is gone."""
        try:
            return (self.root / name).read_bytes().decode("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{self.root / name}: changed or vanished while it was read: {error}") from error

    def texts(self, names: Sequence[str]) -> Iterator[str]:
        return (self.text(name) for name in names)


def stdlib_corpus(max_documents: int | None = None) -> Corpus:
    """The source and text files of the running Python's standard library, without tests and IDLE."""
    root = Path(sysconfig.get_path("stdlib"))
    return scan(root, sorted(_stdlib_names(root)), max_documents)


def folder_corpus(folder: Path, glob: str = "*.txt", max_documents: int | None = None) -> Corpus:
    """The files whose name matches `glob` in `folder`, at any depth. Raises DataError: no folder, no such file."""
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder")
    try:
        names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob(glob) if path.is_file())
    except (ValueError, NotImplementedError) as error:
        raise DataError(f"glob {glob!r} is not a pattern relative to the folder: {error}") from error
    if not names:
        raise DataError(f"{folder}: no file matches {glob!r}; set another glob")
    return scan(folder, names, max_documents)


def scan(root: Path, names: Sequence[str], max_documents: int | None = None) -> Corpus:
    """Read each file once, to leave out those that hold no text and to identify the rest by its content.

    `max_documents` keeps the first so many. Raises DataError when no document is left or a file cannot be read.
    """
    kept: list[str] = []
    undecodable: list[str] = []
    empty = 0
    digest = hashlib.sha256()
    for name in names:
        if max_documents is not None and len(kept) >= max_documents:
            break
        try:
            content = (root / name).read_bytes()
            content.decode("utf-8")
        except OSError as error:
            raise DataError(f"{root / name}: cannot be read: {error.strerror}") from error
        except UnicodeDecodeError:
            undecodable.append(name)
            continue
        if not content:
            empty += 1
            continue
        kept.append(name)
        for part in (name.encode("utf-8", "surrogateescape"), content):
            digest.update(len(part).to_bytes(8, "little"))
            digest.update(part)
    if not kept:
        raise DataError(f"{root}: no document: {len(undecodable)} files are not UTF-8, {empty} are empty")
    return Corpus(root, tuple(kept), tuple(undecodable), empty, digest.hexdigest())


def split_names(names: Sequence[str], validation_share: float) -> tuple[list[str], list[str]]:
    """Train and validation documents, each in the given order.

    A document's side depends on its own name alone, so that the sides stay the same as a corpus grows; where that would
    leave a side empty, one document goes over. Raises DataError for fewer than two documents.
    """
    if len(names) < 2:
        raise DataError(f"{len(names)} document(s): at least 2 are needed, one for train and one for validation")
    ranks = {name: name_rank(name) for name in names}
    by_rank = sorted(names, key=lambda name: ranks[name])
    held_out = {name for name in names if ranks[name] < validation_share} or {by_rank[0]}
    if len(held_out) == len(names):
        held_out.discard(by_rank[-1])
    train = [name for name in names if name not in held_out]
    return train, [name for name in names if name in held_out]


def name_rank(name: str) -> float:
    """A number in [0, 1) that looks random but depends on nothing except the name."""
    digest = hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()
    return int.from_bytes(digest[:6], "big") / 2**48


def _stdlib_names(root: Path) -> Iterator[str]:
    for folder, subfolders, files in os.walk(root):
        # Pruned in place, so that site-packages is not walked through.
        subfolders[:] = [name for name in subfolders if not _excluded(name)]
        for file in files:
            if file.endswith(STDLIB_SUFFIXES) and not _excluded(file):
                yield (Path(folder) / file).relative_to(root).as_posix()


def _excluded(name: str) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in STDLIB_EXCLUDED)
