"""Make the demo's pictures, captions, encoders and teachers: ``python -m musubi_tuner.demo.prepare CONFIG``.

    autoencoder    a linear map of 8x8 patches to 16 channels, fitted to the pictures
    T5, CLIP       tiny text models with random weights and a word-level tokenizer; random features are enough to tell
                   the few words apart
    DistilBERT     a word-level tokenizer; the language model is a part of what is trained
    teachers       a tiny U-Net of SD1.5's topology with random weights, with one overlay for each teacher; they exercise
                   the path, their features teach little

They are saved in the layouts in which real encoders come, and the run loads them like those.
"""

import json
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from musubi_tuner.config import RunConfig, load_config
from musubi_tuner.config.command_line import Parser, split_overrides
from musubi_tuner.data.images import open_image, to_array
from musubi_tuner.demo.pictures import vocabulary, write_dataset
from musubi_tuner.demo.recipe import MANIFEST, demo_folder, expected_manifest, made_paths, pictures_folder
from musubi_tuner.device import set_threads
from musubi_tuner.errors import EXIT_OK, ConfigError, run_command
from musubi_tuner.files import folder_lock, replace_file, write_json, write_text
from musubi_tuner.parent import join_parent
from musubi_tuner.quiet import quiet_progress
from musubi_tuner.randomness import seed_layers
from musubi_tuner.stopping import exit_on_terminate

FIT_PICTURES = 384
"""Pictures that the autoencoder is fitted to."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return run_command(lambda: _main(sys.argv[1:] if arguments is None else arguments))


def _main(arguments: Sequence[str]) -> int:
    parser = Parser(prog="python -m musubi_tuner.demo.prepare", description="Make the demo's pictures and encoders.")
    parser.add_argument("config", help="run file (TOML) with a [demo] table")
    passed, overrides = split_overrides(arguments, {"--help"})
    config = load_config(parser.parse_args(passed).config, overrides)
    if config.demo is None:
        raise ConfigError(f"{config.path}: has no [demo] table")
    join_parent()
    exit_on_terminate()
    prepare(config)
    return EXIT_OK


def prepare(config: RunConfig) -> None:
    """Make everything that is missing."""
    demo, folder = config.demo, demo_folder(config)
    assert demo is not None
    paths, pictures = made_paths(config), pictures_folder(config)
    folder.mkdir(parents=True, exist_ok=True)
    with folder_lock(folder, lambda holder: ConfigError(f"demo.folder {folder}: {holder} is making the demo here")):
        print(f"demo: drawing {demo.pictures} pictures into {pictures}", flush=True)
        pictures.mkdir(parents=True, exist_ok=True)
        write_dataset(pictures, demo.pictures, demo.size, demo.held_out, demo.seed)
        set_threads(config.run.threads, 1)
        quiet_progress()
        makers = {
            "model.vae_path": _make_autoencoder,
            "model.t5_path": _make_t5,
            "model.clip_path": _make_clip,
            "model.bert_tokenizer": _make_bert_tokenizer,
            "experts.unet": _make_unet,
            "experts.vae": _make_teacher_autoencoder,
            "experts.lune": _make_overlay,
            "experts.sol": _make_overlay,
        }
        with tqdm(paths.items(), desc="encoders", disable=None) as bar:
            for key, path in bar:
                path.parent.mkdir(parents=True, exist_ok=True)
                makers[key](config, path, key)
        write_json(folder / MANIFEST, expected_manifest(config))
    print(f"demo: made {', '.join(paths)}")


def _pixels(config: RunConfig) -> Any:
    """The first pictures as [N, 3, H, W] in [-1, 1]."""
    import torch

    files = sorted(pictures_folder(config).glob("*.png"))[:FIT_PICTURES]
    arrays = [torch.from_numpy(to_array(open_image(path)).copy()) for path in files]
    return torch.stack(arrays).permute(0, 3, 1, 2).float() / 127.5 - 1


def _save_linear(config: RunConfig, path: Path, channels: int) -> None:
    from musubi_tuner.encoders.linear_patch import LinearPatchAutoencoder, LinearPatchConfig
    from musubi_tuner.tensors import save_tensors

    model = LinearPatchAutoencoder.fit(_pixels(config), LinearPatchConfig(latent_channels=channels))
    path.mkdir(exist_ok=True)
    write_text(path / "config.json", json.dumps(model.config.to_dict(), indent=2) + "\n")
    tensors = {key: tensor.contiguous() for key, tensor in model.state_dict().items()}
    replace_file(path / "diffusion_pytorch_model.safetensors", partial(save_tensors, tensors))


def _make_autoencoder(config: RunConfig, path: Path, key: str) -> None:
    _save_linear(config, path, config.spec.latent_channels)


def _make_teacher_autoencoder(config: RunConfig, path: Path, key: str) -> None:
    _save_linear(config, path, 4)


def word_tokenizer(words: Sequence[str], begin: str | None, end: str, pad: str, length: int) -> Any:
    """A tokenizer of whole words, lower case."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = [token for token in (pad, begin, end, "<unk>") if token is not None]
    special = list(dict.fromkeys(special))
    vocab = {token: index for index, token in enumerate([*special, *words])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    template = f"{begin} $A {end}" if begin else f"$A {end}"
    pairs = [(token, vocab[token]) for token in (begin, end) if token is not None]
    tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=pairs)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=begin,
        eos_token=end,
        pad_token=pad,
        unk_token="<unk>",
        model_max_length=length,
    )


