"""Frozen parts, rates of groups, inserted blocks: which parameters train when, and how such a run goes on."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from sleeptrain.checkpoint.folder import checkpoints
from sleeptrain.config.compose import compose
from sleeptrain.config.schema import FrozenStage, OptimConfig, Rate
from sleeptrain.errors import ConfigError, DataError
from sleeptrain.optim.freezing import frozen_stage, is_frozen, with_rates
from sleeptrain.optim.optimizers import Optimizers, ParameterRole
from sleeptrain.optim.param_groups import parameter_roles
from sleeptrain.plan.parameters import held_parameters, training_state
from tests.checkpoint.contents import contents
from tests.models import tiny_model
from tests.train.test_trainer import records, run, settings

STEP = 8 * 7  # tokens
INSERTED = (
    "model.layers=[attention,jet,gated_deltanet]",
    "model.mixer_only=[1]",
    "model.jet={num_heads: 2, head_k_dim: 8, head_v_dim: 8, kernel_dim: 8}",
)
INSERTED_FIRST = ("optim.frozen=['*','!blocks.1.*']", f"optim.curriculum=[{{tokens: {6 * STEP}}}]")


def test_the_last_pattern_that_matches_decides():
    patterns = ["*", "!blocks.1.*", "blocks.1.mixer.norm.*"]
    names = ("head.weight", "blocks.1.mixer.A_log", "blocks.1.mixer.norm.weight")
    assert [is_frozen(name, patterns) for name in names] == [True, False, True]
    assert not is_frozen("head.weight", [])


def test_stages_follow_the_tokens_seen():
    optim = OptimConfig(curriculum=[FrozenStage(100), FrozenStage(200, ["*"])])
    assert [frozen_stage(optim, tokens) for tokens in (0, 99, 100, 199, 200, 10**9)] == [0, 0, 1, 1, 2, 2]


def test_roles_get_rates_and_stages():
    roles = {"a.weight": ParameterRole("muon"), "a.bias": ParameterRole("adamw", False)}
    optim = OptimConfig(
        frozen=["a.bias"],
        curriculum=[FrozenStage(5), FrozenStage(9, ["a.*", "!*.weight"])],
        rates=[Rate("a.*", 2.0), Rate("*.bias", 3.0)],
    )
    assert with_rates(roles, optim) == {
        "a.weight": ParameterRole("muon", factor=2.0),
        "a.bias": ParameterRole("adamw", False, factor=3.0, frozen=(0, 2)),
    }


@pytest.mark.parametrize(
    ("optim", "named"),
    [
        (OptimConfig(frozen=["block.*"]), r"optim\.frozen: no parameter of the model matches 'block\.\*'"),
        (OptimConfig(curriculum=[FrozenStage(1, ["!typo"])]), r"optim\.curriculum\[0\]\.frozen: .*'typo'"),
        (OptimConfig(rates=[Rate("typo", 2.0)]), r"optim\.rates: .*'typo'"),
        (OptimConfig(frozen=["*"]), r"optim\.frozen freezes every parameter"),
    ],
)
def test_contradictory_settings_are_refused(optim: OptimConfig, named: str):
    with pytest.raises(ConfigError, match=named):
        with_rates(parameter_roles(tiny_model()), optim)


@pytest.mark.parametrize(
    ("more", "named"),
    [
        (["optim.curriculum=[{tokens: 5},{tokens: 5}]"], r"optim\.curriculum\[1\]\.tokens"),
        (["optim.rates=[{parameters: a, factor: 0}]"], r"optim\.rates\[0\]\.factor"),
        (["run.init_inserted=[0]"], r"run\.init_inserted .*run\.init_from"),
        (["run.init_inserted=[7]", "run.init_from=x"], r"run\.init_inserted must name blocks .*7"),
        (["sleep.curriculum=[{tokens: 5, passes: 2, ramp: cubic}]"], r"ramp: unknown value 'cubic'"),
        (["sleep.curriculum=[{tokens: 5, batch: 2, ramp: sqrt}]"], r"give it passes"),
        (["model.mixer_only=[2]"], r"model\.mixer_only holds 2"),
        (["model.norm_between_passes=true", "sleep.core=[0,1]"], r"model\.norm_between_passes"),
        (["model.sandwich_norms=true", "model.attention.post_norm=true"], r"choose one"),
    ],
)
def test_settings_that_do_not_fit_are_refused(tmp_path: Path, more: list[str], named: str):
    with pytest.raises(ConfigError, match=named):
        compose(settings(tmp_path, *more))


def test_a_rate_scales_the_update_of_both_optimizers():
    moved = []
    for factor in (1.0, 0.25):
        model = tiny_model()
        optim = OptimConfig(rates=[Rate("blocks.1.*", factor)], muon_weight_decay=0.0, adamw_weight_decay=0.0)
        made = Optimizers(with_rates(parameter_roles(model), optim), dict(model.named_parameters()), optim)
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        torch.manual_seed(0)
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        made.step(1.0)
        moved.append({name: p.detach() - before[name] for name, p in model.named_parameters()})
    for name, update in moved[0].items():
        expected = update * (0.25 if name.startswith("blocks.1.") else 1.0)
        torch.testing.assert_close(moved[1][name], expected, rtol=1e-6, atol=1e-12, msg=name)


def weights(folder: Path) -> dict[int, dict[str, torch.Tensor]]:
    """The weights of each checkpoint of a run, by step."""
    found = {int(path.name.split("-")[1]): contents(path) for path in checkpoints(folder / "r" / "checkpoints")}
    return {step: content["model"] for step, content in found.items()}


@pytest.fixture(scope="module")
def grown(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A run, and a second from its weights with an inserted Jet mixer, which trains alone at first."""
    root = tmp_path_factory.mktemp("grown")
    run(root / "small")
    more = ("run.init_inserted=[1]", *INSERTED_FIRST, "checkpoint.keep=9")
    run(root / "large", f"run.init_from={root / 'small' / 'r'}", *INSERTED, *more)
    return root / "small", root / "large"


