"""The groups in configs/ compose to valid, typed configurations; mistakes become one line."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from sleeptrain.config.compose import compose, config_dir, sweep_run_name, validate_sweep
from sleeptrain.config.schema import Config, CurriculumStage
from sleeptrain.data.batch import PAD
from sleeptrain.data.tasks.build import build_task
from sleeptrain.errors import ConfigError
from sleeptrain.model.hybrid import Hybrid
from sleeptrain.optim.freezing import is_frozen
from sleeptrain.plan.mean_row import MeanRow
from sleeptrain.plan.workload import reachable


def options(group: str) -> list[str]:
    return sorted(path.stem for path in (config_dir() / group).glob("*.yaml"))


@pytest.mark.parametrize("experiment", options("experiment"))
def test_an_experiment_names_its_run_after_itself(experiment: str) -> None:
    assert compose([f"experiment={experiment}"]).run.name == experiment


@pytest.mark.parametrize("group", ["model", "sleep", "data", "optim", "train"])
def test_every_option_composes(group: str) -> None:
    base = {"data": "rule110"}.get(group, "stdlib")
    found = options(group)
    assert found
    for option in found:
        overrides = [f"experiment={base}", f"{group}={option}"]
        if option == "unlabelled" or (group == "data" and option != "rule110"):
            overrides = ["experiment=rule110" if group == "sleep" else "experiment=stdlib", f"{group}={option}"]
        if option.startswith("transformer"):
            overrides.append("sleep=wake")
        overrides += {"depo": ["sleep.window=75"], "gsm_infinite": ["sleep.window=2000"]}.get(option, [])
        assert isinstance(compose(overrides), Config)


def test_the_rule110_experiment() -> None:
    config = compose(["experiment=rule110"])
    assert (config.model.layers, config.model.dim) == (["attention", "gated_deltanet"], 64)
    assert (config.data.source, config.data.batch) == ("rule110", 128)
    assert (config.data.rule110.width, config.data.rule110.steps, config.data.rule110.strings) == (20, 8, 1)
    assert (config.sleep.when, config.sleep.window) == ("unlabelled", 20)
    assert (config.optim.muon_lr, config.optim.schedule) == (2e-3, "constant")


def test_the_stdlib_experiment_sleeps_more_and_more() -> None:
    config = compose(["experiment=stdlib"])
    assert {"attention", "gated_deltanet"} == set(config.model.layers)
    assert [stage.passes for stage in config.sleep.curriculum] == [2, 4] and config.sleep.passes == 1
    assert all(stage.tokens < config.train.tokens for stage in config.sleep.curriculum)


@pytest.mark.parametrize(
    ("experiment", "steps", "passes", "updates"),
    [
        *((f"rule110_t32_n{n}", 100_000, n, 32) for n in (1, 2, 3, 4)),
        *((f"rule110_t{t}_n1", 20_000, 1, t) for t in (4, 8, 10, 12, 14, 16)),
        *((f"depo_4x512_n{n}", 138_000, n, None) for n in (1, 2, 4)),
        ("depo_jet_10x512", 138_000, 1, None),
        *((f"rule110_t32_{name}", 100_000, 1, 32) for name in ("deep", "transformer", "full_attention")),
    ],
)
def test_the_papers_runs(experiment: str, steps: int, passes: int, updates: int | None) -> None:
    """Published sizes, and a budget of tokens that makes the published number of steps."""
    config = compose([f"experiment={experiment}"])
    data = config.data
    assert (config.sleep.passes, config.sleep.when) == (passes, "unlabelled")
    assert (config.optim.muon_lr, config.optim.adamw_lr) == (2e-3, 5e-5)
    if updates is None:
        assert (data.batch, config.sleep.window, data.depo.nodes, data.depo.hops) == (128, 75, 75, 16)
    else:
        assert (data.batch, data.rule110.width, data.rule110.strings, data.rule110.steps) == (512, 24, 4, updates)
        assert config.sleep.window == (100 if experiment.endswith("full_attention") else 24)
    rows = build_task(data).rows(0, 0, 2000)
    tokens = float((rows.documents_BT != PAD).sum()) / 2000 * data.batch
    assert config.train.tokens / tokens == pytest.approx(steps, rel=0.03)


@pytest.mark.parametrize(
    ("experiment", "steps", "window", "core"),
    [
        ("gsm_jet_2b_hard", 775, 2000, [7, 21]),
        pytest.param("gsm_ouro_hard", 1090, 2000, None, marks=pytest.mark.slow),
        pytest.param("gsm_ouro_warmup", 325, 512, None, marks=pytest.mark.slow),
        pytest.param("gsm_ouro_sliding", 650, 512, None, marks=pytest.mark.slow),
    ],
)
def test_the_papers_runs_on_open_models(experiment: str, steps: int, window: int, core: list[int] | None) -> None:
    config = compose([f"experiment={experiment}"])
    gsm = config.data.gsm_infinite
    assert (config.data.batch, config.sleep.window, config.sleep.core) == (256, window, core)
    assert (gsm.min_ops, gsm.max_ops, gsm.min_tokens, gsm.max_tokens, gsm.validation_samples) == (
        1,
        8,
        2000,
        3300,
        1600,
    )
    assert (config.optim.muon_lr, config.optim.adamw_lr, config.sleep.when) == (1e-3, 5e-5, "unlabelled")
    assert config.sleep.eviction == ("sliding" if experiment == "gsm_ouro_sliding" else "hard")
    with torch.device("meta"):
        names = [name for name, _ in Hybrid(config.model).named_parameters()]
    # The warm-up trains the inserted blocks, and them only.
    frozen = [is_frozen(name, config.optim.frozen) for name in names]
    inserted = [name.startswith(tuple(f"blocks.{i}." for i in config.model.mixer_only)) for name in names]
    assert frozen == ([not new for new in inserted] if experiment == "gsm_ouro_warmup" else [False] * len(names))
    assert config.train.tokens / (MeanRow(replace(config, data=reachable(config.data))).tokens * 256) == pytest.approx(
        steps, rel=0.01
    )


def test_the_window_of_rule110_follows_its_width() -> None:
    assert compose(["experiment=rule110", "data.rule110.width=24"]).sleep.window == 24


def test_the_plain_transformer_has_no_recurrent_layer() -> None:
    assert set(compose(["experiment=stdlib", "model=transformer_tiny", "sleep=wake"]).model.layers) == {"attention"}


def test_overrides_win_over_the_experiment_and_are_typed() -> None:
    stages = "sleep.curriculum=[{tokens:3,passes:2}]"
    config = compose(["experiment=stdlib", "train.tokens=77", "optim.clip_norm=2", stages])
    assert config.train.tokens == 77
    assert isinstance(config.optim.clip_norm, float)
    assert config.sleep.curriculum == [CurriculumStage(tokens=3, passes=2)]


def test_a_sweep_is_refused_for_its_last_job() -> None:
    validate_sweep(["experiment=stdlib", "sleep.passes=1,2"])
    with pytest.raises(ConfigError, match=r"sleep\.passes must be at least 1, not 0"):
        validate_sweep(["experiment=stdlib", "sleep.passes=1,2,0"])


def test_a_sweep_may_not_share_a_run_folder() -> None:
    validate_sweep(["experiment=stdlib,rule110"])
    with pytest.raises(ConfigError, match=r"run\.name=multirun/same .*experiment=stdlib.*experiment=rule110"):
        validate_sweep(["experiment=stdlib,rule110", "run.name=same"])


def test_the_name_of_a_job_of_a_sweep_is_one_folder_below_the_run() -> None:
    assert sweep_run_name("rule110", "sleep.passes=2") == "multirun/rule110/sleep.passes=2"
    assert sweep_run_name("rule110", "") == "multirun/rule110"
    assert sweep_run_name("a", "data.shards.train=/x/y") == "multirun/a/data.shards.train=-x-y"
    long = [sweep_run_name("a", "x" * 300 + end) for end in "12"]
    assert long[0] != long[1] and all(len(part) <= 255 for name in long for part in name.split("/"))
