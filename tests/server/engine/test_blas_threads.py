"""The number of BLAS threads can be set and is reported."""

from __future__ import annotations

import numpy as np
import pytest

from kvx_server.engine.blas_threads import set_blas_threads


def test_returns_the_number_before() -> None:
    before = set_blas_threads(1)
    if before is None:
        pytest.skip("NumPy uses no OpenBLAS here")
    assert set_blas_threads(2) == 1
    assert set_blas_threads(before) == 2
    assert set_blas_threads(before) == before


def test_products_work_afterwards() -> None:
    before = set_blas_threads(1)
    matrix = np.eye(300, dtype=np.float32)
    assert (matrix @ matrix == matrix).all()
    set_blas_threads(before or 1)


def test_refuses() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        set_blas_threads(0)