def test_inserted_blocks_keep_what_the_others_have_learnt(grown: tuple[Path, Path]):
    small, large = (weights(folder) for folder in grown)
    before, first = small[max(small)], large[0]
    names = {name: name.replace("blocks.1.", "blocks.2.") for name in before}
    assert all(torch.equal(first[names[name]], before[name]) for name in before)
    new = set(first) - set(names.values())
    assert new and all(name.startswith("blocks.1.") for name in new)
    assert not first["blocks.1.mixer.out_proj.weight"].any()


def test_only_unfrozen_parameters_move_and_later_all(grown: tuple[Path, Path]):
    found = weights(grown[1])
    assert set(found) == {0, 3, 6, 9, 12}
    for step, earlier in ((3, 0), (6, 3), (9, 6), (12, 9)):
        moved = {name for name in found[step] if not torch.equal(found[step][name], found[earlier][name])}
        inserted = {name for name in found[step] if name.startswith("blocks.1.")}
        assert moved == (inserted if step <= 6 else set(found[step]))


def test_optimizer_state_is_kept_for_trained_parameters(grown: tuple[Path, Path]):
    places = checkpoints(grown[1] / "r" / "checkpoints")
    sixth, last = (contents(place)["optim"]["adamw"] for place in (places[2], places[-1]))
    early, late = ({name: float(state["step"]) for name, state in saved.items()} for saved in (sixth, last))
    assert set(early.values()) == {6.0} and all(name.startswith("blocks.1.") for name in early)
    assert {name for name, count in late.items() if count == 12.0} == set(early)
    assert set(late.values()) == {6.0, 12.0}


@pytest.mark.parametrize("killed_at", [3, 6, 9])
def test_a_killed_run_goes_on_bit_for_bit(grown: tuple[Path, Path], tmp_path: Path, killed_at: int):
    """While parts are frozen, when they thaw, and after that."""
    small, large = grown
    shutil.copytree(large, tmp_path / "again")
    for path in checkpoints(tmp_path / "again" / "r" / "checkpoints"):
        if int(path.name.split("-")[1]) > killed_at:
            shutil.rmtree(path)
    more = ("run.init_inserted=[1]", *INSERTED_FIRST, "checkpoint.keep=9")
    run(tmp_path / "again", f"run.init_from={small / 'r'}", *INSERTED, *more)
    for step, expected in weights(large).items():
        again = weights(tmp_path / "again")[step]
        assert all(torch.equal(again[name], expected[name]) for name in expected)
    losses = [[r["loss"] for r in records(folder) if "loss" in r] for folder in (large, tmp_path / "again")]
    assert losses[0] == losses[1]


def test_a_part_that_was_never_trained_may_thaw_when_a_run_goes_on(tmp_path: Path):
    run(tmp_path, "optim.frozen=['blocks.0.*']", f"train.tokens={6 * STEP}")
    frozen = weights(tmp_path)
    assert torch.equal(frozen[6]["blocks.0.mixer.q_proj.weight"], frozen[3]["blocks.0.mixer.q_proj.weight"])
    allowed = "run.allow_changes=[optim.frozen,train.tokens]"
    run(tmp_path, f"train.tokens={12 * STEP}", allowed)
    moved = weights(tmp_path)
    assert not torch.equal(moved[12]["blocks.0.mixer.q_proj.weight"], frozen[6]["blocks.0.mixer.q_proj.weight"])


def test_a_checkpoint_with_too_many_blocks_is_refused(tmp_path: Path):
    run(tmp_path / "small")
    with pytest.raises(DataError, match=r"not in the model \(.*run\.init_dropped"):
        run(tmp_path / "new", f"run.init_from={tmp_path / 'small' / 'r'}", "run.init_inserted=[0]")


def test_a_plan_counts_no_state_for_parameters_that_never_train(tmp_path: Path):
    """In one process; DeepSpeed allocates the state of all parameters."""
    never = compose(settings(tmp_path, "model.vocab_size=3", "optim.frozen=['blocks.0.*']"))
    later = compose(settings(tmp_path, "model.vocab_size=3", f"optim.curriculum=[{{tokens: {STEP}}}]"))
    [held] = held_parameters(never, (0, 2))
    frozen = [h for h in held if h.name.startswith("blocks.0.")]
    elements = sum(h.numel for h in frozen)
    averages = sum(h.numel * (1 if h.role.kind == "muon" else 2) for h in frozen)
    [all_held] = held_parameters(later, (0, 2))
    a, b = (training_state(h, 1, (1, 1, 1)) for h in (held, all_held))
    assert (b.gradients - a.gradients, b.optimizer - a.optimizer) == (4 * elements, 4 * averages) and elements > 0
    assert training_state(held, 1, (1, 1, 2)) == training_state(all_held, 1, (1, 1, 2))
