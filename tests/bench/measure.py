"""Time commands as whole processes, from a small parent: wall and processor seconds and peak memory of each run.

Run as a script, so that the parent holds no arrays (a child's peak counts pages that it inherits from its parent):
``python measure.py RUNS COMMANDS_JSON`` with ``[{"name": ..., "argv": [...]}, ...]``; commands take turns, A B A B, so
that ratios survive a machine whose speed drifts. Prints JSON: name -> {"wall_s": [...], "cpu_s": [...],
"peak_mb": [...]}; seconds of all threads together tell what a shared machine hides.
"""

from __future__ import annotations

import json
import os
import sys
import time


def run(argv: list[str]) -> tuple[float, float, float]:
    """Run one command with its output thrown away; return (wall seconds, processor seconds, peak resident MB)."""
    start = time.perf_counter()
    null = os.open(os.devnull, os.O_RDWR)
    actions = [(os.POSIX_SPAWN_DUP2, null, fd) for fd in (0, 1, 2)]
    pid = os.posix_spawnp(argv[0], argv, os.environ, file_actions=actions)
    _, status, usage = os.wait4(pid, 0)
    os.close(null)
    if status:
        raise SystemExit(f"command failed with status {status}: {' '.join(argv)}")
    return time.perf_counter() - start, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024


def main() -> None:
    runs, commands = int(sys.argv[1]), json.loads(sys.argv[2])
    found: dict[str, dict[str, list[float]]] = {c["name"]: {"wall_s": [], "cpu_s": [], "peak_mb": []} for c in commands}
    for turn in range(runs + 1):  # the first turn warms caches and is not counted
        for command in commands:
            wall, cpu, peak = run(command["argv"])
            if turn:
                found[command["name"]]["wall_s"].append(round(wall, 4))
                found[command["name"]]["cpu_s"].append(round(cpu, 4))
                found[command["name"]]["peak_mb"].append(round(peak, 1))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
