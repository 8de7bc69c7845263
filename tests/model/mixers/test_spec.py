"""What all specs share: drawn weights, rows of fused matrices, and cuts over ranks."""

from __future__ import annotations

import pytest
import torch

from sleeptrain.errors import ConfigError
from sleeptrain.model.decay import parameter_generator, random_decay
from sleeptrain.model.mixers.registry import mixer_spec
from sleeptrain.model.mixers.spec import Draw, Precision, consecutive_rows, shareable, uneven
from tests.models import tiny_config


def test_weights_are_drawn_by_seed_and_name() -> None:
    draw = Draw("blocks.0.mixer.a", (40, 50), 0)
    weights = draw.normal(0.5)
    assert torch.equal(weights, Draw("blocks.0.mixer.a", (40, 50), 0).normal(0.5))
    for other in (Draw("blocks.1.mixer.a", (40, 50), 0), Draw("blocks.0.mixer.a", (40, 50), 1)):
        assert not torch.equal(weights, other.normal(0.5))
    assert weights.std().item() == pytest.approx(0.5, rel=0.05)
    even = draw.uniform(0.25)
    assert even.abs().max() <= 0.25 and even.std().item() == pytest.approx(0.25 / 3**0.5, rel=0.05)


def test_one_draw_gives_both_decay_parameters() -> None:
    drawn = random_decay((9,), parameter_generator(0, "blocks.0.mixer.A_log"))
    for name in ("A_log", "dt_bias"):
        assert torch.equal(Draw(f"blocks.0.mixer.{name}", (9,), 0).decay(), drawn[name])


def test_first_weights() -> None:
    model = tiny_config(["jet"] * 8, init_std=0.1)
    spec = mixer_spec(model, "attention")

    def first(name: str, *shape: int) -> torch.Tensor | None:
        return spec.initial_weight(name, Draw(f"blocks.0.mixer.{name}", shape, 0))

    assert first("q_norm.weight", 8) is None
    bias, inner, last = first("q_proj.bias", 8), first("q_proj.weight", 50, 50), first("o_proj.weight", 50, 50)
    assert bias is not None and inner is not None and last is not None
    assert not bias.any() and inner.std().item() == pytest.approx(0.1, rel=0.1)
    assert last.std().item() == pytest.approx(0.1 / 4, rel=0.1), "the matrix that ends the mixer, by the depth"


def test_rows_one_below_the_other() -> None:
    assert consecutive_rows(2, 3, 1) == (slice(0, 2), slice(2, 5), slice(5, 6))


def test_a_size_that_ranks_do_not_divide_is_named() -> None:
    assert list(uneven("jet", {"num_heads": 4, "kernel_dim": 6}, 4)) == ["model.jet.kernel_dim (6)"]
    assert list(uneven("jet", {"num_heads": 4}, 2)) == []


@pytest.mark.parametrize(
    ("heads", "dim", "size", "fits"),
    [(4, 8, 2, True), (2, 8, 4, True), (1, 8, 8, True), (2, 3, 4, False), (3, 8, 2, False), (4, 8, 6, False)],
)
def test_heads_that_ranks_may_share(heads: int, dim: int, size: int, fits: bool) -> None:
    assert shareable(heads, dim, size) == fits


def test_narrow_inputs_are_copied_for_each_layer() -> None:
    assert Precision(2, kernels=False).inputs(10, 3) == 60
    assert Precision(4, kernels=False).inputs(10, 3) == 40


def test_what_crosses_a_boundary() -> None:
    spec = mixer_spec(tiny_config(["mamba2"]), "mamba2")
    assert spec.carried_bytes(2, 5, carry_conv=False) == 4 * 4 * 6 * 8
    assert spec.carried_bytes(2, 5, carry_conv=True) == 4 * (4 * 6 * 8 + 3 * (32 + 12 + 12))


def test_a_parameter_without_an_initialisation_is_refused() -> None:
    spec = mixer_spec(tiny_config(["jet"]), "jet")
    with pytest.raises(ConfigError, match=r"model\.layers: the spec of mixer 'jet' gives no .* feature_map \[3, 5\]"):
        spec.initial_weight("feature_map", Draw("blocks.0.mixer.feature_map", (3, 5), 0))
