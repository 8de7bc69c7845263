"""Which operators attention runs as: one that makes the matrix of all scores is a failure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile

from gpu_parts import Note, Options
from gpu_parts.page import table
from gpu_parts.trained import step_config
from sleeptrain.config.schema import ModelConfig
from sleeptrain.model.block import Block
from sleeptrain.model.document_layout import DocumentLayout, first_of_document, window_layout
from sleeptrain.model.linear import computing_in
from sleeptrain.model.state import HARD

# Parts of names of operators. The unfused one computes softmax(q k^T) v by products.
FUSED = ("flash", "efficient_attention", "cudnn_attention", "varlen", "flex_attention")
UNFUSED = ("attention_math",)
LENGTHS = (700, 3, 900, 445)  # tokens of packed documents, 2048 in all


def run(options: Options, note: Note) -> list[str]:
    device, wrong = torch.device(options.device), list[str]()
    results: dict[str, Any] = {}
    for name, call in _cases(step_config("hybrid_2b", options.small).model, device, options.small).items():
        results[name] = found = observed(call, device)
        if why := verdict(found["operators"]):
            found["wrong"] = why
            # The CPU's kernels have other limits: there this is no failure.
            wrong += [f"{name}: {why}"] if device.type == "cuda" else []
        note({"cases": results})
    return wrong


def _cases(config: ModelConfig, device: torch.device, small: bool) -> dict[str, Callable[[], None]]:
    lengths = [n // 50 + 1 for n in LENGTHS] if small else list(LENGTHS)
    c, tokens = config.attention, sum(lengths)
    block = Block(config.layers.index("attention"), config).to(device)
    one = torch.zeros(1, tokens, dtype=torch.long)
    several = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths)).unsqueeze(0)
    return {
        f"grouped queries ({c.num_heads} to {c.num_kv_heads} heads of {c.head_dim}), causal": lambda: grouped(
            config, tokens, device
        ),
        "a block, one document": lambda: of_block(block, config.dim, one, device),
        "a block, packed documents": lambda: of_block(block, config.dim, several, device),
    }


def grouped(config: ModelConfig, tokens: int, device: torch.device) -> None:
    """Attention with fewer heads of keys than of queries, forward and backward in bf16."""
    c = config.attention
    shapes = [(1, heads, tokens, c.head_dim) for heads in (c.num_heads, c.num_kv_heads, c.num_kv_heads)]
    q, k, v = (torch.randn(s, device=device, dtype=torch.bfloat16, requires_grad=True) for s in shapes)
    F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).sum().backward()


def of_block(block: Block, dim: int, documents_RL: torch.Tensor, device: torch.device) -> None:
    """A block with attention over a window of documents, forward and backward in bf16."""
    layout = _on(window_layout(documents_RL, first_of_document(documents_RL)), device)
    x = torch.randn(*documents_RL.shape, dim, device=device, requires_grad=True)
    with computing_in(block, torch.bfloat16):
        y, _ = block(x, None, layout, HARD)
        assert y is not None
        y.sum().backward()


def _on(layout: DocumentLayout, device: torch.device) -> DocumentLayout:
    from torch.utils._pytree import tree_map_only

    moved: DocumentLayout = tree_map_only(torch.Tensor, lambda t: t.to(device), layout)
    return moved


def observed(call: Callable[[], None], device: torch.device) -> dict[str, Any]:
    """The operators of attention that run in a call, and the kernels of the device that take longest."""
    call()  # compiles
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with profile(activities=activities) as record:
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    events = record.key_averages()
    names = {event.key for event in events}
    kernels = sorted(
        (e for e in events if e.device_type != torch.autograd.DeviceType.CPU), key=lambda e: -e.device_time_total
    )
    return {
        "operators": sorted(name for name in names if any(part in name for part in (*FUSED, *UNFUSED))),
        "kernels": [event.key[:120] for event in kernels[:3]],
    }


def verdict(operators: Sequence[str]) -> str:
    """Why these operators of attention are not what should run; empty if they are."""
    if unfused := [name for name in operators if any(part in name for part in UNFUSED)]:
        return f"it ran as {unfused[0]}, which makes all scores"
    return "" if operators else "no fused operator of attention ran"


def lines(result: dict[str, Any]) -> list[str]:
    rows = [
        [
            name,
            "**not fused**" if "wrong" in found else "fused",
            ", ".join(found["operators"]),
            ", ".join(found["kernels"]),
        ]
        for name, found in result["cases"].items()
    ]
    return table(["attention", "", "operators", "longest kernels"], rows)
