"""How the rooms of the house depend on each other, read from all imports, those inside functions too."""

import ast
import sys
from collections import Counter
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import musubi_tuner

ROOT = Path(musubi_tuner.__file__).parent
TESTS = Path(__file__).parents[1]
REGISTRY = ("models.registry", "models.spec")
"""The list of families and its records: torch-free, read by config, and so a room of their own."""
LIGHT = {*sys.stdlib_module_names, "pydantic", "pydantic_core", "tomli_w", "tqdm"}
SLOW_PARTS = ("torch._dynamo", "torch._subclasses", "torch.distributed")
"""Parts of torch that cost as much as another package."""
PLATFORM = ("fcntl", "msvcrt")


def module_name(path: Path) -> str:
    return path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".").removesuffix("__init__").rstrip(".")


PATHS = {module_name(path): path for path in ROOT.rglob("*.py")}


def imports(path: Path) -> Iterator[tuple[str, bool]]:
    """Imported modules, ours without the package's name, and whether the import stands inside a function."""

    def walk(node: ast.AST, inside: bool) -> Iterator[tuple[str, bool]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and isinstance(child.test, ast.Name) and child.test.id == "TYPE_CHECKING":
                continue
            if isinstance(child, ast.Import):
                names = [alias.name for alias in child.names]
            elif isinstance(child, ast.ImportFrom):
                assert child.module is not None and not child.level, f"{path}: relative import"
                names = [child.module]
                for alias in child.names:
                    if f"{child.module}.{alias.name}".removeprefix("musubi_tuner.") in PATHS:
                        names = [f"{child.module}.{alias.name}", *names[1:]]
            else:
                function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
                yield from walk(child, inside or function)
                continue
            yield from ((name, inside) for name in names)

    yield from walk(ast.parse(path.read_text(encoding="utf-8")), False)


def own(name: str) -> str | None:
    """Name of one of our modules; None for others."""
    short = name.removeprefix("musubi_tuner").lstrip(".")
    return short if name.split(".")[0] == "musubi_tuner" and short in PATHS else None


IMPORTS = {module: list(imports(path)) for module, path in PATHS.items()}


def room(module: str) -> str:
    return "registry" if module in REGISTRY else module.split(".")[0]


def refuse_circles(graph: dict[str, set[str]]) -> None:
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(reversed(error.args[1])))


def test_files_do_not_import_each_other_in_a_circle() -> None:
    refuse_circles({module: {found for name, _ in names if (found := own(name))} for module, names in IMPORTS.items()})


def test_rooms_do_not_import_each_other_in_a_circle() -> None:
    graph: dict[str, set[str]] = {}
    for module, names in IMPORTS.items():
        others = {room(found) for name, _ in names if (found := own(name))}
        graph.setdefault(room(module), set()).update(others - {room(module)})
    refuse_circles(graph)


@pytest.mark.parametrize(
    ("lower", "upper"),
    [
        ("flow", ()),
        ("config", ("registry",)),
        ("weights", ("config",)),
        ("models", ("adapters", "config", "encoders", "flow", "memory", "registry", "weights")),
    ],
)
def test_a_room_knows_only_those_below_it(lower: str, upper: tuple[str, ...]) -> None:
    known = {room(f) for m, names in IMPORTS.items() if room(m) == lower for n, _ in names if (f := own(n))}
    folders = {room(module) for module in PATHS if "." in module}
    assert (known & folders) - {lower} <= set(upper)


def at_once(module: str) -> list[str]:
    """What importing one of our modules imports: its own imports, and the packages it is in."""
    parts = module.split(".")
    packages = [".".join(parts[:end]) for end in range(1, len(parts))]
    return [name for name, inside in IMPORTS[module] if not inside] + [
        f"musubi_tuner.{package}" for package in packages if package in PATHS
    ]


@cache
def heavy(name: str) -> frozenset[str]:
    """Packages that importing a module brings in and that cost something."""
    seen, waiting, found = set[str](), [name], set[str]()
    while waiting:
        other = waiting.pop()
        module = own(other)
        if module is not None and module not in seen:
            seen.add(module)
            waiting += at_once(module)
        elif module is None:
            base = other.split(".")[0]
            if other.startswith(SLOW_PARTS):
                found.add(".".join(other.split(".")[:2]))
            elif base not in {"musubi_tuner", *LIGHT, *PLATFORM}:
                found.add("torch" if other.startswith("safetensors.torch") else base)
    return frozenset(found | ({"numpy", "safetensors"} if "torch" in found else set()))


def test_an_import_inside_a_function_keeps_a_heavy_package_out() -> None:
    idle = [
        f"{module}: {name}"
        for module, names in IMPORTS.items()
        for name, inside in names
        if inside and name not in PLATFORM and heavy(name) <= heavy(f"musubi_tuner.{module}")
    ]
    assert idle == []


def test_no_two_test_files_share_a_name() -> None:
    names = Counter(path.name for path in TESTS.rglob("test_*.py"))
    assert [name for name, count in names.items() if count > 1] == []  # pytest imports them by their names


def test_no_file_is_too_long_to_be_read_at_once() -> None:
    lengths = {
        path.relative_to(ROOT).as_posix(): len(path.read_text(encoding="utf-8").splitlines()) for path in PATHS.values()
    }
    assert {name: count for name, count in lengths.items() if count > 700} == {}
