"""Every profile: described, sourced, stable ids, commands that exist, silent on its own recipe's output, no crash."""

from __future__ import annotations

import os
import re
from pathlib import Path

import numpy as np
import pytest

import loratools as lt
from loratools.cli.main import main
from loratools.consumers.base import CONSUMERS, LEVELS, Profile
from loratools.consumers.subject import read
from loratools.core.adapter import Adapter, Meta
from loratools.core.update import KINDS
from loratools.errors import LoratoolsError
from loratools.formats.base import FORMATS
from loratools.io.base import Base
from loratools.kinds.lowrank import LowRank
from loratools.ops.check import check
from loratools.ops.fix import fix

FIXTURES = sorted(p.parent for p in (Path(__file__).parents[2] / "fixtures").glob("*/*/adapter_model.safetensors"))
RULES = Path(__file__).parents[2] / "docs" / "check" / "rules.md"
WANTED = {
    "peft",
    "vllm",
    "sglang",
    "tgi",
    "tensorrt-llm",
    "llama.cpp",
    "ollama",
    "mlx",
    "diffusers",
    "comfyui",
    "kohya",
}


def test_the_consumers_are_all_there() -> None:
    assert set(CONSUMERS) == WANTED


@pytest.mark.parametrize("name", list(CONSUMERS))
def test_a_profile_is_described_and_sourced(name: str) -> None:
    profile = CONSUMERS[name]
    assert profile.name == name
    assert re.search(r"\d", profile.version)
    assert profile.source
    assert {*profile.reads, *profile.converts, profile.recipe.format} <= set(FORMATS)
    assert profile.recipe.format in profile.reads
    assert set(profile.recipe.kinds) <= set(KINDS)
    assert f"| `{name}` " in (Path(__file__).parents[2] / "docs" / "check.md").read_text()


@pytest.mark.parametrize("name", list(CONSUMERS))
def test_rules_are_stable_and_say_what_mends_them(name: str) -> None:
    rules = (*CONSUMERS[name].foreign, *CONSUMERS[name].rules)
    ids = [(rule.id, rule.formats) for rule in rules]
    assert len(set(ids)) == len(ids)
    for rule in rules:
        assert re.fullmatch(r"[a-z][a-z-]*", rule.id)
        assert rule.effect in LEVELS
        assert rule.reason
        assert rule.source
        command = re.match(r"loratools (\S+)", rule.mend)
        assert rule.mend
        assert command is None or command[1] in main.list_commands(None)  # type: ignore[arg-type]


def rules_page() -> str:
    """Return docs/check/rules.md as it should be."""
    parts = ["# Rules of `check`\n\nGenerated from the profiles; `tests/contracts/test_consumers.py` compares.\n"]
    for name, profile in CONSUMERS.items():
        lines = [f"## {name}\n", f"{profile.title}, {profile.version}. {'Run.' if profile.ran else 'Not run.'}\n"]
        lines += ["| id | effect | reason | source |", "|---|---|---|---|"]
        for rule in (*profile.foreign, *profile.rules):
            only = f" ({', '.join(rule.formats)} files)" if rule.formats else ""
            cells = (f"`{rule.id}`{only}", rule.effect, rule.reason, rule.source)
            lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
        parts.append("\n".join(lines) + "\n")
    return "\n".join(parts)


def test_the_page_of_rules_is_that_of_the_profiles() -> None:
    if os.environ.get("LORATOOLS_WRITE_DOCS"):
        RULES.write_text(rules_page())
    assert RULES.read_text() == rules_page(), "run LORATOOLS_WRITE_DOCS=1 pytest tests/contracts/test_consumers.py"


@pytest.mark.parametrize("folder", FIXTURES, ids=lambda p: p.name)
@pytest.mark.parametrize("name", list(CONSUMERS))
def test_every_fixture_is_judged(name: str, folder: Path) -> None:
    report = check(folder, name)
    assert report.checks[0]["ok"] == all(row["level"] == "note" for row in report.extra["findings"])


def plain(profile: Profile) -> Adapter:
    """Return an adapter of unequal ranks and scales in names that the profile's format can say."""
    unet = profile.recipe.format in ("diffusers", "comfy", "kohya")
    head = "unet.mid_block.attentions.0.transformer_blocks.0.attn1" if unet else "model.layers.0.self_attn"
    leaves = ("to_q", "to_k") if unet else ("q_proj", "k_proj")
    rng = np.random.default_rng(0)

    def pair(rank: int, scale: float) -> LowRank:
        a, b = rng.standard_normal((rank, 16)), rng.standard_normal((16, rank))
        return LowRank(b.astype(np.float32), a.astype(np.float32), scale)

    updates = {f"{head}.{leaves[0]}.weight": pair(2, 0.75), f"{head}.{leaves[1]}.weight": pair(3, 1.5)}
    return Adapter(updates, Meta(namespace="diffusers" if unet else "hf"))


@pytest.mark.parametrize("name", list(CONSUMERS))
def test_what_fix_writes_passes_and_means_the_same(name: str, tmp_path: Path) -> None:
    profile = CONSUMERS[name]
    adapter = plain(profile)
    source = lt.save(adapter, tmp_path / "in.safetensors", format="native")
    options = {"model_type": "llama", "heads": 2} if profile.recipe.format == "gguf" else {}
    directory = profile.recipe.format in ("peft", "mlx")
    out = tmp_path / ("out" if directory else f"out.{'gguf' if profile.recipe.format == 'gguf' else 'safetensors'}")
    fix(read(source), name, out, **options)
    assert check(out, name).checks[0]["ok"]
    base = Base(
        {}, config={"model_type": "llama", "num_attention_heads": 2, "num_key_value_heads": 2, "hidden_size": 16}
    )
    back = lt.load(out, base=base if profile.recipe.format == "gguf" else None)
    deltas = sorted((u.dense() for u in adapter.values()), key=np.linalg.norm)  # type: ignore[attr-defined]
    again = sorted((u.dense() for u in back.values()), key=np.linalg.norm)  # type: ignore[attr-defined]
    for d, e in zip(deltas, again, strict=True):
        assert np.abs(d - e).max() <= 8 * np.finfo(np.float32).eps * np.abs(d).max() * 3  # one rounding of b per entry


@pytest.mark.real
@pytest.mark.parametrize("name", list(CONSUMERS))
def test_every_real_adapter_is_judged_and_mended_or_refused(name: str, real: Path, tmp_path: Path) -> None:
    for folder in sorted(p for p in real.iterdir() if p.is_dir()):
        try:
            check(folder, name)
            suffix = {"gguf": ".gguf"}.get(CONSUMERS[name].recipe.format, "")
            done = fix(read(folder), name, tmp_path / f"{folder.name}{suffix}")
        except LoratoolsError:
            continue
        assert check(done.path, name).checks
