"""ZeRO on data ranks against one process: losses, norms, weights and optimizer state after several clipped steps."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.distributed as dist

from sleeptrain.config.schema import OptimConfig
from sleeptrain.distributed.mesh import Mesh
from sleeptrain.errors import ConfigError, DataError
from sleeptrain.model.hybrid import Hybrid
from sleeptrain.optim import muon
from sleeptrain.optim.param_groups import parameter_roles
from sleeptrain.parallel.zero.engine import load_deepspeed, wrap
from tests.models import tiny_config
from tests.parallel.processes import run_ranks
from tests.parallel.zero import cases

pytestmark = pytest.mark.usefixtures("imported")

TOLERANCE = 2e-6  # fp32, after three steps, each larger than 1e-2


def assert_equal(results: list[dict[str, Any]], wanted: dict[str, Any], tolerance: float = TOLERANCE) -> None:
    for result in results:
        assert result["losses"] == pytest.approx(wanted["losses"], rel=tolerance)
        assert result["norms"] == pytest.approx(wanted["norms"], rel=tolerance)
    assert cases.largest_difference(results[0]["model"], wanted["model"]) < tolerance
    for kind, named in wanted["optim"].items():
        assert set(results[0]["optim"][kind]) == set(named)
        for name, state in named.items():
            found = results[0]["optim"][kind][name]
            assert cases.largest_difference(found, state) < tolerance * 0.1, (name, found.keys())


def slow(*values: Any) -> Any:
    return pytest.param(*values, marks=pytest.mark.slow)


def untied() -> Hybrid:
    torch.manual_seed(3)
    model = Hybrid(tiny_config(["attention", "gated_deltanet"], init_std=0.1, tie_embeddings=False))
    model.init_weights(3)
    return model


@pytest.mark.parametrize(
    ("world", "zero", "pieces"),
    [
        (2, 3, cases.whole_rounds),
        (4, 1, cases.row_by_row),
        (2, 0, cases.window_by_window),
        (2, 1, cases.window_by_window),
        (2, 2, cases.window_by_window),
        (2, 2, cases.differently),
        slow(2, 0, cases.whole_rounds),
        slow(2, 1, cases.whole_rounds),
        slow(2, 2, cases.whole_rounds),
        slow(4, 2, cases.whole_rounds),
        slow(4, 3, cases.whole_rounds),
        slow(2, 2, cases.row_by_row),
        slow(2, 0, cases.differently),
        slow(2, 1, cases.differently),
    ],
)
def test_equals_one_process(world: int, zero: int, pieces: Any) -> None:
    wanted = cases.single_process()
    assert min(wanted["norms"]) > 10 * cases.OPTIM.clip_norm  # every step is clipped
    assert_equal(run_ranks(cases.data_parallel, world, zero, pieces), wanted)


@pytest.mark.parametrize("shard", [2, pytest.param(1, marks=pytest.mark.slow)])
def test_state_cut_over_some_of_the_replicas_equals_one_process(shard: int) -> None:
    """A checkpoint of two ranks that all share goes on in groups of replicas that each keep all of the state."""
    saved = run_ranks(cases.data_parallel, 2, 1, cases.whole_rounds, cases.small_model, range(1))[0]
    start, wanted = {"model": saved["model"], "optim": saved["optim"]}, cases.single_process()
    wanted |= {key: wanted[key][1:] for key in ("losses", "norms")}

    def go_on() -> dict[str, Any]:
        return cases.data_parallel(1, make=lambda: cases.small_model(9), steps=[1, 2], saved=start, shard=shard)

    results = run_ranks(go_on, 4)
    assert_equal(results, wanted)
    assert all(r["state_bytes"] == pytest.approx(saved["state_bytes"] * 2 / shard, rel=0.01) for r in results)


@pytest.mark.slow
def test_such_a_checkpoint_goes_on_in_other_layouts() -> None:
    """With tensor ranks, which cut Muon's matrices, too."""

    def begin() -> dict[str, Any]:
        return cases.data_parallel(1, steps=range(2), tensor=2, shard=1)

    saved, wanted = run_ranks(begin, 4)[0], cases.single_process()
    wanted |= {key: wanted[key][2:] for key in ("losses", "norms")}

    def go_on(zero: int) -> dict[str, Any]:
        start = {"model": saved["model"], "optim": saved["optim"]}
        return cases.data_parallel(zero, make=lambda: cases.small_model(9), steps=[2], saved=start)

    for world, zero in ((2, 1), (2, 2), (2, 3), (1, 1)):
        assert_equal(run_ranks(go_on, world, zero), wanted)


