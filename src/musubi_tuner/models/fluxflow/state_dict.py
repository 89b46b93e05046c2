"""Parts of a FluxFlow system in files: ours, the published ones, and their geometry.

    part            key in our files          key in the published files
    compressor      vae.compressor.           diffuser.compressor.
    expander        vae.expander.             diffuser.expander.
    flow            flow.                     diffuser.flow_processor.
    text_encoder    text_encoder.             text_encoder.
    discriminator   discriminator.            D_img. or disc_img.

A file of one part may do without a prefix. Geometry is that of a config, or else read from the shapes: a published file has none.
Only files of 0.4.0 to 0.5.1 are what these classes compute; later ones hold other models under similar names and are refused.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from musubi_tuner.errors import CheckpointError
from musubi_tuner.models.fluxflow.autoencoder import Compressor, Expander
from musubi_tuner.models.fluxflow.discriminator import PatchDiscriminator
from musubi_tuner.models.fluxflow.geometry import FluxFlowConfig
from musubi_tuner.models.fluxflow.model import FlowProcessor
from musubi_tuner.models.fluxflow.text_encoder import TextEncoder
from musubi_tuner.weights.checkpoints import WeightFile, read_weights, strip_wrappers

PARTS = ("compressor", "expander", "flow", "text_encoder", "discriminator")
PREFIXES = {
    "vae.compressor.": "compressor",
    "diffuser.compressor.": "compressor",
    "compressor.": "compressor",
    "vae.expander.": "expander",
    "diffuser.expander.": "expander",
    "expander.": "expander",
    "diffuser.flow_processor.": "flow",
    "flow_processor.": "flow",
    "flow.": "flow",
    "text_encoder.": "text_encoder",
    "discriminator.": "discriminator",
    "D_img.": "discriminator",
    "disc_img.": "discriminator",
}
BARE = {
    "compressor": ("encoder_first_step.", "encoder_z.", "latent_proj.", "mu_proj.", "logvar_proj.", "mu_activation.",
                   "logvar_activation.", "token_attn.", "shortcuts."),
    "expander": ("upscale.", "context_mixer.", "to_rgb_conv.", "rgb_activation."),
    "flow": ("vae_to_dmodel.", "dmodel_to_vae.", "ctx_mixer.", "time_embed.", "text_proj.", "text_tokens.", "context_injection.",
             "transformer_blocks.", "flow_predictor.", "context_final."),
    "text_encoder": ("language_model.", "ouput_layer."),
    "discriminator": ("backbone.", "head.", "ctx_proj."),
}  # fmt: skip
"""Beginnings of the keys of a file of one part without a prefix."""
LATER = {"final_norm.": "0.6", "context_proj.": "0.7", "film_p0": "0.8"}
"""In keys of later versions -> the first that has it."""
OUR_PREFIX = {
    "compressor": "vae.compressor.",
    "expander": "vae.expander.",
    "flow": "flow.",
    "text_encoder": "text_encoder.",
    "discriminator": "discriminator.",
}
PUBLISHED_PREFIX = {
    "compressor": "diffuser.compressor.",
    "flow": "diffuser.flow_processor.",
    "expander": "diffuser.expander.",
    "text_encoder": "text_encoder.",
    "discriminator": "D_img.",
}
PUBLISHED_FILES = {
    "flxflow_final.safetensors": ("compressor", "flow", "expander"),
    "text_encoder.safetensors": ("text_encoder",),
    "D_img.safetensors": ("discriminator",),
}
OTHER_FILES = {"D_img.safetensors": "disc_img.safetensors"}
"""Names that the published library itself writes."""


@dataclass
class System:
    """Weights by part, and what they are.

    Attributes:
        geometry: None only without weights. options: recorded with them, see `family`.
    """

    parts: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    geometry: FluxFlowConfig | None = None
    options: dict[str, Any] = field(default_factory=dict)


def split(tensors: Mapping[str, Tensor], what: str) -> dict[str, dict[str, Tensor]]:
    """Tensors by part, under the names of its module.

    Args:
        what: the file, for messages.

    Raises:
        CheckpointError: for keys that belong to no part, or to a later version.
    """
    parts: dict[str, dict[str, Tensor]] = {}
    foreign = []
    for key, tensor in tensors.items():
        key = strip_wrappers(key)
        version = next((first for piece, first in LATER.items() if piece in key), None)
        if version is not None:
            raise CheckpointError(
                f"{what}: is a model of FluxFlow {version} or later ({key}), which computes something else; this program reads "
                "0.4.0 to 0.5.1 and its own files"
            )
        prefix = next((prefix for prefix in PREFIXES if key.startswith(prefix)), "")
        part = PREFIXES[prefix] if prefix else next((p for p, begun in BARE.items() if key.startswith(begun)), None)
        if part is None:
            foreign.append(key)
        else:
            parts.setdefault(part, {})[key.removeprefix(prefix)] = tensor
    if "backbone.0.weight" in parts.get("discriminator", {}):
        raise CheckpointError(
            f"{what}: is a discriminator of FluxFlow 0.6 or later; this program reads 0.4.0 to 0.5.1 and its own files"
        )
    if foreign:
        raise CheckpointError(
            f"{what}: holds {foreign[0]}, which belongs to no part of FluxFlow ({len(foreign)} such keys)"
        )
    return parts


def infer_geometry(parts: Mapping[str, Mapping[str, Tensor]], what: str) -> FluxFlowConfig:
    """Geometry of parts without a config, from their shapes; what no part states is as published.

    Raises:
        CheckpointError: if the shapes fit no model.
    """
    values: dict[str, Any] = {}

    def count(part: Mapping[str, Tensor], prefix: str) -> int:
        return len({key.removeprefix(prefix).split(".")[0] for key in part if key.startswith(prefix)})

    try:
        if compressor := parts.get("compressor"):
            values["vae_dim"] = compressor["latent_proj.0.0.weight"].shape[0] // 5
            values["downscales"] = count(compressor, "encoder_z.")
            values["down_kernel"] = compressor["encoder_z.0.0.weight"].shape[-1]
            values["attn_layers"] = count(compressor, "token_attn.")
            values["down_shortcut"] = any(key.startswith("shortcuts.") for key in compressor)
            if values["attn_layers"]:
                values["attn_ff_mult"] = compressor["token_attn.0.ff.2.weight"].shape[1] // values["vae_dim"]
        if expander := parts.get("expander"):
            values["vae_dim"] = expander["upscale.layers.0.conv1.0.weight"].shape[0]
            values["downscales"] = count(expander, "upscale.layers.")
            values["up_kernel"] = expander["upscale.layers.0.conv1.0.weight"].shape[-1]
            values["mix_kernel"] = expander["upscale.layers.0.conv1.2.weight"].shape[-1]
            values["head_widths"] = tuple(expander[f"to_rgb_conv.{n}.weight"].shape[0] for n in (0, 3))
            values["rgb_norm"] = "group" if "to_rgb_conv.1.weight" in expander else "none"
        if flow := parts.get("flow"):
            values["feature_maps_dim"] = flow["vae_to_dmodel.weight"].shape[0]
            values["vae_dim"] = flow["vae_to_dmodel.weight"].shape[1]
            values["text_embedding_dim"] = flow["text_proj.weight"].shape[1]
            values["flow_layers"] = count(flow, "transformer_blocks.")
            frequencies = flow["transformer_blocks.0.rotary_pe.inv_freq"].shape[0]
            values["flow_heads"] = values["feature_maps_dim"] // (2 * frequencies)
            if "text_tokens.weight" in flow:
                values |= {"text_mode": "sequence", "text_width": flow["text_tokens.weight"].shape[1]}
        if text := parts.get("text_encoder"):
            values["text_embedding_dim"] = text["ouput_layer.3.weight"].shape[0] // 5
            words = text["language_model.embeddings.word_embeddings.weight"]
            values["text_vocab"], values["text_width"] = words.shape
            values["text_positions"] = text["language_model.embeddings.position_embeddings.weight"].shape[0]
            values["text_layers"] = count(text, "language_model.transformer.layer.")
            if values["text_layers"]:
                values["text_ff"] = text["language_model.transformer.layer.0.ffn.lin1.weight"].shape[0]
            values["text_heads"] = max(1, values["text_width"] // 64)
        if judge := parts.get("discriminator"):
            values["feature_maps_dim_disc"] = judge["backbone.0.0.weight_orig"].shape[0]
            values["disc_depth"] = count(judge, "backbone.") - 1
            values["vae_dim"] = judge["ctx_proj.0.weight_orig"].shape[1]
        return FluxFlowConfig.from_dict(values)
    except (KeyError, IndexError) as problem:
        raise CheckpointError(f"{what}: lacks {problem}, from which the geometry is read") from problem
    except ValueError as problem:
        raise CheckpointError(f"{what}: its shapes fit no FluxFlow: {problem}") from problem


def read_system(file: WeightFile) -> System:
    """Parts of a weight file, with those that a folder of the published program keeps beside it.

    Raises:
        CheckpointError: see `split` and `infer_geometry`.
    """
    parts = split(file.tensors, str(file.path))
    if file.path.name in PUBLISHED_FILES:
        for name in PUBLISHED_FILES:
            beside = next(
                (
                    p
                    for p in (file.path.with_name(name), file.path.with_name(OTHER_FILES.get(name, name)))
                    if p.is_file()
                ),
                None,
            )
            if beside is not None and beside != file.path:
                for part, tensors in split(read_weights(beside).tensors, str(beside)).items():
                    parts.setdefault(part, tensors)
    if not parts:
        raise CheckpointError(f"{file.path}: holds no part of FluxFlow")
    if file.config is not None:
        try:
            return System(parts, FluxFlowConfig.from_dict(file.config), dict(file.options))
        except ValueError as problem:
            raise CheckpointError(f"{file.path}: its config fits no FluxFlow: {problem}") from problem
    return System(parts, infer_geometry(parts, str(file.path)))


def build_part(part: str, config: FluxFlowConfig) -> nn.Module:
    """One part with fresh weights, or on the meta device inside ``torch.device("meta")``."""

    def same(*names: str) -> dict[str, Any]:
        """Arguments that have the names of fields."""
        return {name: getattr(config, name) for name in names}

    if part == "compressor":
        own = same("downscales", "max_hw", "attn_layers", "attn_heads", "attn_ff_mult", "down_kernel", "p_pre", "latent_skip",
                   "down_shortcut", "pair_residual", "logvar_points")  # fmt: skip
        return Compressor(d_model=config.vae_dim, **own)
    if part == "expander":
        own = same("max_hw", "up_kernel", "mix_kernel", "up_skip", "p_pre", "head_widths", "rgb_norm")
        return Expander(config.vae_dim, config.downscales, **own)
    if part == "flow":
        return FlowProcessor(
            config.feature_maps_dim,
            embedding_size=config.text_embedding_dim,
            n_head=config.flow_heads,
            n_layers=config.flow_layers,
            text_width=config.text_width if config.text_mode == "sequence" else 0,
            **same("vae_dim", "max_hw", "ctx_tokens", "compat", "rotary", "controls", "flow_head"),
        )
    if part == "text_encoder":
        geometry = {
            "vocab_size": config.text_vocab,
            "dim": config.text_width,
            "n_layers": config.text_layers,
            "n_heads": config.text_heads,
            "hidden_dim": config.text_ff,
            "max_position_embeddings": config.text_positions,
        }
        return TextEncoder(geometry, config.text_embedding_dim, config.compat)
    return PatchDiscriminator(base_ch=config.feature_maps_dim_disc, depth=config.disc_depth, ctx_dim=config.vae_dim)


def published_tensors(parts: Mapping[str, Mapping[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
    """Name of a published file -> its tensors, for those whose parts are there."""
    return {
        name: {f"{PUBLISHED_PREFIX[part]}{key}": tensor for part in held for key, tensor in parts[part].items()}
        for name, wanted in PUBLISHED_FILES.items()
        if (held := [part for part in wanted if part in parts])
    }
