"""What the tokens of a window are to each other: who shares a document, who is a pad, where memory restarts."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sleeptrain.data.batch import PAD


@dataclass(frozen=True)
class Layout:
    """The documents of R rows over one window of L tokens.

    documents_RL: int64 ids, PAD for tokens that take no part.
    valid_RL: bool, False at pads; None when there are none.
    reset_RL: bool, memory is emptied before this token (a document starts inside the row); None when nowhere.
    mask_RLL: bool [R, 1, L, L], who may attend to whom; None for plain causal attention.
    """

    documents_RL: torch.Tensor
    valid_RL: torch.Tensor | None
    reset_RL: torch.Tensor | None
    mask_RLL: torch.Tensor | None

    def to(self, device: torch.device | str) -> Layout:
        def move(t: torch.Tensor | None) -> torch.Tensor | None:
            return None if t is None else t.to(device, non_blocking=True)

        return Layout(self.documents_RL.to(device), move(self.valid_RL), move(self.reset_RL), move(self.mask_RLL))

    def with_retained(self, documents_RC: torch.Tensor, window: int) -> torch.Tensor:
        """The mask [R, 1, L, C + L] when C earlier tokens stay in the cache and each token sees the last `window`."""
        keys = torch.cat([documents_RC, self.documents_RL], dim=1)
        num_keys, num_queries = keys.shape[1], self.documents_RL.shape[1]
        at = torch.arange(num_keys, device=keys.device)
        distance = at[num_keys - num_queries :, None] - at[None, :]
        near = (distance >= 0) & (distance < window)
        return (near & (self.documents_RL[:, :, None] == keys[:, None, :])).unsqueeze(1)


def first_of_document(documents_BT: torch.Tensor) -> torch.Tensor:
    """True at each token whose document differs from that of the last valid token before it in the row.

    The first valid token of a row is not marked: whether memory is carried into a row is the caller's knowledge.
    """
    valid = documents_BT != PAD
    at = torch.arange(documents_BT.shape[1], device=documents_BT.device).expand_as(documents_BT)
    last_valid = torch.where(valid, at, -1).cummax(dim=1).values
    before = torch.nn.functional.pad(last_valid[:, :-1], (1, 0), value=-1)
    previous = documents_BT.gather(1, before.clamp(min=0))
    return valid & (before >= 0) & (documents_BT != previous)


def window_layout(documents_RL: torch.Tensor, starts_RL: torch.Tensor) -> Layout:
    """The layout of a wake pass. `starts_RL`: where documents start (`first_of_document` over the whole row)."""
    valid = documents_RL != PAD
    plain = bool(valid.all())
    one_document = plain and bool((documents_RL == documents_RL[:, :1]).all())
    reset = starts_RL if bool(starts_RL.any()) else None
    return Layout(documents_RL, None if plain else valid, reset, None if one_document else _mask(documents_RL))


def sleep_layout(documents_RL: torch.Tensor) -> Layout:
    """The layout of a sleep pass: only the document still open at the boundary is read again, onto the S it left.

    Its tokens do not restart the memory; all other tokens are pads, since nobody reads the states of their documents.
    """
    at = torch.arange(documents_RL.shape[1], device=documents_RL.device)
    last = torch.where(documents_RL != PAD, at, -1).amax(dim=1).clamp(min=0)
    open_document = documents_RL.gather(1, last[:, None])
    own = torch.where(documents_RL == open_document, documents_RL, PAD)
    return window_layout(own, torch.zeros_like(own, dtype=torch.bool))


def _mask(documents_RL: torch.Tensor) -> torch.Tensor:
    same = documents_RL[:, :, None] == documents_RL[:, None, :]
    return same.tril().unsqueeze(1)
