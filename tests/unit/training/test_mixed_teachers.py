"""A micro-batch from datasets with different teachers, from its cache files to its gradients: equal to its samples one by one."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from musubi_tuner.caching.file_format import cache_path
from musubi_tuner.caching.reader import CachedDataset
from musubi_tuner.config import RunConfig, load_config
from musubi_tuner.data.plan import MicroBatch
from musubi_tuner.data.sources import scan
from musubi_tuner.errors import ConfigError
from musubi_tuner.models.tinyflux import TinyFluxConfig, TinyFluxDeep, TinyFluxProcess, initialize
from musubi_tuner.models.tinyflux.process import TeacherSettings
from musubi_tuner.training.build import check_caches
from musubi_tuner.training.identity import data_digest
from musubi_tuner.training.task import make_draws
from steps import training_step

RUN = """
schema_version = 1
[run]
name = "t"
output_dir = "out"
seed = 3
[model]
arch = "tf"
init = "scratch"
vae_path = "vae"
clip_path = "clip"
t5_path = "t5"
[experts]
unet = "unet"
expert_input = "random"
[objective]
text_dropout = 0.3
lune_teacher_dropout = 0.2
sol_teacher_dropout = 0.2
lune_warmup_steps = 0
sol_warmup_steps = 0
spatial_weighting = true
[scheduler]
warmup_steps = 0
[train]
max_steps = 10
[general]
resolution = 64
batch_size = 6
"""
DATASETS = {"": 4, "experts = false": 0, "experts = {time_buckets = 7}": 7, "experts = {enable_sol = false}": 9,
            "experts = {enable_lune = false, time_buckets = 1}": 1}  # fmt: skip
"""What each dataset says, and how many times its files hold."""
GEOMETRY = TinyFluxConfig(
    hidden_size=32, num_attention_heads=2, attention_head_dim=16, in_channels=16, joint_attention_dim=12,
    pooled_projection_dim=10, num_double_layers=1, num_single_layers=1, axes_dims_rope=(4, 6, 6), lune_expert_dim=6,
    lune_hidden_dim=16, lune_dropout=0.0, sol_spatial_size=4, sol_hidden_dim=12,
)  # fmt: skip


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunConfig:
    """A run over five datasets of one picture, cached."""
    monkeypatch.chdir(tmp_path)
    text = RUN
    for name in ("vae", "clip", "t5", "unet"):
        (tmp_path / name).mkdir()
    for number, lines in enumerate(DATASETS):
        folder = tmp_path / f"images{number}"
        folder.mkdir()
        Image.new("RGB", (64, 64)).save(folder / f"p{number}.png")
        (folder / f"p{number}.txt").write_text("a caption")
        text += f'[[datasets]]\nimage_directory = "images{number}"\ncache_directory = "cache{number}"\n{lines}\n'
    (tmp_path / "run.toml").write_text(text)
    config = load_config(tmp_path / "run.toml")
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    for item, length in zip(scan(config.datasets, "tf").items, DATASETS.values(), strict=True):
        files: dict[str, dict[str, Tensor]] = {
            "latents": {"latents_1x8x8_float32": randn(16, 8, 8)},
            "text": {
                "t5_vec_float32": randn(5, 12),
                "t5_mask": torch.ones(5, dtype=torch.int64),
                "clip_l_pooler_float32": randn(10),
            },
        }
        if length:
            experts = {"t_buckets_float32": torch.rand(length, generator=generator).sort().values}
            if "enable_lune" not in item_experts(config, item.dataset):
                experts["lune_features_float32"] = randn(length, 6)
            if "enable_sol" not in item_experts(config, item.dataset):
                experts["sol_stats_float32"] = randn(length, 3)
                experts["sol_spatial_float32"] = randn(length, 4, 4).flatten(1).softmax(1).view(length, 4, 4)
            files["experts"] = experts
        for kind, tensors in files.items():
            path = cache_path(item, kind, "tf")
            path.parent.mkdir(parents=True, exist_ok=True)
            save_file(tensors, path)
    return config


def item_experts(config: RunConfig, number: int) -> dict[str, object]:
    return dict(config.datasets[number].experts)


def model() -> TinyFluxDeep:
    """A small model in which every path acts, without dropout of its own."""
    generator = torch.Generator().manual_seed(0)
    made = TinyFluxDeep(GEOMETRY)
    initialize(made, "reference", generator)
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.abs().max() == 0:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return made


def summed(config: RunConfig, *batches: MicroBatch) -> tuple[dict[str, Tensor], dict[str, Tensor], list[set[str]]]:
    """Losses and gradients of some micro-batches together, and the tensors that each of them had."""
    process = TinyFluxProcess(config.objective, TeacherSettings(True, True, "max"))
    dataset = CachedDataset(config, scan(config.datasets, "tf").items, ["latents", "text", "experts"])
    own, sums, seen = model(), dict[str, Tensor](), []
    for planned in batches:
        batch = dataset.read(planned, epoch=0)
        draws = make_draws(process, (16, 8, 8), planned, config.run.seed, 0, objective=config.objective)
        output = training_step(own, process, batch, draws, update=0)
        output.loss.backward()
        for name, value in output.terms.items():
            sums[name] = sums.get(name, torch.zeros(())) + value
        seen.append(set(batch.tensors))
    return sums, {name: p.grad for name, p in own.named_parameters() if p.grad is not None}, seen


def test_mixed_batch_equals_its_samples_one_by_one(config: RunConfig) -> None:
    order = (3, 1, 0, 4, 2, 0, 2, 1, 3, 4, 2, 0)
    whole, expected, _ = summed(config, MicroBatch(order, tuple(range(12))))
    parts, found, seen = summed(config, *(MicroBatch((item,), (number,)) for number, item in enumerate(order)))
    assert seen[1].isdisjoint({"t_buckets", "lune_features", "sol_stats"})
    assert "sol_stats" in seen[3] and "lune_features" not in seen[3]
    assert set(whole) == set(parts) == {"main", "lune", "sol", "total"}
    for name, value in whole.items():
        assert value > 0
        torch.testing.assert_close(parts[name], value, rtol=1e-5, atol=0)
    assert set(found) == set(expected)
    scale = max(gradient.abs().max().item() for gradient in expected.values())
    for name, gradient in expected.items():
        # Sums in another order: a millionth of the largest gradient.
        torch.testing.assert_close(found[name], gradient, rtol=0, atol=1e-6 * scale)


def test_sample_without_teachers_costs_what_it_costs_in_a_run_without_them(config: RunConfig) -> None:
    planned = MicroBatch((1,), (0,))
    sums, gradients, _ = summed(config, planned)
    off = config.experts.model_copy(update={"enable_lune": False, "enable_sol": False})
    none = config.model_copy(update={"experts": off})
    plain = TinyFluxProcess(none.objective, TeacherSettings(False, False, "max"))
    own = model()
    batch = CachedDataset(none, scan(none.datasets, "tf").items, ["latents", "text"]).read(planned, 0)
    draws = make_draws(plain, (16, 8, 8), planned, none.run.seed, 0, objective=none.objective)
    output = training_step(own, plain, batch, draws, update=0)
    output.loss.backward()
    assert (sums["lune"], sums["sol"]) == (0, 0)
    assert sums["total"] == output.terms["total"] > 0
    for name, parameter in own.named_parameters():
        if parameter.grad is not None:
            assert torch.equal(gradients[name], parameter.grad), name


def test_features_that_the_model_cannot_take_are_refused_with_the_name_of_their_dataset(config: RunConfig) -> None:
    items = scan(config.datasets, "tf").items
    kinds = ["latents", "text", "experts"]
    check_caches(config, GEOMETRY, [CachedDataset(config, items, kinds)])
    wide = {"t_buckets_float32": torch.arange(2.0), "lune_features_float32": torch.zeros(2, 7)}
    save_file(wide, cache_path(items[3], "experts", "tf"))
    with pytest.raises(ConfigError) as caught:
        check_caches(config, GEOMETRY, [CachedDataset(config, items, kinds)])
    assert str(caught.value).startswith("datasets[3]: [model.geometry] and encoders do not belong together: ")
    assert str(caught.value).endswith("lune_expert_dim is 6, but experts.unet gave lune_features of 7")


def test_text_without_its_mask_is_refused_where_the_model_takes_it(config: RunConfig) -> None:
    masked = config.model_copy(update={"model": config.model.model_copy(update={"t5_attn_mask": True})})
    items, kinds = scan(config.datasets, "tf").items, ["latents", "text"]
    check_caches(masked, GEOMETRY, [CachedDataset(config, items, kinds)])
    path = cache_path(items[3], "text", "tf")
    save_file({key: tensor for key, tensor in load_file(path).items() if key != "t5_mask"}, path)
    without = [CachedDataset(config, items, kinds)]
    check_caches(config, GEOMETRY, without)
    with pytest.raises(
        ConfigError, match=r"datasets\[3\]: model\.t5_attn_mask is true, but text caches hold no t5_mask"
    ):
        check_caches(masked, GEOMETRY, without)


def test_state_knows_the_teachers_of_datasets_where_they_differ(config: RunConfig) -> None:
    items = scan(config.datasets, "tf").items
    plain = data_digest(items, False)
    assert data_digest(items, False, teachers=[{}, {}]) == plain
    others = [{"seed": 1}, {"seed": 2}, {"lune": "a"}]
    digests = {data_digest(items, False, teachers=[*([{}] * number), own]) for number in (0, 1) for own in others}
    assert len(digests - {plain}) == 6


def test_state_knows_which_images_were_squashed(config: RunConfig) -> None:
    items = scan(config.datasets, "tf").items
    assert data_digest([replace(items[0], squashed=True), *items[1:]], False) != data_digest(items, False)


def test_state_knows_which_images_lie_on_another_colour_than_white(config: RunConfig) -> None:
    """White is what a state made before stands for, so that it goes on."""
    items = scan(config.datasets, "tf").items

    def digest(colour: str) -> str:
        return data_digest([replace(items[0], background=colour), *items[1:]], False)

    assert digest("#ffffff") == data_digest(items, False)
    assert len({digest(colour) for colour in ("#ffffff", "#000000", "#808080")}) == 3
