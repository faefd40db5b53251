"""In which pieces the matrix products go."""

from __future__ import annotations

import pytest
import torch

from torchtitan_liger.head_loss.products import (
    MOST_ROWS,
    TILE,
    weight_sum_dtype,
    whole_waves,
)

H200 = 132


@pytest.mark.parametrize(
    ("num_rows", "width", "expected"),
    [
        (16384, 4096, (10560, 5280, 544)),
        (8192, 4096, (8192,)),  # its rest would fill 0.76 of a wave
        (10560, 4096, (10560,)),
        (7936, 4096, (7392, 544)),
        (32768, 2048, (10560, 10560, 10560, 1088)),
        (4352, 5120, (4224, 128)),
        (7936, 5120, (7936,)),  # whole waves of this width are 4,224 rows
        (16384, 896, (16384,)),  # ... and of this one, more than are fast at once
        (100, 4096, (100,)),
        (0, 4096, (0,)),
    ],
)
def test_known_cuts(num_rows, width, expected):
    assert whole_waves(num_rows, width, H200) == expected


@pytest.mark.parametrize("width", [16, 96, 1000, 2048, 3072, 4096, 8192])
@pytest.mark.parametrize("num_sms", [8, 108, 132, 148])
def test_all_rows_in_whole_waves_but_for_the_last_piece(width, num_sms):
    for num_rows in (1, 127, 1056, 5000, 8448, 16384, 131072):
        pieces = whole_waves(num_rows, width, num_sms)
        assert sum(pieces) == num_rows
        assert min(pieces) > 0
        if len(pieces) > 1:
            assert max(pieces) <= MOST_ROWS
        for rows in pieces[:-2]:
            assert rows * width % (num_sms * TILE) == 0


@pytest.mark.parametrize(
    ("weight", "single_chunk", "expected"),
    [
        (torch.float32, True, torch.float32),
        (torch.bfloat16, True, torch.bfloat16),
        (torch.bfloat16, False, torch.float32),
    ],
)
def test_one_chunk_of_narrow_products_keeps_a_wider_weights_dtype(
    weight, single_chunk, expected
):
    sum_dtype = weight_sum_dtype(
        torch.bfloat16, weight, torch.float32, single_chunk=single_chunk
    )
    assert sum_dtype == expected
