"""flash-linear-attention's own GatedDeltaNet model with the sizes of ours, trained on the same GPU in the same run."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from gpu_parts import MissingError, Note, Options
from gpu_parts.page import table
from gpu_parts.trained import peak_memory, reset_peak, step_config, timed
from sleeptrain.config.schema import Config, ModelConfig
from sleeptrain.plan.mean_row import long_rows
from sleeptrain.sleep.flops import step_flops
from sleeptrain.sleep.rounds import plan_batch
from sleeptrain.train.peak import peak_flops

WINDOW, STEPS = 2048, 3
ROWS = (6, 3, 1)  # the first that fits the memory; 6 are as many tokens as a row of the batch in the speed tables


def run(options: Options, note: Note) -> list[str]:
    """Its forward and backward under autocast, and torch's AdamW, with the rows as plain sequences: N = 1."""
    if importlib.util.find_spec("fla") is None or importlib.util.find_spec("triton") is None:
        raise MissingError("flash-linear-attention is not installed: pip install 'sleeptrain[gpu]'")
    device, config = torch.device(options.device), step_config(options.subject, options.small)
    start = time.monotonic()
    model = build(config.model, device)
    note({"parameters": sum(p.numel() for p in model.parameters()), "layers": len(config.model.layers)})
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    length = 32 if options.small else WINDOW
    for rows in (2,) if options.small else ROWS:
        tokens = torch.randint(config.model.vocab_size, (rows, length), device=device)
        try:
            step = _step(model, optimizer, tokens, device)
            step()  # compiles
            note({"batch": [rows, length], "first_seconds": round(time.monotonic() - start, 1)})
            reset_peak(device)
            note(_figures(min(timed(step, device)[0] for _ in range(STEPS)), config, rows, length, device))
            return []
        except torch.OutOfMemoryError:
            optimizer.zero_grad()
        reset_peak(device)
    return ["no batch fits the memory"]


def _figures(seconds: float, config: Config, rows: int, length: int, device: torch.device) -> dict[str, Any]:
    """Of a step. MFU counts FLOPs as for our models."""
    layers = len(config.model.layers)
    rounds = plan_batch(long_rows(rows, length), length, 1, config.sleep)
    flops = step_flops(replace(config.model, layers=["gated_deltanet"] * layers), rounds, rows * length, (0, layers))
    peak = peak_flops(device)
    return {
        "seconds": round(seconds, 4),
        "tokens_per_second": rows * length / seconds,
        "mfu": None if peak is None else flops / seconds / peak,
        "memory_gib": peak_memory(device),
    }


def build(config: ModelConfig, device: torch.device) -> torch.nn.Module:
    """Its model of Gated DeltaNet blocks alone: its attention needs a package that we do not have."""
    from fla.models import GatedDeltaNetConfig, GatedDeltaNetForCausalLM

    c = config.gated_deltanet
    theirs = GatedDeltaNetConfig(
        hidden_size=config.dim,
        intermediate_size=config.ffn_dim,
        num_hidden_layers=len(config.layers),
        num_heads=c.num_k_heads,
        num_v_heads=c.num_v_heads,
        head_dim=c.head_k_dim,
        expand_v=c.head_v_dim / c.head_k_dim,
        vocab_size=config.vocab_size,
        tie_word_embeddings=config.tie_embeddings,
        fuse_cross_entropy=False,
        fuse_linear_cross_entropy=True,
        use_cache=False,
    )
    with torch.device(device):
        return GatedDeltaNetForCausalLM(theirs).train()


def _step(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, tokens: torch.Tensor, device: torch.device
) -> Callable[[], None]:
    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast(device.type, torch.bfloat16):
            loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return step


def lines(result: dict[str, Any]) -> list[str]:
    """Its figures; where it was cut off, those that it has."""
    names = {
        "first_seconds": "built, first step, s",
        "seconds": "a step, s",
        "tokens_per_second": "tokens/s",
        "mfu": "MFU",
    }
    rows = [["parameters", f"{result['parameters'] / 1e9:.2f} B, {result['layers']} blocks of Gated DeltaNet"]]
    rows += [[text, f"{result[key]:,.4g}"] for key, text in names.items() if result.get(key) is not None]
    rows += [["memory, GiB", f"{result['memory_gib']:.1f}"]] if result.get("memory_gib") is not None else []
    return [
        "Autocast to bf16 over fp32 weights, its fused linear cross entropy, torch's fused AdamW, no recomputation. To "
        "compare with N = 1 and L = 2048 above, whose optimizer is Muon.",
        "",
        *table(["", ""], rows),
    ]
