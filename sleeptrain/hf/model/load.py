"""Load a folder of a family of transformers' models as a `SleepForCausalLM`."""

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
from sleeptrain.hf.convert.gate_file import folder_gate
from sleeptrain.hf.convert.weight_files import INDEX_NAME, WeightFiles
from sleeptrain.hf.families import FAMILIES, family_of
from sleeptrain.hf.model.configuration import MODEL_TYPE, SleepPretrainedConfig
from sleeptrain.kinds import is_count, list_of
from sleeptrain.model.decay import DECAY_PARAMETERS
from sleeptrain.small_files import read_json

# Arguments of transformers' `from_pretrained` without effect for a folder on this machine.
_WITHOUT_EFFECT = (
    "_from_auto", "_from_pipeline", "adapter_kwargs", "cache_dir", "force_download", "local_files_only",
    "low_cpu_mem_usage", "proxies", "revision", "token", "trust_remote_code", "use_safetensors", "weights_only",
)  # fmt: skip


def is_native(place: Any) -> bool:
    """True for a folder with a model of a family, False for one that `SleepForCausalLM` saved."""
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
    """The model in evaluation mode; with `output_loading_info` a pair with transformers' dict of loading errors.

    kind: `SleepForCausalLM` or a subclass. dtype: None and `auto` take that of the files. torch_dtype: its older name.
    device_map: one device for the model. others: settings of `SleepPretrainedConfig` that replace the folder's. Raises
    ConfigError: an unknown argument; DataError: the folder does not hold the model or the gate of its `config.json`.
    """
    settings = _settings(folder, config, others)
    wanted, device = _wanted_dtype(torch_dtype if dtype is None else dtype), single_device(device_map)
    with torch.device("meta"):
        model = kind(settings)
    weights = native_weights(folder, settings.model_config(), wanted)
    model.model.load_state_dict(weights, assign=True)
    if settings.stop_gate_passes:
        model.stop_gate = folder_gate(folder, settings.model_config().dim, settings.stop_gate_passes)
    if device is not None:
        nn.Module.to(model, device)
    if (generation := read_generation_config(folder)) is not None:
        model.generation_config = generation
        # Folders of models without attention say False: transformers' class then has no cache. Ours has one.
        model.generation_config.use_cache = settings.use_cache
    info: dict[str, Any] = {"missing_keys": set(), "unexpected_keys": set(), "mismatched_keys": set(), "error_msgs": []}
    return (model.eval(), info) if output_loading_info else model.eval()


def check_saved(folder: Path) -> None:
    """Raises DataError: a folder saved by `SleepForCausalLM` is damaged, or its index names files outside of it.

    transformers would follow such names.
    """
    read_config(folder)
    with understanding(folder / "config.json"):
        SleepPretrainedConfig.from_pretrained(folder)
    read_generation_config(folder)
    WeightFiles(folder, lambda name: name)
    _check_index(folder / INDEX_NAME)


def _check_index(path: Path) -> None:
    """Raises DataError: the index lacks `metadata`, which transformers reads without a check."""
    if path.is_file() and not isinstance(read_json(path, WAY_OUT).get("metadata"), dict):
        raise DataError(f"{path} has no metadata; save the model again, or take the file from where it comes from")


def read_generation_config(folder: Path) -> GenerationConfig | None:
    """The folder's `generation_config.json`; None if there is none. Raises DataError: it is not understood."""
    path = folder / GENERATION_CONFIG_NAME
    if not path.is_file():
        return None
    way_out = "remove the file, or take it from where it comes from again"
    generation = read_json(path, way_out)
    for name, value in generation.items():
        if name.endswith("_token_id") and not _is_ids(value):
            raise DataError(f"{path}: {name} is {str(value)[:60]!r}, no id of a token; {way_out}")
    with understanding(path):
        return GenerationConfig.from_pretrained(folder)


