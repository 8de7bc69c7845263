from __future__ import annotations

import torch

from sleeptrain.data.batch import PAD
from sleeptrain.model.state import FastWeights, Recurrent, Retained


def weights(rows: int, value: float) -> FastWeights:
    S = torch.full((rows, 2, 3, 4), value)
    retained = Retained(
        torch.full((rows, 2, 1, 4), value), torch.full((rows, 2, 1, 4), value), torch.zeros(rows, 2).long()
    )
    return FastWeights((None, Recurrent(S, torch.full((rows, 3, 5), value)), retained))


def test_rows_put_back_leave_the_others():
    new = weights(4, 1.0).put_rows(torch.tensor([1, 3]), weights(2, 2.0), 4)
    assert new[1].S_BHKV[:, 0, 0, 0].tolist() == [1, 2, 1, 2]
    assert new[1].conv_BWD[:, 0, 0].tolist() == [1, 2, 1, 2]


def test_rows_put_into_empty_memory():
    new = FastWeights((None, None, None)).put_rows(torch.tensor([2]), weights(1, 2.0), 3)
    assert new[0] is None
    assert new[1].S_BHKV[:, 0, 0, 0].tolist() == [0, 0, 2]
    assert new[2].documents_BL.tolist() == [[PAD, PAD], [PAD, PAD], [0, 0]]


def test_keep_rows_empties_the_others():
    new = weights(3, 1.0).keep_rows(torch.tensor([True, False, True]))
    assert new[1].S_BHKV[:, 0, 0, 0].tolist() == [1, 0, 1]
    assert new[2].documents_BL.tolist() == [[0, 0], [PAD, PAD], [0, 0]]


def test_state_dict_round_trip():
    state = weights(2, 3.0)
    again = FastWeights.from_state_dict(state.to_state_dict(), 3)
    assert again[0] is None
    assert torch.equal(again[1].S_BHKV, state[1].S_BHKV) and torch.equal(again[1].conv_BWD, state[1].conv_BWD)
    assert torch.equal(again[2].documents_BL, state[2].documents_BL)


def test_gradients_cross_put_rows_and_stop_at_detach():
    S = torch.ones(1, 1, 1, 1, requires_grad=True)
    state = FastWeights((Recurrent(torch.zeros(2, 1, 1, 1)),)).put_rows(
        torch.tensor([1]), FastWeights((Recurrent(S),)), 2
    )
    state[0].S_BHKV.sum().backward()
    assert S.grad.item() == 1
    assert not state.detach()[0].S_BHKV.requires_grad
