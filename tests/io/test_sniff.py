from __future__ import annotations

import io
import os
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest

from loratools.errors import FileError, FormatError, UnsupportedError
from loratools.io.read import open_bundle, peek

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"
JSON = b'{"peft_type": "LORA", "r": 8}'


def _tar() -> bytes:
    held = io.BytesIO()
    with tarfile.open(fileobj=held, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("model_weights.ckpt"))
    return held.getvalue()


def _zip() -> bytes:
    held = io.BytesIO()
    with zipfile.ZipFile(held, "w") as archive:
        archive.writestr("adapter/adapter_model.safetensors", b"")
    return held.getvalue()


REFUSED: dict[str, tuple[bytes, type[Exception], str, str]] = {
    "empty": (b"", FormatError, "empty", "download"),
    "LFS pointer": (LFS, FormatError, "git-LFS pointer", "git lfs pull"),
    "text": (b"hello, this is not a tensor\n", FormatError, "text file", "weights file"),
    "text in UTF-8": (("grüße " * 200).encode(), FormatError, "text file", "weights file"),
    "JSON": (JSON, FormatError, "text file", "directory"),
    "web page": (b"<!DOCTYPE html><html><body>Sign in</body></html>", FormatError, "web page", "download"),
    "random bytes": (bytes(range(200, 256)) * 4, FormatError, "unknown content", "check"),
    "one byte": (b"\0", FormatError, "unknown content", "check"),
    "ggla": (b"algg\1\0\0\0" + bytes(64), UnsupportedError, "ggml LoRA", "PEFT"),
    "ggla, big-endian": (b"ggla\1\0\0\0" + bytes(64), UnsupportedError, "ggml LoRA", "PEFT"),
    "gzip": (b"\x1f\x8b\x08" + bytes(64), UnsupportedError, "gzip", "unpack"),
    "tar": (_tar(), UnsupportedError, "tar archive", "unpack"),
    "npy": (b"\x93NUMPY\1\0" + bytes(64), UnsupportedError, ".npy", "exported"),
    "HDF5": (b"\x89HDF\r\n\x1a\n" + bytes(64), UnsupportedError, "HDF5", "convert"),
    "other zip": (_zip(), FormatError, "adapter/adapter_model.safetensors", "unpack"),
    "zip cut short": (_zip()[:40], FormatError, "cut short", "download"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_weights_file_is_named(case: str, tmp_path: Path) -> None:
    content, kind, what, to_do = REFUSED[case]
    path = tmp_path / "adapter_model.safetensors"
    path.write_bytes(content)
    with pytest.raises(kind) as caught:
        open_bundle(path)
    assert what in str(caught.value) and str(path) in str(caught.value)
    assert to_do in (getattr(caught.value, "hint", None) or "")


def test_a_tar_that_pretends_to_be_a_pickle_is_never_unpickled(tmp_path: Path) -> None:
    held = io.BytesIO()
    with tarfile.open(fileobj=held, mode="w", encoding="latin-1") as archive:
        archive.addfile(tarfile.TarInfo("\x80\x02model"))
    (tmp_path / "a.pt").write_bytes(held.getvalue())
    with pytest.raises(UnsupportedError, match="tar archive"):
        open_bundle(tmp_path / "a.pt")


def test_the_extension_does_not_matter(adapter: Path, tmp_path: Path) -> None:
    (adapter / "adapter_model.safetensors").rename(tmp_path / "weights.bin")
    assert open_bundle(tmp_path / "weights.bin").container == "safetensors"


def test_peek_is_for_safetensors(zip_of: Any) -> None:
    with pytest.raises(FormatError, match="not a safetensors file"):
        peek(zip_of({"a.npy": b""}))


def test_a_pipe_is_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(FileError, match="not a regular file"):
        open_bundle(tmp_path / "pipe")


def test_unreadable_file(adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Path.open

    def refuse(self: Path, *args: Any, **kwargs: Any) -> Any:
        if self.suffix == ".safetensors":
            raise PermissionError(13, "Permission denied")
        return real(self, *args, **kwargs)

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(FileError, match="Permission denied") as caught:
        open_bundle(adapter)
    assert "adapter_model.safetensors" in str(caught.value) and "permissions" in (caught.value.hint or "")


@pytest.mark.usefixtures("permissions_bind")
def test_unreadable_file_for_real(adapter: Path) -> None:
    (adapter / "adapter_model.safetensors").chmod(0)
    with pytest.raises(FileError, match="Permission denied"):
        open_bundle(adapter)


@pytest.mark.parametrize("length", [0x0280, 0x0380, 0x8B1F, 0x0580])
def test_a_header_length_that_spells_another_magic(tmp_path: Path, length: int) -> None:
    """640 is the magic of a pickle, 35615 that of gzip: the length of a header may be any number."""
    path = tmp_path / "x.safetensors"
    header = b'{"t":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}'.ljust(length)
    path.write_bytes(length.to_bytes(8, "little") + header + b"x")
    assert peek(path).shapes == {"t": (1,)}
