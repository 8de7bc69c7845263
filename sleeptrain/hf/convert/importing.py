"""A folder of transformers' as a checkpoint of ours, from whose weights a run may begin (`run.init_from`)."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from omegaconf import OmegaConf

from sleeptrain.checkpoint.fit import WEIGHTS
from sleeptrain.checkpoint.folder import CONFIG, STATE, entries, write_manifest
from sleeptrain.checkpoint.read import TensorFiles
from sleeptrain.checkpoint.vocabulary import TOKENIZER
from sleeptrain.checkpoint.write import FILE_BYTES
from sleeptrain.config import resolved_yaml
from sleeptrain.config.schema import Config, ModelConfig, RunConfig, TrainConfig
from sleeptrain.data.hf_tokenizer import TOKENIZER_JSON
from sleeptrain.data.tokenizer import load_tokenizer
from sleeptrain.errors import DataError
from sleeptrain.files import staged_folder
from sleeptrain.hf.convert.check import check
from sleeptrain.hf.convert.exporting import check_vocabulary
from sleeptrain.hf.convert.read_config import Described, describe
from sleeptrain.hf.convert.weight_files import WeightFiles, write_shards
from sleeptrain.hf.families import Family
from sleeptrain.model.hybrid import Hybrid
from sleeptrain.plain_files import named_file

SHOWN = 40
_HEAD = "lm_head.weight"


@dataclass(frozen=True)
class Imported:
    """config: of the model. left_out: tensors of the folder that belong to no text model. remarks: of the family.
    tokenizer: whether it had one. error: of `check`."""

    model_type: str
    config: ModelConfig
    left_out: Sequence[str]
    remarks: Sequence[str]
    tokenizer: bool
    error: float


def import_folder(folder: Path, out: Path, check_tokens: int = 256) -> Imported:
    """Writes the weights of `folder` as the checkpoint `out`, a new folder, which also gets the tokenizer's files and
    the model's settings as an option of the group `model`.

    Raises UserError, and leaves nothing in `out`, where the model is none that sleeptrain has, tensors are missing,
    unexpected or of another shape, a file is damaged or a pickle, the tokenizer has too many ids, or the check fails.
    """
    described = describe(folder)
    family, config = described.family, described.model
    files = WeightFiles(folder, family.canonical)
    check_tensors(files, family, config)
    with staged_folder(out) as target:
        write_checkpoint_weights(target, files, family, config)
        tokenizer = _copy_tokenizer(folder, target, config)
        _write_documents(target, option_name(out), described, tokenizer)
        ours = TensorFiles(target)
        error = check(config, lambda name: ours.tensor(WEIGHTS + name), folder, family, check_tokens)
    return Imported(family.model_type, config, files.left_out, described.remarks, tokenizer is not None, error)


def option_name(out: Path) -> str:
    """The name of an import's settings in the group `model`; hydra takes `.yaml` for a file's ending."""
    return os.path.basename(os.path.abspath(out)).removesuffix(".yaml")


def check_tensors(files: WeightFiles, family: Family, config: ModelConfig) -> None:
    """Raises DataError unless the files hold the tensors of the model, and no other that is not left out."""
    wanted, found = family.their_shapes(config), {name: form.shape for name, form in files.forms.items()}
    if config.tie_embeddings and found.pop(_HEAD, None) is not None:
        _check_tied(files)
    missing, unexpected = wanted.keys() - found.keys(), found.keys() - wanted.keys()
    if missing or unexpected:
        lines = [*(f"missing: {n}" for n in sorted(missing)), *(f"unexpected: {n}" for n in sorted(unexpected))]
        raise DataError(
            f"the tensors are not those of a {family.model_type} model with the settings of config.json: "
            f"{len(missing)} missing, {len(unexpected)} unexpected",
            _some(lines),
        )
    if wrong := [f"{n}: {list(found[n])}, not {list(wanted[n])}" for n in wanted if found[n] != wanted[n]]:
        raise DataError(f"{len(wrong)} tensors have not the shape that config.json gives them", _some(wrong))


def _check_tied(files: WeightFiles) -> None:
    if not torch.equal(files.read(_HEAD), files.read("model.embed_tokens.weight")):
        raise DataError(f"config.json says tie_word_embeddings, but {_HEAD} differs from the embeddings")


def _some(lines: list[str]) -> list[str]:
    return lines if len(lines) <= SHOWN else [*lines[:SHOWN], f"and {len(lines) - SHOWN} more"]


def write_checkpoint_weights(
    target: Path, files: WeightFiles, family: Family, config: ModelConfig, limit: int = FILE_BYTES
) -> None:
    """The weights under our names in fp32, one link of tensors at a time."""
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in Hybrid(config).named_parameters()}
    order = [name for link in family.links(config) for name in link.ours]
    sizes = {WEIGHTS + name: 4 * prod(shapes[name]) for name in order}
    ours = ((WEIGHTS + name, tensor.float()) for name, tensor in family.to_ours(config, files.read))
    write_shards(target, sizes, ours, lambda n, count: f"shard-00001-model-{n:05d}-of-{count:05d}.safetensors", limit)


def _copy_tokenizer(folder: Path, target: Path, config: ModelConfig) -> str | None:
    """The sha256 of the folder's tokenizer, None where it has none."""
    path = folder / TOKENIZER_JSON
    if not os.path.lexists(path):
        return None
    named_file(folder, TOKENIZER_JSON, folder)
    tokenizer = load_tokenizer(path)
    check_vocabulary(tokenizer, config, path)
    for name, content in tokenizer.files.items():
        (target / name).write_bytes(content)
    return tokenizer.hash


def _write_documents(target: Path, name: str, described: Described, tokenizer: str | None) -> None:
    """What a checkpoint has besides tensors, of a run of no steps, and the option of the group `model`.

    tokenizer: the sha256 of the folder's.
    """
    train = TrainConfig(tokens=0)
    whole = Config(run=RunConfig(name=name), model=described.model, sleep=described.sleep, train=train)
    (target / CONFIG).write_bytes(resolved_yaml(whole))
    state = {"step": 0, "tokens": 0, "shape": None, TOKENIZER: tokenizer}
    (target / STATE).write_text(json.dumps(state, indent=1))
    write_manifest(target, entries(sorted(path for path in target.iterdir())))
    (target / "model").mkdir()
    settings = OmegaConf.to_yaml(OmegaConf.structured(described.model))
    (target / "model" / f"{name}.yaml").write_text(f"# Imported from a {described.model_type} model.\n{settings}")
