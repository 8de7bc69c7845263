"""Text from a sleeping model on a device: its logits are those of fp64 on the CPU, and its memory goes on."""

from __future__ import annotations

from dataclasses import asdict

import pytest
import torch

from tests.gpu.conftest import SLOW_ON_CPU
from tests.gpu.small import MODEL, model_on, relative

pytest.importorskip("transformers")
WINDOW, NEW = 8, 6


def sleeping(place: torch.device, dtype: torch.dtype):
    from sleeptrain.hf.model.configuration import SleepPretrainedConfig
    from sleeptrain.hf.model.modeling import SleepForCausalLM

    sleep = {"passes": 2, "window": WINDOW}
    model = SleepForCausalLM(SleepPretrainedConfig(model=asdict(MODEL), sleep=sleep)).to(place, dtype).eval()
    model.model.load_state_dict(model_on(place, dtype).state_dict())
    return model


@pytest.mark.parametrize("place", SLOW_ON_CPU, indirect=True)
def test_generation_equals_fp64_on_the_cpu(place: torch.device) -> None:
    """The logits of the first new token after windows that have slept; all tokens where they are far apart."""
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(MODEL.vocab_size, (2, 2 * WINDOW + 3), generator=draw)
    outputs = []
    for model in (sleeping(torch.device("cpu"), torch.float64), sleeping(place, torch.float32)):
        options = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": MODEL.vocab_size}
        options |= {"return_dict_in_generate": True, "output_logits": True}
        ids_on, mask = ids.to(place if model.dtype == torch.float32 else "cpu"), torch.ones_like(ids)
        outputs.append(model.generate(input_ids=ids_on, attention_mask=mask.to(ids_on.device), **options))
    expected, found = outputs
    assert found.sequences.device.type == place.type and found.sequences.shape == (2, ids.shape[1] + NEW)
    assert relative(found.logits[0], expected.logits[0]) < 2e-2
    if place.type == "cpu":
        assert torch.equal(found.sequences, expected.sequences)
