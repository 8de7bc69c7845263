"""torch, the GPUs that it sees, and what the driver says of their health."""

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
# Of a GPU's memory that a run may take (`sleeptrain plan` counts on it).
FREE_SHARE = 0.9
SLOWED = ("hw_slowdown", "hw_thermal_slowdown", "hw_power_brake_slowdown")
LEAVE_OUT = "leave this machine out (sbatch --exclude) and have it looked at"


def check_torch(case: Case) -> Finding:
    """details: devices, how many GPUs the other checks are to use."""
    version = installed("torch")
    [wanted] = [r for r in requirements("") if r.name == "torch"]
    if version is None or not fits(wanted, version):
        said = "is missing" if version is None else f"{version} is not {wanted.specifier}"
        return failed(said, f"pip install 'torch{wanted.specifier}'", devices=0)
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        import torch

        devices = torch.cuda.device_count() if wants_gpus(case) and torch.cuda.is_available() else 0
    build = torch.version.cuda
    details = {"version": torch.__version__, "cuda": build, "devices": devices}
    if build is None and torch.version.hip is None and has_driver() and wants_gpus(case):
        return failed(f"{version} is built without CUDA, beside an NVIDIA driver", "make GPU=1 install", **details)
    if build and has_driver() and wants_gpus(case) and not devices and not _hidden():
        why = " ".join(str(heard[-1].message).split()) if heard else "torch does not say why"
        cure = f"update the driver to one for CUDA {build}, or install a torch that is built for this driver's CUDA"
        return failed(f"{version} (CUDA {build}) cannot use the driver: {why}", cure, **details)
    return ok(f"{version}, {f'CUDA {build}' if build else 'built without CUDA'}", **details)


def _hidden() -> bool:
    return os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1", "NoDevFiles")


def check_gpus(case: Case) -> Finding:
    """Memory that others hold, errors of the memory, clocks that are held down, as nvidia-smi tells them."""
    asked = case.config is not None and case.config.train.device == "cuda"
    if not wants_gpus(case):
        return skipped("train.device=cpu")
    if not has_driver():
        said, cure = "there is no NVIDIA driver", "start on a machine with GPUs, or set train.device=auto or cpu"
        return failed(f"train.device=cuda, and {said}", cure) if asked else skipped(said)
    import torch

    count = torch.cuda.device_count()
    if not count:
        said, cure = "torch sees no GPU", "ask for GPUs (sbatch --gpus-per-node), and look at CUDA_VISIBLE_DEVICES"
        return failed(said, cure) if asked else skipped(said)
    command = ["nvidia-smi", "-q", "-x"]
    try:
        asked_driver = subprocess.run(command, capture_output=True, text=True, timeout=SMI_SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        return failed(f"nvidia-smi does not answer: {error}", LEAVE_OUT)
    if asked_driver.returncode:
        said = " ".join((asked_driver.stdout + asked_driver.stderr).split())
        return failed(f"nvidia-smi: {said[-300:]}", LEAVE_OUT)
    return judge_gpus(asked_driver.stdout, [f"GPU-{torch.cuda.get_device_properties(i).uuid}" for i in range(count)])


def judge_gpus(report: str, visible: Collection[str]) -> Finding:
    """report: what `nvidia-smi -q -x` prints. A figure that a driver does not tell is taken for good.

    visible: the UUIDs of the GPUs that this process may use; the others are not looked at, unless none is found (MIG).
    """
    root = ElementTree.fromstring(report)
    listed = list(enumerate(root.findall("gpu")))
    gpus = [(number, gpu) for number, gpu in listed if gpu.findtext("uuid") in visible] or listed
    worst = [(number, *trouble) for number, gpu in gpus for trouble in _troubles(gpu)]
    names = [gpu.findtext("product_name", "?") for _, gpu in gpus]
    details = {"gpus": names}
    if worst:
        told = "; ".join(f"GPU {number}: {said}" for number, said, _ in worst)
        return failed(told, "; ".join(dict.fromkeys(cure for *_, cure in worst)), **details)
    driver = root.findtext("driver_version", "?")
    return ok(f"{len(visible)} of {', '.join(sorted(set(names)))}, driver {driver}", **details)


def _troubles(gpu: ElementTree.Element) -> Iterator[tuple[str, str]]:
    """(what, cure) of one GPU. Xid errors show as errors of the memory or as an action that is asked for."""
    total, free = (_mib(gpu.findtext(f"fb_memory_usage/{kind}")) for kind in ("total", "free"))
    if total and free is not None and free < FREE_SHARE * total:
        said = f"only {free / 1024:.1f} of {total / 1024:.1f} GiB are free"
        yield said, "end what holds the memory (nvidia-smi lists it), or use another machine"
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
    """`81559 MiB`; None for what is no such number."""
    number = (text or "").partition(" ")[0]
    return float(number) if number.isdigit() else None
