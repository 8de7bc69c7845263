"""Preparation from end to end: plan, tokenizer, units, assembly. The same call after a kill continues the work."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sleeptrain.data.shard_writer import SHARD_BYTES
from sleeptrain.data.tokenizer import MODEL_NAME, Tokenizer, load_tokenizer, train_tokenizer
from sleeptrain.errors import DataError, UserError
from sleeptrain.files import write_whole
from sleeptrain.prepare.assembly import assemble
from sleeptrain.prepare.finished import finished
from sleeptrain.prepare.inputs import Source
from sleeptrain.prepare.progress import Progress, shown
from sleeptrain.prepare.readers import MAX_DOCUMENT_BYTES
from sleeptrain.prepare.report import UnitReport, total
from sleeptrain.prepare.sample import sample
from sleeptrain.prepare.split import SIDES
from sleeptrain.prepare.units import UNIT_BYTES, Unit, plan_units
from sleeptrain.prepare.work import Work
from sleeptrain.prepare.worker import REPORT, Recipe, Task, unit_folder
from sleeptrain.prepare.worker_pool import tokenise
from sleeptrain.terminal import say

FORMAT = 2  # increase it when the same settings give other files


@dataclass(frozen=True)
class Job:
    """The input files, the output folder and the settings of a preparation.

    tokenizer: None: train one of `vocab_size` ids.
    max_documents: only the first documents of the corpus; None: all.
    shard_bytes, unit_bytes, max_document_bytes: see `--shard-bytes`, `--unit-bytes` and `--max-document-bytes`.
    skip_bad: leave out bad documents instead of stopping.
    workers: number of processes.
    force: replace an earlier result, or work begun with other settings.
    """

    sources: Sequence[Source]
    out: Path
    tokenizer: Tokenizer | None = None
    vocab_size: int = 2048
    text_field: str = "text"
    validation_share: float = 0.05
    max_documents: int | None = None
    shard_bytes: int = SHARD_BYTES
    unit_bytes: int = UNIT_BYTES
    max_document_bytes: int = MAX_DOCUMENT_BYTES
    skip_bad: bool = False
    workers: int = 1
    force: bool = False

    def __post_init__(self) -> None:
        if self.max_documents is not None and self.max_documents < 2:
            raise DataError(f"--max-documents {self.max_documents}: at least 2 are needed")
        if not 0 < self.validation_share < 1:
            raise DataError(f"--validation-share {self.validation_share}: must lie between 0 and 1")
        for name in ("shard_bytes", "unit_bytes", "max_document_bytes", "workers"):
            if getattr(self, name) < 1:
                raise DataError(f"--{name.replace('_', '-')} {getattr(self, name)}: must be at least 1")

    def settings(self) -> dict[str, Any]:
        """The settings that determine the bytes of the result, if no document is bad."""
        inputs = json.dumps(_input_entries(self.sources)).encode()
        # Without bad documents the limit affects only the text that a tokenizer is trained on.
        sampled = {} if self.tokenizer else {"max_document_bytes": self.max_document_bytes}
        return sampled | {
            "format": FORMAT,
            "tokenizer_sha256": self.tokenizer.hash if self.tokenizer else None,
            "vocab_size": self.tokenizer.vocab_size if self.tokenizer else self.vocab_size,
            "text_field": self.text_field,
            "validation_share": self.validation_share,
            "max_documents": self.max_documents,
            "shard_bytes": self.shard_bytes,
            "unit_bytes": self.unit_bytes,
            "inputs": len(self.sources),
            "input_bytes": sum(source.size for source in self.sources),
            "inputs_sha256": hashlib.sha256(inputs).hexdigest(),
        }

    def record(self) -> dict[str, Any]:
        """The settings that a complete result records."""
        bad = {"max_document_bytes": self.max_document_bytes, "on_bad_document": "skip" if self.skip_bad else "stop"}
        return self.settings() | bad


def _input_entries(sources: Sequence[Source]) -> list[list[Any]]:
    return [[s.name, s.kind, s.compression, s.size, s.mtime_ns] for s in sources]


def prepare(job: Job) -> dict[str, Any]:
    """Make the result, unless it exists already, and return its report.

    The report has a summary of each side and counts of empty documents, bad documents and units. Raises DataError, one
    line, if the user can mend the cause.
    """
    work = Work(job.out)
    if not work.path.exists() and (report := finished(job.out, job.record(), job.force)) is not None:
        return report
    units = plan_units(job.sources, job.text_field, job.unit_bytes)
    slices = [[[part.source.name, part.start, part.stop] for part in unit.slices] for unit in units]
    plan = {"settings": job.settings(), "inputs": _input_entries(job.sources), "units": slices}
    with work.locked():
        try:
            published = work.tidy(plan, job.force)
            report = finished(job.out, job.record(), job.force and not published)
        except DataError:
            if not (work.path / "plan.json").exists():
                work.remove()
            raise
        if report is None:
            work.begin(plan)
            report = _make(job, work, units)
        work.remove()
    return report


def _make(job: Job, work: Work, units: Sequence[Unit]) -> dict[str, Any]:
    try:
        tokenizer = _tokenizer(job, work, units)
        used = _tokenise_units(job, work, units)
    except UserError:
        if not any(work.units.iterdir()):  # another call has nothing to continue from
            work.remove()
        raise
    report = _summary(report for _, report in used)
    if empty := [side for side in SIDES if not report[side]["documents"]]:
        work.remove()  # no call with these settings can succeed
        raise DataError(_empty_side_message(empty[0], report, job))
    record = json.dumps({"settings": job.record(), "report": report}, indent=2) + "\n"
    assemble(work, used, tokenizer, record.encode())
    work.publish(replace=job.force)
    return report


def _tokenizer(job: Job, work: Work, units: Sequence[Unit]) -> Tokenizer:
    """Put the tokenizer into the work folder, if it is not there yet, and load it."""
    files = job.tokenizer.files if job.tokenizer else {}
    main = next(iter(files), MODEL_NAME)
    if not (work.tokenizer / main).exists():
        if job.tokenizer is None:
            say(f"training a tokenizer of {job.vocab_size} ids")
            texts = sample(
                units, job.text_field, job.validation_share, job.max_documents, max_bytes=job.max_document_bytes
            )
            train_tokenizer(texts, job.vocab_size, work.tokenizer / main)
        for name in reversed(files):  # the main file last: once it exists, so do the others
            write_whole(work.tokenizer / name, files[name])
    return load_tokenizer(work.tokenizer)


def _tokenise_units(job: Job, work: Work, units: Sequence[Unit]) -> list[tuple[int, UnitReport]]:
    """The units of the result with their reports, in order. Units of an earlier call are reused."""
    recipe = Recipe(
        work.units,
        work.tokenizer,
        job.text_field,
        job.validation_share,
        job.shard_bytes,
        job.skip_bad,
        job.max_document_bytes,
    )
    reports = _finished_units(job, work, units)
    missing = [unit for unit in units if unit.number not in reports]
    if reports:
        say(f"{len(reports)} of {len(units)} units are there from an earlier call")
    with shown(len(missing), sum(unit.weight for unit in missing)) as progress:
        workers = min(job.workers, max(len(missing), 1))
        for task, report in tokenise(_tasks(units, reports, job.max_documents), recipe, workers, progress.tick):
            reports[task.unit.number] = report
            progress.advance(task.unit.weight)
        return list(_result_units(units, reports, job.max_documents, recipe, progress))


def _finished_units(job: Job, work: Work, units: Sequence[Unit]) -> dict[int, UnitReport]:
    reports = {}
    for unit in units:
        path = unit_folder(work.units, unit.number) / REPORT
        if path.exists():
            try:
                report = UnitReport.read(path)
            except DataError:
                if not job.force:
                    raise
                continue
            if _is_reusable(report, job):
                reports[unit.number] = report
    return reports


def _is_reusable(report: UnitReport, job: Job) -> bool:
    """True if `job` would make the same unit.

    Only `skip_bad` and `max_document_bytes` can differ from the settings of the call that made it.
    """
    if report.max_document_bytes == job.max_document_bytes:
        return job.skip_bad or not report.bad
    return not report.bad and report.max_document_bytes < job.max_document_bytes


def _tasks(units: Sequence[Unit], reports: Mapping[int, UnitReport], max_documents: int | None) -> Iterator[Task]:
    """The units without a report. Ends once the units before the first missing report hold `max_documents`."""
    first_missing = documents = 0
    for unit in units:
        while first_missing in reports:
            documents += reports[first_missing].documents
            first_missing += 1
        if max_documents is not None and documents >= max_documents:
            return
        if unit.number not in reports:
            yield Task(unit, max_documents)


def _result_units(
    units: Sequence[Unit],
    reports: Mapping[int, UnitReport],
    max_documents: int | None,
    recipe: Recipe,
    progress: Progress,
) -> Iterator[tuple[int, UnitReport]]:
    """The units that hold the first `max_documents` documents. The last one is made anew if it has too many."""
    remaining = max_documents
    for unit in units:
        report = reports[unit.number]
        if remaining is not None:
            if report.documents > remaining:
                ((_, report),) = tokenise(iter([Task(unit, remaining)]), recipe, 1, progress.tick)
            remaining -= report.documents
        yield unit.number, report
        if remaining == 0:
            return


def _summary(reports: Iterable[UnitReport]) -> dict[str, Any]:
    unit_reports = list(reports)
    totals = total(unit_reports)
    sides = {side: tally.summary() for side, tally in totals.sides.items()}
    left_out = {"empty": totals.empty, "bad": totals.bad, "first_bad": totals.first_bad}
    return {**sides, **left_out, "units": len(unit_reports)}


def _empty_side_message(side: str, report: dict[str, Any], job: Job) -> str:
    documents = sum(report[name]["documents"] for name in SIDES)
    if not documents:
        return f"no document in {len(job.sources)} files: {report['empty']} are empty, {report['bad']} bad"
    size = "larger" if side == "validation" else "smaller"
    return (
        f"none of {documents} documents is on the {side} side at --validation-share {job.validation_share}: "
        f"set a {size} one, or give more documents"
    )
