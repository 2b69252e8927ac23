from __future__ import annotations

import pytest

from loratools.kernels import blocks

KERNELS = {"row_norms", "row_norms_shared", "compose", "gram", "thin", "small_svd", "sketch", "times", "turned"}


def test_every_kernel_has_rows_and_the_last_one_holds_every_shape():
    assert blocks.table().keys() == KERNELS
    for rows in blocks.table().values():
        assert rows[-1]["upto"] == {}
        assert all(row["upto"] for row in rows[:-1])


@pytest.mark.parametrize("rank", [1, 64, 65, 512])
def test_rows_are_picked_by_shape(rank):
    small = blocks.pick("row_norms", itemsize=2, rank=rank)
    assert (small == blocks.table()["row_norms"][0]["blocks"]) == (rank <= 64)


def test_launch_options():
    assert blocks.options({"warps": 8, "stages": 3}) == {"num_warps": 8, "num_stages": 3}
    assert blocks.options({"warps": 8, "stages": 3, "registers": 128})["maxnreg"] == 128
