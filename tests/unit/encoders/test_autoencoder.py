"""Autoencoders: every accepted file gives the latents of diffusers, and every other file says what is wrong with it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from musubi_tuner.encoders.autoencoder import FLUX_CONFIG, Autoencoder, load_autoencoder, translate_bfl
from musubi_tuner.encoders.linear_patch import LinearPatchAutoencoder, LinearPatchConfig
from musubi_tuner.errors import CheckpointError
from musubi_tuner.weights.sources import fits, on_meta

pytestmark = pytest.mark.long

FORMS = ("folder", "sharded", "json beside", "header", "bfl", "bfl header", "wrapped", "all in one")
TOLERANCE = 1e-5
"""Float32 sums of a few thousand terms of size one, in another order."""


@pytest.fixture(scope="module")
def posterior(kl: Any, pixels: Tensor) -> Any:
    with torch.no_grad():
        return kl.encode(pixels).latent_dist


@pytest.mark.parametrize("form", FORMS)
def test_latents_of_every_form_equal_those_of_diffusers(
    vae_files: dict[str, Path], posterior: Any, pixels: Tensor, form: str
) -> None:
    vae = load_autoencoder(vae_files[form], channels=16)
    assert (vae.channels, vae.factor, vae.scale, vae.shift) == (16, 8, 0.3611, 0.1159)
    plain = vae.encode(pixels, None, use_shift=False)
    assert plain.shape == (2, 16, 4, 6)
    assert (plain - 0.3611 * posterior.mean).abs().max().item() <= TOLERANCE
    shifted = vae.encode(pixels, None, use_shift=True)
    assert (shifted - 0.3611 * (posterior.mean - 0.1159)).abs().max().item() <= TOLERANCE


@pytest.mark.parametrize("form", FORMS)
def test_pictures_of_every_form_equal_those_of_diffusers(
    vae_files: dict[str, Path], kl: Any, posterior: Any, form: str
) -> None:
    with torch.no_grad():
        expected = kl.decode(posterior.mean).sample.clamp(-1, 1)
    vae = load_autoencoder(vae_files[form], channels=16)
    for use_shift in (False, True):
        latents = 0.3611 * (posterior.mean - (0.1159 if use_shift else 0))
        decoded = vae.decode(latents, use_shift)
        # Shift and scale are undone in another order than they are applied here; the decoder enlarges that a little.
        assert (decoded - expected).abs().max().item() <= 10 * TOLERANCE


def test_noise_draws_from_the_posterior(vae_files: dict[str, Path], posterior: Any, pixels: Tensor) -> None:
    noise = torch.randn(posterior.mean.shape, generator=torch.Generator().manual_seed(0))
    found = load_autoencoder(vae_files["folder"], channels=16).encode(pixels, noise, use_shift=False)
    expected = 0.3611 * (posterior.mean + posterior.std * noise)
    assert (found - expected).abs().max().item() <= TOLERANCE
    assert (expected - 0.3611 * posterior.mean).abs().max().item() > 0.01


def test_decoded_pictures_stay_in_range(vae_files: dict[str, Path]) -> None:
    decoded = load_autoencoder(vae_files["folder"], channels=16).decode(torch.randn(1, 16, 4, 4) * 100, use_shift=True)
    assert decoded.shape == (1, 3, 32, 32)
    assert (decoded.min().item(), decoded.max().item()) == (-1, 1)


def test_weights_take_the_asked_precision_and_are_frozen(vae_files: dict[str, Path], pixels: Tensor) -> None:
    vae = load_autoencoder(vae_files["header"], channels=16, dtype=torch.bfloat16)
    assert vae.dtype == torch.bfloat16
    assert vae.device.type == "cpu"
    assert {parameter.dtype for parameter in vae.module.parameters()} == {torch.bfloat16}
    assert not any(parameter.requires_grad for parameter in vae.module.parameters())
    assert not vae.module.training
    assert vae.encode(pixels, None, use_shift=False).dtype == torch.float32


def test_weights_are_copies_and_not_views_of_the_file(
    tmp_path: Path, vae_files: dict[str, Path], pixels: Tensor
) -> None:
    path = Path(shutil.copy(vae_files["header"], tmp_path / "vae.safetensors"))
    vae = load_autoencoder(path, channels=16)
    before = vae.encode(pixels, None, use_shift=False)
    with path.open("r+b") as file:
        file.write(b"\0" * path.stat().st_size)
    assert torch.equal(vae.encode(pixels, None, use_shift=False), before)


def test_tiling_is_switched_on_for_convolutional_autoencoders_only(vae_files: dict[str, Path]) -> None:
    vae = load_autoencoder(vae_files["folder"], channels=16)
    vae.set_tiling(False)
    assert not vae.module.use_tiling
    vae.set_tiling(True)
    assert vae.module.use_tiling
    linear = LinearPatchConfig()
    Autoencoder(LinearPatchAutoencoder(linear), linear.to_dict()).set_tiling(True)


def published_shapes() -> dict[str, tuple[int, ...]]:
    """Every key and shape of the published ae.safetensors, written out from its description.

    128 channels times 1, 2, 4, 4 by level; two blocks per level in the encoder, three in the decoder.
    """
    channels = [128, 256, 512, 512]
    shapes: dict[str, tuple[int, ...]] = {}

    def convolution(name: str, into: int, out: int, size: int) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (out, into, size, size), (out,)

    def norm(name: str, width: int) -> None:
        shapes[f"{name}.weight"] = shapes[f"{name}.bias"] = (width,)

    def block(name: str, into: int, out: int) -> None:
        norm(f"{name}.norm1", into)
        convolution(f"{name}.conv1", into, out, 3)
        norm(f"{name}.norm2", out)
        convolution(f"{name}.conv2", out, out, 3)
        if into != out:
            convolution(f"{name}.nin_shortcut", into, out, 1)

    for half in ("encoder", "decoder"):
        for index in (1, 2):
            block(f"{half}.mid.block_{index}", 512, 512)
        norm(f"{half}.mid.attn_1.norm", 512)
        for part in ("q", "k", "v", "proj_out"):
            convolution(f"{half}.mid.attn_1.{part}", 512, 512, 1)
    convolution("encoder.conv_in", 3, 128, 3)
    width = 128
    for level, out in enumerate(channels):
        for index in range(2):
            block(f"encoder.down.{level}.block.{index}", width if index == 0 else out, out)
        width = out
        if level < 3:
            convolution(f"encoder.down.{level}.downsample.conv", out, out, 3)
    norm("encoder.norm_out", 512)
    convolution("encoder.conv_out", 512, 32, 3)
    convolution("decoder.conv_in", 16, 512, 3)
    for level in reversed(range(4)):
        for index in range(3):
            block(f"decoder.up.{level}.block.{index}", width if index == 0 else channels[level], channels[level])
        width = channels[level]
        if level > 0:
            convolution(f"decoder.up.{level}.upsample.conv", width, width, 3)
    norm("decoder.norm_out", 128)
    convolution("decoder.conv_out", 128, 3, 3)
    return shapes


def test_the_published_flux_autoencoder_fits_its_config_exactly() -> None:
    from diffusers import AutoencoderKL

    shapes = published_shapes()
    assert len(shapes) == 244
    assert sum(torch.Size(shape).numel() for shape in shapes.values()) == 83_819_683
    tensors = translate_bfl({key: torch.empty(shape, device="meta") for key, shape in shapes.items()})
    values = {key: value for key, value in FLUX_CONFIG.items() if not key.startswith("_")}
    module = on_meta(lambda: AutoencoderKL.from_config(values))
    own = {key: tensor.shape for key, tensor in module.state_dict().items()}
    assert own == {key: tensor.shape for key, tensor in tensors.items()}
    assert fits(module, tensors)
    del tensors["encoder.conv_out.bias"]
    assert not fits(module, tensors)


@pytest.fixture(scope="module")
def old_config(vae_config: dict[str, Any]) -> dict[str, Any]:
    """The keys that a config of diffusers 0.6 has; everything else is the library's default."""
    names = ("_class_name", "in_channels", "out_channels", "down_block_types", "up_block_types", "sample_size",
             "block_out_channels", "layers_per_block", "norm_num_groups")  # fmt: skip
    return {name: vae_config[name] for name in names} | {"latent_channels": 4, "act_fn": "silu"}


