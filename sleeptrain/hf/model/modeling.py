"""`SleepForCausalLM`: a sleeping model with the interface of transformers, `generate()` included.

Importing this module registers it with `AutoConfig`, `AutoModelForCausalLM` and `AutoModel`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from sleeptrain.config import schema
from sleeptrain.errors import ConfigError, DataError
from sleeptrain.hf.model.cache import CACHE_NAME, SleepCache, one_cache
from sleeptrain.hf.model.configuration import SleepPretrainedConfig
from sleeptrain.hf.model.generation_mixin import SleepGeneration
from sleeptrain.hf.model.labels import mean_loss, with_label
from sleeptrain.hf.model.load import check_saved, is_native, load_native, single_device
from sleeptrain.hf.model.offered import REFUSED_LOADING, refuse, refuse_others
from sleeptrain.hf.model.refusing import Refusing
from sleeptrain.model.decay import DECAY_PARAMETERS
from sleeptrain.model.hybrid import Hybrid, at_least_fp32
from sleeptrain.sleep.full_logits import compact, whole_logits
from sleeptrain.sleep.live import read
from sleeptrain.sleep.stop_gate import StopGate


class SleepForCausalLM(Refusing, PreTrainedModel, SleepGeneration, GenerationMixin):
    """A `Hybrid` that reads window by window, sleeps at each boundary and predicts the next token.

    `config.sleep` holds the settings; `forward` and `generate` also take N and L (`passes=4, window=512`).
    stop_gate: the gate of `sleep.stop=gate`, fp32; None if the model holds none. It is saved with the weights.
    """

    config_class = SleepPretrainedConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    accepts_loss_kwargs = False  # the loss is the mean over the targets of one call
    _is_stateful = True  # assisted generation would have to remove tokens from the memory
    _supports_sdpa = True
    _no_split_modules = ["Block"]  # noqa: RUF012
    _keep_in_fp32_modules_strict = [*DECAY_PARAMETERS]  # noqa: RUF012

    def __init__(self, config: SleepPretrainedConfig):
        super().__init__(config)
        if config.vocab_size == 0:
            raise ConfigError("model.vocab_size must be set: how many ids the model knows")
        self.model = Hybrid(config.model_config())
        self.stop_gate = None
        if config.stop_gate_passes:
            self.stop_gate = StopGate(self.model.config.dim, config.stop_gate_passes).float().requires_grad_(False)
        self._sleeps: dict[tuple[int | None, int | None, str], schema.SleepConfig] = {}
        if self.model.device.type != "meta":
            self.model.init_weights(seed=0)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """`Hybrid` draws its initial weights itself; `from_pretrained` refuses files without some of the weights."""

    def get_input_embeddings(self) -> nn.Module:
        assert self.model.embedding is not None
        return self.model.embedding

    def get_output_embeddings(self) -> nn.Module | None:
        return self.model.head

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Load a folder of `save_pretrained`, or of a family of `sleeptrain.hf.families`, with the same weights.

        A folder of a family takes the arguments of `sleeptrain.hf.model.load.load_native`. Raises ConfigError: an
        argument is not supported; DataError: a weight is missing, unexpected or of another shape.
        """
        refuse(kwargs, REFUSED_LOADING)
        if is_native(pretrained_model_name_or_path):
            return load_native(cls, Path(pretrained_model_name_or_path), *args, **kwargs)
        if not {"subfolder", "variant", "state_dict"} & kwargs.keys() and Path(pretrained_model_name_or_path).is_dir():
            check_saved(Path(pretrained_model_name_or_path))
        device = single_device(kwargs.pop("device_map", None))
        wants_info = kwargs.pop("output_loading_info", False)
        kwargs["ignore_mismatched_sizes"] = True  # the code below refuses them in one line
        loaded: Any = super().from_pretrained(pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs)
        model, info = loaded
        for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
            if info[kind]:
                listed = ", ".join(sorted(map(str, info[kind]))[:3])
                raise DataError(
                    f"{pretrained_model_name_or_path}: {len(info[kind])} {kind.replace('_', ' ')} ({listed})"
                )
        if model.stop_gate is not None:
            model.stop_gate.requires_grad_(False)
        if device is not None:
            nn.Module.to(model, device)
        return (model, info) if wants_info else model

    def sleep_settings(self, passes: int | None = None, window: int | None = None) -> schema.SleepConfig:
        """The settings of sleep, cached. passes, window: replace N and L. Raises ConfigError."""
        key = (passes, window, repr(self.config.sleep))
        if key not in self._sleeps:
            self._sleeps = {key: self.config.sleep_settings(passes, window)}
        return self._sleeps[key]

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: SleepCache | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        passes: int | None = None,
        window: int | None = None,
        cache: SleepCache | None = None,
        **others: Any,
    ) -> CausalLMOutputWithPast:
        """Logits [B, T, V] in fp32 or wider; with `logits_to_keep` > 0 only those of the last columns.

        input_ids: int64 [B, T]. attention_mask: [B, >= T], 0 at pads, which may be anywhere; its last T columns count.
        Pads have no effect, and the windows of a row begin at its first token. Logits at pads are 0.

        With a cache (arguments `cache` or `past_key_values`) the ids continue the text that it has read, without a
        gradient. A new cache is the default if gradients are disabled; `past_key_values` of the output is the cache.
        Without a cache the ids are complete texts, computed as in training. labels: ids, not shifted, IGNORE (-100) for
        no loss; they give the mean cross entropy. Under `sleep.when=unlabelled` windows that predict nothing (no label,
        or no logits kept) sleep; their logits are NaN. Raises ConfigError, also for unsupported arguments of
        transformers.
        """
        refuse_others(others, self.config)
        if input_ids is None:
            raise ConfigError("input_ids: give the ids to read")
        valid_BT = self._valid(input_ids, attention_mask)
        keep = min(logits_to_keep or input_ids.shape[1], input_ids.shape[1])
        if use_cache is None:
            use_cache = self.config.use_cache and labels is None and not torch.is_grad_enabled()
        previous = one_cache(past_key_values, cache)
        if previous is None and not use_cache:
            logits = self._full_logits(input_ids, valid_BT, labels, keep, self.sleep_settings(passes, window))
            loss = None if labels is None else mean_loss(logits, labels, valid_BT)
            return CausalLMOutputWithPast(loss=loss, logits=logits)
        if labels is not None:
            raise ConfigError("labels need the whole text in one forward: leave the cache and use_cache out")
        memory, sleep = self._cache(previous, len(input_ids), passes, window)
        logits = self._read(input_ids, valid_BT, memory, sleep, keep)
        output: dict[str, Any] = {CACHE_NAME: memory}
        return CausalLMOutputWithPast(logits=logits, **output)

    @torch.no_grad()
    def read(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        past_key_values: SleepCache | None = None,
        passes: int | None = None,
        window: int | None = None,
        cache: SleepCache | None = None,
    ) -> SleepCache:
        """Read texts, or continue a cache, without predictions. Returns the cache, to save or for `generate`.

        input_ids: int64 [B, T]. attention_mask: [B, >= T], 0 at pads. Raises ConfigError.
        """
        memory, sleep = self._cache(one_cache(past_key_values, cache), len(input_ids), passes, window)
        valid_BT = self._valid(input_ids, attention_mask)
        memory.begin_turn()
        self._read(input_ids, valid_BT, memory, sleep, 0)
        return memory.follow_with_new_text()

    def _cache(
        self, cache: SleepCache | None, num_rows: int, passes: int | None, window: int | None
    ) -> tuple[SleepCache, schema.SleepConfig]:
        if cache is None:
            sleep = self.sleep_settings(passes, window)
            return SleepCache(self.model, num_rows, sleep), sleep
        if cache.model is not self.model:
            raise ConfigError(
                "the cache was made by another model: to hand it on to an equal one, save() it and load it with "
                "SleepCache.load(path, model), which compares the two"
            )
        sleep = self.sleep_settings(passes, cache.window if window is None else window)
        cache.check(sleep, num_rows)
        return cache, sleep

    def _valid(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
        if attention_mask is None:
            return torch.ones_like(input_ids, dtype=torch.bool)
        num_rows, num_columns = input_ids.shape
        shape = list(attention_mask.shape)
        if len(shape) != 2 or shape[0] != num_rows or shape[1] < num_columns:
            raise ConfigError(
                f"attention_mask has shape {shape}: it must be [rows, columns] with the {num_rows} rows of input_ids "
                f"and a column for each of its {num_columns}"
            )
        return attention_mask[:, shape[1] - num_columns :].bool()

    def _full_logits(
        self,
        input_ids: torch.Tensor,
        valid_BT: torch.Tensor,
        labels: torch.Tensor | None,
        keep: int,
        sleep: schema.SleepConfig,
    ) -> torch.Tensor:
        predicts_BT = valid_BT.clone()
        predicts_BT[:, : input_ids.shape[1] - keep] = False
        if labels is not None and sleep.when == "unlabelled":
            predicts_BT &= with_label(labels, valid_BT, sleep.window)
        fill = torch.zeros_like(predicts_BT[:, -keep:], dtype=self._logits_dtype)
        fill = fill.masked_fill((valid_BT & ~predicts_BT)[:, -keep:], float("nan")).unsqueeze(-1)
        ids_BT = input_ids.masked_fill(~valid_BT, 0)  # pads may hold ids that the model does not have
        predicted_PV = whole_logits(self.model, ids_BT, valid_BT, predicts_BT, sleep, self.stop_gate)
        logits = fill.expand(-1, -1, self.config.vocab_size)
        return logits.masked_scatter(predicts_BT[:, -keep:].unsqueeze(-1), predicted_PV)

    @property
    def _logits_dtype(self) -> torch.dtype:
        return torch.promote_types(self.dtype, torch.float32)

    @torch.no_grad()
    def _read(
        self, input_ids: torch.Tensor, valid_BT: torch.Tensor, cache: SleepCache, sleep: schema.SleepConfig, keep: int
    ) -> torch.Tensor:
        """Read the ids window by window and update the cache. Returns logits [B, keep, V] of the last columns."""
        num_rows, num_columns = input_ids.shape
        logits = torch.zeros(num_rows, keep, self.config.vocab_size, dtype=self._logits_dtype, device=input_ids.device)
        order_BT, counts_B = None, valid_BT.sum(1)
        if not bool(valid_BT.all()):  # saves memory of the prompt's size if there are no pads
            order_BT, counts_B = compact(valid_BT)
            input_ids = input_ids.masked_fill(~valid_BT, 0)  # pads may hold ids that the model does not have
        remaining, done = counts_B.tolist(), [0] * num_rows
        first_kept = num_columns - keep
        while any(remaining):
            counts = [min(n, sleep.window - f) for n, f in zip(remaining, cache.live.filled, strict=True)]
            column_BM = _columns(order_BT, done, counts, input_ids)
            kept_BM = column_BM >= first_kept
            tokens_BM = input_ids.gather(1, column_BM.clamp(min=0))
            predicts = kept_BM.any(1).tolist()
            x_BMD, cache.live = read(self.model, cache.live, tokens_BM, counts, predicts, sleep, self.stop_gate)
            row_N, index_N = kept_BM.nonzero(as_tuple=True)
            if len(row_N):
                column_N = column_BM[row_N, index_N] - first_kept
                logits[row_N, column_N] = at_least_fp32(self.model.logits(x_BMD[row_N, index_N]))
            done = [d + n for d, n in zip(done, counts, strict=True)]
            remaining = [n - m for n, m in zip(remaining, counts, strict=True)]
        cache.sleep = sleep
        cache.columns += 0 if cache.new_text else num_columns
        return logits


def _columns(
    order_BT: torch.Tensor | None, done: Sequence[int], counts: Sequence[int], like: torch.Tensor
) -> torch.Tensor:
    """int64 [B, max(counts)]: in row b the columns of tokens done[b] to done[b] + counts[b], then -1.

    order_BT: columns of the tokens, from `compact`; None if there are no pads. like: gives the device.
    """
    start, number = (torch.tensor(list(values), device=like.device)[:, None] for values in (done, counts))
    token = torch.arange(max(counts), device=like.device)
    column_BM = start + token
    if order_BT is not None:
        column_BM = order_BT.gather(1, column_BM.clamp(max=order_BT.shape[1] - 1))
    return torch.where(token < number, column_BM, -1)


AutoModel.register(SleepPretrainedConfig, SleepForCausalLM)
AutoModelForCausalLM.register(SleepPretrainedConfig, SleepForCausalLM)
