"""Teachers: which files are accepted, what an overlay must provide, grids that are not square, and memory of Sol."""

import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from attention import reduce_attention
from musubi_tuner.encoders import teachers
from musubi_tuner.encoders.teachers import (
    SD15_UNET_CONFIG,
    Capture,
    LayerSums,
    Teacher,
    load_teacher,
)
from musubi_tuner.errors import CacheError, CheckpointError
from musubi_tuner.weights.sources import on_meta

pytestmark = pytest.mark.long

BuildUnet = Callable[..., Any]
TOLERANCE = 1e-5
"""Float32 sums of a few hundred terms below one, in another order."""


def inputs(rows: int, columns: int, batch: int = 2) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    return {
        "latents": torch.randn(batch, 4, rows, columns, generator=generator),
        "timestep_B": torch.linspace(50, 950, batch),
        "text": torch.randn(batch, 6, 32, generator=generator),
    }


def features(teacher: Teacher, given: dict[str, Any]) -> dict[str, Tensor]:
    return teacher.features(**given, lune=True, sol=True)


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert (found[name] - tensor).abs().max().item() <= TOLERANCE, name


def load(unet: Path, overlay: Path | None = None, name: str = "lune", **options: Any) -> Teacher:
    return load_teacher(unet, overlay, name=name, **({"dtype": torch.float32, "device": "cpu"} | options))


RESNET = {"norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0",
          "conv2": "out_layers.3", "conv_shortcut": "skip_connection"}  # fmt: skip
OUTSIDE = {"time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
           "conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2"}  # fmt: skip


def original_name(key: str, config: Any) -> str:
    """Key of a U-Net as Stable Diffusion was published: numbered blocks, of which a sampling layer is one more."""
    layers = config.layers_per_block
    module, _, leaf = key.rpartition(".")
    if module in OUTSIDE:
        return f"{OUTSIDE[module]}.{leaf}"
    parts = key.split(".")
    if parts[0] == "mid_block":
        kind, index, rest = parts[1], int(parts[2]), parts[3:]
        place = f"middle_block.{1 if kind == 'attentions' else 2 * index}"
    else:
        side, block, kind, index, rest = parts[0], int(parts[1]), parts[2], int(parts[3]), parts[4:]
        if kind == "downsamplers":
            return f"input_blocks.{(block + 1) * (layers + 1)}.0.op.{rest[-1]}"
        if kind == "upsamplers":
            attention = "CrossAttn" in config.up_block_types[block]
            return f"output_blocks.{block * (layers + 1) + layers}.{1 + attention}.conv.{rest[-1]}"
        first = 1 if side == "down_blocks" else 0
        name = "input_blocks" if side == "down_blocks" else "output_blocks"
        place = f"{name}.{first + block * (layers + 1) + index}.{int(kind == 'attentions')}"
    if kind == "resnets":
        rest = [RESNET[rest[0]], *rest[1:]]
    return ".".join([place, *rest])


def failure(*arguments: Any) -> str:
    with pytest.raises(CheckpointError) as caught:
        load(*arguments)
    return str(caught.value)


@pytest.fixture(scope="module")
def unet(build_unet: BuildUnet) -> Any:
    return build_unet()


@pytest.fixture(scope="module")
def unet_files(tmp_path_factory: pytest.TempPathFactory, unet: Any) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("unet")
    unet.save_pretrained(root / "folder")
    unet.save_pretrained(root / "sharded", max_shard_size="40KB")
    assert len(list((root / "sharded").glob("*-of-*.safetensors"))) > 1
    config = (root / "folder" / "config.json").read_text()
    save_file(unet.state_dict(), root / "header.safetensors", metadata={"config_json": config})
    save_file(unet.state_dict(), root / "single.safetensors")
    (root / "single.json").write_text(config)
    return {
        "folder": root / "folder",
        "sharded": root / "sharded",
        "header": root / "header.safetensors",
        "json beside": root / "single.safetensors",
    }