@pytest.mark.parametrize("zero", [1, slow(3)])
def test_equals_one_process_with_an_untied_head(zero: int) -> None:
    results = run_ranks(cases.data_parallel, 2, zero, cases.whole_rounds, untied)
    assert_equal(results, cases.single_process(untied))


@pytest.mark.parametrize("zero", [slow(0), 1, slow(2), slow(3)])
def test_nothing_is_clipped_without_a_limit_and_the_norm_is_still_returned(zero: int) -> None:
    config = OptimConfig(clip_norm=0.0, muon_scaling="moonshot")
    wanted = cases.single_process(steps=2, config=config)
    results = run_ranks(cases.data_parallel, 2, zero, cases.whole_rounds, cases.small_model, range(2), False, config)
    assert_equal(results, wanted)


@pytest.mark.parametrize("zero", [slow(0), 1, slow(3)])
def test_bf16_keeps_every_weight_wide(zero: int) -> None:
    """The ranks round other sums to bf16 than one process does, so results are equal up to that rounding."""

    def run() -> dict[str, Any]:
        result = cases.data_parallel(zero, bf16=True, steps=range(2))
        if dist.get_rank() == 0:
            assert {t.dtype for t in result["model"].values()} == {torch.float32}
        return result

    wanted, (result, _) = cases.single_process(steps=2, bf16=True), run_ranks(run, 2)
    assert result["losses"] == pytest.approx(wanted["losses"], rel=2e-3)
    assert result["norms"] == pytest.approx(wanted["norms"], rel=1e-2)
    for name in wanted["model"]:
        assert float((result["model"][name] - wanted["model"][name]).norm()) < 2e-2 * max(
            1.0, float(wanted["model"][name].norm())
        )
        if name.endswith(("A_log", "dt_bias")):
            torch.testing.assert_close(result["model"][name], wanted["model"][name], rtol=0, atol=1e-3)


def test_every_matrix_is_orthogonalised_once_and_the_state_is_cut() -> None:
    def run(zero: int) -> tuple[int, int]:
        counted: list[int] = []
        plain = muon.newton_schulz
        muon.newton_schulz = lambda G: counted.append(G.shape[0]) or plain(G)  # type: ignore[func-returns-value]
        result = cases.data_parallel(zero, steps=range(2))
        return sum(counted), result["state_bytes"]

    roles = parameter_roles(cases.small_model())
    matrices = sum(len(role.blocks or (1,)) for role in roles.values() if role.kind == "muon")
    state_of_one = None
    for zero in (0, 1, 2, 3):
        results = run_ranks(run, 2, zero)
        assert sum(count for count, _ in results) == 2 * matrices and all(count for count, _ in results)
        state_of_one = state_of_one or results[0][1]
        assert all(size < 0.51 * state_of_one for _, size in results) == (zero > 0)


