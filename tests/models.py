"""Small models and batches that tests share."""

from __future__ import annotations

import torch

from sleeptrain.config.schema import AttentionConfig, GatedDeltaNetConfig, JetConfig, Mamba2Config, ModelConfig
from sleeptrain.data.batch import IGNORE, PAD, Batch
from sleeptrain.model.hybrid import Hybrid

VOCABULARY = 17


def tiny_config(layers: list[str] | None = None, **changes: object) -> ModelConfig:
    reach = {"sliding_window": 3} if layers and "sliding_attention" in layers else {}
    return ModelConfig(
        vocab_size=VOCABULARY,
        dim=16,
        ffn_dim=24,
        layers=layers or ["attention", "gated_deltanet", "mamba2"],
        attention=AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=8, **reach),
        gated_deltanet=GatedDeltaNetConfig(num_k_heads=2, num_v_heads=4, head_k_dim=8, head_v_dim=6),
        jet=JetConfig(num_heads=4, head_k_dim=6, head_v_dim=10, kernel_dim=8),
        mamba2=Mamba2Config(num_heads=4, head_dim=8, state_dim=6, num_groups=2),
        **changes,  # type: ignore[arg-type]
    )


def tiny_model(layers: list[str] | None = None, seed: int = 0, **changes: object) -> Hybrid:
    """A fp64 model whose weights are large enough that every path counts."""
    model = Hybrid(tiny_config(layers, **changes)).double()
    model.init_weights(seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.2)
    return model


def random_batch(documents: list[list[int]], seed: int = 0, target_share: float = 1.0, **flags: list[bool]) -> Batch:
    """A batch with these document ids (PAD for pads); targets are the next token inside a document."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.tensor(documents)
    num_rows = ids.shape[0]
    tokens = torch.randint(VOCABULARY, ids.shape, generator=generator)
    inside = (ids[:, :-1] == ids[:, 1:]) & (ids[:, :-1] != PAD)
    targets = torch.full_like(tokens, IGNORE)
    targets[:, :-1] = torch.where(inside, tokens[:, 1:], IGNORE)
    drop = torch.rand(ids.shape, generator=generator) >= target_share
    targets[drop] = IGNORE
    carried = torch.tensor(flags.get("carried", [False] * num_rows))
    continues = torch.tensor(flags.get("continues", [False] * num_rows))
    return Batch(tokens, targets, ids, carried, continues)
