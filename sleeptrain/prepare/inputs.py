"""The files a corpus consists of, in a fixed order, and what the name of each says of its format."""

from __future__ import annotations

import fnmatch
import glob
import os
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from sleeptrain.config.overrides import shell_command
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
JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}


@dataclass(frozen=True)
class Source:
    """One input file.

    name: as the user knows it, unique in the corpus. kind: text (the whole file is a document), lines (one a line),
    json (one object a line) or parquet (one a row). compression: gzip, zstd or empty. size: bytes. mtime_ns: time of
    the last change; with the size it tells that a file is still the same.
    """

    path: Path
    name: str
    kind: str
    compression: str
    size: int
    mtime_ns: int

    def check_unchanged(self) -> None:
        """Raises DataError when the file is gone or another one than when it was listed."""
        stat = _stat(self.path, self.name)
        if (stat.st_size, stat.st_mtime_ns) != (self.size, self.mtime_ns):
            raise DataError(f"{self.name} changed while the corpus was read; when it rests, begin anew with --force")


def stdlib_inputs() -> list[Source]:
    """The source and text files of the running Python's standard library, without tests and IDLE."""
    root = Path(sysconfig.get_path("stdlib"))
    return [_source(root / name, name, "text", "") for name in sorted(_stdlib_names(root))]


def folder_inputs(folder: Path, pattern: str = "*.txt", document: str = "file") -> list[Source]:
    """The files whose name matches `pattern` in `folder`, at any depth, in the order of their names.

    Raises DataError: no folder, no such file, a file that cannot be listed.
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder")
    try:
        names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob(pattern) if path.is_file())
    except (ValueError, NotImplementedError) as error:
        raise DataError(f"glob {pattern!r} is not a pattern relative to the folder: {error}") from error
    if not names:
        raise DataError(f"{folder}: no file matches {pattern!r}; set another glob")
    return [_source(folder / name, name, *_format(name, document)) for name in names]


def named_inputs(patterns: Sequence[str], document: str = "file") -> list[Source]:
    """The files that `patterns` name (paths, or globs with `**` for any depth), pattern by pattern, sorted in each.

    Raises DataError: a pattern that matches no file, a folder, a file that is named twice, in whatever way.
    """
    sources: list[Source] = []
    seen: dict[str, str] = {}
    for pattern in patterns:
        for name in _expanded(pattern):
            real = os.path.realpath(name)
            if real in seen:
                raise DataError(f"{name} is given twice (also as {seen[real]}): its documents would count double")
            seen[real] = name
            sources.append(_source(Path(name), name, *_format(name, document)))
    return sources


def _expanded(pattern: str) -> list[str]:
    if os.path.isdir(pattern):
        inside = shell_command(f"{pattern.rstrip('/')}/*")
        raise DataError(f"{pattern} is a folder: give it with --folder, or a glob such as {inside}")
    if os.path.lexists(pattern):  # also a name with brackets or stars
        return [pattern]
    names = sorted(name for name in glob.glob(pattern, recursive=True) if not os.path.isdir(name))
    if not names:
        raise DataError(f"--input {pattern}: no such file")
    return names


def _format(name: str, document: str) -> tuple[str, str]:
    """Kind and compression of a file by the ends of its name."""
    stem, suffix = os.path.splitext(name.lower())
    compression = COMPRESSIONS.get(suffix, "")
    inner = os.path.splitext(stem)[1] if compression else suffix
    if inner in JSON_SUFFIXES:
        return "json", compression
    if inner == ".parquet":
        if compression:
            raise DataError(f"{name}: a compressed parquet file; unpack it (parquet compresses inside)")
        return "parquet", ""
    return ("lines" if inner == ".txt" and document == "line" else "text"), compression


def _source(path: Path, name: str, kind: str, compression: str) -> Source:
    stat = _stat(path, name)
    return Source(path, name, kind, compression, stat.st_size, stat.st_mtime_ns)


def _stat(path: Path, name: str) -> os.stat_result:
    try:
        return os.stat(path)
    except OSError as error:
        raise DataError(f"{name}: cannot be read: {error.strerror}") from error


def _stdlib_names(root: Path) -> Iterator[str]:
    for folder, subfolders, files in os.walk(root):
        # Pruned in place, so that site-packages is not walked through.
        subfolders[:] = _without_excluded(subfolders)
        for file in _without_excluded(files):
            if file.endswith(STDLIB_SUFFIXES):
                yield (Path(folder) / file).relative_to(root).as_posix()


def _without_excluded(names: Iterable[str]) -> list[str]:
    return [name for name in names if not any(fnmatch.fnmatchcase(name, pattern) for pattern in STDLIB_EXCLUDED)]
