from __future__ import annotations

from pathlib import Path

import pytest

from loratools.errors import FileError, FormatError
from loratools.io import sidecar
from loratools.io.read import open_bundle, read_json

BROKEN = {
    "cut short": (b'{"r": 8,', "line 1 column"),
    "not an object": (b"[1, 2]", "list"),
    "empty": (b"", "line 1 column 1"),
    "duplicate key": (b'{"r": 8, "lora_alpha": 16, "r": 4}', "'r'"),
    "duplicate key further in": (b'{"rank_pattern": {"a": 8, "a": 4}}', "'a'"),
    "not UTF-8": (b'{"r": "\xff"}', "utf-8"),
    "nested too deeply": (b"[" * 200_000, "nested too deeply"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_json_names_file_and_place(case: str, adapter: Path) -> None:
    content, told = BROKEN[case]
    (adapter / "adapter_config.json").write_bytes(content)
    with pytest.raises(FormatError) as caught:
        open_bundle(adapter)
    assert told in str(caught.value) and "adapter_config.json" in str(caught.value)


def test_sizes_beyond_a_config_are_refused(adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sidecar, "LIMIT_BYTES", 10)
    with pytest.raises(FormatError, match="too large") as caught:
        open_bundle(adapter)
    assert caught.value.got == (adapter / "adapter_config.json").stat().st_size


def test_byte_order_mark_and_unicode(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes('\ufeff{"näme": [1, null]}'.encode())
    assert read_json(tmp_path / "a.json") == {"näme": [1, None]}


def test_missing_json(tmp_path: Path) -> None:
    with pytest.raises(FileError, match=r"a\.json"):
        read_json(tmp_path / "a.json")