def _seed(config: RunConfig, key: str) -> None:
    assert config.demo is not None
    seed_layers(config.demo.seed, "demo encoder", key)


def _width(config: RunConfig, name: str) -> int:
    values = config.spec.geometry_class().from_dict(config.get("model.geometry")).to_dict()
    return int(values[name])


def _make_t5(config: RunConfig, path: Path, key: str) -> None:
    from transformers import T5Config, T5EncoderModel

    _seed(config, key)
    width = _width(config, "joint_attention_dim")
    tokenizer = word_tokenizer(vocabulary(), None, "</s>", "<pad>", config.clip_and_t5.t5_max_tokens)
    model = T5EncoderModel(
        T5Config(
            vocab_size=len(tokenizer),
            d_model=width,
            d_kv=width // 4,
            d_ff=2 * width,
            num_layers=2,
            num_heads=4,
            feed_forward_proj="gated-gelu",
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)


def _make_clip(config: RunConfig, path: Path, key: str) -> None:
    from transformers import CLIPTextConfig, CLIPTextModel

    _seed(config, key)
    width = _width(config, "pooled_projection_dim")
    length = config.clip_and_t5.t5_max_tokens + 2
    tokenizer = word_tokenizer(vocabulary(), "<|startoftext|>", "<|endoftext|>", "<pad>", length)
    model = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=2 * width,
            projection_dim=width,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=length,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)


def _make_bert_tokenizer(config: RunConfig, path: Path, key: str) -> None:
    """Of whole words; the language model that reads them is a part of the checkpoint."""
    length = int(config.get("model.text_max_tokens"))
    word_tokenizer(vocabulary(), "[CLS]", "[SEP]", "[PAD]", length).save_pretrained(path)


def _make_unet(config: RunConfig, path: Path, key: str) -> None:
    from diffusers import UNet2DConditionModel

    _seed(config, key)
    middle = _width(config, "lune_expert_dim")
    model: Any = UNet2DConditionModel(
        sample_size=config.sd15.resolution // 8,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(middle // 2, middle),
        norm_num_groups=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=_width(config, "pooled_projection_dim"),
        attention_head_dim=4,
    )
    model.save_pretrained(path)


def _make_overlay(config: RunConfig, path: Path, key: str) -> None:
    """Weights of the U-Net, each moved a little: a teacher of its own."""
    import torch
    from safetensors.torch import load_file

    from musubi_tuner.tensors import save_tensors

    _seed(config, key)
    assert config.sd15.unet is not None
    base = load_file(config.locate(config.sd15.unet) / "diffusion_pytorch_model.safetensors")
    moved = {name: tensor + 0.1 * torch.randn_like(tensor) * tensor.std(correction=0) for name, tensor in base.items()}
    replace_file(path, partial(save_tensors, moved))


if __name__ == "__main__":
    sys.exit(main())
