from __future__ import annotations

import pytest
import torch

from sleeptrain.model.hybrid import Hybrid
from sleeptrain.model.shards import VocabularyPart
from sleeptrain.model.state import Boundary, Retained
from sleeptrain.parallel.tensor.sharding import ModelSharding, Sharding, own_heads
from tests.parallel.cases import Case, random_state
from tests.parallel.state_shards import join_state, take_state

CASES = [Case(tied=False), Case(num_kv_heads=1, num_groups=1), Case(vocab_size=5), Case(num_kv_heads=4, num_groups=4)]


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("case", CASES)
def test_shards_join_to_the_full_tensor_and_hold_each_element_once(case: Case, size: int):
    model = Hybrid(case.config)
    model.init_weights(0)
    sharding = ModelSharding(case.config, size)
    assert sorted(sharding.names()) == sorted(name for name, _ in model.named_parameters())
    for name, full in model.state_dict().items():
        numbered = torch.arange(1.0, full.numel() + 1).view_as(full)
        shards = [sharding.take(name, numbered, rank) for rank in range(size)]
        assert torch.equal(sharding.join(name, shards), numbered)
        assert len({shard.shape for shard in shards}) == 1
        assert sharding[name].whole_shape(shards[0].shape) == tuple(full.shape)
        if sharding[name].dim is not None:
            held = torch.cat([shard.flatten() for shard in shards])
            assert torch.equal(held[held > 0].sort().values, numbered.flatten()), "an element on two ranks, or on none"
            assert name in ("embedding.weight", "head.weight") or bool((held > 0).all()), "only vocabularies are padded"


@pytest.mark.parametrize("size", [1, 2])
def test_stages_that_share_the_head_hold_each_of_its_rows_once(size: int) -> None:
    """Of 17 tokens two tensor ranks hold 9 rows each, the last of them padding."""
    case, stages = Case(tied=False), 4
    whole, held = torch.arange(17.0 * 16).view(17, 16), list[int]()
    for stage in range(stages):
        sharding = ModelSharding(case.config, size, VocabularyPart(stage, stages))
        for rank in range(size):
            part, shard = sharding.part("head.weight", (17, 16), rank), sharding.take("head.weight", whole, rank)
            [(start, stop)] = part.ranges[0]
            assert torch.equal(shard[: stop - start], whole[start:stop]) and not shard[stop - start :].any()
            held += range(start, stop)
        rows = sharding.take("embedding.weight", whole, 0).shape[0]
        assert (rows == -(-17 // size)) == (stage == 0), "the first stage embeds all tokens"
    assert sorted(held) == list(range(17))


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("case", CASES[:2])
@pytest.mark.parametrize("boundary", [Boundary(), Boundary(sliding_window=4, carry_conv=True)])
def test_memory_is_cut_and_joined(case: Case, size: int, boundary: Boundary):
    case = Case(num_kv_heads=case.num_kv_heads, num_groups=case.num_groups, boundary=boundary)
    full, sharding = random_state(case, 0), ModelSharding(case.config, size)
    parts = [take_state(sharding, full, rank) for rank in range(size)]
    joined = join_state(sharding, parts).to_state_dict()
    assert joined.keys() == full.to_state_dict().keys()
    assert all(torch.equal(joined[name], t) for name, t in full.to_state_dict().items())
    assert parts[-1][1].S_BHKV.shape[1] * size == full[1].S_BHKV.shape[1]
    if isinstance(parts[-1][0], Retained):
        assert parts[-1][0].k_BLGD.shape[2] == max(case.num_kv_heads // size, 1)


def test_fused_pieces_are_cut_one_by_one():
    qkv = Sharding(0, (4, 4, 8))
    assert qkv.take(torch.arange(16), 1, 2).tolist() == [2, 3, 6, 7, 12, 13, 14, 15]


def test_ranks_share_heads_with_their_neighbours():
    assert [own_heads(2, rank, 8).start for rank in range(8)] == [0, 0, 0, 0, 1, 1, 1, 1]
    assert [list(own_heads(4, rank, 2)) for rank in range(2)] == [[0, 1], [2, 3]]


def test_impossible_cuts_are_refused():
    with pytest.raises(ValueError, match="cannot be cut evenly over 3"):
        Sharding(0, (4,)).take(torch.zeros(4), 0, 3)
    with pytest.raises(ValueError, match=r"\[5\] is not 4 long in dimension 0"):
        Sharding(0, (4,)).take(torch.zeros(5), 0, 2)
    with pytest.raises(ValueError, match=r"shards are \[2, 1\] long"):
        Sharding(0, (4,)).join([torch.zeros(2), torch.zeros(1)])
    sharding = ModelSharding(Case().config, 2)
    with pytest.raises(ValueError, match=r"norm\.weight: the ranks hold different values"):
        sharding.join("norm.weight", [torch.zeros(16), torch.ones(16)])
