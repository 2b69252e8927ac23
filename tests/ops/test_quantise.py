"""quantize: budgets to the byte, errors that fall with them, every command reads the result, files of the paper."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import loratools as lt
from loratools.core.adapter import Adapter, Meta
from loratools.errors import ConversionError, FormatError, LoratoolsError, NumericsError, UsageError
from loratools.files import open_base
from loratools.formats.binary_bytes import from_bytes, to_bytes
from loratools.kinds.dense import Dense
from loratools.kinds.lowrank import LowRank
from loratools.kinds.replace import Replace
from loratools.linalg.medians import MEDIANS
from loratools.ops.advise import advise
from loratools.ops.bit_budget import MENDED, Module, allocate
from loratools.ops.quantise_budget import Budget

ROOT = Path(__file__).parents[2]
R4, R32 = ROOT / "fixtures" / "digits" / "r4", ROOT / "fixtures" / "digits" / "r32"


def adapter(seed: int = 0, rank: int = 6, **more: object) -> Adapter:
    rng = np.random.default_rng(seed)
    shapes = {"a.weight": (48, 40), "b.weight": (32, 64), "c.weight": (50, 30)}
    updates = {
        name: LowRank(
            (rng.standard_normal((m, rank)) * np.arange(1, rank + 1) ** -1.0).astype(np.float16),
            rng.standard_normal((rank, n)).astype(np.float16),
            0.5,
        )
        for name, (m, n) in shapes.items()
    }
    return Adapter({**updates, **more}, Meta(format="peft", namespace="hf"))  # type: ignore[arg-type]


def error(one: Adapter, other: Adapter) -> float:
    wrong = sum(float(((one[n].dense() - other[n].dense()) ** 2).sum()) for n in one)
    return float(np.sqrt(wrong / sum(float((one[n].dense() ** 2).sum()) for n in one)))


@pytest.mark.parametrize(
    "options", [{"bits": 1}, {"bits": 3}, {"avg_bits": 1.7}, {"size": 4000}, {"bits": 1, "group": 16}]
)
def test_the_error_told_is_true_and_survives_the_file(options: dict[str, object], tmp_path: Path) -> None:
    source = adapter()
    done = lt.quantize(source, **options)
    assert done.report.total["relative_error"] == pytest.approx(error(source, done), rel=1e-2)
    back = lt.load(lt.save(done, tmp_path / "q.safetensors", format="native"))
    assert all(np.array_equal(back[n].dense(), done[n].dense()) for n in done)
    assert done.report.total["bytes_file"] == (tmp_path / "q.safetensors").stat().st_size


@pytest.mark.parametrize("size", [1700, 2001, 2500, 4000, 40_000])
def test_a_size_is_honoured_to_the_byte(size: int, tmp_path: Path) -> None:
    done = lt.quantize(adapter(), size=size)
    written = lt.save(done, tmp_path / "q.safetensors", format="native").stat().st_size
    assert written <= size
    assert written == done.report.total["bytes_file"]
    step = 2 * (64 + 32 + 4)  # the largest that is left unspent is a component's next step
    assert written > size - step - 64 or size == 40_000  # there everything has 16 bits


def test_an_impossible_size_says_what_is_possible() -> None:
    with pytest.raises(UsageError) as told:
        lt.quantize(adapter(), size=500)
    assert "at least" in str(told.value)


def test_average_bits_count_scales() -> None:
    for average in (0.6, 1.5, 6.0):
        total = lt.quantize(adapter(), avg_bits=average).report.total
        assert average - 0.5 < total["bits"] <= average


def test_error_falls_as_the_budget_grows() -> None:
    source = adapter(rank=5)
    errors = [lt.quantize(source, avg_bits=b).report.total["relative_error"] for b in (0.5, 1, 2, 4, 8)]
    assert errors == sorted(errors, reverse=True)
    assert lt.quantize(source, bits=8).report.total["relative_error"] < 0.01


def test_sharing_out_beats_one_size_for_all() -> None:
    source = adapter(rank=16)
    plain = lt.quantize(source, bits=1).report.total
    shared = lt.quantize(source, avg_bits=plain["bits"]).report.total
    assert shared["bits"] <= plain["bits"]
    assert shared["relative_error"] < plain["relative_error"]


def test_the_next_bit_goes_where_it_helps_most() -> None:
    modules = {"strong": Module((100.0, 1.0), (8, 8)), "weak": Module((0.1,), (8, 8))}
    found = allocate(modules, 20, lost=MENDED)
    assert found is not None
    assert found["strong"][0] > 1
    assert found["weak"] == ()
    assert allocate(modules, 1, lost=MENDED, least=1) is None


@pytest.mark.parametrize(
    "options",
    [
        {}, {"bits": 1, "avg_bits": 1.0}, {"bits": 5}, {"bits": 0}, {"avg_bits": 0}, {"avg_bits": float("nan")},
        {"bits": 1, "group": 3}, {"bits": 3, "scheme": "binary-adapter"}, {"bits": 1, "scheme": "x"}, {"size": "much"},
    ],
)  # fmt: skip
def test_contradictions_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(UsageError):
        Budget(**options)  # type: ignore[arg-type]


def test_nan_names_the_module() -> None:
    source = adapter()
    broken = LowRank(np.full((48, 6), np.nan, np.float32), np.ones((6, 40), np.float32))
    with pytest.raises(NumericsError) as told:
        lt.quantize(replace(source, updates={**source, "a.weight": broken}), bits=1)
    assert told.value.parameter == "a.weight"


def test_zero_updates_and_what_is_no_product() -> None:
    zero = LowRank(np.zeros((8, 2), np.float32), np.ones((2, 9), np.float32))
    source = adapter(**{"z.weight": zero, "h.weight": Replace(np.ones((3, 3))), "d.weight": Dense(np.ones((4, 4)))})
    done = lt.quantize(source, bits=1)
    assert not done["z.weight"].dense().any()
    assert done["h.weight"] is source["h.weight"]
    assert any("d.weight" in line for line in done.report.warnings)
    with pytest.raises(UsageError):
        lt.quantize(Adapter({"h.weight": Replace(np.ones((3, 3)))}), bits=1)


def test_other_operations_read_it_as_it_is(tmp_path: Path) -> None:
    source = lt.load(R4)
    packed = lt.load(lt.save(lt.quantize(source, bits=2), tmp_path / "q.safetensors", format="native"))
    assert lt.squeeze(packed, rank=2)["vision_model.encoder.layers.0.mlp.fc1.weight"].rank == 2  # type: ignore[attr-defined]
    assert lt.diagnose(packed).total["nonfinite"] == 0
    assert len(lt.info(packed).modules) == len(source)
    fused = lt.fuse([packed, source], weights=[0.5, 0.5], method="linear")
    assert len(fused) == len(source)
    base, name = open_base(ROOT / "fixtures" / "digits" / "base"), next(iter(packed))
    assert base is not None
    merged = dict(lt.merged(base, [packed]))
    assert np.allclose(merged[name], base[name] + packed[name].dense(), atol=2e-3)  # fp16 weights


def test_back_to_plain_factors(tmp_path: Path) -> None:
    source = lt.load(R4)
    done = lt.quantize(source, bits=2)
    plain = lt.dequantize(lt.load(lt.save(done, tmp_path / "q.safetensors", format="native")))
    assert all(u.kind == "lowrank" for u in plain.values())
    lt.save(plain, tmp_path / "plain", format="peft")
    assert error(lt.load(tmp_path / "plain"), done) < 1e-3  # the rounding of fp16 factors
    with pytest.raises(UsageError):
        lt.dequantize(source)


def test_dora_keeps_its_magnitude() -> None:
    source = lt.load(ROOT / "fixtures" / "digits" / "r4-dora")
    done = lt.quantize(source, bits=4)
    for name, u in source.items():
        assert done[name].kind == "dora"
        assert done[name].magnitude is u.magnitude  # type: ignore[attr-defined]
    assert all(u.kind == "dora" for u in lt.dequantize(done).values())


def test_statistics_weigh_the_inputs() -> None:
    source = adapter()
    stats = {f"{n.removesuffix('.weight')}.in_diag": np.linspace(0.01, 9, u.shape[1]) for n, u in source.items()}
    plain, seen = lt.quantize(source, bits=1), lt.quantize(source, bits=1, stats=stats)
    for name, u in source.items():
        q = np.sqrt(stats[f"{name.removesuffix('.weight')}.in_diag"])
        wrong = [np.linalg.norm((u.dense() - d[name].dense()) * q) for d in (plain, seen)]
        assert wrong[1] < wrong[0]
        row = next(row for row in seen.report.modules if row["name"] == name)
        assert row["weighted_error"] == pytest.approx(wrong[1] / np.linalg.norm(u.dense() * q), rel=1e-3)
    assert "weighted_error" not in plain.report.total
    with pytest.raises(LoratoolsError):
        lt.quantize(source, bits=1, stats={"a.in_diag": np.ones(7)})
    some = lt.quantize(source, bits=1, stats={k: v for k, v in stats.items() if k.startswith("a.")})
    assert any("no statistics for 2 of 3 modules" in line for line in some.report.warnings)


@pytest.mark.parametrize("bits", list(MEDIANS))
def test_the_bytes_of_the_paper(bits: int) -> None:
    """Down before up, codes then mean and deviation; the head last: sizes as its program writes them."""
    source = adapter(rank=8, **{"head.weight": Replace(np.ones((3, 4), np.float32))})
    done = lt.quantize(source, bits=bits, scheme="binary-adapter")
    raw = to_bytes(done)
    weights = sum(u.rank * sum(u.shape) for u in source.values() if isinstance(u, LowRank))
    assert len(raw) == weights * bits // 8 + 2 * 8 * 3 + 4 * 12
    back = from_bytes(raw, source, bits)
    assert all(np.array_equal(back[n].dense(), done[n].dense()) for n in done if n != "head.weight")
    assert np.array_equal(back["head.weight"].value, np.ones((3, 4)))  # type: ignore[attr-defined]
    assert "head.weight" not in from_bytes(raw[:-48], source, bits)
    for broken in (raw[:-1], raw + b"x", raw[:50]):
        with pytest.raises(FormatError):
            from_bytes(broken, source, bits)


def test_the_paper_s_file_sizes() -> None:
    """LoRA q+v of ViT-B at dimension 32 in 1 bit: 147840 bytes, as the shipped files have before their head."""
    one = LowRank(np.ones((768, 32), np.float16), np.ones((32, 768), np.float16))
    source = Adapter({f"{i}.{x}.weight": one for i in range(12) for x in "qv"})
    done = lt.quantize(source, bits=1, scheme="binary-adapter")
    assert len(to_bytes(done)) == 147_840


def test_codes_that_the_layout_would_drop_are_refused() -> None:
    odd = Adapter({"x.weight": LowRank(np.ones((5, 3), np.float32), np.ones((3, 7), np.float32))})
    with pytest.raises(ConversionError):
        to_bytes(lt.quantize(odd, bits=1, scheme="binary-adapter"))


def test_advice_is_a_frontier() -> None:
    report = advise(adapter(rank=32))
    best = [row for row in report.modules if row["best"]]
    assert len(best) >= 3
    assert [row["relative_error"] for row in best] == sorted((row["relative_error"] for row in best), reverse=True)
    assert {row["name"] for row in report.modules} >= {"1 bit, rank 32", "8 bit, rank 4"}


@pytest.mark.parametrize("group", [10**12, 10**20])
def test_groups_longer_than_the_vectors_are_whole_vectors(group: int) -> None:
    adapter = Adapter({"x.weight": LowRank.example(0)}, Meta())
    long, whole = (lt.dequantize(lt.quantize(adapter, bits=4, group=g), dtype="float32") for g in (group, 64))
    assert np.array_equal(long["x.weight"].dense(), whole["x.weight"].dense())


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 1, 1), (4, 9, 4), (2, 1, 3)])
@pytest.mark.parametrize("avg_bits", [1.5, 12.0])
def test_modules_of_a_few_entries(shape: tuple[int, int, int], avg_bits: float) -> None:
    rng, (m, r, n) = np.random.default_rng(0), shape
    u = LowRank(rng.standard_normal((m, r)).astype(np.float32), rng.standard_normal((r, n)).astype(np.float32))
    done = lt.quantize(Adapter({"x.weight": u}, Meta()), avg_bits=avg_bits)
    assert done.report is not None
    assert done.report.total["relative_error"] <= 1


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("size", [1e30, 1e6, 1e-9])
def test_factors_beyond_the_range_of_scales_are_told(size: float) -> None:
    rng = np.random.default_rng(0)
    b, a = ((size * rng.standard_normal(shape)).astype(np.float32) for shape in ((40, 4), (4, 30)))
    done = lt.quantize(Adapter({"x.weight": LowRank(b, a)}, Meta()), bits=4)
    assert done.report is not None
    assert any("x.weight: nearly nothing of the update is left" in line for line in done.report.warnings)
