"""Versions of Python and of packages, compared with the metadata of the installed sleeptrain."""

from __future__ import annotations

import platform
import sys
from collections.abc import Iterable
from importlib import metadata

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from sleeptrain.doctor.finding import Case, Finding, failed, ok, skipped

NAME = "sleeptrain"
DEVELOPERS = "dev"  # this extra is not needed on a machine that trains


def check_python(case: Case) -> Finding:
    version, wanted = platform.python_version(), metadata.metadata(NAME)["Requires-Python"]
    if not SpecifierSet(wanted).contains(version, prereleases=True):
        return failed(f"{version} is not {wanted}", "make PYTHON=python3.12 install, or another newer Python")
    return ok(f"{version} ({wanted})", version=version, executable=sys.executable, sleeptrain=installed(NAME))


def check_packages(case: Case) -> Finding:
    """The packages that every run needs, except torch, which has its own check."""
    return _judge([r for r in requirements("") if r.name != "torch"], needed=True)


def check_optional_packages(case: Case) -> Finding:
    """The packages of the extras. A missing one is no failure here: the checks that use it report it."""
    extras = metadata.metadata(NAME).get_all("Provides-Extra") or []
    wanted = {r.name: r for extra in extras if extra != DEVELOPERS for r in requirements(extra)}
    others = [r for name, r in wanted.items() if name not in (NAME, "torch")]
    return _judge([*others, *_triton()], needed=False)


def requirements(extra: str) -> list[Requirement]:
    """The requirements that an extra adds; '' gives those of the package itself."""
    declared = [Requirement(line) for line in metadata.requires(NAME) or []]
    chosen = [r for r in declared if r.marker is None or r.marker.evaluate({"extra": extra})]
    return chosen if extra == "" else [r for r in chosen if r.marker is not None]


def installed(name: str) -> str | None:
    """The version of a distribution, None if it is not installed."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def fits(requirement: Requirement, version: str) -> bool:
    """True if the version meets the requirement. Versions of vendors' builds (2.11.0a0+nv26.03) count, too."""
    return requirement.specifier.contains(version, prereleases=True)


def _triton() -> list[Requirement]:
    """torch's requirement of triton, if both are installed: other versions miscompile or fail to load."""
    if installed("torch") is None or installed("triton") is None:
        return []
    declared = [Requirement(line) for line in metadata.requires("torch") or []]
    return [r for r in declared if r.name == "triton" and (r.marker is None or r.marker.evaluate({"extra": ""}))]


def _judge(packages: Iterable[Requirement], needed: bool) -> Finding:
    """needed: missing packages are a failure."""
    versions = {r: installed(r.name) for r in packages}
    missing = [r for r, version in versions.items() if version is None]
    wrong = [r for r, version in versions.items() if version is not None and not fits(r, version)]
    details = {r.name: {"version": version, "wanted": str(r.specifier)} for r, version in versions.items()}
    if wrong or (needed and missing):
        problems = [f"{r.name} {versions[r]} is not {r.specifier}" for r in wrong]
        problems += [f"{r.name} is missing" for r in missing if needed]
        specifiers = " ".join(f"'{r.name}{r.specifier}'" for r in [*wrong, *(missing if needed else [])])
        return failed(", ".join(problems), f"pip install {specifiers}", packages=details)
    present = [f"{r.name} {version}" for r, version in versions.items() if version is not None]
    if needed:
        return ok(f"{len(present)} as declared", packages=details)
    absent = f"not installed: {', '.join(r.name for r in missing)}" if missing else ""
    if not present:
        return skipped(absent, packages=details)
    return ok("; ".join(filter(None, [", ".join(present), absent])), packages=details)
