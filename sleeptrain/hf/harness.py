"""The lm-evaluation-harness on a sleeping model: `sleeptrain lm_eval --model sleeptrain --model_args pretrained=...`.

Importing this module registers the model `sleeptrain` with the harness.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from itertools import groupby, takewhile
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from transformers import StoppingCriteria, StoppingCriteriaList

from sleeptrain.data.batch import IGNORE
from sleeptrain.data.continued import continued_text
from sleeptrain.data.tokenizer import Tokenizer
from sleeptrain.errors import ConfigError
from sleeptrain.hf.load_for_inference import encode_prompt, open_model
from sleeptrain.hf.model.cache import CACHE_NAME
from sleeptrain.hf.model.text_options import text_options
from sleeptrain.hf.request_options import generation_options, stop_strings
from sleeptrain.remote import named_place


def main(arguments: Sequence[str]) -> int:
    """Run the harness's own command line."""
    from lm_eval.__main__ import cli_evaluate

    before, sys.argv = sys.argv, ["lm_eval", *arguments]
    try:
        cli_evaluate()
    finally:
        sys.argv = before
    return 0


@register_model("sleeptrain")
class Sleeping(TemplateLM):
    """Scores texts of any length: it reads window by window, each full window sleeps, and nothing is truncated.

    Requests to generate are greedy unless they set `temperature` or `do_sample`. Other settings are those of
    transformers' `generate`; the length also has the harness's names.

    pretrained: a run, a checkpoint or a Hugging Face folder. passes, window: replace the model's N and L. allow_older:
    if the newest checkpoint of the run is damaged, take the newest undamaged one.
    """

    def __init__(
        self,
        pretrained: str,
        passes: int | None = None,
        window: int | None = None,
        tokenizer: str | None = None,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        device: str | None = None,
        dtype: str = "auto",
        max_gen_toks: int = 256,
        allow_older: bool = False,
    ) -> None:
        super().__init__()
        if not str(batch_size).isdigit() or int(batch_size) < 1:
            raise ConfigError(f"batch_size={batch_size}: give a number")
        path = None if tokenizer is None else Path(tokenizer)
        # The default of the harness's command line is cuda:0, also without a GPU.
        if device is None or (device == "cuda:0" and not torch.cuda.is_available()):
            device = "auto"
        opened = open_model(named_place(pretrained), path, device, dtype, allow_older)
        self.model: Any = opened[0]
        self._tokenizer = opened[1]
        self._sleep: dict[str, Any] = {"passes": passes, "window": window}
        self._unlabelled = self.model.sleep_settings(**self._sleep).when == "unlabelled"
        self.batch_size, self.max_gen_toks = int(batch_size), max_gen_toks

    @property
    def eot_token_id(self) -> int:
        return self._tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        bos = self._tokenizer.bos_id
        return self.eot_token_id if bos is None else bos

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **ignored: Any) -> list[int]:
        return encode_prompt(self._tokenizer, string, begins=add_special_tokens is not False)

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **ignored: Any
    ) -> list[tuple[float, bool]]:
        scores = self._scores([(context, continuation) for _, context, continuation in requests])
        for (key, _, _), score in zip(requests, scores, strict=True):
            self.cache_hook.add_partial("loglikelihood", key, score)
        return scores

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        texts = [request.args[0] for request in requests]
        pairs = [([self.prefix_token_id], self._tokenizer.encode(text)) for text in texts]
        scores = [score for score, _ in self._scores(pairs)]
        for request, score in zip(requests, scores, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, score)
        return scores

    def _scores(self, pairs: list[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
        """(log-likelihood in nats, True if greedy) of the continuation in each pair (context, continuation)."""
        scores: list[tuple[float, bool]] = [(0.0, True)] * len(pairs)
        # Under `unlabelled` windows without targets sleep: the rows of a batch must predict the same number of tokens.
        num_predicted = [len(more) if self._unlabelled else 0 for _, more in pairs]
        for part in self._batches([len(context) + len(more) for context, more in pairs], num_predicted):
            for i, score in zip(part, self._score_rows([pairs[i] for i in part]), strict=True):
                scores[i] = score
        return scores

    @torch.no_grad()
    def _score_rows(self, pairs: list[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
        """`_scores` of one batch. Reads L columns at a time, so that it never holds logits of more columns."""
        inputs = self._padded([(context + more)[:-1] for context, more in pairs])
        targets_BT = self._targets([more for _, more in pairs], inputs["input_ids"].shape[1])
        window, cache = self.model.sleep_settings(**self._sleep).window, None
        total_B = torch.zeros(len(pairs), dtype=torch.float64)
        greedy_B = torch.ones(len(pairs), dtype=torch.bool)
        for start in range(0, targets_BT.shape[1], window):
            part = {name: t[:, start : start + window] for name, t in inputs.items()}
            targets_BM = targets_BT[:, start : start + window]
            has_target_M = (targets_BM != IGNORE).any(0)
            if not has_target_M.any():
                cache = self.model.read(**part, cache=cache, **self._sleep)
                continue
            keep = targets_BM.shape[1] - int(has_target_M.int().argmax())
            out = self.model(**part, cache=cache, use_cache=True, logits_to_keep=keep, **self._sleep)
            cache = out[CACHE_NAME]
            score_B, is_greedy_B = _score(out.logits, targets_BM[:, -keep:])
            total_B, greedy_B = total_B + score_B, greedy_B & is_greedy_B
        return list(zip(total_B.tolist(), greedy_B.tolist(), strict=True))

    def _targets(self, continuations: list[list[int]], width: int) -> torch.Tensor:
        """int64 [B, width]: each continuation at the end of its row, after IGNORE."""
        rows = [[IGNORE] * (width - len(more)) + more for more in continuations]
        return torch.tensor(rows, device=self.model.device)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        answers = [""] * len(requests)
        prompts = [self.tok_encode(request.args[0]) for request in requests]
        groups: dict[str, list[int]] = {}
        for i, request in enumerate(requests):
            groups.setdefault(repr(sorted(request.args[1].items())), []).append(i)
        for group in groups.values():
            for part in self._batches([len(prompts[i]) for i in group]):
                rows = [group[i] for i in part]
                options = requests[rows[0]].args[1]
                for i, text in zip(rows, self._generate([prompts[i] for i in rows], options), strict=True):
                    answers[i] = text
                    self.cache_hook.add_partial("generate_until", requests[i].args, text)
        return answers

    def _generate(self, prompts: list[list[int]], request: dict[str, Any]) -> list[str]:
        until, options = stop_strings(request), generation_options(request, self.max_gen_toks)
        inputs = self._padded(prompts)
        width = inputs["input_ids"].shape[1]
        settings = text_options(self.model, self._tokenizer) | options
        texts = _Texts(self._tokenizer, prompts, settings["eos_token_id"])
        stop = StoppingCriteriaList([_Until(texts, until, width)])
        ids = self.model.generate(**inputs, **settings, stopping_criteria=stop, **self._sleep)
        return [_cut(text, until) for text in texts(ids[:, width:])]

    def _batches(self, lengths: list[int], keys: list[int] | None = None) -> Iterator[list[int]]:
        """Indices of the rows of each batch: rows of similar lengths, with equal keys."""
        keys = keys or [0] * len(lengths)
        order = sorted(range(len(lengths)), key=lambda i: (keys[i], lengths[i]))
        for _, group in groupby(order, key=lambda i: keys[i]):
            rows = list(group)
            for start in range(0, len(rows), self.batch_size):
                yield rows[start : start + self.batch_size]

    def _padded(self, rows: list[list[int]]) -> dict[str, torch.Tensor]:
        width = max(map(len, rows))
        ids = torch.tensor([[self.eot_token_id] * (width - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
        return {"input_ids": ids.to(self.model.device), "attention_mask": mask.to(self.model.device)}


class _Texts:
    """Maps new ids [rows, T] to the texts that they add to the prompts, up to an id that ends a text."""

    def __init__(self, tokenizer: Tokenizer, prompts: list[list[int]], ends: int | list[int]) -> None:
        self._tokenizer, self._prompts = tokenizer, prompts
        self._ends = {ends} if isinstance(ends, int) else set(ends or ())

    def __call__(self, ids: torch.Tensor) -> list[str]:
        num_beams = len(ids) // len(self._prompts)  # beams of one prompt are neighbouring rows
        rows = [list(takewhile(lambda id: id not in self._ends, row)) for row in ids.tolist()]
        return [continued_text(self._tokenizer, self._prompts[i // num_beams], row) for i, row in enumerate(rows)]


class _Until(StoppingCriteria):
    """A row ends when its new text contains one of the strings."""

    def __init__(self, texts: _Texts, until: list[str], width: int) -> None:
        self._texts, self._until, self._width = texts, until, width

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        texts = self._texts(input_ids[:, self._width :]) if self._until else [""] * len(input_ids)
        done = [any(end in text for end in self._until) for text in texts]
        return torch.tensor(done, device=input_ids.device)


def _cut(text: str, until: list[str]) -> str:
    return text[: min((text.index(end) for end in until if end in text), default=len(text))]


def _score(logits_BKV: torch.Tensor, targets_BK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(log-likelihood of each row's targets in nats, fp64 [B]; True if all are greedy, bool [B]), on the CPU."""
    loss_BK = F.cross_entropy(logits_BKV.flatten(0, 1), targets_BK.flatten(), ignore_index=IGNORE, reduction="none")
    greedy_BK = (logits_BKV.argmax(-1) == targets_BK) | (targets_BK == IGNORE)
    return -loss_BK.view_as(targets_BK).double().sum(1).cpu(), greedy_BK.all(1).cpu()
