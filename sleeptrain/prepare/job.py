"""Preparation from end to end: plan, tokenizer, units, assembly. The same call after a kill goes on where it was."""

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

FORMAT = 2  # raise it when the same settings would give other files


@dataclass(frozen=True)
class Job:
    """What to make of which files. tokenizer: None trains one of `vocab_size` ids. workers: processes."""

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
        """What decides the bytes of the result, as far as the documents are good."""
        inputs = json.dumps(_described(self.sources)).encode()
        # Longer documents are bad, and so they decide nothing but what a tokenizer is trained on.
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
        """The settings that a result which is whole keeps."""
        bad = {"max_document_bytes": self.max_document_bytes, "on_bad_document": "skip" if self.skip_bad else "stop"}
        return self.settings() | bad


def _described(sources: Sequence[Source]) -> list[list[Any]]:
    return [[s.name, s.kind, s.compression, s.size, s.mtime_ns] for s in sources]


def prepare(job: Job) -> dict[str, Any]:
    """The report of what was there already or has been made: a summary of each side, documents left out, units.

    Raises DataError, one line, for what the user can mend.
    """
    work = Work(job.out)
    if not work.path.exists() and (report := finished(job.out, job.record(), job.force)) is not None:
        return report
    units = plan_units(job.sources, job.text_field, job.unit_bytes)
    slices = [[[part.source.name, part.start, part.stop] for part in unit.slices] for unit in units]
    plan = {"settings": job.settings(), "inputs": _described(job.sources), "units": slices}
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
        used = _tokenised(job, work, units)
    except UserError:
        if not any(work.units.iterdir()):  # nothing that another call could go on with
            work.remove()
        raise
    report = _summary(report for _, report in used)
    if empty := [side for side in SIDES if not report[side]["documents"]]:
        work.remove()  # these settings can never be met
        raise DataError(_explained(empty[0], report, job))
    record = json.dumps({"settings": job.record(), "report": report}, indent=2) + "\n"
    assemble(work, used, tokenizer, record.encode())
    work.publish(replace=job.force)
    return report


def _tokenizer(job: Job, work: Work, units: Sequence[Unit]) -> Tokenizer:
    """The tokenizer, which from here on is in the work folder."""
    files = job.tokenizer.files if job.tokenizer else {}
    main = next(iter(files), MODEL_NAME)
    if not (work.tokenizer / main).exists():
        if job.tokenizer is None:
            say(f"training a tokenizer of {job.vocab_size} ids")
            texts = sample(
                units, job.text_field, job.validation_share, job.max_documents, max_bytes=job.max_document_bytes
            )
            train_tokenizer(texts, job.vocab_size, work.tokenizer / main)
        for name in reversed(files):  # the main one last: where it is, the others are
            write_whole(work.tokenizer / name, files[name])
    return load_tokenizer(work.tokenizer)


def _tokenised(job: Job, work: Work, units: Sequence[Unit]) -> list[tuple[int, UnitReport]]:
    """The units of the result with their reports, in order; those of an earlier call are kept."""
    recipe = Recipe(
        work.units,
        work.tokenizer,
        job.text_field,
        job.validation_share,
        job.shard_bytes,
        job.skip_bad,
        job.max_document_bytes,
    )
    reports = _whole_units(job, work, units)
    missing = [unit for unit in units if unit.number not in reports]
    if reports:
        say(f"{len(reports)} of {len(units)} units are there from an earlier call")
    with shown(len(missing), sum(unit.weight for unit in missing)) as progress:
        workers = min(job.workers, max(len(missing), 1))
        for task, report in tokenise(_tasks(units, reports, job.max_documents), recipe, workers, progress.tick):
            reports[task.unit.number] = report
            progress.advance(task.unit.weight)
        return list(_used(units, reports, job.max_documents, recipe, progress))


def _whole_units(job: Job, work: Work, units: Sequence[Unit]) -> dict[int, UnitReport]:
    found = {}
    for unit in units:
        path = unit_folder(work.units, unit.number) / REPORT
        if path.exists():
            try:
                report = UnitReport.read(path)
            except DataError:
                if not job.force:
                    raise
                continue
            if _is_what_is_made_now(report, job):
                found[unit.number] = report
    return found


def _is_what_is_made_now(report: UnitReport, job: Job) -> bool:
    """Of the settings only these two may be others than when the unit was made: what to do with a bad document, and
    how long a good one may be."""
    if report.max_document_bytes == job.max_document_bytes:
        return job.skip_bad or not report.bad
    return not report.bad and report.max_document_bytes < job.max_document_bytes


def _tasks(units: Sequence[Unit], reports: Mapping[int, UnitReport], max_documents: int | None) -> Iterator[Task]:
    """The units that lack a report, until those in front of all gaps hold enough documents."""
    front = documents = 0
    for unit in units:
        while front in reports:
            documents += reports[front].documents
            front += 1
        if max_documents is not None and documents >= max_documents:
            return
        if unit.number not in reports:
            yield Task(unit, max_documents)


def _used(
    units: Sequence[Unit],
    reports: Mapping[int, UnitReport],
    max_documents: int | None,
    recipe: Recipe,
    progress: Progress,
) -> Iterator[tuple[int, UnitReport]]:
    """The units of the first `max_documents` documents; the last of them is made anew where it has too many."""
    left = max_documents
    for unit in units:
        report = reports[unit.number]
        if left is not None:
            if report.documents > left:
                ((_, report),) = tokenise(iter([Task(unit, left)]), recipe, 1, progress.tick)
            left -= report.documents
        yield unit.number, report
        if left == 0:
            return


def _summary(reports: Iterable[UnitReport]) -> dict[str, Any]:
    counted = list(reports)
    totals = total(counted)
    sides = {side: tally.summary() for side, tally in totals.sides.items()}
    left_out = {"empty": totals.empty, "bad": totals.bad, "first_bad": totals.first_bad}
    return {**sides, **left_out, "units": len(counted)}


def _explained(side: str, report: dict[str, Any], job: Job) -> str:
    documents = sum(report[name]["documents"] for name in SIDES)
    if not documents:
        return f"no document in {len(job.sources)} files: {report['empty']} are empty, {report['bad']} bad"
    way = "larger" if side == "validation" else "smaller"
    return (
        f"none of {documents} documents is on the {side} side at --validation-share {job.validation_share}: "
        f"set a {way} one, or give more documents"
    )
