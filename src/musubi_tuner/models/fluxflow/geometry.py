"""The shape of a FluxFlow system: autoencoder, flow processor, text head, discriminator. Torch-free.

Defaults are the published layout of 0.4.0 to 0.5.1. Fields below ``latent_skip`` change what is computed; `V2` turns on what new
models should have. A file without a config is read from its shapes (see `state_dict`) and has none of them.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, Self

MOST_HALVINGS = 4
"""Of a picture whose sides are multiples of 16."""
POINTS_OF_LOGVAR = (-3.0, -1.0, 1.0, 3.0)


@dataclass(frozen=True)
class FluxFlowConfig:
    """Geometry of a FluxFlow system.

    Attributes:
        vae_dim: channels of the latents. feature_maps_dim: width of the flow processor. text_embedding_dim: of the pooled text.
        feature_maps_dim_disc: width of the discriminator's first layer. disc_depth: its halvings.
        downscales: halvings of the autoencoder. attn_layers, attn_heads, attn_ff_mult: of the compressor's attention.
        flow_layers, flow_heads: of the flow processor. ctx_tokens: latents that its context begins with.
        max_hw: unit of the sizes in the last token. down_kernel, up_kernel, mix_kernel: sides of the strided, the transposed
            and the dilated convolutions. head_widths: of the layers before RGB.
        compat: ``fixed``, or ``reference`` for weights trained by the published program: all times but 0 mean the last one,
            and padding counts in the pooled text.
        latent_skip: latents before sampling are added to the tokens, which bypasses the KL term.
        down_shortcut: every stage of the compressor adds its input. pair_residual: pairs of 1x1 layers add theirs.
        up_skip: weight of an up-block's input in its output.
        p_pre: activation of control points in the autoencoder. rgb_norm: ``group`` or ``none``.
        logvar_points: control points of the log-variance at the beginning.
        rotary: ``raster`` positions with the published pairing, or ``axial``: rows and columns, and true rotations.
        controls: how a flow block's parts meet: ``part`` after part, or ``interleaved`` channel by channel, beside a residual.
        flow_head: the convolutions after the blocks change the ``first`` tokens, or ``all``.
        latent_space: what the flow makes: ``tokens`` behind the compressor's attention, as published, or ``mu`` before it, normalised.
        text_mode: ``pooled``, or ``sequence``: the blocks also see the states of all text tokens.
        text_width, text_layers, text_heads, text_ff, text_vocab, text_positions: of the language model, a DistilBERT.

    Raises:
        ValueError: naming the numbers, if they do not fit together.
    """

    vae_dim: int = 128
    feature_maps_dim: int = 128
    text_embedding_dim: int = 1024
    feature_maps_dim_disc: int = 64
    disc_depth: int = 4
    downscales: int = 4
    attn_layers: int = 4
    attn_heads: int = 8
    attn_ff_mult: int = 2
    flow_layers: int = 10
    flow_heads: int = 8
    ctx_tokens: int = 4
    max_hw: int = 1024
    down_kernel: int = 8
    up_kernel: int = 16
    mix_kernel: int = 5
    head_widths: tuple[int, int] = (96, 48)
    compat: Literal["fixed", "reference"] = "fixed"
    latent_skip: bool = True
    down_shortcut: bool = False
    pair_residual: bool = False
    up_skip: float = 0.1
    p_pre: Literal["silu", "none", "sigmoid", "tanh"] = "silu"
    rgb_norm: Literal["group", "none"] = "group"
    logvar_points: tuple[float, float, float, float] = POINTS_OF_LOGVAR
    rotary: Literal["raster", "axial"] = "raster"
    controls: Literal["part", "interleaved"] = "part"
    flow_head: Literal["first", "all"] = "first"
    latent_space: Literal["tokens", "mu"] = "tokens"
    text_mode: Literal["pooled", "sequence"] = "pooled"
    text_width: int = 768
    text_layers: int = 6
    text_heads: int = 12
    text_ff: int = 3072
    text_vocab: int = 30522
    text_positions: int = 512

    def __post_init__(self) -> None:
        self._check_types()
        for name, count in (("head_widths", 2), ("logvar_points", 4)):
            object.__setattr__(self, name, tuple(getattr(self, name)))
            if len(getattr(self, name)) != count:
                raise ValueError(f"{name} is {list(getattr(self, name))}, it must be {count} numbers")
        least = {"attn_layers": 0, "disc_depth": 0, "text_layers": 0}
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, int) and not isinstance(value, bool) and value < least.get(field.name, 1):
                raise ValueError(f"{field.name} is {value}, it must be at least {least.get(field.name, 1)}")
        for name in ("downscales", "disc_depth"):
            if getattr(self, name) > MOST_HALVINGS:
                raise ValueError(
                    f"{name} is {getattr(self, name)}, at most {MOST_HALVINGS}: sides of pictures are multiples of 16"
                )
        if self.vae_dim % self.attn_heads:
            raise ValueError(f"vae_dim {self.vae_dim} is not a multiple of attn_heads {self.attn_heads}")
        if self.vae_dim > 32 and self.vae_dim % 32:
            raise ValueError(f"vae_dim is {self.vae_dim}: above 32 it must be a multiple of 32")
        if self.feature_maps_dim % self.flow_heads or self.feature_maps_dim // self.flow_heads % 2:
            raise ValueError(
                f"feature_maps_dim {self.feature_maps_dim} is not an even multiple of flow_heads {self.flow_heads}"
            )
        if self.rotary == "axial" and self.feature_maps_dim // self.flow_heads % 4:
            raise ValueError(
                f'feature_maps_dim / flow_heads is {self.feature_maps_dim // self.flow_heads}: rotary = "axial" needs a multiple of 4'
            )
        if self.latent_space == "mu" and self.latent_skip:
            raise ValueError('latent_space is "mu", from which tokens can be made only with latent_skip = false')
        if self.text_width % self.text_heads:
            raise ValueError(f"text_width {self.text_width} is not a multiple of text_heads {self.text_heads}")
        for name in ("down_kernel", "up_kernel"):
            if getattr(self, name) % 2:
                raise ValueError(f"{name} is {getattr(self, name)}, it must be even")
        if not self.mix_kernel % 2:
            raise ValueError(f"mix_kernel is {self.mix_kernel}, it must be odd")
        if self.rgb_norm == "group" and any(width % 8 for width in self.head_widths):
            raise ValueError(
                f'head_widths is {list(self.head_widths)}: with rgb_norm = "group" they must be multiples of 8'
            )

    def _check_types(self) -> None:
        choices = {"compat": ("fixed", "reference"), "p_pre": ("none", "sigmoid", "tanh", "silu"), "rgb_norm": ("group", "none"),
                   "rotary": ("raster", "axial"), "controls": ("part", "interleaved"), "flow_head": ("first", "all"), "latent_space": ("tokens", "mu"),
                   "text_mode": ("pooled", "sequence")}  # fmt: skip
        for field in fields(self):
            value = getattr(self, field.name)
            whole = type(value) is int
            if field.name in choices:
                good, expected = value in choices[field.name], f"one of {', '.join(choices[field.name])}"
            elif field.type is int:
                good, expected = whole, "a whole number"
            elif field.type is bool:
                good, expected = isinstance(value, bool), "true or false"
            elif field.type is float:
                good, expected = whole or isinstance(value, float), "a number"
            else:
                good = isinstance(value, list | tuple) and all(type(v) in (int, float) for v in value)
                expected = "a list of numbers"
            if not good:
                raise ValueError(f"{field.name} is {value!r}, expected {expected}")

    @property
    def factor(self) -> int:
        """Pixels per latent and axis."""
        return int(2**self.downscales)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Build from a plain object; unknown keys are ignored."""
        known = {field.name for field in fields(cls)}
        return cls(**{name: value for name, value in values.items() if name in known})

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, fields in order."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    def to_json(self) -> str:
        """Text of a `config.json`."""
        return json.dumps(self.to_dict(), indent=2) + "\n"


V2: dict[str, Any] = {
    "latent_skip": False,
    "down_shortcut": True,
    "pair_residual": True,
    "up_skip": 1.0,
    "p_pre": "none",
    "rgb_norm": "none",
    "logvar_points": (-8.0, -6.0, -4.0, -2.0),
    "rotary": "axial",
    "controls": "interleaved",
    "flow_head": "all",
    "latent_space": "mu",
    "text_mode": "sequence",
}
"""What new models should have (`ff-v2`); off for weights of the published program."""
LAYOUTS: dict[str, dict[str, Any]] = {"ff-v2": V2, "published": {}}
"""Value of model.layout -> the fields that it changes."""
