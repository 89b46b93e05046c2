"""The two text encoders: T5 (one state per token) and CLIP-L (states and one pooled vector), with their tokenizers.

Files: a single safetensors file with the published key names (with or without prefixes), the part of an all-in-one file, or a
folder in the Hugging Face layout. Tokenizers come from a folder (the encoder's own, a `tokenizer` folder beside it, or the one given) or
from the hub. Geometry of a single file: header, else a json beside it, else the published model if all shapes agree.

Facts: T5 is fed padded to a fixed length, with its attention mask or, as FLUX.1 wants it, without; CLIP is padded to its
77 positions and pooled at the first end-of-text token of the final-normed states.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from musubi_tuner.encoders.locate import find_tokenizer
from musubi_tuner.encoders.tokens import CLIP_TOKENS
from musubi_tuner.errors import CheckpointError
from musubi_tuner.files import encodable
from musubi_tuner.memory.frozen_linear import FrozenLinear
from musubi_tuner.weights.sources import fits, materialize, on_meta, part_of, read_source
from musubi_tuner.weights.stored import StoredWeight, read_stored

CLIP_L_CONFIG: dict[str, Any] = {
    "vocab_size": 49408,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "projection_dim": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": CLIP_TOKENS,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}
_T5_COMMON: dict[str, Any] = {
    "vocab_size": 32128,
    "d_kv": 64,
    "relative_attention_num_buckets": 32,
    "layer_norm_epsilon": 1e-6,
    "feed_forward_proj": "gated-gelu",
}
T5_CONFIGS: dict[str, dict[str, Any]] = {
    "base": {**_T5_COMMON, "d_model": 768, "d_ff": 2048, "num_layers": 12, "num_heads": 12},
    "xxl": {**_T5_COMMON, "d_model": 4096, "d_ff": 10240, "num_layers": 24, "num_heads": 64},
}
"""google/flan-t5-base (T5 v1.1 base has the same shapes) and google/t5-v1_1-xxl."""
T5_TITLES = {"base": "flan-T5-base", "xxl": "T5 v1.1 XXL"}

_CLIP_IGNORED = ("position_ids", "text_projection.weight", "logit_scale")


@dataclass
class TextStates:
    """Encoded texts.

    Attributes:
        states: [B, L, D] float32. mask: [B, L] int64, 1 for real tokens.
        pooled: [B, D] float32, CLIP only.
    """

    states: Tensor
    mask: Tensor
    pooled: Tensor | None


class TextEncoder:
    """A frozen text encoder with its tokenizer."""

    def __init__(self, module: Any, tokenizer: Any, max_tokens: int, pooled: bool, masked: bool = True) -> None:
        self.module, self.tokenizer, self.max_tokens, self.has_pooled = module, tokenizer, max_tokens, pooled
        self.masked = masked

    @property
    def width(self) -> int:
        """Size of a token's state."""
        return int(self.module.config.hidden_size)

    @torch.no_grad()
    def encode(self, texts: Sequence[str]) -> TextStates:
        """Encode texts, padded and cut to `max_tokens`; encoders/tokens.py says which are cut."""
        texts = [encodable(text) for text in texts]  # tokenizers take UTF-8 only
        tokens = self.tokenizer(
            texts, padding="max_length", truncation=True, max_length=self.max_tokens, return_tensors="pt"
        )
        device = next(self.module.parameters()).device
        ids, mask = tokens["input_ids"].to(device), tokens["attention_mask"].to(device)
        visible = mask if self.masked else torch.ones_like(mask)
        states = self.module(input_ids=ids, attention_mask=visible).last_hidden_state.float()
        pooled = None
        if self.has_pooled:
            first_end = (ids == self.tokenizer.eos_token_id).int().argmax(dim=-1)
            pooled = states[torch.arange(len(ids), device=device), first_end].cpu()
        return TextStates(states.cpu(), mask.cpu(), pooled)


