"""How the tokens of a window are related: which share a document, which are pads, where memory restarts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from sleeptrain.data.batch import PAD
from sleeptrain.ops.document_attention import DocumentBounds, bounds_of_fixed_size, document_bounds
from sleeptrain.ops.segments import Segments, cut_at_resets, segments_of_fixed_size


@dataclass(frozen=True)
class Place:
    """The positions of a pass's tokens in windows that are in progress.

    window: the window's length L.
    low, high: the positions [low, high) that some token attends to; negative ones lie in the previous window.
    start: the position of each row's first token; None where rows differ or some tokens are pads.

    The tensors (int64) are set only where start is None; N counts the tokens that are not pads.
    position_RL: each token's position, 0 for pads.
    row_N, position_N: each token's row and position.
    token_N: each token's index in the flattened [R * L].
    """

    window: int
    low: int
    high: int
    start: int | None
    position_RL: torch.Tensor | None = None
    row_N: torch.Tensor | None = None
    position_N: torch.Tensor | None = None
    token_N: torch.Tensor | None = None

    def put(self, buffer_RCX: torch.Tensor, x_RLX: torch.Tensor) -> None:
        """Writes the tokens' values into their slots, in place. The last `window` slots belong to the window."""
        first = buffer_RCX.shape[1] - self.window
        if self.start is not None:
            buffer_RCX[:, first + self.start : first + self.start + x_RLX.shape[1]] = x_RLX
        else:
            assert self.row_N is not None and self.position_N is not None and self.token_N is not None
            buffer_RCX[self.row_N, first + self.position_N] = x_RLX.flatten(0, 1)[self.token_N].to(buffer_RCX.dtype)

    def seen(self, buffer_RCX: torch.Tensor) -> torch.Tensor:
        """The slots [low, high) of a buffer."""
        first = buffer_RCX.shape[1] - self.window
        return buffer_RCX[:, first + self.low : first + self.high]


@dataclass(frozen=True)
class DocumentLayout:
    """The documents of R rows over one window of L tokens.

    documents_RL: int64 ids, PAD for tokens that take no part.
    valid_RL: bool, False at pads; None without pads.
    reset_RL: bool, True where memory is emptied before the token, because a document starts inside the row; None if
        nowhere.
    mask_RLL: bool [R or 1, 1, L, L], True where a query (dim 2) may attend to a key (dim 3); None: causal attention,
        or `bounds` are there.
    segments: the cut of the rows at `reset_RL`; None where that is None.
    place: the tokens' positions in windows in progress (mask_RLL is then [R or 1, 1, L, high - low]); None: the rows
        are whole windows.
    bounds: the documents as FlashAttention reads them, in place of a mask; None: attention reads `mask_RLL`.
    bounds_after: besides `bounds`, those after C retained tokens, by C; empty if no token attends to retained ones.
    reach: besides `bounds`, how many of the last tokens each token sees, itself included; None: no limit.
    """

    documents_RL: torch.Tensor
    valid_RL: torch.Tensor | None
    reset_RL: torch.Tensor | None
    mask_RLL: torch.Tensor | None
    segments: Segments | None = None
    place: Place | None = None
    bounds: DocumentBounds | None = None
    bounds_after: Mapping[int, DocumentBounds] = field(default_factory=dict)
    reach: int | None = None

    @property
    def reads_retained(self) -> bool:
        """False if no token attends to retained ones. A mask does not tell on the host."""
        return self.bounds is None or bool(self.bounds_after)

    @property
    def sizes_are_fixed(self) -> bool:
        """False if a tensor of `of_fixed_sizes` has a size that depends on the documents, row by row."""
        return all(bounds.key_index is None for bounds in self.bounds_after.values())

    def of_fixed_sizes(self) -> DocumentLayout:
        """The same documents in tensors whose sizes hardly depend on them: a few powers of two."""
        return replace(
            self,
            segments=None if self.segments is None else segments_of_fixed_size(self.segments),
            bounds=None if self.bounds is None else bounds_of_fixed_size(self.bounds),
            bounds_after={n: bounds_of_fixed_size(bounds) for n, bounds in self.bounds_after.items()},
        )

    def within(self, reach: int) -> DocumentLayout:
        """The layout in which each token sees at most the last `reach` tokens, itself included."""
        num_tokens, device = self.documents_RL.shape[1], self.documents_RL.device
        place = self.place or Place(num_tokens, 0, num_tokens, 0)
        if reach >= place.window:
            return self
        if self.bounds is not None:
            return replace(self, reach=reach)
        query_RL = place.position_RL if place.start is None else place.start + torch.arange(num_tokens, device=device)
        assert query_RL is not None
        distance = query_RL.unsqueeze(-1) - torch.arange(place.low, place.high, device=device)
        mask = (distance < reach).view(-1, 1, num_tokens, place.high - place.low)
        mask = mask & ((distance >= 0).view_as(mask) if self.mask_RLL is None else self.mask_RLL)
        if self.place is not None and self.valid_RL is not None:
            mask = mask | ~self.valid_RL[:, None, :, None]
        return replace(self, mask_RLL=mask)

    def with_retained(self, documents_RC: torch.Tensor, window: int) -> torch.Tensor:
        """The mask [R, 1, L, C + L] with C earlier tokens in the cache. Each token sees the last `window` tokens."""
        keys = torch.cat([documents_RC, self.documents_RL], dim=1)
        num_keys, num_queries = keys.shape[1], self.documents_RL.shape[1]
        position = torch.arange(num_keys, device=keys.device)
        distance = position[num_keys - num_queries :, None] - position[None, :]
        near = (distance >= 0) & (distance < window)
        return (near & (self.documents_RL[:, :, None] == keys[:, None, :])).unsqueeze(1)


