"""What pip is to install in an image, and what it must leave as it is: PYPROJECT BASE REQUIREMENTS CONSTRAINTS.

BASE is `pip list --format=freeze` of the base image. Needs nothing but Python. Exits with an error where the base has
no torch, which pip would then bring with a CUDA of its own.
"""

import re
import sys
import tomllib
from pathlib import Path

EXTRAS = ("data", "gpu", "parallel")
HELD = re.compile(r"(torch|triton|pytorch[-_]triton|torchvision|torchaudio|nvidia[-_][^=]*)==")


def main(pyproject: str, base: str, requirements: str, constraints: str) -> None:
    project = tomllib.loads(Path(pyproject).read_text())["project"]
    wanted = [*project["dependencies"]]
    for extra in EXTRAS:
        wanted += project["optional-dependencies"][extra]
    held = [line for line in Path(base).read_text().splitlines() if HELD.match(line)]
    if not any(line.startswith("torch==") for line in held):
        sys.exit("the base image has no torch; choose one that has (BASE_IMAGE)")
    Path(requirements).write_text("\n".join(wanted) + "\n")
    Path(constraints).write_text("\n".join(held) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
