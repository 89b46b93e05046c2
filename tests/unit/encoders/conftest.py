"""Tiny encoders of the real topologies with random weights, saved once per session in every form that is accepted.

Every parameter is moved away from its start value, so that two weights that are taken for each other change the output.
"""

import json
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from musubi_tuner.demo.prepare import word_tokenizer

WORDS = ["a", "blue", "circle", "cross", "green", "left", "of", "on", "red", "square", "the", "triangle", "white"]
LONG = " ".join(WORDS * 6)
TEXTS = ["a red circle", "", "the blue square on the left of a white triangle", "unknown words here", LONG]
"""Short, empty, middling, out of the vocabulary, and longer than any encoder takes."""


def perturb(module: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(noise, alpha=0.1 + 0.2 * parameter.std(correction=0).item())


def contiguous(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: tensor.detach().clone().contiguous() for key, tensor in tensors.items()}


def kl_modules(levels: int, layers: int) -> dict[str, str]:
    """Module of Black Forest Labs' autoencoder -> module of diffusers', for all modules with weights.

    Theirs counts decoder levels from the finest, diffusers' from the coarsest; a level has ``layers`` blocks in the
    encoder and one more in the decoder. Modules that a geometry lacks are named too.
    """
    block = {"norm1": "norm1", "conv1": "conv1", "norm2": "norm2", "conv2": "conv2", "nin_shortcut": "conv_shortcut"}
    attention = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
    names: dict[str, str] = {}
    for half, level_name, diffusers_levels, resize, resizers, blocks in (
        ("encoder", "down", "down_blocks", "downsample", "downsamplers", layers),
        ("decoder", "up", "up_blocks", "upsample", "upsamplers", layers + 1),
    ):
        names |= {f"{half}.conv_in": f"{half}.conv_in", f"{half}.conv_out": f"{half}.conv_out"}
        names[f"{half}.norm_out"] = f"{half}.conv_norm_out"
        for index in (1, 2):
            for ours, theirs in block.items():
                names[f"{half}.mid.block_{index}.{ours}"] = f"{half}.mid_block.resnets.{index - 1}.{theirs}"
        for ours, theirs in attention.items():
            names[f"{half}.mid.attn_1.{ours}"] = f"{half}.mid_block.attentions.0.{theirs}"
        for level in range(levels):
            other = f"{half}.{diffusers_levels}.{level if half == 'encoder' else levels - 1 - level}"
            names[f"{half}.{level_name}.{level}.{resize}.conv"] = f"{other}.{resizers}.0.conv"
            for index in range(blocks):
                for ours, theirs in block.items():
                    names[f"{half}.{level_name}.{level}.block.{index}.{ours}"] = f"{other}.resnets.{index}.{theirs}"
    return names


def to_bfl(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights of a four-level diffusers autoencoder under Black Forest Labs' names, attention as 1x1 convolutions."""
    renamed: dict[str, Tensor] = {}
    for ours, theirs in kl_modules(levels=4, layers=2).items():
        for leaf in ("weight", "bias"):
            tensor = tensors.get(f"{theirs}.{leaf}")
            if tensor is not None:
                is_matrix = ".attn_1." in ours and tensor.ndim == 2
                renamed[f"{ours}.{leaf}"] = tensor[:, :, None, None] if is_matrix else tensor
    assert len(renamed) == len(tensors)
    return renamed


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Networks this small only lose by sharing out their work."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def texts() -> list[str]:
    return TEXTS


@pytest.fixture(scope="session")
def pixels() -> Tensor:
    """Two pictures [2, 3, 32, 48] in [-1, 1], not square."""
    return torch.rand(2, 3, 32, 48, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.fixture(scope="session")
def vae_config() -> dict[str, Any]:
    """The published FLUX autoencoder, 16 times narrower."""
    from musubi_tuner.encoders.autoencoder import FLUX_CONFIG

    return FLUX_CONFIG | {"block_out_channels": [8, 8, 16, 16], "norm_num_groups": 4, "sample_size": 32}


def build_kl(config: dict[str, Any], seed: int = 2) -> Any:
    from diffusers import AutoencoderKL

    torch.manual_seed(seed)
    module = AutoencoderKL.from_config({k: v for k, v in config.items() if not k.startswith("_")})
    perturb(module, seed)
    return module.eval()


@pytest.fixture(scope="session")
def kl(vae_config: dict[str, Any]) -> Any:
    """The autoencoder of diffusers that all files of `vae_files` hold."""
    return build_kl(vae_config)


STRANGERS = {
    "model.diffusion_model.double_blocks.0.img_attn.qkv.weight": torch.zeros(3, 3),
    "text_encoders.clip_l.transformer.text_model.encoder.layers.0.self_attn.q_proj.weight": torch.zeros(2, 2),
    "text_encoders.t5xxl.transformer.encoder.block.0.layer.0.SelfAttention.q.weight": torch.zeros(2, 2),
    "vae.decoder.up.0.block.0.conv1.weight": torch.zeros(2, 2, 3, 3),
}
"""Tensors of the other networks of an all-in-one file."""


@pytest.fixture(scope="session")
def vae_files(tmp_path_factory: pytest.TempPathFactory, kl: Any, vae_config: dict[str, Any]) -> dict[str, Path]:
    """Form -> file or folder of the same autoencoder."""
    root = tmp_path_factory.mktemp("vae")
    tensors = contiguous(kl.state_dict())
    bfl = contiguous(to_bfl(tensors))
    kl.save_pretrained(root / "folder")
    kl.save_pretrained(root / "sharded", max_shard_size="60KB")
    assert len(list((root / "sharded").glob("*-of-*.safetensors"))) > 1
    text = json.dumps(vae_config)
    header = {"config_json": text}
    save_file(tensors, root / "single.safetensors")
    (root / "single.json").write_text(text)
    save_file(tensors, root / "header.safetensors", metadata=header)
    save_file(bfl, root / "bfl.safetensors")
    (root / "bfl.json").write_text(text)
    save_file(bfl, root / "bfl_header.safetensors", metadata=header)
    wrapped = {f"module._orig_mod.{key}": tensor for key, tensor in tensors.items()}
    save_file(wrapped, root / "wrapped.safetensors", metadata=header)
    whole = STRANGERS | {f"vae.{key}": tensor for key, tensor in bfl.items()}
    save_file(contiguous(whole), root / "whole.safetensors", metadata=header)
    return {
        "folder": root / "folder",
        "sharded": root / "sharded",
        "json beside": root / "single.safetensors",
        "header": root / "header.safetensors",
        "bfl": root / "bfl.safetensors",
        "bfl header": root / "bfl_header.safetensors",
        "wrapped": root / "wrapped.safetensors",
        "all in one": root / "whole.safetensors",
    }


@pytest.fixture(scope="session")
def clip_tokenizer() -> Any:
    """Pads with its end-of-text token, as the published one does."""
    return word_tokenizer([*WORDS, "yellow", "cyan"], "<|startoftext|>", "<|endoftext|>", "<|endoftext|>", 20)


@pytest.fixture(scope="session")
def t5_tokenizer() -> Any:
    return word_tokenizer(WORDS, None, "</s>", "<pad>", 16)


@pytest.fixture(scope="session")
def clip(clip_tokenizer: Any) -> Any:
    """A CLIP text model of transformers: 2 layers of width 32, 20 positions."""
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(3)
    module = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(clip_tokenizer),
            hidden_size=32,
            intermediate_size=64,
            projection_dim=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=20,
            hidden_act="quick_gelu",
            pad_token_id=clip_tokenizer.pad_token_id,
            bos_token_id=clip_tokenizer.bos_token_id,
            eos_token_id=clip_tokenizer.eos_token_id,
        )
    )
    perturb(module, 3)
    return module.eval()


def clip_keys(module: Any) -> dict[str, Tensor]:
    """Weights of a CLIP text model without any prefix."""
    return {key.removeprefix("text_model."): tensor for key, tensor in contiguous(module.state_dict()).items()}


@pytest.fixture(scope="session")
def clip_files(tmp_path_factory: pytest.TempPathFactory, clip: Any, clip_tokenizer: Any) -> dict[str, Path]:
    """Form -> file or folder of the same CLIP text model, each with its tokenizer in reach."""
    root = tmp_path_factory.mktemp("clip")
    plain = clip_keys(clip)
    clip.save_pretrained(root / "folder")
    clip.save_pretrained(root / "sharded", max_shard_size="10KB")
    assert len(list((root / "sharded").glob("*-of-*.safetensors"))) > 1
    for folder in ("folder", "sharded", "tokenizer"):
        clip_tokenizer.save_pretrained(root / folder)
    config = (root / "folder" / "config.json").read_text()

    def save(name: str, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> Path:
        path = root / f"{name}.safetensors"
        save_file(tensors, path, metadata=metadata)
        if metadata is None:
            path.with_suffix(".json").write_text(config)
        return path

    prefixed = {f"text_model.{key}": tensor for key, tensor in plain.items()}
    extras = {"text_model.embeddings.position_ids": torch.arange(20)[None], "text_projection.weight": torch.eye(32)}
    outer = "text_encoders.clip_l.transformer."
    whole = {f"{outer}{key}": tensor for key, tensor in (prefixed | extras).items()}
    whole["text_encoders.clip_l.logit_scale"] = torch.tensor(4.6)
    return {
        "folder": root / "folder",
        "sharded": root / "sharded",
        "prefixed": save("prefixed", prefixed | contiguous(extras)),
        "unprefixed": save("unprefixed", plain),
        "all in one": save("whole", contiguous(STRANGERS | whole)),
        "header": save("header", prefixed, {"config_json": config}),
    }


@pytest.fixture(scope="session")
def t5(t5_tokenizer: Any) -> Any:
    """A T5 encoder of transformers: 2 layers of width 32, gated GELU."""
    from transformers import T5Config, T5EncoderModel

    torch.manual_seed(4)
    module = T5EncoderModel(
        T5Config(
            vocab_size=len(t5_tokenizer),
            d_model=32,
            d_kv=8,
            d_ff=64,
            num_layers=2,
            num_heads=4,
            feed_forward_proj="gated-gelu",
            tie_word_embeddings=False,
            pad_token_id=t5_tokenizer.pad_token_id,
            eos_token_id=t5_tokenizer.eos_token_id,
        )
    )
    perturb(module, 4)
    return module.eval()


@pytest.fixture(scope="session")
def t5_files(tmp_path_factory: pytest.TempPathFactory, t5: Any, t5_tokenizer: Any) -> dict[str, Path]:
    """Form -> file or folder of the same T5 encoder, each with its tokenizer in reach."""
    root = tmp_path_factory.mktemp("t5")
    t5.save_pretrained(root / "folder")
    t5.save_pretrained(root / "sharded", max_shard_size="20KB")
    assert len(list((root / "sharded").glob("*-of-*.safetensors"))) > 1
    for folder in ("folder", "sharded", "tokenizer"):
        t5_tokenizer.save_pretrained(root / folder)
    config = (root / "folder" / "config.json").read_text()
    tensors = contiguous(t5.state_dict())
    embedding = tensors.pop("shared.weight")
    tensors.pop("encoder.embed_tokens.weight", None)
    assert all(key.startswith("encoder.") for key in tensors)

    def save(name: str, more: dict[str, Tensor], prefix: str = "", metadata: dict[str, str] | None = None) -> Path:
        path = root / f"{name}.safetensors"
        own = {f"{prefix}{key}": t for key, t in (tensors | more).items()}
        save_file(contiguous((STRANGERS if prefix else {}) | own), path, metadata=metadata)
        if metadata is None:
            path.with_suffix(".json").write_text(config)
        return path

    embed, shared = {"encoder.embed_tokens.weight": embedding}, {"shared.weight": embedding}
    decoder = {
        "decoder.embed_tokens.weight": embedding,
        "decoder.block.0.layer.0.SelfAttention.q.weight": torch.zeros(32, 32),
        "lm_head.weight": torch.zeros(4, 32),
    }
    return {
        "folder": root / "folder",
        "sharded": root / "sharded",
        "embed_tokens only": save("embed", embed),
        "shared only": save("shared", shared),
        "both": save("both", embed | shared),
        "with decoder": save("decoder", shared | decoder),
        "all in one": save("whole", shared, prefix="text_encoders.t5xxl.transformer."),
        "header": save("header", shared, metadata={"config_json": config}),
    }


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No network: HF_HUB_OFFLINE for what reads it late, and a socket that refuses for what does not."""
    import huggingface_hub.constants

    def refuse(self: socket.socket, address: object) -> None:
        raise AssertionError(f"a test that must work offline connects to {address}")

    monkeypatch.setitem(os.environ, "HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    yield


@pytest.fixture(scope="session")
def build_unet() -> Callable[..., Any]:
    """Build a tiny U-Net of SD1.5's topology; keywords replace entries of its config."""

    def build(seed: int = 5, **changes: Any) -> Any:
        from diffusers import UNet2DConditionModel

        torch.manual_seed(seed)
        config = {
            "sample_size": 8,
            "in_channels": 4,
            "out_channels": 4,
            "layers_per_block": 1,
            "block_out_channels": [8, 16],
            "norm_num_groups": 4,
            "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
            "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
            "cross_attention_dim": 32,
            "attention_head_dim": 2,
        }
        module = UNet2DConditionModel.from_config(config | changes)
        perturb(module, seed)
        return module.eval()

    return build