@pytest.fixture(scope="module")
def plain(unet_files: dict[str, Path]) -> dict[str, Tensor]:
    """Features of the U-Net without any overlay."""
    return features(load(unet_files["folder"]), inputs(8, 8))


class TestFiles:
    @pytest.mark.parametrize("form", ["folder", "sharded", "header", "json beside"])
    def test_every_form_gives_the_same_features(
        self, unet_files: dict[str, Path], plain: dict[str, Tensor], form: str
    ) -> None:
        teacher = load(unet_files[form])
        assert_equal(features(teacher, inputs(8, 8)), plain)
        assert not any(parameter.requires_grad for parameter in teacher.unet.parameters())
        assert not teacher.unet.training

    def test_the_built_in_geometry_is_that_of_sd15(self) -> None:
        from diffusers import UNet2DConditionModel

        module = on_meta(lambda: UNet2DConditionModel.from_config(SD15_UNET_CONFIG))
        assert len(module.state_dict()) == 686
        assert sum(tensor.numel() for tensor in module.state_dict().values()) == 859_520_964

    def test_an_original_checkpoint_gives_the_same_features(
        self, tmp_path: Path, unet: Any, plain: dict[str, Tensor]
    ) -> None:
        path = tmp_path / "v1-5.safetensors"
        tensors = {original_name(key, unet.config): tensor for key, tensor in unet.state_dict().items()}
        assert len(tensors) == len(unet.state_dict())
        save_file(
            {f"model.diffusion_model.{key}": tensor for key, tensor in tensors.items()}
            | {"first_stage_model.decoder.conv_in.bias": torch.zeros(3), "model_ema.decay": torch.zeros(1)},
            path,
        )
        path.with_suffix(".json").write_text(unet.to_json_string())
        assert_equal(features(load(path), inputs(8, 8)), plain)

    def test_an_original_checkpoint_of_something_else_is_refused(self, tmp_path: Path) -> None:
        path = tmp_path / "other.safetensors"
        save_file({"model.diffusion_model.blocks.0.weight": torch.zeros(3)}, path)
        assert failure(path).startswith(f"experts.unet: {path}: is not this U-Net: ")

    def test_a_single_file_of_another_geometry_without_config(self, tmp_path: Path, unet: Any) -> None:
        path = tmp_path / "unet.safetensors"
        save_file(unet.state_dict(), path)
        message = failure(path)
        assert message.startswith(f"experts.unet: {path}: is not this U-Net: ")
        assert "keys missing (" in message

    def test_a_folder_without_config(self, tmp_path: Path) -> None:
        assert failure(tmp_path).startswith(f"{tmp_path}: the folder has no config.json (found nothing)")

    def test_half_precision(self, unet_files: dict[str, Path], plain: dict[str, Tensor]) -> None:
        found = features(load(unet_files["folder"], dtype=torch.bfloat16), inputs(8, 8))
        assert {tensor.dtype for tensor in found.values()} == {torch.float32}
        # bfloat16 keeps 8 bits, and errors add up over the layers of a network with large random weights.
        assert (found["sol_stats"] - plain["sol_stats"]).abs().max().item() < 0.05


