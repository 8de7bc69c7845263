"""The files of a corpus, in a fixed order, each with the format that its name gives."""

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
MAX_NAMES = 5

STDLIB_SUFFIXES = (".py", ".txt", ".rst")
# Third-party code, tests (their data is often broken on purpose) and files that a build writes for its own machine.
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

    path: where it lies.
    name: as the user knows it, unique in the corpus.
    kind: `text` (the file is one document), `lines` (a document a line), `json` (an object a line) or `parquet` (a
        document a row).
    compression: `gzip`, `zstd` or empty.
    size: bytes.
    mtime_ns: time of the last change, in nanoseconds. A file with another size or time has changed.
    """

    path: Path
    name: str
    kind: str
    compression: str
    size: int
    mtime_ns: int

    def check_unchanged(self) -> None:
        """Raise DataError if the file is gone or has changed since it was listed."""
        stat = _stat(self.path, self.name)
        if (stat.st_size, stat.st_mtime_ns) != (self.size, self.mtime_ns):
            raise DataError(f"{self.name} changed while the corpus was read; when it rests, begin anew with --force")


def stdlib_inputs() -> list[Source]:
    """Source and text files of the running Python's standard library, without tests and IDLE."""
    root = Path(sysconfig.get_path("stdlib"))
    return [_source(root / name, name, "text", "") for name in sorted(_stdlib_names(root))]


def folder_inputs(folder: Path, pattern: str = "*.txt", document: str = "file") -> list[Source]:
    """The files in `folder`, at any depth, whose names match `pattern`, sorted by name.

    Links to files and folders are followed, and each file counts once. Raises DataError if there is no such folder, no
    file matches, or a folder cannot be listed.
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder")
    if not pattern or os.path.isabs(pattern) or ".." in Path(pattern).parts:
        raise DataError(f"glob {pattern!r} is not a pattern relative to the folder")
    names, left_out = each_once(folder, names_below(folder, f"**/{pattern}"))
    _warn_left_out(str(folder), left_out)
    if not names:
        raise DataError(f"{folder}: no file matches {pattern!r}; set another glob")
    return [_source(folder / name, name, *_format(name, document)) for name in names]


def named_inputs(patterns: Sequence[str], document: str = "file") -> list[Source]:
    """The files that `patterns` name, in the order of the patterns; the files of one pattern are sorted.

    patterns: paths, or globs with `**` for any depth. A glob yields each file once, even if several links point to it.
    Raises DataError if a pattern matches no file, names a folder or another path that is no plain file, or names a file
    that another pattern names too.
    """
    sources: list[Source] = []
    seen: dict[tuple[int, int] | str, str] = {}
    for pattern in patterns:
        for name in _expanded(pattern):
            identity = same_file(Path(name))
            if identity in seen:
                raise DataError(f"{name} is given twice (also as {seen[identity]}): its documents would count double")
            seen[identity] = name
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
    _warn_left_out(pattern, left_out)
    if not names:
        raise DataError(f"--input {pattern}: no such file")
    return names


def _globbed(pattern: str) -> Iterator[str]:
    """The paths that match a glob. `glob` alone would never end where a folder below `**` links to one above it."""
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


def _warn_left_out(where: str, left_out: Sequence[str]) -> None:
    """Warn about unreadable paths, such as a link to a disk that is not mounted. They are no reason to stop."""
    if left_out:
        more = f" and {len(left_out) - MAX_NAMES} more" if len(left_out) > MAX_NAMES else ""
        logger.warning("%s: left out, because they cannot be read: %s%s", where, ", ".join(left_out[:MAX_NAMES]), more)


def _format(name: str, document: str) -> tuple[str, str]:
    """(kind, compression) of a file, from its suffixes."""
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
        # In place, so that os.walk skips site-packages.
        subfolders[:] = _without_excluded(subfolders)
        for file in _without_excluded(files):
            if file.endswith(STDLIB_SUFFIXES):
                yield (Path(folder) / file).relative_to(root).as_posix()


def _without_excluded(names: Iterable[str]) -> list[str]:
    return [name for name in names if not any(fnmatch.fnmatchcase(name, pattern) for pattern in STDLIB_EXCLUDED)]
