"""The only list of model families. Torch-free: families are described by their options and resolved on use.

To add a family, write its folder and add one line to `FAMILIES`.
"""

from collections.abc import Iterator, Mapping

from musubi_tuner.models.spec import ModelSpec, resolve

FAMILIES: dict[str, str] = {
    "tf": "musubi_tuner.models.tinyflux.options:SPEC",
    "fd": "musubi_tuner.models.flux_dev.options:SPEC",
    "ff": "musubi_tuner.models.fluxflow.options:SPEC",
}
"""Architecture code -> dotted name of the family's `ModelSpec`."""

_OTHER_MODELS = {
    "U-Net models": ("sd1", "sd15", "sd1.5", "sd2", "sd21", "sd2.1", "sdxl", "sdxl1", "stable-diffusion", "pony", "illustrious"),
    "SD3 models": ("sd3", "sd3.5", "sd35"),
    "video models": ("hv", "hunyuan_video", "hv15", "wan", "wan21", "wan22", "fp", "framepack", "k5", "kandinsky5", "ltx", "cogvideox"),
    "other image models": ("fk", "flux_kontext", "kontext", "f2d", "flux_2_dev", "flux2", "f2k4b", "f2k9b", "qi", "qwen_image", "qie",
                           "qil", "zi", "z_image", "zimage", "chroma", "lumina2", "hidream", "ho1", "i4", "ideogram4", "kr2", "krea2",
                           "sana", "auraflow", "pixart"),
}  # fmt: skip
"""What other trainers train."""
_SCHNELL = ("schnell", "flux-schnell", "flux1-schnell", "flux_schnell")


def foreign_family(name: str) -> str | None:
    """What a name is that is no family here; None if nothing is known of it."""
    word = name.lower()
    for kind, names in _OTHER_MODELS.items():
        if word in names:
            return f"is one of the {kind}, which this program does not train."
    code = called(word)
    if code is not None:
        return f'is {MODELS[code].title} here if you write "{code}".'
    if word in _SCHNELL:
        return 'is FLUX.1 without guidance: write "fd" and model.allow_schnell = true.'
    return None


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


def called(name: str) -> str | None:
    """Code of the family that a name means, by its own names or those of other trainers; None if it is none."""
    word = name.lower()
    return next(
        (
            code
            for code in MODELS
            if word in (code, MODELS[code].full_name, MODELS[code].title.lower(), *MODELS[code].other_names)
        ),
        None,
    )


def trained_elsewhere() -> str:
    """Code of the family that other trainers train too."""
    return next(code for code in MODELS if MODELS[code].other_names)