@pytest.fixture(scope="module")
def old_module(old_config: dict[str, Any]) -> Any:
    from diffusers import AutoencoderKL

    torch.manual_seed(6)
    return AutoencoderKL.from_config({k: v for k, v in old_config.items() if not k.startswith("_")}).eval()


class TestOlderFilesOfDiffusers:
    """The SD1.5 autoencoder on the hub is one of these; the teachers need it to see the noised image."""

    def test_a_config_without_a_scale_means_the_scale_of_sd15(
        self, tmp_path: Path, old_config: dict[str, Any], old_module: Any, pixels: Tensor
    ) -> None:
        save_file(
            old_module.state_dict(), tmp_path / "vae.safetensors", metadata={"config_json": json.dumps(old_config)}
        )
        vae = load_autoencoder(tmp_path / "vae.safetensors", channels=4)
        with torch.no_grad():
            expected = 0.18215 * old_module.encode(pixels).latent_dist.mean
        assert vae.scale == pytest.approx(0.18215)
        assert (vae.encode(pixels, None, use_shift=True) - expected).abs().max().item() <= TOLERANCE

    def test_attention_under_its_old_names_is_read(
        self, tmp_path: Path, old_config: dict[str, Any], old_module: Any, pixels: Tensor
    ) -> None:
        tensors = {}
        for key, tensor in old_module.state_dict().items():
            for new, old in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
                key = key.replace(f".attentions.0.{new}.", f".attentions.0.{old}.")
            tensors[key] = tensor
        assert "encoder.mid_block.attentions.0.proj_attn.weight" in tensors
        folder = tmp_path / "vae"
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(old_config | {"scaling_factor": 1.0}))
        save_file(tensors, folder / "diffusion_pytorch_model.safetensors")
        # The library itself reads the folder.
        type(old_module).from_pretrained(folder)
        vae = load_autoencoder(folder, channels=4)
        with torch.no_grad():
            expected = old_module.encode(pixels).latent_dist.mean
        assert (vae.encode(pixels, None, use_shift=False) - expected).abs().max().item() <= TOLERANCE


