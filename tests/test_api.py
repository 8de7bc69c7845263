"""What `import sleeptrain` gives: documented, typed, and computing what a run computes."""

from __future__ import annotations

import ast
import inspect
import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import torch

import sleeptrain

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs/python.md").read_text()
SMALL = ["experiment=rule110", "data.batch=4", "sleep.passes=2", "train.eval_batches=1", "wandb.mode=disabled"]


def declared() -> dict[str, str]:
    """{name: its module} of the imports that type checkers read."""
    tree = ast.parse(Path(sleeptrain.__file__).read_text())
    [block] = [node for node in tree.body if isinstance(node, ast.If)]
    imports = [node for node in block.body if isinstance(node, ast.ImportFrom)]
    return {alias.name: str(node.module) for node in imports for alias in node.names}


def test_type_checkers_and_python_find_the_same_names() -> None:
    assert set(declared()) == set(sleeptrain.__all__) <= set(dir(sleeptrain))
    for name, module in declared().items():
        assert getattr(sleeptrain, name).__module__.startswith(module), name  # Config is of a package
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        sleeptrain.nothing  # noqa: B018
    assert (Path(sleeptrain.__file__).parent / "py.typed").is_file()


@pytest.mark.parametrize("name", sleeptrain.__all__)
def test_every_name_is_documented_and_typed(name: str) -> None:
    value: Any = getattr(sleeptrain, name)
    assert value.__doc__ and not value.__doc__.startswith(f"{name}("), "a docstring of its own"
    assert f"`{name}`" in PAGE.partition("## All names")[2]
    if inspect.isfunction(value):
        assert set(get_type_hints(value)) == {*inspect.signature(value).parameters, "return"}
        assert "Raises" in value.__doc__


def test_the_import_alone_loads_no_package() -> None:
    code = "import sys, sleeptrain; print(sorted({'torch', 'hydra', 'transformers', 'numpy'} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout == "[]\n"


def test_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for block in re.findall(r"^```python\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE):
        exec(block, names)
    assert names["losses"][1] != names["losses"][4]
    assert names["config"].sleep.passes == 2 and (tmp_path / "runs/from-python/checkpoints").is_dir()
    assert set(names["report"]["eval"]["loss"]) == {"1", "4"}


def test_the_loss_is_that_of_a_run(tmp_path: Path) -> None:
    settings = [*SMALL, f"run.root={tmp_path}", "train.tokens=1", "train.log_every=1"]
    config = sleeptrain.compose(settings)
    batch = sleeptrain.build_task(config).rows(config.data.seed, 0, 4)
    before = float(sleeptrain.mean_loss(sleeptrain.build_model(config), batch, config).detach())
    folder = sleeptrain.run_training(config)
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    [recorded] = [record["loss"] for record in records if "loss" in record]
    assert before == pytest.approx(recorded, rel=1e-6)
    model, saved = sleeptrain.load_checkpoint(folder)
    assert saved.sleep.passes == 2 and float(sleeptrain.mean_loss(model, batch, saved).detach()) != before


def test_what_the_loss_cannot_compute_is_refused() -> None:
    config = sleeptrain.compose(SMALL)
    batch, model = sleeptrain.build_task(config).rows(0, 0, 2), sleeptrain.build_model(config)
    stops = replace(config, sleep=replace(config.sleep, stop="change"))
    with pytest.raises(sleeptrain.ConfigError, match=r"sleep\.stop=change"):
        sleeptrain.mean_loss(model, batch, stops)
    carried = replace(batch, carried_B=torch.ones(2, dtype=torch.bool))
    with pytest.raises(sleeptrain.ConfigError, match="whose memory"):
        sleeptrain.mean_loss(model, carried, config)
