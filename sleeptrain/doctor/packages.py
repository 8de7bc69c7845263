"""Python and the packages, held against what this installation of sleeptrain declares (its metadata)."""

from __future__ import annotations

import platform
import sys
from collections.abc import Iterable
from importlib import metadata

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from sleeptrain.doctor.finding import Case, Finding, failed, ok, skipped

NAME = "sleeptrain"
DEVELOPERS = "dev"  # whose tools are not asked for on a machine that trains


def check_python(case: Case) -> Finding:
    version, wanted = platform.python_version(), metadata.metadata(NAME)["Requires-Python"]
    if not SpecifierSet(wanted).contains(version, prereleases=True):
        return failed(f"{version} is not {wanted}", "make PYTHON=python3.12 install, or another newer Python")
    return ok(f"{version} ({wanted})", version=version, executable=sys.executable, sleeptrain=installed(NAME))


def check_packages(case: Case) -> Finding:
    """What every run needs, torch left to its own check."""
    return _judge([r for r in requirements("") if r.name != "torch"], needed=True)


def check_optional_packages(case: Case) -> Finding:
    """What some runs need. Those that are missing are asked for by the checks that use them."""
    extras = metadata.metadata(NAME).get_all("Provides-Extra") or []
    wanted = {r.name: r for extra in extras if extra != DEVELOPERS for r in requirements(extra)}
    others = [r for name, r in wanted.items() if name not in (NAME, "torch")]
    return _judge([*others, *_triton()], needed=False)


def requirements(extra: str) -> list[Requirement]:
    """Those that an extra adds; of the package itself: ''."""
    declared = [Requirement(line) for line in metadata.requires(NAME) or []]
    chosen = [r for r in declared if r.marker is None or r.marker.evaluate({"extra": extra})]
    return chosen if extra == "" else [r for r in chosen if r.marker is not None]


def installed(name: str) -> str | None:
    """The version of a distribution, None where there is none."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def fits(requirement: Requirement, version: str) -> bool:
    """Vendors' own builds (2.11.0a0+nv26.03) are versions too."""
    return requirement.specifier.contains(version, prereleases=True)


def _triton() -> list[Requirement]:
    """What torch asks of triton, where both are installed: another one miscompiles or fails to load."""
    if installed("torch") is None or installed("triton") is None:
        return []
    declared = [Requirement(line) for line in metadata.requires("torch") or []]
    return [r for r in declared if r.name == "triton" and (r.marker is None or r.marker.evaluate({"extra": ""}))]


def _judge(wanted: Iterable[Requirement], needed: bool) -> Finding:
    versions = {r: installed(r.name) for r in wanted}
    missing = [r for r, version in versions.items() if version is None]
    wrong = [r for r, version in versions.items() if version is not None and not fits(r, version)]
    details = {r.name: {"version": version, "wanted": str(r.specifier)} for r, version in versions.items()}
    if wrong or (needed and missing):
        told = [f"{r.name} {versions[r]} is not {r.specifier}" for r in wrong]
        told += [f"{r.name} is missing" for r in missing if needed]
        asked = " ".join(f"'{r.name}{r.specifier}'" for r in [*wrong, *(missing if needed else [])])
        return failed(", ".join(told), f"pip install {asked}", packages=details)
    present = [f"{r.name} {version}" for r, version in versions.items() if version is not None]
    if needed:
        return ok(f"{len(present)} as declared", packages=details)
    without = f"not installed: {', '.join(r.name for r in missing)}" if missing else ""
    if not present:
        return skipped(without, packages=details)
    return ok("; ".join(filter(None, [", ".join(present), without])), packages=details)