def _is_ids(value: Any) -> bool:
    return value is None or is_count(value) or list_of(is_count)(value)


def _settings(folder: Path, config: Any, others: dict[str, Any]) -> SleepPretrainedConfig:
    arguments = {name: value for name, value in others.items() if value is not None and name not in _WITHOUT_EFFECT}
    if isinstance(config, SleepPretrainedConfig):
        settings, unknown = copy.deepcopy(config), arguments
    elif config is None or isinstance(config, str | Path):
        place = config or folder
        with understanding(Path(place) / "config.json"):
            settings, unknown = SleepPretrainedConfig.from_pretrained(place, return_unused_kwargs=True, **arguments)
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


def _wanted_dtype(value: Any) -> torch.dtype | None:
    if value in (None, "auto"):
        return None
    dtype = getattr(torch, value, None) if isinstance(value, str) else value
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ConfigError(f"dtype={value}: give 'auto' or a floating point type, as torch.bfloat16 or 'bfloat16'")
    return dtype


def single_device(device_map: Any) -> torch.device | None:
    """The device of a `device_map`, None for None. Raises ConfigError: it names several devices, or a wrong one."""
    if isinstance(device_map, dict) and set(device_map) == {""}:
        device_map = device_map[""]
    if device_map is None:
        return None
    if isinstance(device_map, dict) or device_map in ("auto", "balanced", "balanced_low_0", "sequential"):
        raise ConfigError(f"device_map={device_map}: the model stands on one device; give it, as device_map='cuda'")
    return usable_device(device_map, "device_map")


def usable_device(name: str | int | torch.device, setting: str) -> torch.device:
    """The device of this name or number. Raises ConfigError, which names the setting: there is no such device."""
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError) as error:
        raise ConfigError(f"{setting}={name} is no device that torch knows; use cpu or cuda") from error
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"{setting}={name}: the model runs on cpu and cuda")
    count = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= count:
        available = f"only {count} GPUs" if count else "no GPU"
        raise ConfigError(f"{setting}={name}: torch sees {available} here; use cpu, or one that is there")
    return device


def native_weights(folder: Path, config: ModelConfig, dtype: torch.dtype | None) -> dict[str, torch.Tensor]:
    """{name: parameter} of `Hybrid`, in `dtype` (None: that of the files); decay parameters are at least fp32.

    Raises DataError: a file cannot be read, or a tensor is missing, unexpected or of another shape.
    """
    family = family_of(_model_type(folder / "config.json"))
    files, expected = WeightFiles(folder, family.canonical), family.their_shapes(config)
    actual = {name: form.shape for name, form in files.forms.items()}
    if config.tie_embeddings:
        actual.pop("lm_head.weight", None)
    if wrong := sorted(name for name in expected.keys() | actual.keys() if expected.get(name) != actual.get(name)):
        name = wrong[0]
        raise DataError(
            f"{folder} does not hold the model of its config.json: {name} has shape {actual.get(name, 'none')}, not "
            f"{expected.get(name, 'none')} ({len(wrong)} such tensors)"
        )
    return {name: _typed(name, tensor, dtype) for name, tensor in family.to_ours(config, files.read)}


def _typed(name: str, tensor: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    dtype = dtype or tensor.dtype
    if name.rsplit(".", 1)[-1] in DECAY_PARAMETERS:
        dtype = torch.promote_types(dtype, torch.float32)
    return tensor.to(dtype).contiguous()


def _model_type(path: Path) -> str:
    config_dict = read_json(path, WAY_OUT)
    # Multimodal models keep the settings of the text model under `text_config`.
    outer, text = config_dict.get("model_type", ""), config_dict.get("text_config")
    inner = text.get("model_type", outer) if isinstance(text, dict) else outer
    chosen = outer if outer in (*FAMILIES, MODEL_TYPE) else inner
    if not isinstance(chosen, str):
        raise DataError(f"{path} names no model_type; {WAY_OUT}")
    return chosen
