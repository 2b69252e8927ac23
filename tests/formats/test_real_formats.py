"""Adapters that others trained: recognised for what they are, and kept to the last byte."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import loratools as lt
from loratools.core.update import Delta
from loratools.formats.base import FORMATS
from loratools.io.read import open_bundle
from loratools.linalg.namespace import to_numpy

pytestmark = pytest.mark.real
WHAT = {
    "convnext-tiny-r8": "peft",
    "mistral7b-mlx-npz-r4": "mlx",
    "qwen25-0.5b-mlx-dpo-r8": "mlx",
    "qwen25-0.5b-mlx-r8-step100": "mlx",
    "qwen25-0.5b-mlx-r8-step200": "mlx",
    "roberta-agnews-r4-biasall": "peft",
    "roberta-mnli-loralib-bin": "loralib",
    "roberta-pt-r8-ckpt500": "peft",
    "roberta-pt-r8-ckpt8610": "peft",
    **{f"sam-vitb-r{r}": "samlora" for r in (2, 4, 8, 16)},
    "sam-vitb-r4-untrained": "samlora",
    "sd15-cloneofsimo-r1-tokens": "cloneofsimo",
    "sd15-cloneofsimo-te-list-pt": "cloneofsimo",
    "sd15-diffusers-r4": "diffusers",
}


@pytest.mark.parametrize("folder", WHAT)
def test_recognised_and_kept_byte_for_byte(folder: str, real: Path, tmp_path: Path) -> None:
    bundle, adapter = open_bundle(real / folder), lt.load(real / folder)
    assert adapter.meta.format == WHAT[folder]
    native = lt.load(lt.save(adapter, tmp_path / "n.safetensors", format="native"))
    again = FORMATS[WHAT[folder]].encode(native)
    assert sorted(again.tensors) == sorted(bundle.tensors)
    for key, leaf in bundle.tensors.items():
        before, after = to_numpy(leaf), to_numpy(again.tensors[key])
        assert (before.dtype, before.shape, before.tobytes()) == (after.dtype, after.shape, after.tobytes()), key
    assert dict(again.metadata) == dict(bundle.metadata)
    assert again.config == bundle.config


@pytest.mark.parametrize("folder", WHAT)
def test_the_function_survives_peft(folder: str, real: Path, tmp_path: Path) -> None:
    adapter = lt.load(real / folder)
    source = adapter if adapter.meta.scaled else lt.convert(adapter, "peft", scale=2.0)
    parts = {n.partition(".")[0] for n in source} & {"unet", "text_encoder"}
    for component in parts or {""}:
        path = lt.save(source, tmp_path / f"p-{component}", format="peft", component=component)
        back = lt.load(path)
        for name, u in back.items():
            before = source[f"{component}.{name}" if component else name]
            if isinstance(before, Delta) and isinstance(u, Delta):
                x = np.random.default_rng(0).standard_normal((u.matrix_shape[1], 1)).astype(np.float32)
                wanted = before.matmul(x)
                # fp32 sums of up to 4096 terms in another order: sqrt(4096) roundings
                assert np.abs(u.matmul(x) - wanted).max() <= 1e-5 * max(np.abs(wanted).max(), 1e-30)
    if WHAT[folder] in ("samlora", "diffusers"):
        again = FORMATS[WHAT[folder]].encode(lt.load(tmp_path / f"p-{next(iter(parts), '')}"))
        assert len(again.tensors) == len(open_bundle(real / folder).tensors)
