"""Programs of benchmarks/, which are no package, as modules."""

from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def load_benchmark(name: str) -> ModuleType:
    """The program ``benchmarks/<name>.py``, without running it."""
    path = str(BENCHMARKS / f"{name}.py")
    module = ModuleType(f"{name}_benchmark")
    module.__file__ = path
    SourceFileLoader(module.__name__, path).exec_module(module)
    return module
