"""Every format, on the committed fixtures: claims are exclusive, decode and encode are each other's inverses.

``fixtures/formats/<format>/`` holds files made without loratools; a ``config.json`` beside one is its base's.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from loratools import files
from loratools.core.adapter import Adapter, Meta
from loratools.core.update import KINDS, Delta, tensors
from loratools.errors import ConversionError, LoratoolsError, NameUnresolvedError, NeedsBaseError, UnsupportedError
from loratools.formats.base import FORMATS
from loratools.formats.detect import detect
from loratools.io.base import Base
from loratools.io.bundle import Bundle, from_memory
from loratools.io.read import open_bundle
from loratools.io.sidecar import read_json
from loratools.leaf import Leaf
from loratools.linalg.namespace import to_numpy

HOME = Path(__file__).parents[2] / "fixtures"
OWN = sorted(p for p in (HOME / "formats").rglob("*") if p.is_file() and p.suffix != ".json")
FIXTURES = [*sorted(HOME.glob("digits/*/adapter_model.safetensors")), *OWN]
IDS = ["-".join(p.relative_to(HOME).parts[-3:]) for p in FIXTURES]
PICKLED = (".bin", ".pt", ".lora")
REFUSALS = (ConversionError, NameUnresolvedError, NeedsBaseError, UnsupportedError)


def opened(path: Path) -> Bundle:
    if path.suffix in PICKLED:
        pytest.importorskip("torch", reason="torch files need torch")
    if path.suffix == ".gguf":
        pytest.importorskip("gguf", reason="gguf is not installed")
    return open_bundle(path)


def base_of(path: Path) -> Base | None:
    """The base beside a fixture: its config alone."""
    config = path.parent / "config.json"
    return Base({}, config=read_json(config)) if path in OWN and config.exists() else None


def loaded(path: Path) -> Adapter:
    opened(path)
    return files.load(path, base=base_of(path))


def same(a: Adapter, b: Adapter) -> None:
    assert list(a) == list(b)
    for name in a:
        assert (a[name].kind, a[name].shape) == (b[name].kind, b[name].shape)
        for (field, x), (other, y) in zip(tensors(a[name]), tensors(b[name]), strict=True):
            assert field == other
            assert to_numpy(x).tobytes() == to_numpy(y).tobytes()


def in_memory(bundle: Bundle) -> Bundle:
    return from_memory({k: to_numpy(t) for k, t in bundle.tensors.items()}, bundle.config, bundle.metadata)


def raw(bundle: Bundle) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    read = {k: to_numpy(t) for k, t in bundle.tensors.items()}
    return {k: (str(x.dtype), x.shape, x.tobytes()) for k, x in read.items()}


def test_every_format_has_a_fixture() -> None:
    homes = {p.relative_to(HOME / "formats").parts[0] for p in OWN}
    assert homes == set(FORMATS) - {"native", "peft"}


@pytest.mark.parametrize("path", FIXTURES, ids=IDS)
def test_exactly_one_format_claims_a_fixture(path: Path) -> None:
    bundle = opened(path)
    home = "peft" if path not in OWN else path.relative_to(HOME / "formats").parts[0]
    assert [name for name, f in FORMATS.items() if f.declines(bundle) is None] == [home]
    assert detect(bundle).name == home


@pytest.mark.parametrize("path", FIXTURES, ids=IDS)
def test_encode_after_decode_gives_the_same_tensors_and_config(path: Path) -> None:
    bundle, adapter = opened(path), loaded(path)
    again = FORMATS[adapter.meta.format].encode(adapter, base=base_of(path))
    assert raw(again) == raw(bundle)
    assert again.config == bundle.config
    assert dict(again.metadata) == dict(bundle.metadata)


@pytest.mark.parametrize("path", OWN, ids=IDS[-len(OWN) :])
def test_decoding_reads_no_factor(path: Path) -> None:
    """Single numbers (alphas) may be read, nothing else: opening stays cheap, whatever the size."""
    bundle = opened(path)
    read: list[str] = []

    def watched(key: str, leaf: Leaf) -> Leaf:
        return Leaf(leaf.shape, leaf.dtype, lambda out: read.append(key) or leaf.load(out))

    watching = replace(bundle, tensors={key: watched(key, leaf) for key, leaf in bundle.tensors.items()})
    detect(watching).decode(watching, base=base_of(path))
    assert all(bundle.tensors[key].shape == () for key in read)


@pytest.mark.parametrize("path", FIXTURES, ids=IDS)
def test_native_keeps_every_byte(path: Path, tmp_path: Path) -> None:
    bundle, adapter = opened(path), loaded(path)
    native = files.save(adapter, tmp_path / "n.safetensors", format="native")
    again = FORMATS[adapter.meta.format].encode(files.load(native), base=base_of(path))
    assert raw(again) == raw(bundle)
    assert again.config == bundle.config
    assert dict(again.metadata) == dict(bundle.metadata)


@pytest.mark.parametrize("path", FIXTURES, ids=IDS)
@pytest.mark.parametrize("name", list(FORMATS))
def test_another_format_says_the_same_or_refuses_by_name(path: Path, name: str) -> None:
    adapter, base = loaded(path), base_of(path)
    try:
        bundle = FORMATS[name].encode(adapter, base=base)
    except LoratoolsError as refusal:
        assert isinstance(refusal, REFUSALS) or "scale" in str(refusal)  # what cannot be said is refused, not lost
        return
    again = FORMATS[name].decode(in_memory(bundle), base=None if name == "peft" else base)
    if name in (adapter.meta.format, "native"):
        same(again, adapter)
    for key in set(again) & set(adapter):
        before, after = (to_numpy(a[key].delta(weights(adapter, key)).dense()) for a in (adapter, again))
        # one rounding of the factors where a scale is multiplied in: half a unit of fp16 at worst
        assert np.abs(after - before).max() <= 1e-3 * np.abs(before).max(initial=0.0)
    assert len(again) == len(adapter) or name != "native"


def weights(adapter: Adapter, key: str) -> object:
    u = adapter[key]
    return None if isinstance(u, Delta) else np.random.default_rng(0).standard_normal(u.shape).astype(np.float32)


@pytest.mark.parametrize("path", [p for p in FIXTURES if p not in OWN], ids=lambda p: p.parent.name)
@pytest.mark.parametrize("name", ["peft", "native", "kohya", "lycoris", "mlx"])
def test_formats_of_language_models_hold_the_digits_adapters(path: Path, name: str) -> None:
    adapter = files.load(path)
    again = FORMATS[name].decode(in_memory(FORMATS[name].encode(adapter)))
    same(again, adapter)
    for key in adapter:
        for field in ("scale", "axis", "eps"):
            before = getattr(adapter[key], field, 0.0)
            assert getattr(again[key], field, 0.0) == pytest.approx(before, rel=1e-12)


@pytest.mark.parametrize("kind", list(KINDS))
def test_native_holds_every_kind(kind: str, tmp_path: Path) -> None:
    adapter = Adapter({"layer.weight": KINDS[kind].example(1)}, Meta(history=("made",)))
    out = files.save(adapter, tmp_path / "x.safetensors", format="native")
    again = files.load(out)
    same(again, adapter)
    assert again.meta.history == ("made",)
    w = np.random.default_rng(0).standard_normal(adapter["layer.weight"].shape).astype(np.float32)
    assert np.array_equal(again["layer.weight"].apply(w), adapter["layer.weight"].apply(w))


@pytest.mark.parametrize("name", list(FORMATS))
def test_unknown_keys_are_refused_or_carried(name: str) -> None:
    path = next((p for p in OWN if p.relative_to(HOME / "formats").parts[0] == name), FIXTURES[0])
    adapter, base = loaded(path), base_of(path)
    encoded = FORMATS[name].encode(adapter, base=base)
    more = {**{k: to_numpy(t) for k, t in encoded.tensors.items()}, "something.else": np.ones(2, np.float32)}
    bundle = from_memory(more, encoded.config, encoded.metadata)
    with pytest.raises(LoratoolsError, match=r"does not (explain|name)"):
        FORMATS[name].decode(bundle, base=base)
    carried = FORMATS[name].decode(bundle, base=base, allow_unknown=True)
    assert "something.else" in carried.meta.leftover
    assert "something.else" in FORMATS[name].encode(carried, base=base).tensors
