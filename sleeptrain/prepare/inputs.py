"""The files a corpus consists of, in a fixed order, and what the name of each says of its format."""

from __future__ import annotations

import fnmatch
import glob
import logging
import os
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from sleeptrain.config.overrides import shell_command
from sleeptrain.errors import DataError
from sleeptrain.plain_files import require_plain, same_file
from sleeptrain.prepare.walk import each_once, names_below

logger = logging.getLogger(__name__)
SHOWN = 5

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

    Links to files and folders are followed, and each file counts once. Raises DataError: no folder, no such file, a
    folder that cannot be listed.
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder")
    if not pattern or os.path.isabs(pattern) or ".." in Path(pattern).parts:
        raise DataError(f"glob {pattern!r} is not a pattern relative to the folder")
    names, left_out = each_once(folder, names_below(folder, f"**/{pattern}"))
    _tell(str(folder), left_out)
    if not names:
        raise DataError(f"{folder}: no file matches {pattern!r}; set another glob")
    return [_source(folder / name, name, *_format(name, document)) for name in names]


def named_inputs(patterns: Sequence[str], document: str = "file") -> list[Source]:
    """The files that `patterns` name (paths, or globs with `**` for any depth), pattern by pattern, sorted in each.

    A glob names each file once, whatever links lead to it. Raises DataError: a pattern that matches no file, a folder
    or another thing that is no plain file, a file that two patterns name, in whatever way.
    """
    sources: list[Source] = []
    seen: dict[tuple[int, int] | str, str] = {}
    for pattern in patterns:
        for name in _expanded(pattern):
            this = same_file(Path(name))
            if this in seen:
                raise DataError(f"{name} is given twice (also as {seen[this]}): its documents would count double")
            seen[this] = name
            sources.append(_source(Path(name), name, *_format(name, document)))
    return sources


def _expanded(pattern: str) -> list[str]:
    if os.path.isdir(pattern):
        inside = shell_command(f"{pattern.rstrip('/')}/*")
        raise DataError(f"{pattern} is a folder: give it with --folder, or a glob such as {inside}")
    if os.path.lexists(pattern):  # also a name with brackets or stars
        require_plain(Path(pattern))
        return [pattern]
    names, left_out = each_once(Path(), _globbed(pattern))
    _tell(pattern, left_out)
    if not names:
        raise DataError(f"--input {pattern}: no such file")
    return names


def _globbed(pattern: str) -> Iterator[str]:
    """Not by `glob` alone, which goes round and round where a folder below `**` links to one above it."""
    parts = pattern.split("/")
    if "**" not in parts:
        yield from glob.glob(pattern)
        return
    deep = parts.index("**")
    above = "/".join(parts[:deep]) or ("/" if pattern.startswith("/") else "")
    below = "/".join(["**", *(parts[deep + 1 :] or ["*"])])
    for folder in glob.glob(above) if above else [""]:
        if os.path.isdir(folder or "."):
            yield from (os.path.join(folder, name) for name in names_below(Path(folder), below, hidden=False))


def _tell(where: str, left_out: Sequence[str]) -> None:
    """What a user may miss: a link to a disk that is not there is no reason to stop, and none to say nothing."""
    if left_out:
        more = f" and {len(left_out) - SHOWN} more" if len(left_out) > SHOWN else ""
        logger.warning("%s: left out, as no file can be read there: %s%s", where, ", ".join(left_out[:SHOWN]), more)


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
