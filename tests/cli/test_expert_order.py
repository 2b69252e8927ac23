from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from safetensors.numpy import load_file, save_file

import loratools as lt
from loratools.cli.main import main
from loratools.kinds.stack import Stack


def test_the_packing_of_experts_can_be_said(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    u = Stack(rng.standard_normal((3, 8, 2)).astype(np.float32), rng.standard_normal((3, 2, 6)).astype(np.float32))
    lt.save(lt.Adapter({"mlp.experts.down_proj": u}), tmp_path / "in", format="peft")

    def told(*options: str) -> list[str]:
        result = CliRunner().invoke(main, ["info", str(tmp_path / "in"), "--json", *options])
        assert result.exit_code == 0, result.output
        return [w for w in json.loads(result.stdout)["warnings"] if "packs" in w]

    assert len(told()) == 1
    assert "--expert-order" in told()[0]
    assert told("--expert-order", "expert-major") == []
    outputs = {}
    for order in ("rank-major", "expert-major"):
        out = tmp_path / order
        args = ["squeeze", str(tmp_path / "in"), "--rank", "1", "-o", str(out), "--expert-order", order, "-q"]
        assert CliRunner().invoke(main, args).exit_code == 0
        outputs[order] = lt.load(out, expert_order=order)["mlp.experts.down_proj"].dense()  # type: ignore[attr-defined]
    best = lt.squeeze(lt.Adapter({"x": u}), rank=1)["x"].dense()  # type: ignore[attr-defined]
    assert np.abs(outputs["rank-major"] - best).max() <= 1e-5 * np.abs(best).max()
    assert np.abs(outputs["expert-major"] - best).max() > 0.1 * np.abs(best).max()


@pytest.mark.parametrize("order", ["rank-major", "expert-major"])
def test_merging_and_unmerging_know_it_too(order: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    u = Stack(rng.standard_normal((3, 8, 2)).astype(np.float32), rng.standard_normal((3, 2, 6)).astype(np.float32))
    lt.save(lt.Adapter({"mlp.experts.down_proj": u}), tmp_path / "in", format="peft")
    w = rng.standard_normal((3, 8, 6)).astype(np.float32)
    save_file({"mlp.experts.down_proj": w}, tmp_path / "base.safetensors")
    words = [str(tmp_path / "in"), "--expert-order", order, "-q", "-o"]
    merged, back = tmp_path / "merged.safetensors", tmp_path / "back.safetensors"
    assert CliRunner().invoke(main, ["merge", str(tmp_path / "base.safetensors"), *words, str(merged)]).exit_code == 0
    d = lt.load(tmp_path / "in", expert_order=order)["mlp.experts.down_proj"].dense()  # type: ignore[attr-defined]
    assert np.allclose(load_file(merged)["mlp.experts.down_proj"], w + d, atol=1e-5)
    assert CliRunner().invoke(main, ["unmerge", str(merged), *words, str(back)]).exit_code == 0
    assert np.allclose(load_file(back)["mlp.experts.down_proj"], w, atol=1e-5)
