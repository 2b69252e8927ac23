from __future__ import annotations

import subprocess
import sys
from pathlib import Path

HEAVY = [
    "torch",
    "scipy",
    "ml_dtypes",
    "rich",
    "networkx",
    "safetensors",
    "concurrent.futures",
    "multiprocessing",
    "tempfile",
    "zipfile",
    "shutil",
]


def _loaded(code: str, *args: str) -> set[str]:
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\nprint(*sys.modules)", *args], check=True, capture_output=True, text=True
    )
    return set(done.stdout.split())


def test_importing_the_reader_imports_nothing_heavy() -> None:
    assert not _loaded("import sys, loratools.io.read") & set(HEAVY)


def test_opening_safetensors_needs_no_torch_nor_ml_dtypes(adapter: Path) -> None:
    code = "import sys; from loratools.io.read import open_bundle\n"
    code += "for leaf in open_bundle(sys.argv[1]).tensors.values(): leaf.read()"
    assert not _loaded(code, str(adapter)) & {"torch", "scipy", "ml_dtypes", "rich", "concurrent.futures", "tempfile"}
