"""Numbers that are none are found, and those that only add up to one are not taken for them."""

import pytest
import torch

from corolla.codec import all_finite, count_not_finite

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES)
def test_large_numbers_are_numbers_though_their_sum_is_none(dtype):
    largest = torch.full((4, 8), torch.finfo(dtype).max, dtype=dtype)
    assert all_finite([largest, -largest, torch.zeros(1, dtype=dtype)])
    assert count_not_finite([largest]) == 0


@pytest.mark.parametrize(
    "values", [(float("nan"),), (float("inf"),), (float("-inf"), float("inf")), (float("inf"),) * 3]
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_number_that_is_none_is_found(dtype, values):
    tensor = torch.ones(4, 8, dtype=dtype)
    tensor[2, : len(values)] = torch.tensor(values, dtype=dtype)
    assert not all_finite([torch.ones(3, dtype=dtype), tensor])
    assert count_not_finite([torch.ones(3, dtype=dtype), tensor]) == len(values)
