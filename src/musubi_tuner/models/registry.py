"""The only list of model families. Torch-free: families are described by their options and resolved on use.

To add a family, write its folder and add one line to `FAMILIES`.
"""

from collections.abc import Iterator, Mapping

from musubi_tuner.models.spec import ModelSpec, resolve

FAMILIES: dict[str, str] = {
    "tf": "musubi_tuner.models.tinyflux.options:SPEC",
    "fd": "musubi_tuner.models.flux_dev.options:SPEC",
}
"""Architecture code -> dotted name of the family's `ModelSpec`."""

RESERVED: dict[str, str] = {
    "ff": "FluxFlow is planned and not built yet",
    "fluxflow": "FluxFlow is planned and not built yet",
}
"""Codes and names that a user may reasonably ask for, and why they are refused."""

RESERVED_STEPS: dict[str, int] = {"ff": 16}
"""Pixel steps of the reserved codes, whose bucket lists are already fixed."""


class Registry(Mapping[str, ModelSpec]):
    """Code -> `ModelSpec`; a full name (``tinyflux``) finds its family too."""

    def __init__(self, families: dict[str, str]) -> None:
        self._families = families
        self._loaded: dict[str, ModelSpec] = {}

    def __getitem__(self, name: str) -> ModelSpec:
        if name in self._families:
            if name not in self._loaded:
                self._loaded[name] = resolve(self._families[name])
            return self._loaded[name]
        for code in self._families:
            if self[code].full_name == name:
                return self[code]
        raise KeyError(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._families)

    def __len__(self) -> int:
        return len(self._families)

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and (name in self._families or any(self[c].full_name == name for c in self))


MODELS: Mapping[str, ModelSpec] = Registry(FAMILIES)