class TestLinear:
    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        torch.manual_seed(7)
        config = LinearPatchConfig(encoder_window=12, scaling_factor=0.5, shift_factor=0.25)
        model = LinearPatchAutoencoder(config)
        folder = tmp_path / "linear"
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(config.to_dict()))
        save_file(model.state_dict(), folder / "diffusion_pytorch_model.safetensors")
        return folder

    def test_it_is_chosen_by_its_class_name(self, folder: Path, pixels: Tensor) -> None:
        vae = load_autoencoder(folder, channels=16)
        assert isinstance(vae.module, LinearPatchAutoencoder)
        assert (vae.factor, vae.scale, vae.shift) == (8, 0.5, 0.25)
        with torch.no_grad():
            z = vae.module.encode(pixels)
        assert torch.equal(vae.encode(pixels, None, use_shift=False), 0.5 * z)
        assert torch.equal(vae.encode(pixels, None, use_shift=True), 0.5 * (z - 0.25))

    def test_it_has_no_posterior_to_sample(self, folder: Path, pixels: Tensor) -> None:
        vae = load_autoencoder(folder, channels=16)
        noise = torch.randn(2, 16, 4, 6)
        assert torch.equal(vae.encode(pixels, noise, False), vae.encode(pixels, None, False))

    def test_decoding_undoes_scale_and_shift(self, folder: Path) -> None:
        vae = load_autoencoder(folder, channels=16)
        z = torch.randn(1, 16, 3, 5)
        with torch.no_grad():
            expected = vae.module.decode(z).clamp(-1, 1)
        # 1e-6: scale and shift of these config values are exact, their product with z is rounded once.
        assert (vae.decode(0.5 * z, False) - expected).abs().max().item() <= 1e-6
        assert (vae.decode(0.5 * (z - 0.25), True) - expected).abs().max().item() <= 1e-6

    def test_a_geometry_that_does_not_fit_the_weights_is_an_error(self, folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text()) | {"encoder_window": 8}
        (folder / "config.json").write_text(json.dumps(config))
        with pytest.raises(CheckpointError, match=r"encoder\.weight is \[16, 3, 12, 12\], expected \[16, 3, 8, 8\]"):
            load_autoencoder(folder, channels=16)


