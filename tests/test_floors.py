"""Imports only point downward, without knots; heavy libraries stay off the paths that do not need them."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FLOORS = [
    {"errors", "registry", "dispatch", "report", "leaf", "version", "gates", "sarif"},
    {"linalg", "io"},
    {"core", "kernels"},
    {"kinds"},
    {"formats", "fusion"},
    {"files", "outputs", "ops", "render", "consumers", "calibrate"},
    {"cli"},
]
ROOM_FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
HEAVY = {
    "torch",
    "scipy",
    "rich",
    "networkx",
    "ml_dtypes",
    "fbpca",
    "safetensors",
    "threadpoolctl",
    "triton",
    "gguf",
    "matplotlib",
}
ARRAY_LIBRARIES = {"numpy", "torch", "scipy"}
SAME_FLOOR = {("files", "outputs"), ("ops", "outputs"), ("ops", "files"), ("ops", "consumers")}


def sources() -> list[tuple[str, Path]]:
    """Return (dotted module name, file) of every module of the project."""
    found = [(p.relative_to(ROOT).with_suffix(""), p) for p in (ROOT / "loratools").rglob("*.py")]
    found += [
        (Path("loratools") / p.relative_to(ROOT).with_suffix(""), p)
        for d in ("cli", "kernels")
        for p in (ROOT / d).rglob("*.py")
    ]
    return [(".".join(name.parts).removesuffix(".__init__"), path) for name, path in found]


def room(module: str) -> str | None:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and parts[0] == "loratools" else None


def imports(path: Path, *, top_level_only: bool) -> set[str]:
    tree = ast.parse(path.read_text())
    nodes = tree.body if top_level_only else list(ast.walk(tree))
    names: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize(("module", "path"), sources(), ids=lambda v: v if isinstance(v, str) else "")
def test_imports_point_downward(module: str, path: Path) -> None:
    here = room(module)
    for name in imports(path, top_level_only=False):
        there = room(name)
        if here is None or there is None or there not in ROOM_FLOOR or there == here:
            continue
        ground = ROOM_FLOOR[there] == 0  # the ground floor has no knots either: see test_no_import_cycles
        down = ground or ROOM_FLOOR[there] < ROOM_FLOOR[here] or (here, there) in SAME_FLOOR
        assert down, f"{module} imports {name}: floor {ROOM_FLOOR[here]} may not see floor {ROOM_FLOOR[there]}"


@pytest.mark.parametrize(("module", "path"), sources(), ids=lambda v: v if isinstance(v, str) else "")
def test_heavy_libraries_are_imported_lazily(module: str, path: Path) -> None:
    if room(module) == "kernels":
        return
    heavy = {name.split(".")[0] for name in imports(path, top_level_only=True)} & HEAVY
    assert not heavy, f"{module} imports {heavy} when it is imported"


@pytest.mark.parametrize(("module", "path"), sources(), ids=lambda v: v if isinstance(v, str) else "")
def test_only_namespace_names_an_array_library(module: str, path: Path) -> None:
    if room(module) not in ("linalg", "core", "kinds", "fusion", "ops") or module.endswith("linalg.namespace"):
        return
    exempt = {"loratools.linalg.dense": {"numpy", "scipy"}, "loratools.linalg.short_floats": {"numpy"}}
    allowed = exempt.get(module, set())
    named = {name.split(".")[0] for name in imports(path, top_level_only=False)} & ARRAY_LIBRARIES - allowed
    assert not named, f"{module} names {named}; go through linalg.namespace"


def test_no_import_cycles() -> None:
    modules = dict(sources())
    graph = {m: {n for n in imports(p, top_level_only=True) if n in modules and n != m} for m, p in modules.items()}
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, f"import cycle: {' -> '.join((*path, module))}"
        if module not in done:
            for other in sorted(graph[module]):
                # a package's __init__ that re-exports one of its modules is not a knot
                if not other.startswith(f"{module}.") and not module.startswith(f"{other}."):
                    visit(other, (*path, module))
            done.add(module)

    for module in graph:
        visit(module, ())


def test_root_is_off_the_path() -> None:
    """transformers and diffusers import a package named ``kernels``; ours must not answer."""
    assert str(ROOT) not in [str(Path(p).resolve()) for p in sys.path if p]


def loaded_after(code: str) -> set[str]:
    script = f"import sys\n{code}\nprint(*sorted({{m.split('.')[0] for m in sys.modules}}))"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd="/")
    return set(result.stdout.splitlines()[-1].split())


def test_importing_the_package_is_free() -> None:
    assert not loaded_after("import loratools") & (HEAVY | {"numpy", "click"})


def test_a_squeeze_imports_only_what_it_needs(tmp_path: Path) -> None:
    args = ["squeeze", str(ROOT / "fixtures" / "digits" / "r4"), "--rank", "2", "-o", str(tmp_path / "out")]
    loaded = loaded_after(f"from loratools.cli.main import main\nmain.main({args!r}, standalone_mode=False)")
    assert "numpy" in loaded
    assert not loaded & (HEAVY - {"safetensors", "threadpoolctl"})  # the parser; no limit set here as run() would
    assert not loaded & {"array_api_compat", "multiprocessing", "concurrent", "asyncio"}


def test_help_needs_no_arrays() -> None:
    code = "from loratools.cli.main import main\nmain.main(['--help'], standalone_mode=False)"
    assert not loaded_after(code) & (HEAVY | {"numpy"})


def test_every_package_is_shipped() -> None:
    """An editable install hides a package that the wheel would lack."""
    import tomllib

    listed = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    folders = {p.parent.relative_to(ROOT) for p in (ROOT / "loratools").rglob("*.py")}
    assert {".".join(folder.parts) for folder in folders} | {"loratools.cli", "loratools.kernels"} == listed
