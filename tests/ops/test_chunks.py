import pytest
import torch

from sleeptrain.ops.chunks import Cut
from sleeptrain.ops.inverse import LARGEST_BLOCK, base_block


@pytest.mark.parametrize("num_tokens", [1, 5, 17, 20, 31, 47, 48, 49, 100, 1000, 1024])
def test_chunks_cover_the_tokens_and_can_be_inverted(num_tokens: int) -> None:
    cut = Cut.of(num_tokens, 32, elements_per_token=64)
    assert cut.size * cut.num_chunks >= num_tokens > cut.size * (cut.num_chunks - 1)
    assert base_block(cut.size) <= LARGEST_BLOCK
    covered = [c for slab in cut.slabs() for c in range(slab.start, slab.stop)]
    assert covered == list(range(cut.num_chunks))


def test_a_short_sequence_is_one_chunk_of_its_own_size() -> None:
    cut = Cut.of(20, 32, elements_per_token=64)
    assert (cut.size, cut.num_chunks) == (20, 1)


def test_split_fills_with_zeros_and_join_undoes_it() -> None:
    x = torch.randn(2, 37, 3)
    cut = Cut.of(37, 16, elements_per_token=6)
    chunks = cut.split(x)
    assert chunks.shape[:3] == (cut.num_chunks, 2, cut.size)
    assert torch.equal(cut.join(chunks), x)
    assert not chunks.transpose(0, 1).flatten(1, 2)[:, 37:].any()


def test_slabs_shrink_where_a_token_is_large() -> None:
    assert len(Cut.of(1024, 32, elements_per_token=1).slabs()) == 1
    assert len(Cut.of(1024, 32, elements_per_token=1 << 20).slabs()) == 32
