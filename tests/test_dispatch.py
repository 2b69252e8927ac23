"""Dispatch: which body answers, and that a failing kernel never falls back in silence."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from loratools import dispatch
from loratools.errors import KernelError, MissingExtraError, NumericsError, UsageError
from loratools.ops.kernels import kernels

torch = pytest.importorskip("torch", reason="torch is not installed")


@pytest.fixture
def doubled(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A textbook function of one array with a kernel that takes fp32 and says so in its result."""
    monkeypatch.setattr(dispatch, "_kernels", {})
    monkeypatch.setattr(dispatch, "_load", lambda: None)

    @dispatch.accelerable
    def double(x: Any) -> tuple[str, Any]:
        return "reference", 2 * x

    def takes_floats(x: Any) -> bool:
        """True for fp32."""
        return bool(x.dtype == torch.float32)

    @dispatch.fuses(double, when=takes_floats)
    def fused(x: Any) -> tuple[str, Any]:
        if bool(x.isnan().any()):
            raise NumericsError("not finite")
        if bool((x < 0).any()):
            raise RuntimeError("boom")
        return "kernel", 2 * x

    return double


X = torch.ones(3)


def test_auto_keeps_to_the_reference_without_an_accelerator(doubled, monkeypatch):
    assert doubled(X)[0] == doubled(np.ones(3))[0] == "reference"
    monkeypatch.setattr(dispatch, "_has_accelerator", lambda args: True)
    assert doubled(X)[0] == "kernel"
    assert doubled(X.double())[0] == "reference"  # a dtype that the kernel does not take
    monkeypatch.setenv("LORATOOLS_KERNELS", "off")
    assert doubled(X)[0] == "reference"


def test_force_never_answers_by_the_reference(doubled, monkeypatch):
    monkeypatch.setenv("LORATOOLS_KERNELS", "force")
    assert doubled(X)[0] == "kernel"
    with pytest.raises(KernelError, match=r"no kernel accepts these arguments of .*double"):
        doubled(X.double())
    monkeypatch.setattr(dispatch, "missing", lambda: ("triton",))
    with pytest.raises(MissingExtraError, match=r"kernels need triton(.|\n)*loratools\[gpu\]"):
        doubled(X.double())


def test_a_failing_kernel_is_named_and_what_it_says_of_the_input_passes(doubled, monkeypatch):
    monkeypatch.setenv("LORATOOLS_KERNELS", "force")
    with pytest.raises(KernelError, match=r"fused failed: boom(.|\n)*LORATOOLS_KERNELS=off"):
        doubled(-X)
    with pytest.raises(NumericsError, match="not finite"):
        doubled(X * float("nan"))


def test_an_unknown_mode_is_refused(doubled, monkeypatch):
    monkeypatch.setenv("LORATOOLS_KERNELS", "fast")
    with pytest.raises(UsageError, match="unknown value"):
        doubled(X)


def test_arrays_are_found_in_lists_and_operators():
    class Operator:
        like = X.to("meta")

    assert not dispatch._has_accelerator((X, [(X, X)], [1.0]))
    assert dispatch._has_accelerator(([(X.to("meta"), X)], [1.0]))
    assert dispatch._has_accelerator(([Operator()],))


@pytest.mark.parametrize(
    ("mode", "gpu", "lacking", "runs", "why"),
    [
        ("auto", "H200", (), "kernel", "H200"),
        ("off", "H200", (), "reference", "off"),
        ("auto", None, (), "reference", "no GPU"),
        ("auto", "H200", ("triton",), "reference", "triton not installed"),
        ("auto", "interpreter", (), "reference", "interprets"),
        ("force", "interpreter", (), "kernel", "interpreter"),
    ],
)
def test_what_would_run_is_told(monkeypatch, mode, gpu, lacking, runs, why):
    monkeypatch.setenv("LORATOOLS_KERNELS", mode)
    monkeypatch.setattr(dispatch, "accelerator", lambda: gpu)
    monkeypatch.setattr(dispatch, "missing", lambda: lacking)
    report = kernels()
    names = {row["name"] for row in report.modules}
    assert {"loratools.linalg.factored.truncate_many", "loratools.linalg.row_norms.row_norms_many"} <= names
    assert {row["runs"] for row in report.modules} == {runs}
    assert all(why in row["why"] for row in report.modules)