class TestOverlay:
    @pytest.fixture(scope="class")
    @classmethod
    def other(cls, build_unet: BuildUnet) -> Any:
        return build_unet(seed=9)

    @pytest.fixture
    def save(self, tmp_path: Path) -> Callable[[dict[str, Tensor]], Path]:
        def save(tensors: dict[str, Tensor]) -> Path:
            path = tmp_path / "overlay.safetensors"
            save_file({key: tensor.clone().contiguous() for key, tensor in tensors.items()}, path)
            return path

        return save

    @pytest.mark.parametrize("prefix", ["", "unet."])
    def test_its_weights_replace_those_of_the_unet(
        self, unet_files: dict[str, Path], plain: dict[str, Tensor], other: Any, save: Any, prefix: str
    ) -> None:
        path = save({prefix + key: tensor for key, tensor in other.state_dict().items()})
        found = features(load(unet_files["folder"], path), inputs(8, 8))
        assert_equal(found, features(Teacher(other), inputs(8, 8)))
        assert (found["lune_features"] - plain["lune_features"]).abs().max().item() > 0.1

    def test_one_weight_in_more_than_a_hundred_may_be_missing_and_is_named(
        self, unet_files: dict[str, Path], other: Any, save: Any, caplog: pytest.LogCaptureFixture
    ) -> None:
        tensors = dict(other.state_dict())
        assert len(tensors) > 100
        left_out = tensors.pop("conv_out.bias")
        path = save({**tensors, "conv_out.scale": torch.zeros(1)})
        teacher = load(unet_files["folder"], path)
        assert [record.getMessage() for record in caplog.records] == [
            f"experts.lune: {path}: lacks 1 weights of the U-Net, which stay as they are below it: conv_out.bias",
            f"experts.lune: {path}: has 1 weights that are none of the U-Net: conv_out.scale",
        ]
        own = teacher.unet.state_dict()
        assert torch.equal(own["conv_out.weight"], tensors["conv_out.weight"])
        assert not torch.equal(own["conv_out.bias"], left_out)

    def test_less_than_99_percent_is_refused_with_the_missing_names(
        self, unet_files: dict[str, Path], other: Any, save: Any
    ) -> None:
        tensors = dict(other.state_dict())
        total = len(tensors)
        gone = [key for key in tensors if key.startswith("mid_block.")]
        for key in gone:
            del tensors[key]
        path = save(tensors)
        assert failure(unet_files["folder"], path, "sol") == (
            f"experts.sol: {path}: provides {total - len(gone)} of {total} weights of the U-Net, expected at least 99%; "
            f"missing or of another shape: {', '.join(gone[:4])}, ..."
        )

    def test_weights_of_another_shape_do_not_count(
        self, unet_files: dict[str, Path], build_unet: BuildUnet, save: Any
    ) -> None:
        wider = build_unet(block_out_channels=[16, 32])
        message = failure(unet_files["folder"], save(wider.state_dict()), "lune")
        assert message.startswith("experts.lune: ")
        assert "missing or of another shape: conv_in.weight, conv_in.bias" in message

    def test_a_file_of_something_else_provides_nothing(
        self, unet_files: dict[str, Path], vae_files: dict[str, Path]
    ) -> None:
        assert f"{vae_files['header']}: provides 0 of " in failure(unet_files["folder"], vae_files["header"])


class WholeAttention:
    """Attention written out, as published: keeps the probabilities of every self-attention with its grid."""

    def __init__(self, grids: dict[int, tuple[int, int]]) -> None:
        self.grids = grids
        self.kept: list[tuple[Tensor, tuple[int, int]]] = []

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **ignored: Any,
    ) -> Tensor:
        batch, tokens, _ = hidden_states.shape
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        assert attention_mask is None
        q, k, v = (attn.head_to_batch_dim(layer(x)) for layer, x in (
            (attn.to_q, hidden_states), (attn.to_k, context), (attn.to_v, context)))  # fmt: skip
        probabilities = attn.get_attention_scores(q, k)
        if encoder_hidden_states is None:
            self.kept.append((probabilities.unflatten(0, (batch, attn.heads)), self.grids[tokens]))
        return attn.to_out[0](attn.batch_to_head_dim(torch.bmm(probabilities, v)))


