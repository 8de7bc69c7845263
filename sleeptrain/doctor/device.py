"""torch, the GPUs that it sees, and their health as the driver reports it."""

from __future__ import annotations

import os
import subprocess
import warnings
from collections.abc import Collection, Iterator
from xml.etree import ElementTree

from sleeptrain.doctor.driver import has_driver, wants_gpus
from sleeptrain.doctor.finding import Case, Finding, failed, ok, skipped
from sleeptrain.doctor.packages import fits, installed, requirements

SMI_SECONDS = 60
# Share of a GPU's memory that must be free; `sleeptrain plan` assumes it.
FREE_SHARE = 0.9
SLOWED = ("hw_slowdown", "hw_thermal_slowdown", "hw_power_brake_slowdown")
LEAVE_OUT = "leave this machine out (sbatch --exclude) and have it looked at"


def check_torch(case: Case) -> Finding:
    """Check that torch is installed and can use the driver. details['devices']: number of GPUs for the other checks."""
    version = installed("torch")
    [wanted] = [r for r in requirements("") if r.name == "torch"]
    if version is None or not fits(wanted, version):
        problem = "is missing" if version is None else f"{version} is not {wanted.specifier}"
        return failed(problem, f"pip install 'torch{wanted.specifier}'", devices=0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        import torch

        devices = torch.cuda.device_count() if wants_gpus(case) and torch.cuda.is_available() else 0
    build = torch.version.cuda
    details = {"version": torch.__version__, "cuda": build, "devices": devices}
    if build is None and torch.version.hip is None and has_driver() and wants_gpus(case):
        return failed(f"{version} is built without CUDA, beside an NVIDIA driver", "make GPU=1 install", **details)
    if build and has_driver() and wants_gpus(case) and not devices and not _hidden():
        why = " ".join(str(caught[-1].message).split()) if caught else "torch does not say why"
        cure = f"update the driver to one for CUDA {build}, or install a torch that is built for this driver's CUDA"
        return failed(f"{version} (CUDA {build}) cannot use the driver: {why}", cure, **details)
    return ok(f"{version}, {f'CUDA {build}' if build else 'built without CUDA'}", **details)


def _hidden() -> bool:
    return os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1", "NoDevFiles")


def check_gpus(case: Case) -> Finding:
    """Check with nvidia-smi: memory held by other processes, memory errors, clocks that are throttled."""
    requested = case.config is not None and case.config.train.device == "cuda"
    if not wants_gpus(case):
        return skipped("train.device=cpu")
    if not has_driver():
        problem, cure = "there is no NVIDIA driver", "start on a machine with GPUs, or set train.device=auto or cpu"
        return failed(f"train.device=cuda, and {problem}", cure) if requested else skipped(problem)
    import torch

    count = torch.cuda.device_count()
    if not count:
        problem, cure = "torch sees no GPU", "ask for GPUs (sbatch --gpus-per-node), and look at CUDA_VISIBLE_DEVICES"
        return failed(problem, cure) if requested else skipped(problem)
    command = ["nvidia-smi", "-q", "-x"]
    try:
        smi = subprocess.run(command, capture_output=True, text=True, timeout=SMI_SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        return failed(f"nvidia-smi does not answer: {error}", LEAVE_OUT)
    if smi.returncode:
        output = " ".join((smi.stdout + smi.stderr).split())
        return failed(f"nvidia-smi: {output[-300:]}", LEAVE_OUT)
    return judge_gpus(smi.stdout, [f"GPU-{torch.cuda.get_device_properties(i).uuid}" for i in range(count)])


def judge_gpus(report: str, visible: Collection[str]) -> Finding:
    """The finding from the XML output of `nvidia-smi -q -x`. A value that the driver does not report counts as good.

    visible: UUIDs of the GPUs that this process may use. If the report lists none of them (MIG), all its GPUs count.
    """
    root = ElementTree.fromstring(report)
    listed = list(enumerate(root.findall("gpu")))
    gpus = [(number, gpu) for number, gpu in listed if gpu.findtext("uuid") in visible] or listed
    problems = [(number, *problem) for number, gpu in gpus for problem in _problems(gpu)]
    names = [gpu.findtext("product_name", "?") for _, gpu in gpus]
    details = {"gpus": names}
    if problems:
        message = "; ".join(f"GPU {number}: {problem}" for number, problem, _ in problems)
        return failed(message, "; ".join(dict.fromkeys(cure for *_, cure in problems)), **details)
    driver = root.findtext("driver_version", "?")
    return ok(f"{len(visible)} of {', '.join(sorted(set(names)))}, driver {driver}", **details)


def _problems(gpu: ElementTree.Element) -> Iterator[tuple[str, str]]:
    """(problem, cure) pairs of one GPU. Xid errors appear as memory errors or as a recovery action."""
    total, free = (_mib(gpu.findtext(f"fb_memory_usage/{kind}")) for kind in ("total", "free"))
    if total and free is not None and free < FREE_SHARE * total:
        problem = f"only {free / 1024:.1f} of {total / 1024:.1f} GiB are free"
        yield problem, "end the processes that hold the memory (nvidia-smi lists them), or use another machine"
    volatile = gpu.find("ecc_errors/volatile")
    errors = [] if volatile is None else [e for e in volatile.iter() if "uncorrectable" in e.tag]
    if count := sum(int(e.text) for e in errors if e.text and e.text.isdigit()):
        yield f"{count} uncorrectable memory errors since the last restart", LEAVE_OUT
    for place in ("remapped_rows/remapped_row_failure", "remapped_rows/remapped_row_pending"):
        if gpu.findtext(place, "No").strip() == "Yes":
            yield f"{place.partition('/')[2].replace('_', ' ')}", LEAVE_OUT
    action = gpu.findtext("gpu_recovery_action", "None").strip()
    if action not in ("None", "N/A"):
        yield f"the driver asks for: {action}", LEAVE_OUT
    for reasons in ("clocks_event_reasons", "clocks_throttle_reasons"):
        for name in SLOWED:
            if gpu.findtext(f"{reasons}/{reasons}_{name}", "").strip() == "Active":
                yield f"clocks are held down ({name.replace('_', ' ')})", LEAVE_OUT


def _mib(text: str | None) -> float | None:
    """The number in a text such as `81559 MiB`; None if there is no number."""
    number = (text or "").partition(" ")[0]
    return float(number) if number.isdigit() else None
