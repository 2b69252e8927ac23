"""Which of the textbook's functions would be answered by a kernel on this machine, and why the others not."""

from __future__ import annotations

from loratools import dispatch
from loratools.linalg import factored, row_norms, rsvd
from loratools.report import Report

ROOMS = (factored, row_norms, rsvd)  # importing them is what makes their functions known to the dispatcher

UNITS = {
    "runs": "what answers a call with tensors on the GPU: kernel or reference",
    "kernel": "the function that stands in for the textbook's",
    "takes": "the tensors it takes; others go to the textbook (under LORATOOLS_KERNELS=force they are an error)",
    "why": "what the choice hangs on",
}


def kernels() -> Report:
    """Return a row per function that may have a kernel; the total tells mode and device. Loads the kernels."""
    mode, device, found = dispatch.mode(), dispatch.accelerator(), dispatch.table()
    runs, why = _choice(mode, device)
    takes = dispatch.conditions()
    pairs = [(name, kernel) for name, some in found.items() for kernel in some or (None,)]
    rows = tuple(
        {"name": name, "runs": runs, "kernel": kernel, "takes": takes.get(kernel or ""), "why": why}
        for name, kernel in pairs
    )
    total = {
        "mode": mode,
        "device": device,
        "missing": list(dispatch.missing()),
        "kernels": sum(map(len, found.values())),
    }
    return Report("loratools.kernels/1", rows, total, UNITS)


def _choice(mode: str, device: str | None) -> tuple[str, str]:
    """Return what would run, and why."""
    if mode == "off":
        return "reference", "LORATOOLS_KERNELS=off"
    if dispatch.missing():
        return "reference", f"{' and '.join(dispatch.missing())} not installed: pip install 'loratools[gpu]'"
    if device is None:
        return "reference", "torch sees no GPU"
    if device == "interpreter" and mode == "auto":
        return "reference", "Triton interprets, and tensors lie on the CPU: LORATOOLS_KERNELS=force runs kernels"
    return "kernel", f"LORATOOLS_KERNELS={mode}, {device}"
