"""A folder that a family of transformers' models describes, loaded as one of ours."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig
from transformers.utils import GENERATION_CONFIG_NAME

from sleeptrain.config.schema import ModelConfig
from sleeptrain.errors import ConfigError, DataError
from sleeptrain.hf.convert.config_file import WAY_OUT, read_config, understanding
from sleeptrain.hf.convert.weight_files import INDEX_NAME, WeightFiles
from sleeptrain.hf.families import FAMILIES, family_of
from sleeptrain.hf.model.configuration import MODEL_TYPE, SleepPretrainedConfig
from sleeptrain.kinds import is_count, list_of
from sleeptrain.model.decay import DECAY_PARAMETERS
from sleeptrain.small_files import read_json

# Arguments of transformers' `from_pretrained` that change nothing of a folder on this machine.
_OF_NO_EFFECT = (
    "_from_auto", "_from_pipeline", "adapter_kwargs", "cache_dir", "force_download", "local_files_only",
    "low_cpu_mem_usage", "proxies", "revision", "token", "trust_remote_code", "use_safetensors", "weights_only",
)  # fmt: skip


def is_native(place: Any) -> bool:
    """Whether it is a folder with a model of a family, not one that `SleepForCausalLM` has saved."""
    config = Path(place) / "config.json"
    return config.is_file() and _model_type(config) != MODEL_TYPE


def load_native(
    kind: Any,
    folder: Path,
    config: SleepPretrainedConfig | str | Path | None = None,
    dtype: torch.dtype | str | None = None,
    torch_dtype: torch.dtype | str | None = None,
    device_map: Any = None,
    output_loading_info: bool = False,
    **others: Any,
) -> Any:
    """The model in evaluation mode, with `output_loading_info` also what transformers would tell of the loading.

    kind: `SleepForCausalLM` or a class of it. dtype: `auto` (default): that of the files. torch_dtype: its older name.
    device_map: one device for the model. others: settings of `SleepPretrainedConfig` that replace the folder's. Raises
    ConfigError: an unknown argument; DataError: the folder does not hold the model of its `config.json`.
    """
    settings = _settings(folder, config, others)
    wanted, device = _wanted_dtype(torch_dtype if dtype is None else dtype), single_device(device_map)
    with torch.device("meta"):
        model = kind(settings)
    weights = native_weights(folder, settings.model_config(), wanted)
    model.model.load_state_dict(weights, assign=True)
    if device is not None:
        nn.Module.to(model, device)
    if (generation := read_generation_config(folder)) is not None:
        model.generation_config = generation
        # A folder without attention says False, for transformers' own class of it has no cache; ours has one.
        model.generation_config.use_cache = settings.use_cache
    info: dict[str, Any] = {"missing_keys": set(), "unexpected_keys": set(), "mismatched_keys": set(), "error_msgs": []}
    return (model.eval(), info) if output_loading_info else model.eval()


def check_saved(folder: Path) -> None:
    """Raises DataError where a folder that `SleepForCausalLM` has saved is damaged, or names files outside of it:
    transformers, which reads it, follows such names."""
    read_config(folder)
    with understanding(folder / "config.json"):
        SleepPretrainedConfig.from_pretrained(folder)
    read_generation_config(folder)
    WeightFiles(folder, lambda name: name)
    _check_index(folder / INDEX_NAME)


def _check_index(path: Path) -> None:
    """Raises DataError where transformers does not find in an index what it takes for granted."""
    if path.is_file() and not isinstance(read_json(path, WAY_OUT).get("metadata"), dict):
        raise DataError(f"{path} has no metadata; save the model again, or take the file from where it comes from")


def read_generation_config(folder: Path) -> GenerationConfig | None:
    """How a folder asks to generate, None where it does not. Raises DataError where that is not understood."""
    path = folder / GENERATION_CONFIG_NAME
    if not path.is_file():
        return None
    way_out = "remove the file, or take it from where it comes from again"
    found = read_json(path, way_out)
    for name, value in found.items():
        if name.endswith("_token_id") and not _is_ids(value):
            raise DataError(f"{path}: {name} is {str(value)[:60]!r}, no id of a token; {way_out}")
    with understanding(path):
        return GenerationConfig.from_pretrained(folder)


def _is_ids(value: Any) -> bool:
    return value is None or is_count(value) or list_of(is_count)(value)


def _settings(folder: Path, config: Any, others: dict[str, Any]) -> SleepPretrainedConfig:
    given = {name: value for name, value in others.items() if value is not None and name not in _OF_NO_EFFECT}
    if isinstance(config, SleepPretrainedConfig):
        settings, unknown = copy.deepcopy(config), given
    elif config is None or isinstance(config, str | Path):
        place = config or folder
        with understanding(Path(place) / "config.json"):
            settings, unknown = SleepPretrainedConfig.from_pretrained(place, return_unused_kwargs=True, **given)
    else:
        raise ConfigError(
            f"config is a {type(config).__name__}: take SleepPretrainedConfig.from_pretrained('{folder}'), or leave it "
            "out"
        )
    if unknown:
        raise ConfigError(
            f"from_pretrained({folder}) does not know {', '.join(sorted(unknown))}: it takes config, dtype, device_map "
            "and output_loading_info, and without config the settings of SleepPretrainedConfig"
        )
    return settings


def _wanted_dtype(given: Any) -> torch.dtype | None:
    if given in (None, "auto"):
        return None
    dtype = getattr(torch, given, None) if isinstance(given, str) else given
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ConfigError(f"dtype={given}: give 'auto' or a floating point type, as torch.bfloat16 or 'bfloat16'")
    return dtype


def single_device(device_map: Any) -> torch.device | None:
    if isinstance(device_map, dict) and set(device_map) == {""}:
        device_map = device_map[""]
    if device_map is None:
        return None
    if isinstance(device_map, dict) or device_map in ("auto", "balanced", "balanced_low_0", "sequential"):
        raise ConfigError(f"device_map={device_map}: the model stands on one device; give it, as device_map='cuda'")
    return usable_device(device_map, "device_map")


def usable_device(given: str | int | torch.device, setting: str) -> torch.device:
    """The device of this name or number. Raises ConfigError, in the name of the setting, where there is none."""
    try:
        device = torch.device(given)
    except (RuntimeError, TypeError) as error:
        raise ConfigError(f"{setting}={given} is no device that torch knows; use cpu or cuda") from error
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"{setting}={given}: the model runs on cpu and cuda")
    count = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= count:
        seen = f"only {count} GPUs" if count else "no GPU"
        raise ConfigError(f"{setting}={given}: torch sees {seen} here; use cpu, or one that is there")
    return device


def native_weights(folder: Path, config: ModelConfig, dtype: torch.dtype | None) -> dict[str, torch.Tensor]:
    """Our parameters, in `dtype` (None: that of the files); decays are never narrower than fp32.

    Raises DataError where a file cannot be read, or a tensor is missing, left over or of another shape.
    """
    family = family_of(_model_type(folder / "config.json"))
    files, shapes = WeightFiles(folder, family.canonical), family.their_shapes(config)
    found = {name: form.shape for name, form in files.forms.items()}
    if config.tie_embeddings:
        found.pop("lm_head.weight", None)
    if wrong := sorted(name for name in shapes.keys() | found.keys() if shapes.get(name) != found.get(name)):
        name = wrong[0]
        raise DataError(
            f"{folder} does not hold the model of its config.json: {name} has shape {found.get(name, 'none')}, not "
            f"{shapes.get(name, 'none')} ({len(wrong)} such tensors)"
        )
    return {name: _typed(name, tensor, dtype) for name, tensor in family.to_ours(config, files.read)}


def _typed(name: str, tensor: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    dtype = dtype or tensor.dtype
    if name.rsplit(".", 1)[-1] in DECAY_PARAMETERS:
        dtype = torch.promote_types(dtype, torch.float32)
    return tensor.to(dtype).contiguous()


def _model_type(path: Path) -> str:
    found = read_json(path, WAY_OUT)
    # Models that also see images hold the text model's settings apart.
    own, text = found.get("model_type", ""), found.get("text_config")
    inner = text.get("model_type", own) if isinstance(text, dict) else own
    chosen = own if own in (*FAMILIES, MODEL_TYPE) else inner
    if not isinstance(chosen, str):
        raise DataError(f"{path} names no model_type; {WAY_OUT}")
    return chosen
