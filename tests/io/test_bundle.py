from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from loratools.errors import FormatError
from loratools.io.bundle import from_memory


def test_arrays_of_both_libraries(library: Any, tensors: dict[str, Any]) -> None:
    bundle = from_memory({name: library(array) for name, array in tensors.items()}, {"r": 3}, {"k": "v"})
    assert (bundle.container, bundle.config, bundle.metadata) == ("memory", {"r": 3}, {"k": "v"})
    assert (bundle.path, bundle.siblings, bundle.readme) == (None, (), None)
    for name, leaf in bundle.tensors.items():
        assert (leaf.shape, leaf.dtype) == (tensors[name].shape, tensors[name].dtype.name)
        np.testing.assert_array_equal(np.asarray(leaf.read()), tensors[name])
        assert type(leaf.read()) is type(library(tensors[name]))


def test_callers_arrays_are_not_changed_nor_frozen(tensors: dict[str, Any]) -> None:
    array = next(iter(tensors.values()))
    read = next(iter(from_memory(tensors).tensors.values())).read()
    assert np.shares_memory(read, array) and array.flags.writeable and not read.flags.writeable


@pytest.mark.parametrize("bad", [np.array(["a"]), np.zeros(1, np.complex128), np.array([None], object), [1.0]])
def test_dtypes_that_no_file_holds(bad: Any) -> None:
    with pytest.raises(FormatError) as caught:
        from_memory({"odd": bad})
    assert caught.value.parameter == "odd"
