"""A wake round, and a wake round with a sleep round after it, in torch's profiler: where the time goes.

The latter also as CUDA graphs (`train.cuda_graphs`), if the device is a GPU.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from gpu_parts import Note, Options
from gpu_parts.page import table
from gpu_parts.trained import Trained, random_rows, step_config, synchronize
from sleeptrain.config.schema import Config
from sleeptrain.data.batch import Batch
from sleeptrain.distributed.gpus import Gpu
from sleeptrain.plan.roofline.kinds import Kind
from sleeptrain.plan.roofline.step import count_step
from sleeptrain.plan.workload import Workload
from sleeptrain.sleep.curriculum import StepShape
from sleeptrain.sleep.graphs.capture import CudaCapture
from sleeptrain.sleep.graphs.round_graphs import RoundGraphs
from sleeptrain.sleep.loop import loop_settings
from sleeptrain.sleep.rounds import plan_batch
from sleeptrain.train.peak import gpu_of

NORMS = "norms, convolutions, SwiGLU"
# Kinds of work, by parts of the names of operators: the first line that fits an operator or one of those around it.
KINDS = (
    ("recurrence", ("gated_delta_rule", "gated_linear_attention", "_GatedDeltaRule", "_SSD")),
    (NORMS, ("short_convolution", "conv1d", "_CausalConv", "rms_norm", "l2norm", "swiglu", "silu", "_RMSNorm")),
    ("attention", ("_attention", "varlen")),
    ("loss", ("cross_entropy", "log_softmax", "nll_loss", "logsumexp")),
    ("matrix products", ("::mm", "::addmm", "::bmm", "::matmul", "::linear", "_Product", "::baddbmm")),
    ("copies and casts", ("copy", "::cat", "::fill", "zero", "memcpy", "memset", "::index", "gather", "embedding")),
    (
        "elementwise",
        ("::add", "::mul", "::sub", "::div", "::sum", "sigmoid", "softplus", "::exp", "::neg", "where", "mean"),
    ),
)
OTHER = "other"
# The kinds of the count under these names. A profile does not tell the head's products and sums of gradients apart.
COUNTED = {
    Kind.PRODUCT: "matrix products",
    Kind.HEAD: "matrix products",
    Kind.ATTENTION: "attention",
    Kind.RECURRENCE: "recurrence",
    Kind.NORM: NORMS,
    Kind.LOSS: "loss",
    Kind.CAST: "copies and casts",
    Kind.EMBEDDING: "copies and casts",
    Kind.ELEMENTWISE: "elementwise",
    Kind.SUM: "elementwise",
}
# Calls of CUDA's runtime for which the host waits.
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy")
WINDOW, ROWS = 2048, 1


def run(options: Options, note: Note) -> list[str]:
    device = torch.device(options.device)
    trained = Trained.build(step_config(options.subject, options.small), device)
    window, rows = (16, 2) if options.small else (WINDOW, ROWS)
    batch = random_rows(trained.config.model, rows, window)
    measured: dict[str, dict[str, Any]] = {}
    forecast: dict[str, dict[str, float]] = {}
    gpu = gpu_of(device)
    cases: list[tuple[str, int, RoundGraphs | None]] = [("wake", 1, None), ("wake and sleep", 2, None)]
    if device.type == "cuda":
        cases.append(("wake and sleep, CUDA graphs", 2, RoundGraphs(trained.model, CudaCapture())))
    for name, passes, graphs in cases:
        shape = StepShape(passes, window, rows)
        measured[name] = profiled(trained, batch, shape, device, graphs)
        forecast[name] = {} if gpu is None else counted(trained.config, batch, shape, gpu)
        note({"model": options.subject, "window": window, "rows": rows, "measured": measured, "counted": forecast})
    return []


def counted(config: Config, batch: Batch, shape: StepShape, gpu: Gpu) -> dict[str, float]:
    """Seconds by kind that `sleeptrain.plan.roofline` counts for a gradient of one micro-batch of one window."""
    rounds = tuple(plan_batch(batch, shape.window, shape.passes, config.sleep))
    settings = loop_settings(config.sleep, shape.window, len(config.model.layers), recompute="none")
    workload = Workload(
        0,
        shape,
        1,
        shape.batch,
        1,
        1,
        batch.tokens_BT.numel(),
        rounds,
        batch.tokens_BT.numel(),
        False,
        (rounds,),
        settings,
    )
    work = count_step(config, workload, gpu, config.train.compile, batch, mode="none").work
    seconds = dict.fromkeys(COUNTED.values(), 0.0)
    for kind, value in work.seconds.items():
        seconds[COUNTED[kind]] += value
    return seconds


def profiled(
    trained: Trained, batch: Any, shape: StepShape, device: torch.device, graphs: RoundGraphs | None
) -> dict[str, Any]:
    """A gradient of one window: the second one, after what the first compiles; with graphs the third one, after what
    the second records."""
    for _ in range(1 if graphs is None else 2):
        trained.gradient(batch, shape, graphs)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    synchronize(device)
    with profile(activities=activities) as record:
        trained.gradient(batch, shape, graphs)
        synchronize(device)
    return summary(record.events() or [], device.type == "cuda")


def summary(events: Iterable[Any], on_device: bool) -> dict[str, Any]:
    """Seconds by kind of work, the device's idle time, launches, waits, and the longest kernels.

    On a CPU operators are their own kernels.
    """
    events = list(events)
    spans, kinds, kernels = list[tuple[float, float]](), Counter[str](), Counter[str]()
    for event in events:
        if event.device_type != DeviceType.CPU:  # a kernel or a copy
            spans.append((event.time_range.start, event.time_range.end))
            continue
        if not on_device:
            kinds[kind_of(event)] += event.self_cpu_time_total
            kernels[event.name] += event.self_cpu_time_total
            spans.append((event.time_range.start, event.time_range.end))
        for kernel in event.kernels:
            kinds[kind_of(event)] += kernel.duration
            kernels[kernel.name] += kernel.duration
    busy, whole = busy_time(spans)
    calls = Counter(event.name for event in events if event.name.startswith("cu"))
    return {
        "kinds": {name: us / 1e6 for name, us in kinds.most_common()},
        "seconds": whole / 1e6,
        "busy": busy / 1e6,
        "launches": sum(n for name, n in calls.items() if "LaunchKernel" in name or "GraphLaunch" in name),
        "waits": {name: n for name, n in calls.items() if name in WAITS},
        "longest": [[name[:100], us / 1e6] for name, us in kernels.most_common(12)],
    }


def kind_of(event: Any) -> str:
    """The kind of work of an operator, from its name and those of the operators that it was called by."""
    names = list[str]()
    while event is not None:
        names.append(event.name)
        event = event.cpu_parent
    return next((kind for kind, parts in KINDS if any(part in name for part in parts for name in names)), OTHER)


def busy_time(spans: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """(the time in which at least one span runs, the time from the first start to the last end)."""
    busy, end = 0.0, float("-inf")
    for start, stop in sorted(spans):
        busy += max(stop - max(start, end), 0.0)
        end = max(end, stop)
    return busy, (end - min(start for start, _ in spans)) if spans else 0.0


def beside(counted: Mapping[str, float], measured: Mapping[str, float]) -> list[list[str]]:
    """Rows of a table: a kind of work, counted and measured milliseconds, and measured over counted.

    counted, measured: seconds by kind. A kind that only one of them has stands there alone.
    """
    rows = []
    for kind in [*measured, *(kind for kind in counted if kind not in measured)]:
        a, b = counted.get(kind), measured.get(kind)
        cells = ["" if x is None else f"{1e3 * x:.2f}" for x in (a, b)]
        rows.append([kind, *cells, f"{b / a:.2f}" if a and b is not None else ""])
    return rows


def lines(result: dict[str, Any]) -> list[str]:
    text = [
        f"{result['model']}, {result['rows']} rows of one window of {result['window']} tokens, forward and backward, "
        "no recomputation, no optimizer."
    ]
    counted: Mapping[str, Mapping[str, float]] = result.get("counted", {})
    for name, found in result["measured"].items():
        waits = ", ".join(f"{n} {call}" for call, n in found["waits"].items()) or "none"
        idle = found["seconds"] - found["busy"]
        text += [
            "",
            f"**{name}**: {1e3 * found['seconds']:.1f} ms from the first kernel to the last, the device is idle for "
            f"{1e3 * idle:.1f} ms of them. {found['launches']} launches; the host waits: {waits}.",
            "",
            *table(
                ["work", "counted, ms", "measured, ms", "measured / counted"],
                beside(counted.get(name, {}), found["kinds"]),
            ),
            "",
            *table(["longest kernels", "ms"], [[kernel, f"{1e3 * s:.2f}"] for kernel, s in found["longest"]]),
        ]
    return text
