"""What pip is to install in an image, and at which versions: PYPROJECT LOCK BASE REQUIREMENTS CONSTRAINTS.

LOCK has the versions that were tested. BASE is `pip list --format=freeze` of the base image, whose torch, Triton and
NVIDIA libraries stay as they are; where the base constrains pip by itself (PIP_CONSTRAINT), its versions hold, too.
Needs nothing but Python. Exits with an error where the base has no torch, which pip would then bring with a CUDA of its
own.
"""

import os
import re
import sys
import tomllib
from pathlib import Path

EXTRAS = ("data", "gpu", "parallel")
HELD = re.compile(r"(torch|triton|pytorch-triton|torchvision|torchaudio|nvidia-.*|cuda-.*)")


def main(pyproject: str, lock: str, base: str, requirements: str, constraints: str) -> None:
    held = {name: line for name, line in _named(base).items() if HELD.fullmatch(name)}
    if "torch" not in held:
        sys.exit("the base image has no torch; choose one that has (BASE_IMAGE)")
    of_base = {name for path in os.environ.get("PIP_CONSTRAINT", "").split() for name in _named(path)}
    pins = [line for name, line in _named(lock).items() if name not in held and name not in of_base]
    wanted = _wanted(tomllib.loads(Path(pyproject).read_text()))
    if "pytorch-triton" in held and "triton" not in held:  # the same module under a vendor's name
        wanted = [re.sub(r"^triton\b", "pytorch-triton", line) for line in wanted]
        pins = [line for line in pins if not line.startswith("triton==")]
    Path(requirements).write_text("\n".join(wanted) + "\n")
    Path(constraints).write_text("\n".join([*held.values(), *pins]) + "\n")


def _wanted(project: dict) -> list[str]:
    """What training needs, and what builds this package."""
    extras = project["project"]["optional-dependencies"]
    return [
        *project["project"]["dependencies"],
        *(line for extra in EXTRAS for line in extras[extra]),
        *project["build-system"]["requires"],
    ]


def _named(path: str) -> dict[str, str]:
    """{canonical name of a package: its line}, comments left out."""
    lines = (line.partition(" #")[0].strip() for line in Path(path).read_text().splitlines())
    found = ((re.match(r"[A-Za-z0-9][\w.-]*", line), line) for line in lines)
    return {re.sub(r"[-_.]+", "-", name[0]).lower(): line for name, line in found if name}


if __name__ == "__main__":
    main(*sys.argv[1:])
