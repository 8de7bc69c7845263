"""bf16 weights under ZeRO-1: the numbers are those of fp32 weights with bf16 copies, and less is held and gathered."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.multiprocessing.reductions import StorageWeakRef

from sleeptrain.config.schema import OptimConfig
from sleeptrain.model import compiled
from sleeptrain.model.hybrid import Hybrid
from sleeptrain.parallel.zero import working_weights
from sleeptrain.parallel.zero.matrix_exchange import LayoutError
from sleeptrain.parallel.zero.state import load
from tests.checkpoint.contents import InMemory, flat
from tests.configs import change
from tests.models import tiny_config
from tests.parallel.processes import run_ranks
from tests.parallel.zero import cases

pytestmark = pytest.mark.usefixtures("imported")

UNCLIPPED = OptimConfig(muon_lr=0.02, adamw_lr=0.01, muon_weight_decay=0.1, adamw_weight_decay=0.1, clip_norm=0.0)


def every_kind() -> Hybrid:
    """A model with each kind of block, attention with biases, and an odd vocabulary."""
    layers = ["attention", "gated_deltanet", "mamba2", "jet"]
    model = Hybrid(change(tiny_config(layers, init_std=0.1), {"attention.qkv_bias": True}))
    model.init_weights(0)
    return model


def same_bits(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    """The weights and the optimizer state of two results are equal bit for bit."""
    a, b = (flat({"model": r["model"], "optim": r["optim"]}) for r in (found, wanted))
    assert a.keys() == b.keys()
    assert not [name for name in a if not torch.equal(a[name], b[name])]


@pytest.mark.parametrize(
    ("world", "tensor", "pieces"),
    [(2, 1, cases.row_by_row), pytest.param(4, 2, cases.whole_rounds, marks=pytest.mark.slow)],
)
def test_three_steps_equal_those_of_fp32_weights_with_bf16_copies(world: int, tensor: int, pieces: Any) -> None:
    """Losses have the same bits. Groups are other ones, so the norm adds up in another order: there is no clipping.

    The last elements of a group, which fill no vector of the processor, get an update that differs in its last bit.
    """

    def run(narrow: bool) -> dict[str, Any]:
        return cases.data_parallel(1, pieces, every_kind, bf16=True, config=UNCLIPPED, tensor=tensor, narrow=narrow)

    narrow, wide = (run_ranks(run, world, narrow)[0] for narrow in (True, False))
    assert narrow["losses"] == wide["losses"]
    assert narrow["norms"] == pytest.approx(wide["norms"], rel=1e-6)
    found, wanted = (flat({"model": r["model"], "optim": r["optim"]}) for r in (narrow, wide))
    assert found.keys() == wanted.keys()
    for name, values in wanted.items():
        torch.testing.assert_close(found[name], values, rtol=1e-6, atol=1e-9, msg=name)


def test_what_products_read_is_narrow_and_masters_gradients_and_the_rest_are_wide() -> None:
    def run() -> None:
        model = every_kind()
        drawn = {name: p.detach().clone() for name, p in model.named_parameters()}
        made, released = working_weights.narrow, list[StorageWeakRef]()

        def watched(wrapped: Any, groups: list[int]) -> None:
            released.extend(StorageWeakRef(wrapped.bit16_groups_flat[i].untyped_storage()) for i in groups)
            made(wrapped, groups)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(working_weights, "narrow", watched)
            engine = cases.engine_for(model, 1, narrow=True)
        assert released and all(storage.expired() for storage in released), "nothing keeps the fp32 weights"
        cases.whole_rounds(engine, cases.rows_of(cases.step_batch(0), dist.get_rank(), 2), True)
        for name, p in engine.parameters.items():
            is_narrow = p.dim() == 2 and "conv" not in name
            assert p.dtype == (torch.bfloat16 if is_narrow else torch.float32), name
            assert torch.equal(p, drawn[name].to(p.dtype))
            assert p.grad is not None and p.grad.dtype == torch.float32, name
            assert bool(p.grad.any()) is not name.endswith("kernel_in.weight"), "a Jet kernel begins as zero"
        saved = cases.stage_state(engine)
        assert saved is None or all(torch.equal(saved["model"][name], p) for name, p in drawn.items())

    run_ranks(run, 2)


@pytest.mark.slow
def test_compiled_blocks_compute_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "BACKEND", "aot_eager")

    def run(compile: bool) -> dict[str, Any]:
        engine = cases.engine_for(every_kind(), 1, narrow=True)
        if compile:
            compiled.compile_blocks(engine.model)
        batch = cases.step_batch(0)
        loss = cases.whole_rounds(engine, batch, True)
        norm = engine.step(1.0)
        with torch.no_grad():
            return {"loss": float(loss), "norm": norm, "after": float(cases.share_of_loss(engine.model, batch, True))}

    found, wanted = (run_ranks(run, 1, compile)[0] for compile in (True, False))
    assert found == pytest.approx(wanted, rel=1e-3)


def test_a_checkpoint_goes_on_bit_for_bit_and_in_one_process() -> None:
    """The masters are saved and loaded, not their roundings; into an engine that had other weights."""

    def run(steps: list[int], saved: dict[str, Any] | None) -> dict[str, Any]:
        return cases.data_parallel(1, steps=steps, bf16=True, saved=saved, narrow=True)

    whole, start = (run_ranks(run, 2, steps, None)[0] for steps in ([0, 1, 2], [0, 1]))
    rest = run_ranks(run, 2, [2], {key: start[key] for key in ("model", "optim")})[0]
    assert rest["losses"] == whole["losses"][2:]
    same_bits(rest, whole)


def test_weights_are_loaded_from_masters() -> None:
    """As for a run that starts from the weights of another: those that the checkpoint lacks keep their values."""
    done = cases.single_process(steps=1, bf16=True)

    def run() -> dict[str, Any] | None:
        engine = cases.engine_for(cases.small_model(9), 1, narrow=True)
        load(engine, InMemory(flat({"model": done["model"], "optim": done["optim"]})))
        assert all(torch.equal(p, done["model"][n].to(p.dtype)) for n, p in engine.parameters.items())
        return cases.stage_state(engine)

    same_bits(run_ranks(run, 2)[0], done)


def test_an_optimizer_of_another_deepspeed_is_refused() -> None:
    other: Any = SimpleNamespace(bit16_groups_flat=[])
    with pytest.raises(LayoutError, match="ZeRO-1 has parallel_partitioned_bit16_groups"):
        working_weights.narrow(other, [0])
    with pytest.raises(LayoutError, match="ZeRO-1 has scaled_global_norm"):
        working_weights.join_norms(other, ["muon"])
