"""Import a folder of transformers as a checkpoint. A run starts from its weights with `run.init_from`."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

import torch
from omegaconf import OmegaConf

from sleeptrain.checkpoint.fit import WEIGHTS
from sleeptrain.checkpoint.folder import CONFIG, STATE, entries, write_manifest
from sleeptrain.checkpoint.read import TensorFiles
from sleeptrain.checkpoint.vocabulary import TOKENIZER
from sleeptrain.config import resolved_yaml
from sleeptrain.config.schema import Config, ModelConfig, RunConfig, TrainConfig
from sleeptrain.data.hf_tokenizer import TOKENIZER_JSON
from sleeptrain.data.tokenizer import load_tokenizer
from sleeptrain.errors import DataError
from sleeptrain.files import staged_folder
from sleeptrain.hf.convert.check import check
from sleeptrain.hf.convert.exporting import check_vocabulary
from sleeptrain.hf.convert.gate_file import GATE_FILE, write_gate
from sleeptrain.hf.convert.read_config import Described, describe
from sleeptrain.hf.convert.weight_files import WeightFiles, write_shards
from sleeptrain.hf.families import Family
from sleeptrain.model.hybrid import Hybrid
from sleeptrain.plain_files import named_file

SHOWN = 40
FILE_BYTES = 256 * 2**20  # each file is built in memory
_HEAD = "lm_head.weight"


@dataclass(frozen=True)
class Imported:
    """The result of an import.

    model_type: the family.
    config: settings of the model.
    left_out: names of tensors in the folder that belong to no text model.
    remarks: `Family.remarks`.
    tokenizer: True if the folder had a tokenizer.
    error: result of `check`.
    """

    model_type: str
    config: ModelConfig
    left_out: Sequence[str]
    remarks: Sequence[str]
    tokenizer: bool
    error: float


def import_folder(folder: Path, out: Path, check_tokens: int = 256) -> Imported:
    """Write the weights of `folder` to the new checkpoint `out`, with the tokenizer's files and the model's settings as
    an option of hydra's group `model`. A gate of `sleep.stop=gate` becomes a file that the settings of sleep name.

    Raises UserError and leaves nothing in `out`: sleeptrain has no such model, tensors are missing, unexpected or of
    another shape, a file is missing, damaged or a pickle, the tokenizer has too many ids, or the check fails.
    """
    described = describe(folder)
    family, config = described.family, described.model
    files = WeightFiles(folder, family.canonical)
    check_tensors(files, family, config)
    with staged_folder(out) as target:
        write_checkpoint_weights(target, files, family, config)
        tokenizer = _copy_tokenizer(folder, target, config)
        _write_documents(target, out, described, tokenizer)
        ours = TensorFiles(target)
        error = check(config, lambda name: ours.tensor(WEIGHTS + name), folder, family, check_tokens)
    return Imported(family.model_type, config, files.left_out, described.remarks, tokenizer is not None, error)


def option_name(out: Path) -> str:
    """The name of the import in the group `model`: that of `out` without `.yaml`, which hydra would remove."""
    return os.path.basename(os.path.abspath(out)).removesuffix(".yaml")


def check_tensors(files: WeightFiles, family: Family, config: ModelConfig) -> None:
    """Raises DataError unless the files hold exactly the tensors of the model, besides those that are left out."""
    expected, actual = family.their_shapes(config), {name: form.shape for name, form in files.forms.items()}
    if config.tie_embeddings and actual.pop(_HEAD, None) is not None:
        _check_tied(files)
    missing, unexpected = expected.keys() - actual.keys(), actual.keys() - expected.keys()
    if missing or unexpected:
        lines = [*(f"missing: {n}" for n in sorted(missing)), *(f"unexpected: {n}" for n in sorted(unexpected))]
        raise DataError(
            f"the tensors are not those of a {family.model_type} model with the settings of config.json: "
            f"{len(missing)} missing, {len(unexpected)} unexpected",
            _some(lines),
        )
    if wrong := [f"{n}: {list(actual[n])}, not {list(expected[n])}" for n in expected if actual[n] != expected[n]]:
        raise DataError(f"{len(wrong)} tensors have not the shape that config.json gives them", _some(wrong))


def _check_tied(files: WeightFiles) -> None:
    if not torch.equal(files.read(_HEAD), files.read("model.embed_tokens.weight")):
        raise DataError(f"config.json says tie_word_embeddings, but {_HEAD} differs from the embeddings")


def _some(lines: list[str]) -> list[str]:
    return lines if len(lines) <= SHOWN else [*lines[:SHOWN], f"and {len(lines) - SHOWN} more"]


def write_checkpoint_weights(
    target: Path, files: WeightFiles, family: Family, config: ModelConfig, limit: int = FILE_BYTES
) -> None:
    """Write the weights under our names in fp32, one mapping of tensors at a time. limit: bytes of a file."""
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in Hybrid(config).named_parameters()}
    order = [name for mapping in family.mappings(config) for name in mapping.ours]
    sizes = {WEIGHTS + name: 4 * prod(shapes[name]) for name in order}
    ours = ((WEIGHTS + name, tensor.float()) for name, tensor in family.to_ours(config, files.read))
    write_shards(target, sizes, ours, lambda n, _: f"shard-{n:05d}.safetensors", limit)


def _copy_tokenizer(folder: Path, target: Path, config: ModelConfig) -> str | None:
    """Copy the folder's tokenizer. Returns its sha256; None if the folder has none."""
    path = folder / TOKENIZER_JSON
    if not os.path.lexists(path):
        return None
    named_file(folder, TOKENIZER_JSON, folder)
    tokenizer = load_tokenizer(path)
    check_vocabulary(tokenizer, config, path)
    for name, content in tokenizer.files.items():
        (target / name).write_bytes(content)
    return tokenizer.hash


def _write_documents(target: Path, out: Path, described: Described, tokenizer: str | None) -> None:
    """Write the other files of a checkpoint at step 0, and the option of the group `model`.

    out: the later place of `target`. tokenizer: sha256 of the folder's tokenizer.
    """
    name, sleep = option_name(out), described.sleep
    if described.gate is not None:
        sleep = replace(sleep, stop_gate=os.path.abspath(out / GATE_FILE))
    config = Config(run=RunConfig(name=name), model=described.model, sleep=sleep, train=TrainConfig(tokens=0))
    (target / CONFIG).write_bytes(resolved_yaml(config))
    state = {"step": 0, "tokens": 0, "shape": None, TOKENIZER: tokenizer}
    (target / STATE).write_text(json.dumps(state, indent=1))
    write_manifest(target, entries(sorted(path for path in target.iterdir())))
    if described.gate is not None:
        write_gate(target, described.gate)
    (target / "model").mkdir()
    settings = OmegaConf.to_yaml(OmegaConf.structured(described.model))
    (target / "model" / f"{name}.yaml").write_text(f"# Imported from a {described.model_type} model.\n{settings}")