@pytest.mark.parametrize("zero", [slow(0), 1, 2, slow(3)])
def test_a_step_that_is_not_finite_changes_nothing_and_the_next_is_right(zero: int) -> None:
    def run() -> dict[str, Any]:
        engine = cases.engine_for(cases.small_model(), zero)
        before = cases.stage_state(engine)
        broken = cases.rows_of(cases.step_batch(5), dist.get_rank(), 2)
        # Only one rank's part of the loss is broken.
        loss = engine.forward(lambda m: cases.share_of_loss(m, broken) * (math.nan if dist.get_rank() else 1.0))
        engine.backward(loss)
        norm = engine.step(1.0)
        after = cases.stage_state(engine)
        if before is not None and after is not None:
            assert all(torch.equal(before["model"][n], t) for n, t in after["model"].items())
        cases.whole_rounds(engine, cases.rows_of(cases.step_batch(0), dist.get_rank(), 2), False)
        return {"norm": norm, "norms": [engine.step(1.0)], **(cases.stage_state(engine) or {})}

    results, wanted = run_ranks(run, 2), cases.single_process(steps=1)
    assert all(r["norm"] == math.inf for r in results)
    assert results[0]["norms"] == pytest.approx(wanted["norms"], rel=TOLERANCE)
    assert cases.largest_difference(results[0]["model"], wanted["model"]) < TOLERANCE


@pytest.mark.parametrize(
    ("zero", "pieces"),
    [
        (1, cases.whole_rounds),
        *(slow(zero, cases.whole_rounds) for zero in (0, 2, 3)),
        (2, cases.differently),
    ],
)
def test_dropped_gradients_leave_no_trace(zero: int, pieces: Any) -> None:
    def run() -> dict[str, Any]:
        engine = cases.engine_for(cases.small_model(), zero)
        for step in (5, 0):
            engine.zero_grad()
            pieces(engine, cases.rows_of(cases.step_batch(step), dist.get_rank(), 2), False)
        return {"norms": [engine.step(1.0)], **(cases.stage_state(engine) or {})}

    result, wanted = run_ranks(run, 2)[0], cases.single_process(steps=1)
    assert result["norms"] == pytest.approx(wanted["norms"], rel=TOLERANCE)
    assert cases.largest_difference(result["model"], wanted["model"]) < TOLERANCE


def test_a_replica_that_fails_does_not_wait_for_the_others() -> None:
    def run() -> str:
        engine = cases.engine_for(cases.small_model(), 2)
        if dist.get_rank() == 0:
            with pytest.raises(DataError, match="a bad row"), engine.sum_once():
                cases.whole_rounds(engine, cases.rows_of(cases.step_batch(0), 0, 2), False)
                raise DataError("a bad row")
        return "gone on"

    assert run_ranks(run, 2) == ["gone on"] * 2


def test_a_second_backward_under_zero_3_is_refused() -> None:
    with pytest.raises(AssertionError, match=r"ConfigError: parallel.zero=3 takes one backward"):
        run_ranks(cases.data_parallel, 2, 3, cases.row_by_row)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_weights_that_are_not_fp32_are_refused(dtype: torch.dtype) -> None:
    model = cases.small_model().to(dtype)
    with pytest.raises(ConfigError, match=r"embedding.weight is torch.*train.precision=bf16"):
        wrap(model, parameter_roles(model), cases.OPTIM, 1, Mesh.single())


def test_a_parameter_without_a_role_is_refused() -> None:
    model = cases.small_model()
    roles = parameter_roles(model)
    del roles["norm.weight"]
    with pytest.raises(ConfigError, match=r"norm\.weight is trainable but has no role"):
        wrap(model, roles, cases.OPTIM, 1, Mesh.single())


def test_deepspeed_compiles_nothing_and_stays_quiet() -> None:
    """It does not even test what could be compiled: such a test runs a compiler."""

    def run() -> tuple[list[str], int]:
        from deepspeed.ops.op_builder.builder import OpBuilder

        requests: list[str] = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(OpBuilder, "has_function", lambda builder, *_, **__: requests.append(builder.name))
            deepspeed = load_deepspeed()
            return requests, deepspeed.logger.level

    assert run_ranks(run, 1) == [([], 40)]
