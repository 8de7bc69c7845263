"""Which runs make one curve, and the name of the curve."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from sleeptrain.config.schema import CurriculumStage
from sleeptrain.report.curves import quantities
from sleeptrain.report.figures import draw_quantity
from sleeptrain.report.groups import value_text
from sleeptrain.report.page import page
from sleeptrain.report.summary import summary
from sleeptrain.report.tables import tables
from tests.report.drawn import lines
from tests.report.made import accuracy, grid, make_run, only_section, step


def test_seeds_are_one_group_and_passes_are_separate(tmp_path: Path) -> None:
    found = only_section(grid(tmp_path))
    assert [(g.name, g.label, len(g.runs)) for g in found.groups] == [("N=1", "N=1", 2), ("N=2", "N=2", 2)]
    assert found.differing == ["sleep.passes", "data.seed", "train.seed"] and found.difficulty is None
    assert [q.name for q in quantities(found)] == ["accuracy", "loss", "bits", "sampled"]


def test_settings_that_do_not_touch_the_numbers_make_no_curve(tmp_path: Path) -> None:
    make_run(tmp_path / "a", ["train.threads=1", "wandb.project=x"], [accuracy(5, 0.5)])
    make_run(tmp_path / "b", ["train.threads=2"], [accuracy(5, 0.7)])
    make_run(tmp_path / "c", ["optim.muon_lr=0.5"], [accuracy(5, 0.9)])
    found = only_section(tmp_path)
    assert [(g.name, len(g.runs)) for g in found.groups] == [("optim.muon_lr=0.002", 2), ("optim.muon_lr=0.5", 1)]
    assert {"train.threads", "wandb.project", "optim.muon_lr"} == set(found.differing)
    [every] = [table for table in tables(found) if table.title == "Every run"]
    assert {"train.threads", "wandb.project", "optim.muon_lr"} < set(every.header)


def test_runs_from_different_weights_are_no_seeds_of_one_another(tmp_path: Path) -> None:
    for name, start in (("a", "one"), ("b", "one"), ("c", "two")):
        make_run(tmp_path / name, [f"run.init_from={start}", f"train.seed={name == 'b':d}"], [accuracy(5, 0.5)])
    found = only_section(tmp_path)
    assert [(g.name, len(g.runs)) for g in found.groups] == [("run.init_from=one", 2), ("run.init_from=two", 1)]
    assert "run.init_from" in tables(found)[-1].header


def test_paths_and_settings_of_other_data_make_no_curve(tmp_path: Path) -> None:
    for at, weight in (("here", 1), ("there", 1), ("there", 2)):
        sources = f"data.shards.sources=[{{train: {at}/a, validation: {at}/b, weight: {weight}}}]"
        text = ["experiment=stdlib", "sleep.curriculum=[]", f"data.shards.tokenizer={at}", sources]
        make_run(tmp_path / f"{at}{weight}", [*text, f"data.rule110.steps={len(at)}"], [step(1)])
    names = [group.name for group in only_section(tmp_path).groups]
    assert names == ["data.shards.sources=[default]", "data.shards.sources=[weight=2.0]"]


def test_a_run_and_its_copy_are_one_seed(tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("copy", 0), ("b", 1)):
        make_run(tmp_path / name, [f"data.seed={seed}"], [accuracy(5, 0.5)])
    found = only_section(tmp_path)
    note = f"{tmp_path / 'a'}, {tmp_path / 'copy'} have the same seeds and count as one; the mean is over runs"
    assert found.groups[0].repeated == [note] and note in summary(found) and note in page("", [(found, [])], [])
    assert "N=1: 50.0 % (50.0 to 50.0 %), 3 runs of 2 seeds" in summary(found)
    assert tables(found)[0].rows[0][1] == "2"
    assert "N=1, mean of 3 runs of 2 seeds" in lines(draw_quantity(found, quantities(found)[0]).axes[0])


def test_settings_that_follow_from_the_difficulty_are_in_no_label(tmp_path: Path) -> None:
    """A label names no budget while each t has one; where a t has two, the budget separates the curves."""
    budgets = {4: 100, 8: 200}
    for updates, n in itertools.product(budgets, (1, 2)):
        settings = [f"data.rule110.steps={updates}", f"sleep.passes={n}", f"train.tokens={budgets[updates]}"]
        make_run(tmp_path / f"{updates}-{n}", settings, [accuracy(budgets[updates] // 10, 0.5, n)])
    assert only_section(tmp_path).labels == ["N=1", "N=2"]
    assert only_section(tmp_path).groups[0].name == "N=1, t=4"
    assert "at step" not in "\n".join(summary(only_section(tmp_path))), "each t has been evaluated to its own end"
    make_run(tmp_path / "more", [*settings[:2], "train.tokens=300"], [accuracy(10, 0.5, 2)])
    assert only_section(tmp_path).labels == ["N=1, train.tokens=100", "N=1, train.tokens=200", *(
        f"N=2, train.tokens={number}" for number in (100, 200, 300)
    )]  # fmt: skip


def test_values_are_short() -> None:
    assert value_text(["a", "b"] * 3) == "3 x [a, b]" and value_text(["a", "b", "a"]) == "[a, b, a]"
    assert value_text([1, 1, 1]) == "3 x [1]" and value_text([1]) == "[1]" and value_text([]) == "[]"
    assert value_text(None) == "none" and value_text(0.5) == "0.5"
    assert (
        value_text([CurriculumStage(8, passes=4), CurriculumStage(9, window=2)])
        == "[tokens=8 passes=4, tokens=9 window=2]"
    )


@pytest.mark.parametrize(
    ("overrides", "label"),
    [
        (["sleep.passes=3"], "N=3"),
        (["sleep.passes=3", "sleep.sample_passes=true"], "N drawn from 1 to 3"),
        (["sleep.curriculum=[{tokens: 8, passes: 4}]"], "N by the curriculum"),
    ],
)
def test_a_single_curve_names_its_passes(tmp_path: Path, overrides: list[str], label: str) -> None:
    make_run(tmp_path / "r", overrides, [accuracy(1, 0.5)])
    [group] = only_section(tmp_path).groups
    assert group.label == group.name == label
