"""Damaged files of a work folder and of a result: the message names the file and the way out."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sleeptrain.data.tokenizer import SentencePieceTokenizer
from sleeptrain.errors import DataError
from sleeptrain.prepare.inputs import named_inputs
from sleeptrain.prepare.job import Job, prepare
from tests.prepare.test_job import content, killed

Damage = Callable[[dict[str, Any]], Any]


def damaged(path: Path, damage: Damage) -> None:
    found = json.loads(path.read_bytes())
    changed = damage(found)
    path.write_text(json.dumps(found if changed is None else changed))


def without(name: str) -> Damage:
    return lambda found: {field: value for field, value in found.items() if field != name}


@pytest.fixture
def job(tmp_path: Path, write_jsonl: Callable[..., Path], tokenizer: SentencePieceTokenizer, texts: list[str]) -> Job:
    sources = named_inputs([str(write_jsonl(texts[:35])), str(write_jsonl(texts[35:], "b.jsonl"))])
    out = tmp_path / "made" / "out"
    return Job(sources, out, tokenizer, validation_share=0.3, unit_bytes=5000, shard_bytes=8000)


@pytest.fixture
def begun(job: Job) -> Path:
    assert killed(job, 60)
    return job.out.with_name(".out.work")


PLAN: list[tuple[Damage, str]] = [
    (lambda plan: [], "it is no object"),
    (without("inputs"), "it has no inputs"),
    (lambda plan: plan.update(settings=[1]), "its settings is"),
    (lambda plan: plan.update(inputs=[["a", 1], 7]), "its inputs is"),
    (lambda plan: plan.update(inputs=[[["a"], 1]]), "its inputs is"),
    (lambda plan: plan.update(units=None), "its units is None"),
]
UNIT: list[tuple[Damage, str]] = [
    (lambda unit: [], "it is no object"),
    (without("bad"), "it has no bad"),
    (without("max_document_bytes"), "it has no max_document_bytes"),
    (lambda unit: unit.update(empty=-1), "its empty is -1"),
    (lambda unit: unit.update(first_bad=5), "its first_bad is 5"),
    (lambda unit: unit["sides"].pop("train") and None, "its sides is"),
    (lambda unit: unit["sides"]["train"].update(tokens=True), "its sides is"),
    (lambda unit: unit["sides"]["train"].update(shards=[{}]), "its sides is"),
    (lambda unit: unit["sides"]["train"]["shards"][0].update(url="../shard-000000.tar"), "its sides is"),
    (lambda unit: unit["sides"]["train"]["shards"][0].update(more=1), "its sides is"),
]
RECORD: list[tuple[Damage, str]] = [
    (lambda record: [], "it is no object"),
    (without("report"), "it has no report"),
    (lambda record: record.update(settings=5), "its settings is 5"),
    (lambda record: record["report"].pop("units") and None, "its report is"),
    (lambda record: record["report"]["train"].update(tokens="x"), "its report is"),
    (lambda record: record["report"].update(validation=7), "its report is"),
]


@pytest.mark.parametrize(("damage", "message"), PLAN)
def test_plan(job: Job, begun: Path, damage: Damage, message: str) -> None:
    damaged(begun / "plan.json", damage)
    with pytest.raises(DataError, match=rf"plan\.json .*{message}.*; drop the work so far with --force$"):
        prepare(job)
    prepare(replace(job, force=True))
    assert [path.name for path in job.out.parent.iterdir()] == ["out"]


@pytest.mark.parametrize(("damage", "message"), UNIT)
def test_unit(job: Job, begun: Path, damage: Damage, message: str) -> None:
    damaged(begun / "units" / "000001" / "report.json", damage)
    with pytest.raises(DataError, match=rf"000001/report\.json .*({message}).*; make it anew with --force$"):
        prepare(job)


def test_units_that_are_damaged_are_made_anew_by_force(job: Job, begun: Path) -> None:
    prepare(replace(job, out=job.out.with_name("other")))
    (begun / "units" / "000001" / "report.json").write_bytes(b"\0")
    with pytest.raises(DataError, match=r"000001/report\.json is not the JSON"):
        prepare(job)
    prepare(replace(job, force=True))
    other = content(job.out.with_name("other"))
    assert content(job.out) == {name: data.replace(b"other ", b"out ") for name, data in other.items()}


@pytest.mark.parametrize(("damage", "message"), RECORD)
def test_record(job: Job, damage: Damage, message: str) -> None:
    prepare(job)
    damaged(job.out / "prepared.json", damage)
    before = content(job.out)
    for force in (False, True):
        with pytest.raises(DataError, match=rf"prepared\.json .*{message}.*; name another --out"):
            prepare(replace(job, force=force))
    assert content(job.out) == before