class TestMessages:
    @staticmethod
    def failure(path: Path, **options: Any) -> str:
        with pytest.raises(CheckpointError) as caught:
            load_autoencoder(path, **({"channels": 16} | options))
        return str(caught.value)

    @pytest.fixture
    def save(self, tmp_path: Path, vae_config: dict[str, Any]) -> Callable[..., Path]:
        def save(module: Any, **changes: Any) -> Path:
            path = tmp_path / "vae.safetensors"
            save_file(module.state_dict(), path, metadata={"config_json": json.dumps(vae_config | changes)})
            return path

        return save

    def test_an_autoencoder_of_four_channels(self, save: Callable[..., Path], kl: Any) -> None:
        path = save(kl, latent_channels=4)
        assert self.failure(path) == (
            f"model.vae_path: {path}: has 4 latent channels, expected 16 (4 channels is an SD1.5 or SDXL autoencoder)"
        )

    def test_a_flux_autoencoder_for_the_teachers(self, vae_files: dict[str, Path]) -> None:
        path = vae_files["header"]
        assert self.failure(path, channels=4, key="experts.vae") == (
            f"experts.vae: {path}: has 16 latent channels, expected 4"
        )

    def test_another_factor(self, save: Callable[..., Path], kl: Any) -> None:
        path = save(
            kl,
            block_out_channels=[8, 8, 16],
            down_block_types=["DownEncoderBlock2D"] * 3,
            up_block_types=["UpDecoderBlock2D"] * 3,
        )
        assert self.failure(path) == f"model.vae_path: {path}: reduces images by 4, expected 8"

    def test_a_single_file_without_config_that_is_not_the_published_one(
        self, tmp_path: Path, vae_files: dict[str, Path]
    ) -> None:
        for name in ("json beside", "bfl"):
            path = Path(shutil.copy(vae_files[name], tmp_path / "alone.safetensors"))
            assert self.failure(path) == (
                f"model.vae_path: {path}: has no config in its header or beside it, and is not the published FLUX "
                "autoencoder. Put its config.json beside the file, or give its diffusers folder"
            )

    def test_another_class(self, save: Callable[..., Path], kl: Any) -> None:
        path = save(kl, _class_name="AutoencoderTiny")
        assert self.failure(path) == (
            f"model.vae_path: {path}: is AutoencoderTiny, expected AutoencoderKL or LinearPatchAutoencoder"
        )

    def test_a_config_without_a_class(self, tmp_path: Path, kl: Any) -> None:
        path = tmp_path / "vae.safetensors"
        save_file(kl.state_dict(), path, metadata={"config_json": json.dumps({"latent_channels": 16})})
        assert "is of no known class, expected AutoencoderKL or LinearPatchAutoencoder" in self.failure(path)

    def test_a_folder_without_config(self, tmp_path: Path) -> None:
        assert self.failure(tmp_path) == (
            f"{tmp_path}: the folder has no config.json (found nothing); give the encoder's own folder"
        )
        for name in ("text_encoder", "vae", "model_index.json"):
            (tmp_path / name).touch()
        assert "(found model_index.json, text_encoder, vae)" in self.failure(tmp_path)

    def test_a_folder_without_weights(self, tmp_path: Path, vae_config: dict[str, Any]) -> None:
        (tmp_path / "config.json").write_text(json.dumps(vae_config))
        assert self.failure(tmp_path) == (
            f"{tmp_path}: the folder has no weights; looked for diffusion_pytorch_model.safetensors, model.safetensors, "
            "pytorch_model.bin"
        )

    def test_a_broken_config(self, tmp_path: Path) -> None:
        (tmp_path / "config.json").write_text("{")
        assert self.failure(tmp_path).startswith(f"{tmp_path / 'config.json'}: not a JSON file (Expecting property")

    def test_a_missing_shard(self, tmp_path: Path, vae_files: dict[str, Path]) -> None:
        folder = Path(shutil.copytree(vae_files["sharded"], tmp_path / "vae"))
        shard = sorted(folder.glob("*-of-*.safetensors"))[1]
        shard.unlink()
        assert str(shard) in self.failure(folder)

    def test_weights_of_another_width(self, save: Callable[..., Path], kl: Any) -> None:
        path = save(kl, block_out_channels=[8, 8, 16, 32])
        message = self.failure(path)
        assert message.startswith(f"model.vae_path: {path}: is not this autoencoder: ")
        assert "keys of another shape" in message

    def test_missing_and_unexpected_keys(self, tmp_path: Path, vae_files: dict[str, Path], vae_config: Any) -> None:
        tensors = load_file(vae_files["header"])
        tensors["extra.weight"] = tensors.pop("decoder.conv_in.weight")
        path = tmp_path / "vae.safetensors"
        save_file(tensors, path, metadata={"config_json": json.dumps(vae_config)})
        total = len(tensors)
        assert self.failure(path) == (
            f"model.vae_path: {path}: is not this autoencoder: 1 of {total} keys missing (decoder.conv_in.weight); "
            f"1 of {total} keys unexpected (extra.weight)"
        )

    def test_a_file_that_is_cut_short(self, tmp_path: Path, vae_files: dict[str, Path]) -> None:
        path = tmp_path / "vae.safetensors"
        path.write_bytes(vae_files["header"].read_bytes()[:-10])
        assert self.failure(path).startswith(f"{path}: not a complete safetensors file (")

    def test_an_autoencoder_with_the_names_of_an_original_sd_checkpoint(
        self, tmp_path: Path, vae_files: dict[str, Path]
    ) -> None:
        tensors = {f"first_stage_model.{key}": tensor for key, tensor in load_file(vae_files["bfl"]).items()}
        save_file(tensors, tmp_path / "vae.safetensors")
        assert "is not the published FLUX autoencoder" in self.failure(tmp_path / "vae.safetensors")
