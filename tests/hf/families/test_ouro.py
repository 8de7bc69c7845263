"""Ouro's settings and names."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sleeptrain.cli import main
from sleeptrain.errors import ConfigError
from sleeptrain.hf.convert.check import our_logits
from sleeptrain.hf.families import family_of
from tests.hf.published.small import folder_of, imported
from tests.hf.published_settings import OURO_1_4B


@torch.no_grad()
def test_an_export_of_ouro_has_one_loop():
    """The published code runs all loops and then predicts. For an export it gives the logits of our model at N=1."""
    theirs, ours = (model.double() for model in imported("ouro"))
    tokens = torch.randint(17, (2, 30))
    y = theirs.embed(tokens)
    for _ in range(family_of("ouro").to_config(ours.config)["total_ut_steps"]):
        y, _ = theirs.loop(y, theirs.empty_memory())
    torch.testing.assert_close(our_logits(ours, tokens, 30, 1), theirs.predict(y), rtol=0, atol=1e-12)


def test_an_import_of_ouro_says_which_loop_predicts(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    folder_of("ouro", tmp_path / "theirs")
    assert main(["convert", "import", str(tmp_path / "theirs"), str(tmp_path / "ours"), "--check-tokens", "16"]) == 0
    output = capsys.readouterr().out
    assert "total_ut_steps=4: in Ouro the last of 4 loops predicts, in sleeptrain the first pass" in output
    assert "give it a memory with run.init_inserted" in output
    assert not family_of("ouro").remarks({"total_ut_steps": 1}) and not family_of("jet_nemotron").remarks({})


def test_only_full_attention_is_read() -> None:
    for change in ({"layer_types": ["full_attention", "sliding_attention"]}, {"rope_scaling": {"factor": 2.0}}):
        with pytest.raises(ConfigError, match="are not supported for ouro, only full_attention and none"):
            family_of("ouro").from_config(OURO_1_4B | change)


def test_its_gate_is_written_as_zeros_and_ignored_by_an_import() -> None:
    [gate] = [m for m in family_of("ouro").mappings(family_of("ouro").from_config(OURO_1_4B)) if not m.ours]
    weight, bias = gate.to_theirs()
    assert weight.shape == (1, 2048) and bias.shape == (1,) and not weight.any() and not bias.any()
    assert gate.to_ours(weight, bias) == ()