def first_of_document(documents_BT: torch.Tensor) -> torch.Tensor:
    """bool [B, T]: True at each token whose document differs from that of the last valid token before it in the row.

    The first valid token of a row is not marked: the caller knows if memory is carried into the row.
    """
    valid = documents_BT != PAD
    position = torch.arange(documents_BT.shape[1], device=documents_BT.device).expand_as(documents_BT)
    last_valid = torch.where(valid, position, -1).cummax(dim=1).values
    before = torch.nn.functional.pad(last_valid[:, :-1], (1, 0), value=-1)
    previous = documents_BT.gather(1, before.clamp(min=0))
    return valid & (before >= 0) & (documents_BT != previous)


def window_layout(documents_RL: torch.Tensor, starts_RL: torch.Tensor, with_bounds: bool = False) -> DocumentLayout:
    """The layout of a wake pass. starts_RL: True where a document starts (`first_of_document` over the whole row).

    with_bounds: attention reads `bounds`, not a mask. The tokens of each document must then be consecutive.
    """
    valid = documents_RL != PAD
    plain = bool(valid.all())
    one_document = plain and bool((documents_RL == documents_RL[:, :1]).all())
    reset = starts_RL if bool(starts_RL.any()) else None
    mask = None if one_document or with_bounds else _mask(documents_RL)
    segments = None if reset is None else cut_at_resets(reset)
    bounds = document_bounds(documents_RL) if with_bounds else None
    return DocumentLayout(documents_RL, None if plain else valid, reset, mask, segments, bounds=bounds)


def sleep_layout(documents_RL: torch.Tensor, with_bounds: bool = False) -> DocumentLayout:
    """The layout of a sleep pass: only the document that is open at the boundary is read again, on top of its S.

    Its tokens do not restart the memory. All other tokens are pads, since nobody reads the states of their documents.
    """
    position = torch.arange(documents_RL.shape[1], device=documents_RL.device)
    last = torch.where(documents_RL != PAD, position, -1).amax(dim=1).clamp(min=0)
    open_document = documents_RL.gather(1, last[:, None])
    documents = torch.where(documents_RL == open_document, documents_RL, PAD)
    return window_layout(documents, torch.zeros_like(documents, dtype=torch.bool), with_bounds)


def continued_layout(
    filled: Sequence[int], counts: Sequence[int], window: int, retained: Sequence[bool] | None, device: torch.device
) -> DocumentLayout:
    """The layout of the next counts[b] tokens of each row's document, after the filled[b] tokens in its window.

    Rows with fewer tokens than others are padded on the right. retained: under sliding eviction, True for rows that
    have keys and values of the previous window; None under hard eviction.
    """
    num_tokens = max(counts)
    has_retained = [False] * len(filled) if retained is None else retained
    low = min(f + 1 - window if has else 0 for f, has in zip(filled, has_retained, strict=True))
    high = max(f + n for f, n in zip(filled, counts, strict=True))
    if len(set(has_retained)) == len(set(filled)) == len(set(counts)) == 1:
        documents = torch.zeros(len(filled), num_tokens, dtype=torch.long, device=device)
        place = Place(window, low, high, filled[0])
        plain = num_tokens == 1 or low == high - num_tokens  # a single token sees all keys; more tokens are causal
        mask = None if plain else _place_mask(filled[:1], num_tokens, place, has_retained[:1], device)
        return DocumentLayout(documents, None, None, mask, place=place)
    first, number = torch.tensor(filled, device=device), torch.tensor(counts, device=device)
    token = torch.arange(num_tokens, device=device)
    valid = token < number[:, None]
    position_RL = torch.where(valid, first[:, None] + token, 0)
    row_N, column_N = valid.nonzero(as_tuple=True)
    place = Place(window, low, high, None, position_RL, row_N, position_RL[valid], row_N * num_tokens + column_N)
    mask = _place_mask(filled, num_tokens, place, has_retained, device)
    all_valid = min(counts) == num_tokens
    # A pad may attend to any key: nobody reads its output, and no row of a mask may be empty.
    mask = mask if all_valid else mask | ~valid[:, None, :, None]
    return DocumentLayout(torch.where(valid, 0, PAD), None if all_valid else valid, None, mask, place=place)


def _place_mask(
    filled: Sequence[int], num_tokens: int, place: Place, retained: Sequence[bool], device: torch.device
) -> torch.Tensor:
    """[R, 1, L, high - low]: True for keys of this and the previous window, at most `window` tokens back."""
    query = torch.tensor(filled, device=device)[:, None, None] + torch.arange(num_tokens, device=device)[:, None]
    key = torch.arange(place.low, place.high, device=device)
    exists = (key >= 0) | torch.tensor(retained, device=device)[:, None, None]
    return ((key <= query) & (key > query - place.window) & exists).unsqueeze(1)


def _mask(documents_RL: torch.Tensor) -> torch.Tensor:
    same = documents_RL[:, :, None] == documents_RL[:, None, :]
    return same.tril().unsqueeze(1)
