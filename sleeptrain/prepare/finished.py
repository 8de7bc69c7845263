"""Check the output folder when it exists already: a result of an earlier call, or a folder of somebody else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sleeptrain.data.shards import TokenShards
from sleeptrain.data.tokenizer import load_tokenizer
from sleeptrain.errors import DataError
from sleeptrain.prepare.assembly import RECORD
from sleeptrain.prepare.split import SIDES
from sleeptrain.prepare.work import changes
from sleeptrain.prepare.work_schema import RECORD_CHECKS, read_checked
from sleeptrain.terminal import say


def finished(out: Path, record: dict[str, Any], force: bool) -> dict[str, Any] | None:
    """Return the report of a sound earlier result, or None if a result must be made.

    record: the settings of this call; the earlier result must have the same. force: make a new result whatever the
    settings of the earlier one are. Raises DataError for a folder that is neither empty nor such a result.
    """
    if out.exists() and not out.is_dir():
        raise DataError(f"{out} is a file; name a folder")
    if not out.is_dir() or not any(out.iterdir()):
        return None
    # Never replaced, not even by force: the folder may hold files of somebody else.
    if not (out / RECORD).exists():
        raise DataError(f"{out} is not empty and not a prepared corpus; name another --out")
    earlier = read_checked(out / RECORD, RECORD_CHECKS, "name another --out, or move the folder away")
    if force:
        return None
    if changed := changes(earlier["settings"], record):
        raise DataError(f"{out} was made with other settings ({'; '.join(changed)}); name another --out or use --force")
    try:
        tokenizer = load_tokenizer(out)
        for side in SIDES:
            TokenShards(out / side, expect_tokenizer=tokenizer.hash)
    except DataError as error:
        raise DataError(f"{error}; make it anew with --force") from error
    say(f"{out} is complete and was made with the same settings: nothing to do")
    return earlier["report"]