def load_tokenizer(place: Path | str, vocabulary: int, key: str) -> Any:
    """Load a fast tokenizer offline from a folder, or from the hub.

    Raises:
        CheckpointError: if it cannot be read, or does not belong to an encoder of that vocabulary.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(place))
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(f"{key}: no tokenizer at {place} ({reason}); give its folder") from error
    if not 8 <= len(tokenizer) <= vocabulary:
        raise CheckpointError(
            f"{key}: the tokenizer at {place} knows {len(tokenizer)} tokens, the encoder {vocabulary}; they do not belong "
            "together"
        )
    if tokenizer.pad_token_id is None:
        raise CheckpointError(f"{key}: the tokenizer at {place} has no padding token")
    return tokenizer


def _check_marks(tokenizer: Any, place: Path | str, key: str, *, begins: bool) -> None:
    """CLIP's texts begin and end with a mark, T5's only end with one; the tokenizers are told apart by that."""
    ids = tokenizer("a")["input_ids"]
    has_begin = tokenizer.bos_token_id is not None and ids[:1] == [tokenizer.bos_token_id]
    if has_begin != begins or ids[-1:] != [tokenizer.eos_token_id]:
        wanted = "CLIP's, whose texts begin and end with a mark" if begins else "T5's, whose texts end with a mark"
        raise CheckpointError(f"{key}: the tokenizer at {place} is not {wanted}; are the two tokenizers swapped?")


def load_clip(
    path: Path,
    tokenizer: Path | str | None,
    fallback: str,
    *,
    dtype: torch.dtype,
    device: torch.device | str,
    activation: str = "quick_gelu",
) -> TextEncoder:
    """Load a CLIP text model.

    Args:
        activation: of a file without config; the published models use quick_gelu.

    Raises:
        CheckpointError: for a T5 file, a file of another shape, or a tokenizer that does not fit.
    """
    from transformers import CLIPTextConfig, CLIPTextModel

    tensors, config, file = read_source(path)
    tensors, what = part_of(tensors, "text_encoders.clip_l.", "cond_stage_model."), f"model.clip_path: {file}"
    if any(".SelfAttention." in key for key in tensors):
        raise CheckpointError(f"{what}: is a T5 encoder, expected CLIP-L; are clip_path and t5_path swapped?")
    text = _strip_prefix(tensors, "text_model.")
    if not any(key.startswith("encoder.layers.") for key in text):
        raise CheckpointError(f"{what}: holds no CLIP text model (first key: {next(iter(tensors))})")
    text = {
        key: tensor
        for key, tensor in text.items()
        if not key.endswith(_CLIP_IGNORED) and not key.startswith(("vision_model.", "visual_projection."))
    }
    if config is not None and "text_config" in config:
        config = config["text_config"]
    stated = None if config is None else config.get("hidden_act", "quick_gelu")
    if stated is not None and activation not in ("quick_gelu", stated):
        raise CheckpointError(
            f'{what}: its config says hidden_act = "{stated}", and model.clip_act "{activation}"; remove the key, or give the file '
            "without its config"
        )

    def build(values: dict[str, Any]) -> Any:
        known = {key: value for key, value in values.items() if key not in ("architectures", "_class_name", "dtype")}
        return on_meta(lambda: CLIPTextModel(CLIPTextConfig(**known)))

    if config is None:
        config = {**CLIP_L_CONFIG, "hidden_act": activation}
        if not fits(build(config), _to_module_names(build(config), text)):
            raise CheckpointError(
                f"{what}: has no config in its header or beside it, and is not the published CLIP-L. Put its config.json "
                "beside the file"
            )
    module = build(config)
    materialize(module, _to_module_names(module, text), f"{what}: is not this CLIP text model", dtype, device)
    place = find_tokenizer(path, tokenizer, fallback)
    loaded = load_tokenizer(place, module.config.vocab_size, "model.clip_tokenizer")
    _check_marks(loaded, place, "model.clip_tokenizer", begins=True)
    return TextEncoder(module, loaded, module.config.max_position_embeddings, pooled=True)


def _strip_prefix(tensors: dict[str, Tensor], marker: str) -> dict[str, Tensor]:
    """Keys after the last ``marker`` where a file has it (``text_encoders.clip_l.transformer.text_model.`` and the like)."""
    if not any(marker in key for key in tensors):
        return tensors
    return {key.split(marker, 1)[1] if marker in key else key: tensor for key, tensor in tensors.items()}


def _to_module_names(module: Any, text: dict[str, Tensor]) -> dict[str, Tensor]:
    """Add the ``text_model.`` level where the installed transformers version still has it."""
    prefix = "text_model." if any(key.startswith("text_model.") for key in module.state_dict()) else ""
    return {prefix + key: tensor for key, tensor in text.items()}


def load_t5(
    path: Path,
    tokenizer: Path | str | None,
    fallback: str,
    *,
    max_tokens: int,
    dtype: torch.dtype,
    device: torch.device | str,
    preset: str = "base",
    masked: bool = True,
    fp8: bool = False,
) -> TextEncoder:
    """Load a T5 encoder.

    Args:
        preset: published geometry that a file without config is taken for.
        masked: hide padding from attention.
        fp8: hold the weights of the Linear layers in float8: those of an fp8 file as they are, others with a scale per row.

    Raises:
        CheckpointError: for a CLIP file, a file of another shape, or a tokenizer that does not fit.
    """
    from transformers import T5Config, T5EncoderModel

    tensors, config, file = read_source(path)
    tensors, what = part_of(tensors, "text_encoders.t5xxl."), f"model.t5_path: {file}"
    if any("self_attn" in key or "text_model." in key for key in tensors):
        raise CheckpointError(f"{what}: is a CLIP text model, expected T5; are clip_path and t5_path swapped?")
    stored = read_stored(_t5_keys(tensors), {}, what)
    text = {key: weight.dense(dtype) for key, weight in stored.items()}
    if not any(key.startswith("encoder.block.") for key in text):
        raise CheckpointError(f"{what}: holds no T5 encoder (first key: {next(iter(tensors))})")

    def build(values: dict[str, Any]) -> Any:
        known = {key: value for key, value in values.items() if key not in ("architectures", "_class_name", "dtype")}
        return on_meta(lambda: T5EncoderModel(T5Config(**known)))

    if config is None:
        config = T5_CONFIGS[preset]
        if not fits(build(config), text):
            raise CheckpointError(
                f"{what}: has no config in its header or beside it, and is not the published {T5_TITLES[preset]}. Put its "
                "config.json beside the file"
            )
    module = build(config)
    own = set(module.state_dict())
    materialize(
        module, {key: t for key, t in text.items() if key in own}, f"{what}: is not this T5 encoder", dtype, device
    )
    module.tie_weights()
    if fp8:
        _store_fp8(module, stored)
    place = find_tokenizer(path, tokenizer, fallback)
    loaded = load_tokenizer(place, module.config.vocab_size, "model.t5_tokenizer")
    _check_marks(loaded, place, "model.t5_tokenizer", begins=False)
    return TextEncoder(module, loaded, max_tokens, pooled=False, masked=masked)


def _store_fp8(module: Any, stored: dict[str, StoredWeight]) -> None:
    """Replace the Linear layers of a T5 encoder by fp8 ones."""
    layers = {name: layer for name, layer in module.named_modules() if isinstance(layer, torch.nn.Linear)}
    for name, layer in layers.items():
        weight = stored.get(f"{name}.weight")
        frozen = FrozenLinear.of_weight(
            StoredWeight.of(layer.weight.detach()) if weight is None or not weight.is_fp8 else weight,
            layer.bias, "fp8_scaled", layer.weight.dtype, scale="row", device=layer.weight.device,
        )  # fmt: skip
        # transformers asks the last layer of a block for the dtype of its weight, and casts its input to that.
        frozen.weight = torch.empty(0, dtype=frozen.dtype)
        module.set_submodule(name, frozen)


def _t5_keys(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Encoder keys without outer prefixes; both names of the embedding matrix are filled in."""
    marker = next((key[: key.index("encoder.block.")] for key in tensors if "encoder.block." in key), "")
    text = {key.removeprefix(marker): tensor for key, tensor in tensors.items()}
    embedding = text.get("shared.weight", text.get("encoder.embed_tokens.weight"))
    if embedding is not None:
        text["shared.weight"] = text["encoder.embed_tokens.weight"] = embedding
    return {key: tensor for key, tensor in text.items() if not key.startswith(("decoder.", "lm_head.", "spiece_model"))}