class TestGrids:
    @pytest.mark.parametrize(("rows", "columns"), [(8, 12), (12, 8), (4, 16), (2, 2)])
    def test_features_equal_those_of_whole_attention(self, build_unet: BuildUnet, rows: int, columns: int) -> None:
        given = inputs(rows, columns)
        reference = build_unet()
        recorder = WholeAttention({rows * columns: (rows, columns), rows * columns // 4: (rows // 2, columns // 2)})
        reference.set_attn_processor(recorder)
        mid: list[Tensor] = []
        reference.mid_block.register_forward_hook(lambda module, args, out: mid.append(out))
        with torch.no_grad():
            reference(
                given["latents"],
                given["timestep_B"],
                encoder_hidden_states=given["text"],
            )
        stats, spatial = reduce_attention(recorder.kept, batch=2)
        assert len(recorder.kept) == 4
        expected = {"lune_features": mid[0].mean(dim=(2, 3)), "sol_stats": stats, "sol_spatial": spatial}
        assert_equal(features(Teacher(build_unet()), given), expected)

    def test_shapes_and_ranges(self, unet: Any) -> None:
        found = features(Teacher(unet), inputs(8, 12))
        assert {name: tuple(tensor.shape) for name, tensor in found.items()} == {
            "lune_features": (2, 16),
            "sol_stats": (2, 3),
            "sol_spatial": (2, 8, 8),
        }
        assert (found["sol_spatial"].sum(dim=(1, 2)) - 1).abs().max().item() <= TOLERANCE
        assert found["sol_stats"].min() >= 0
        assert found["sol_stats"].max() <= 1
        assert (found["sol_stats"][:, 1] + found["sol_stats"][:, 2] - 1).abs().max().item() <= TOLERANCE

    def test_only_what_is_asked_for_comes_back(self, unet: Any) -> None:
        teacher, given = Teacher(unet), inputs(8, 8)
        assert set(teacher.features(**given, lune=True, sol=False)) == {"lune_features"}
        assert set(teacher.features(**given, lune=False, sol=True)) == {"sol_stats", "sol_spatial"}

    def test_every_text_token_has_an_influence(self, unet: Any) -> None:
        """Published, CLIP is told what is padding, and the U-Net is not."""
        teacher, given = Teacher(unet), inputs(8, 8)
        for token in range(6):
            changed = given | {"text": given["text"].clone()}
            changed["text"][1, token] += 10
            moved = features(teacher, changed)["lune_features"] - features(teacher, given)["lune_features"]
            assert moved[1].abs().max() > 0.01 and moved[0].abs().max() <= TOLERANCE

    def test_samples_of_a_batch_do_not_mix(self, unet: Any) -> None:
        teacher, given = Teacher(unet), inputs(8, 12, batch=3)
        together = features(teacher, given)
        for row in range(3):
            alone = features(teacher, {name: tensor[row : row + 1] for name, tensor in given.items()})
            assert_equal(alone, {name: tensor[row : row + 1] for name, tensor in together.items()})

    def test_grids_of_earlier_calls_are_forgotten(self, unet: Any) -> None:
        """8 x 12 and 12 x 8 have the same number of tokens; each call must see its own."""
        teacher = Teacher(unet)
        first = features(teacher, inputs(8, 12))
        features(teacher, inputs(12, 8))
        assert_equal(features(teacher, inputs(8, 12)), first)

    def test_a_unet_without_self_attention_is_an_error(self, build_unet: BuildUnet) -> None:
        bare = build_unet(
            down_block_types=["DownBlock2D"] * 2, up_block_types=["UpBlock2D"] * 2, mid_block_type="UNetMidBlock2D"
        )
        with pytest.raises(CacheError, match=r"Sol: no self-attention layer was captured; is this U-Net an SD1\.5"):
            features(Teacher(bare), inputs(8, 8))

    def test_a_mid_block_that_is_not_captured_is_an_error(self, unet: Any) -> None:
        """As in compiled networks, which may pass over hooks."""
        teacher = Teacher(unet)
        unet.mid_block._forward_hooks.clear()
        with pytest.raises(CacheError, match=r"Lune: the U-Net's mid block was not captured; is it compiled\?"):
            features(teacher, inputs(8, 8))

    def test_nothing_is_captured_outside_of_features(self, unet: Any) -> None:
        teacher, given = Teacher(unet), inputs(8, 8)
        with pytest.raises(RuntimeError):
            teacher.features(**(given | {"text": given["text"][..., :5]}), lune=True, sol=True)
        assert teacher.capture is None
        with torch.no_grad():
            unet(given["latents"], given["timestep_B"], encoder_hidden_states=given["text"])
        assert teacher.capture is None


class LargestTensor(TorchDispatchMode):
    """Remembers the number of elements of the largest tensor that any operation makes."""

    largest = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, Tensor):
                self.largest = max(self.largest, tensor.numel())
        return result


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensors that operations make and that are still referred to, and the largest sum."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            storage = tensor.untyped_storage() if isinstance(tensor, Tensor) else None
            if storage is not None and storage not in self.known:
                self.known.add(storage)
                weakref.finalize(storage, self._free, storage.nbytes())
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
        return result

    def _free(self, count: int) -> None:
        self.now -= count


def held_bytes(sums: LayerSums) -> int:
    return sum(value.untyped_storage().nbytes() for value in vars(sums).values() if isinstance(value, Tensor))


class TestMemory:
    @pytest.mark.parametrize("layers", [1, 3])
    def test_a_layer_leaves_one_number_per_token_and_two_per_sample(self, build_unet: BuildUnet, layers: int) -> None:
        """Attention itself has tokens x tokens numbers per head; none of that may stay, however many layers there are."""
        teacher, given = Teacher(build_unet(layers_per_block=layers)), inputs(16, 24)
        teacher.capture = capture = Capture()
        with torch.no_grad():
            teacher.unet(given["latents"], given["timestep_B"], encoder_hidden_states=given["text"])
        teacher.capture = None
        grids = [sums.grid for sums in capture.layers]
        assert grids == [(16, 24)] * layers + [(8, 12)] + [(16, 24)] * (layers + 1)
        assert [held_bytes(sums) for sums in capture.layers] == [
            4 * 2 * (2 + rows * columns) for rows, columns in grids
        ]

    def test_no_tensor_holds_the_attention_of_all_queries(
        self, build_unet: BuildUnet, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        teacher, given = Teacher(build_unet(attention_head_dim=2)), inputs(16, 24)
        heads, tokens = 4, 16 * 24
        monkeypatch.setattr(teachers, "QUERY_BLOCK_BYTES", 2 * heads * tokens * 4 * 16)
        with LargestTensor() as watch:
            features(teacher, given)
        # 16 queries of two samples at four heads; the features of the U-Net itself are smaller than that.
        assert watch.largest <= 2 * heads * tokens * 16
        assert watch.largest < 2 * heads * tokens * tokens / 10

    def test_at_512_pixels_the_peak_does_not_grow_with_the_number_of_layers(
        self, build_unet: BuildUnet, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The attention of one layer has 64^2 x 64^2 numbers, 67 MB with a single head."""
        whole, given = 4096 * 4096 * 4, inputs(64, 64, batch=1)
        monkeypatch.setattr(teachers, "QUERY_BLOCK_BYTES", whole // 16)
        peaks = []
        for layers in (1, 3):
            teacher = Teacher(build_unet(layers_per_block=layers, attention_head_dim=1))
            with LiveBytes() as watch:
                features(teacher, given)
            peaks.append(watch.peak)
        # 3 and then 7 layers of 64 x 64 tokens; the U-Net itself keeps two more skip connections of 8 channels.
        assert peaks[1] - peaks[0] < whole / 50
        assert peaks[1] < whole

    def test_keeping_whole_attention_would_be_seen(self, build_unet: BuildUnet) -> None:
        whole, given = 1024 * 1024 * 2 * 4, inputs(32, 32, batch=1)
        peaks = []
        for layers in (1, 3):
            unet = build_unet(layers_per_block=layers)
            unet.set_attn_processor(WholeAttention({1024: (32, 32), 256: (16, 16)}))
            with LiveBytes() as watch, torch.no_grad():
                unet(given["latents"], given["timestep_B"], encoder_hidden_states=given["text"])
            peaks.append(watch.peak)
        assert peaks[1] - peaks[0] >= 4 * whole
