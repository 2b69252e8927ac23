from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from loratools.core.adapter import Adapter, Meta
from loratools.core.pool import progress, threads
from loratools.core.update import Leaf, Update, nbytes, tensors
from loratools.errors import LoratoolsError, NumericsError, UsageError
from loratools.kinds.dora import Dora
from loratools.kinds.lowrank import LowRank
from loratools.kinds.sum import Sum


def several(count: int = 5) -> Adapter:
    return Adapter({f"m.{i}.weight": LowRank.example(i) for i in range(count)}, Meta(path=None))


def test_map_keeps_order_and_meta() -> None:
    adapter = several().with_history("before")
    done = adapter.map(lambda name, u: LowRank(u.b, u.a, float(name[2])))  # type: ignore[attr-defined]
    assert list(done) == list(adapter)
    assert [u.scale for u in done.values()] == [0.0, 1.0, 2.0, 3.0, 4.0]  # type: ignore[attr-defined]
    assert done.meta == adapter.meta


def test_errors_name_the_parameter() -> None:
    def fail(name: str, u: Update) -> Update:
        if name == "m.3.weight":
            raise NumericsError("not finite")
        return u

    with pytest.raises(NumericsError, match=r"m\.3\.weight"):
        several().map(fail)


@pytest.mark.parametrize("count", [1, 2])
def test_the_first_error_wins_whatever_the_threads(count: int) -> None:
    def fail(name: str, u: Update) -> Update:
        raise NumericsError(f"at {name}")

    with threads(count), pytest.raises(LoratoolsError, match=r"at m\.0\.weight"):
        several().map(fail)


def test_groups_have_one_form_and_a_limit() -> None:
    wide = LowRank(np.ones((5, 2), np.float16), np.ones((2, 7), np.float16))
    adapter = Adapter({"a": LowRank.example(0), "b": wide, "c": LowRank.example(1), "d": LowRank.example(2)})
    seen: list[tuple[str, ...]] = []

    def note(names: Sequence[str], updates: Sequence[Update]) -> Sequence[Update]:
        seen.append(tuple(names))
        return updates

    assert list(adapter.map_groups(note, limit_bytes=1 << 20)) == list(adapter)
    assert sorted(seen) == [("a", "c", "d"), ("b",)]
    seen.clear()
    adapter.map_groups(note, limit_bytes=2 * nbytes(LowRank.example(0)))
    assert sorted(seen) == [("a", "c"), ("b",), ("d",)]
    seen.clear()
    adapter.map(lambda name, u: note([name], [u])[0])  # one by one
    assert sorted(seen) == [("a",), ("b",), ("c",), ("d",)]


def test_progress_ends_at_the_whole() -> None:
    told: list[tuple[int, int]] = []
    with progress(lambda done, whole: told.append((done, whole))):
        several().map(lambda _, u: u)
    assert told[-1] == (several().nbytes, several().nbytes)
    assert told == sorted(told)


def test_to_a_device_keeps_values_and_dtypes() -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    half = LowRank.example(0)
    stored = LowRank(half.b.astype(np.float16), half.a.astype(np.float16), half.scale)
    leaf = Leaf(stored.b.shape, "float16", lambda out: stored.b)
    adapter = Adapter({"lazy": LowRank(leaf, stored.a, 2.0), "coat": Dora(stored, np.ones(5, np.float32))})
    moved = adapter.to("meta")
    assert {str(t.device) for u in moved.values() for _, t in tensors(u)} == {"meta"}
    assert {n: [t.shape for _, t in tensors(u)] for n, u in moved.items()} == {
        n: [t.shape for _, t in tensors(u)] for n, u in adapter.items()
    }
    there = adapter.to("cpu")
    assert np.array_equal(there["lazy"].b, stored.b)  # type: ignore[attr-defined]
    assert there["lazy"].b.dtype == np.float16  # type: ignore[attr-defined]
    assert moved["lazy"].b.dtype == torch.float16  # type: ignore[attr-defined]


def test_an_unknown_device_is_refused() -> None:
    pytest.importorskip("torch", reason="torch is not installed")
    with pytest.raises(UsageError, match="torch cannot use this device"):
        several().to("nowhere")


def test_tensors_are_named_by_field_and_place() -> None:
    one = LowRank.example(0)
    both = Sum((one, Dora(one, np.ones(5, np.float32))))
    assert [name for name, _ in tensors(both)] == [
        "parts.0.b", "parts.0.a", "parts.1.direction.b", "parts.1.direction.a", "parts.1.magnitude",
    ]  # fmt: skip
    assert nbytes(both) == 2 * nbytes(one) + 20
