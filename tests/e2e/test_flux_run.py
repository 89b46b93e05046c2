"""A LoRA on FLUX.1 from photographs, by one command: caches, training, pictures, resume, processes, mistakes."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tomli_w
import torch
from PIL import Image
from project import (
    REPOSITORY,
    ForkServer,
    Result,
    autoencoder,
    cache_files,
    copy_tree,
    make_flux,
    metrics,
    save_single,
    write_flux_run,
)
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from musubi_tuner.config import RunConfig, load_config
from musubi_tuner.device import has_bf16

PROMPTS = ["the moon --w 64 --h 96 --d 3", "a tabby cat --m 0.5", "a tabby cat --m 0", "coins --l 3 --n the moon"]
SAMPLES = {"prompts": PROMPTS, "every_steps": 10, "width": 64, "height": 64, "steps": 3}
NewRun = Callable[..., Path]


@pytest.fixture(scope="module")
def base(workshop: Path) -> Path:
    """A small FLUX.1 as a single file."""
    return make_flux(workshop / "flux" / "flux1-small.safetensors")


@pytest.fixture(scope="module")
def trained(workshop: Path, photographs: Path, encoders: Path, base: Path, server: ForkServer) -> Path:
    """Run file of a finished run, made by one command."""
    config = write_flux_run(workshop / "flux_run", photographs, encoders, base, sample=SAMPLES)
    text = config.read_text(encoding="utf-8").replace("[save]\n", '[save]\ntitle = "My photographs"\nauthor = "Ann"\n')
    config.write_text(text, encoding="utf-8")
    result = server.run("train", [config], workshop).expect(0)
    assert "latents: encoded 9" in result.out and "text: encoded 9" in result.out
    assert "adapter: LoRA of rank 4 on 22 layers" in result.out
    return config


@pytest.fixture
def new_run(tmp_path: Path, photographs: Path, encoders: Path, base: Path, trained: Path) -> NewRun:
    """Write a run file whose caches are complete."""

    def write(name: str = "again", cached: bool = True, **changes: Any) -> Path:
        if cached:
            copy_tree(trained.parent / "cache", tmp_path / name / "cache")
        return write_flux_run(tmp_path / name, photographs, encoders, base, **changes)

    return write


def out(config: Path) -> Path:
    return config.parent / "out"


def lora(config: Path) -> dict[str, Tensor]:
    return load_file(out(config) / "photos.safetensors")


def assert_equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert set(first) == set(second)
    assert all(torch.equal(first[key], second[key]) for key in first)


def final(config: Path) -> dict[str, dict[str, Tensor]]:
    """Tensors that a finished run must reproduce."""
    state = out(config) / "photos-state"
    return {"file": lora(config)} | {part: load_file(state / f"{part}.safetensors") for part in ("model", "optimizer")}


def pictures(config: Path, step: int) -> list[np.ndarray]:
    return [np.asarray(Image.open(path)) for path in sorted((out(config) / "sample").glob(f"photos_{step:08d}_*.png"))]


# One command


def test_caches_hold_what_flux_needs(trained: Path) -> None:
    cache = trained.parent / "cache"
    with safe_open(str(cache / "coffee_0600x0400_fd.safetensors"), "pt") as file:
        assert list(file.keys()) == ["latents_1x12x20_float32"]
        assert file.metadata()["architecture"] == "flux_dev"
        assert file.metadata()["vae_shift_applied"] == "true"
    text = load_file(cache / "coffee_fd_te.safetensors")
    assert {key: tuple(t.shape) for key, t in text.items()} == {
        "t5_vec_float32": (24, 32),
        "clip_l_pooler_float32": (32,),
    }


def test_cached_text_is_what_transformers_gives_without_a_mask(trained: Path, encoders: Path) -> None:
    from transformers import AutoTokenizer, T5Config, T5EncoderModel

    config = json.loads((encoders / "t5" / "t5_base.json").read_text())
    model = T5EncoderModel(T5Config(**config)).eval()
    model.load_state_dict(load_file(encoders / "t5" / "t5_base.safetensors"), strict=False)
    tokenizer = AutoTokenizer.from_pretrained(encoders / "t5" / "tokenizer")
    caption = "a cup of coffee with a spoon on a wooden table"
    ids = tokenizer([caption], padding="max_length", max_length=24, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        expected = model(input_ids=ids).last_hidden_state[0]
    found = load_file(trained.parent / "cache" / "coffee_fd_te.safetensors")["t5_vec_float32"]
    assert torch.allclose(found, expected, atol=1e-4)


def test_lora_has_the_names_and_metadata_of_sd_scripts(trained: Path) -> None:
    tensors = lora(trained)
    assert len(tensors) == 22 * 3
    assert tensors["lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight"].shape == (4, 48)
    assert tensors["lora_unet_single_blocks_2_linear1.lora_up.weight"].shape == (336, 4)
    assert tensors["lora_unet_single_blocks_2_linear2.alpha"] == 4
    with safe_open(str(out(trained) / "photos.safetensors"), "pt") as file:
        header = file.metadata()
    assert header["ss_base_model_version"] == "flux_dev"
    assert header["ss_network_module"] == "networks.lora_flux"
    assert (header["ss_network_dim"], header["ss_network_alpha"], header["ss_steps"]) == ("4", "4.0", "20")
    assert header["modelspec.architecture"] == "Flux.1-dev/lora"
    assert (header["modelspec.title"], header["modelspec.author"]) == ("My photographs", "Ann")
    assert "modelspec.license" not in header
    assert header["ss_sd_model_name"] == "flux1-small.safetensors"
    assert json.loads(header["ss_datasets"])[0]["image_directory"] == "photographs"
    assert len(header["sshs_model_hash"]) == 64 and len(header["sshs_legacy_hash"]) == 8
    assert all(isinstance(value, str) for value in header.values())


def test_what_a_run_leaves(trained: Path) -> None:
    names = {path.name for path in out(trained).iterdir()}
    assert {"photos.safetensors", "photos-state", "photos-step00000015.safetensors", "checkpoints.json"} <= names
    assert "config.json" not in names
    assert {path.name for path in (out(trained) / "release").iterdir()} == {"README.md", "photos.safetensors"}


def test_samples_obey_the_options_of_their_lines(trained: Path) -> None:
    moon, half, none, guided = pictures(trained, 20)
    assert moon.shape == (96, 64, 3) and half.shape == none.shape == guided.shape == (64, 64, 3)
    assert (half != none).any()
    with Image.open(sorted((out(trained) / "sample").glob("photos_00000020_*.png"))[3]) as image:
        text = json.loads(image.text["parameters"])  # type: ignore[attr-defined]
    assert (text["prompt"], text["negative"], text["cfg_scale"], text["guidance"]) == ("coins", "the moon", 3.0, 3.5)


def test_second_start_skips_caches_and_training(trained: Path, server: ForkServer) -> None:
    before = cache_files(trained.parent / "cache")
    again = server.run("train", [trained], trained.parent).expect(0)
    assert "9 up to date, 0 to make" in again.out and "this run is finished" in again.out
    assert "encoded" not in again.out
    assert cache_files(trained.parent / "cache") == before


def fixed_batch_loss(config: RunConfig, strength: float) -> float:
    """Mean loss of all photographs at fixed noise and noise levels, with the trained LoRA at a strength."""
    from musubi_tuner.assemble import load_trainee
    from musubi_tuner.caching.reader import CachedDataset
    from musubi_tuner.caching.status import needed_kinds
    from musubi_tuner.data.plan import plan_epoch
    from musubi_tuner.data.sources import scan
    from musubi_tuner.training.generate import use_adapters
    from musubi_tuner.training.task import make_draws
    from steps import training_step

    model = load_trainee(config, torch.device("cpu")).model
    use_adapters(model, config.spec, [(str(config.output_dir), strength)])
    process = config.spec.family.make_process(config, {})
    dataset = CachedDataset(config, scan(config.datasets, config.spec.code).items, needed_kinds(config))
    total, samples = 0.0, 0
    with torch.no_grad():
        for planned in plan_epoch(dataset.plan_items(), seed=99, epoch=0):
            batch = dataset[planned]
            draws = make_draws(process, tuple(batch.tensors["latents"].shape[1:]), planned, seed=99, epoch=0)
            total += float(training_step(model.eval(), process, batch, draws, update=100).loss)
            samples += len(planned)
    return total / samples


def test_the_loss_on_fixed_batches_falls(trained: Path) -> None:
    config = load_config(trained)
    assert fixed_batch_loss(config, 1.0) < 0.95 * fixed_batch_loss(config, 0.0)


# The same again


@pytest.mark.parametrize("point", ["train.update:7", "state.written:2", "checkpoint.listed:1", "file.written:3"])
def test_killed_and_continued(point: str, new_run: NewRun, trained: Path, server: ForkServer) -> None:
    config = new_run(sample=SAMPLES)
    killed = server.run("train", [config], config.parent, MUSUBI_FAULT=point)
    assert killed.code == -9
    assert "Traceback" not in killed.err
    server.run("train", [config], config.parent).expect(0)
    expected, found = final(trained), final(config)
    for part, tensors in expected.items():
        assert_equal(found[part], tensors)
    assert metrics(out(config)) == metrics(out(trained))
    assert all((a == b).all() for a, b in zip(pictures(config, 20), pictures(trained, 20), strict=True))


def test_another_base_of_the_same_name_is_refused(new_run: NewRun, tmp_path: Path, server: ForkServer) -> None:
    base = make_flux(tmp_path / "base.safetensors")
    config = new_run(model={"path": str(base)})
    assert server.run("train", [config], config.parent, MUSUBI_FAULT="train.update:7").code == -9
    make_flux(base, seed=6)
    assert "the checkpoint below the adapter holds other weights" in text_of(
        server.run("train", [config], config.parent)
    )


def test_checkpointing_changes_nothing(new_run: NewRun, trained: Path, server: ForkServer) -> None:
    config = new_run(memory={"gradient_checkpointing": True}, sample=SAMPLES)
    server.run("train", [config], config.parent).expect(0)
    assert_equal(lora(config), lora(trained))


def norm(tensors: list[Tensor]) -> float:
    return float(torch.stack([tensor.norm() for tensor in tensors]).norm())


@pytest.mark.parametrize("swap", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_two_processes_train_the_lora_of_one(swap: int, new_run: NewRun, tmp_path: Path, server: ForkServer) -> None:
    """With swap, each of the two streams blocks of its own copy; the one process keeps all on the device."""
    deep = make_flux(tmp_path / "deep.safetensors", depth=3, depth_single_blocks=4)
    common: dict[str, Any] = {
        "model": {"path": str(deep)} if swap else {},
        "adapter": {"dropout": 0.1, "module_dropout": 0.1, "rank_dropout": 0.1},
        "objective": {"ip_noise_gamma": 0.2, "ip_noise_gamma_random_strength": True},
        "general": {"num_repeats": 3},
        "save": {"every_steps": 0},
    }
    alone = new_run("alone", **common, train={"grad_accum_steps": 2, "max_steps": 12})
    server.run("train", [alone], alone.parent).expect(0)
    memory = {"blocks_to_swap": swap} if swap else {}
    both = new_run("both", **common, train={"max_steps": 12}, distributed={"num_processes": 2}, memory=memory)
    result = server.run("train", [both], both.parent).expect(0)
    assert ("swap: 2 blocks stay in main memory" in result.out) == bool(swap)
    assert "fetched on the spot" not in result.out
    # They add gradients in another order than one process does.
    expected, found = lora(alone), lora(both)
    moved = max(float(t.abs().max()) for key, t in expected.items() if key.endswith("lora_up.weight"))
    assert max(float((found[key] - expected[key]).abs().max()) for key in expected) <= 1e-5 * moved


@pytest.mark.parametrize(
    "change",
    [
        {"adapter": {"dropout": 0.5}},
        {"adapter": {"rank_dropout": 0.5}},
        {"adapter": {"module_dropout": 0.5}},
        {"adapter": {"loraplus_lr_ratio": 4.0}},
        {"adapter": {"max_norm": 0.01}},
        {"adapter": {"alpha": 1.0}},
        {"objective": {"timestep_sampling": "sigmoid"}},
        {"objective": {"timestep_sampling": "shift", "discrete_flow_shift": 3.0}},
        {"objective": {"weighting_scheme": "cosmap"}},
        {"objective": {"guidance_scale": 3.0}},
        {"objective": {"timestep_offset": 0.05}},
        {"objective": {"min_timestep": 400}},
        {"objective": {"ip_noise_gamma": 0.2}},
        {"objective": {"ip_noise_gamma": 0.2, "ip_noise_gamma_random_strength": True}},
        {"objective": {"ip_noise_gamma": 0.2, "ip_noise_gamma_random_strength": True, "ip_noise_per_sample": True}},
        {"objective": {"min_snr_gamma": 1.0}},
        {"objective": {"loss": "huber"}},
        {"objective": {"timestep_stratified": True}},
    ],
    ids=str,
)
def test_every_option_acts(change: dict[str, Any], new_run: NewRun, trained: Path, server: ForkServer) -> None:
    """Trained as by a launcher of one process, which leaves planning to others: of these runs it would be most of the time."""
    config = new_run(**change, train={"max_steps": 4}, save={"every_steps": 0, "release": False})
    launched = {"ACCELERATE_MIXED_PRECISION": "no"}
    server.run("train", [config, "--skip_cache"], config.parent, **launched).expect(0)
    rows, plain = metrics(out(config))[:4], metrics(out(trained))[:4]
    assert any(row["loss/total"] != other["loss/total"] for row, other in zip(rows, plain))


def test_training_starts_from_a_lora_and_merges_others(new_run: NewRun, trained: Path, server: ForkServer) -> None:
    file = str(out(trained) / "photos.safetensors")
    config = new_run(
        adapter={"init_from": file, "rank_from_weights": True, "rank": None, "alpha": None, "merge": [file],
                 "merge_multipliers": [0.5]},
        train={"max_steps": 2}, save={"every_steps": 0, "release": False}, optimizer={"lr": 0.0},
    )  # fmt: skip
    result = server.run("train", [config], config.parent).expect(0)
    assert "merged photos.safetensors at 0.5 into 22 layers: changes" in result.out
    assert "starting from photos.safetensors" in result.out
    assert_equal(lora(config), lora(trained))
    # Merged at half and attached in full, the first loss is not that of the LoRA alone.
    other = new_run(
        "other", adapter={"init_from": file}, train={"max_steps": 2}, save={"every_steps": 0, "release": False}
    )
    server.run("train", [other], other.parent).expect(0)
    assert metrics(out(config))[0]["loss/total"] != metrics(out(other))[0]["loss/total"]


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("lokr", {"adapter": {"train_norm": True}, "optimizer": {"type": "AdamWScheduleFree", "lr": 0.01}}),
        ("dora", {"memory": {"base_storage": "fp8_scaled"}, "optimizer": {"type": "Prodigy", "lr": 1.0}}),
    ],
)
def test_other_types_train_go_on_after_a_kill_and_draw(
    kind: str, changes: dict[str, Any], new_run: NewRun, trained: Path, server: ForkServer, tmp_path: Path
) -> None:
    tables = {"sample": {**SAMPLES, "every_steps": 6}, "train": {"max_steps": 6}, "save": {"every_steps": 2}, **changes}
    tables["adapter"] = {"type": kind, **changes.get("adapter", {})}
    whole, broken = new_run("whole", **tables), new_run("broken", **tables)
    said = server.run("train", [whole], whole.parent).expect(0).out
    assert f"adapter: {kind} of rank 4 on 22 layers" in said and (" norms" in said) == (kind == "lokr")
    assert server.run("train", [broken], broken.parent, MUSUBI_FAULT="train.update:5").code == -9
    server.run("train", [broken], broken.parent).expect(0)
    for part, tensors in final(whole).items():
        assert_equal(final(broken)[part], tensors)
    file = out(whole) / "photos.safetensors"
    again = new_run("again", **{**tables, "optimizer": {"lr": 0.0}, "memory": {},
                               "adapter": {**tables["adapter"], "init_from": str(file), "rank_from_weights": True, "rank": None,
                                           "alpha": None}})  # fmt: skip
    server.run("train", [again], again.parent).expect(0)
    assert_equal(lora(again), lora(whole))
    options = [
        "--prompt",
        "a tabby cat --d 43",
        "--save_path",
        tmp_path / "drawn",
        "--lora_weight",
        file,
        out(trained) / "photos.safetensors",
    ]
    server.run("flux_generate", [whole, *options], tmp_path).expect(0)
    assert len(list((tmp_path / "drawn").glob("*.png"))) == 1


# Memory


@pytest.mark.parametrize(
    ("count", "checkpointing"),
    [
        (1, False),
        (2, True),
        pytest.param(1, True, marks=pytest.mark.slow),
        pytest.param(2, False, marks=pytest.mark.slow),
    ],
)
def test_swapped_blocks_train_the_same_lora(
    count: int, checkpointing: bool, new_run: NewRun, trained: Path, tmp_path: Path, photographs: Path, encoders: Path,
    server: ForkServer,
) -> None:  # fmt: skip
    """Five blocks would leave one to swap; this model has more, and its run without swap is made too."""
    deep = make_flux(tmp_path / "deep.safetensors", depth=3, depth_single_blocks=4)
    common: dict[str, Any] = {"model": {"path": str(deep)}, "sample": SAMPLES, "train": {"max_steps": 10}}
    plain = new_run("plain", **common)
    server.run("train", [plain], plain.parent).expect(0)
    memory = {"blocks_to_swap": count + 1, "gradient_checkpointing": checkpointing}
    swapped = new_run("swapped", memory=memory, **common)
    result = server.run("train", [swapped], swapped.parent).expect(0)
    assert f"swap: {count + 1} blocks stay in main memory" in result.out
    assert "fetched on the spot" not in result.out
    assert_equal(lora(swapped), lora(plain))
    # Everything at once: inputs of blocks in main memory too, and weights that pass through small buffers.
    memory = {"blocks_to_swap": count + 1, "checkpoint_offload": checkpointing, "swap_pinned": False}
    away = new_run("away", memory=memory, **common)
    result = server.run("train", [away], away.parent).expect(0)
    assert ("memory.checkpoint_offload saves nothing here" in result.out) == checkpointing
    assert_equal(lora(away), lora(plain))
    assert all((a == b).all() for a, b in zip(pictures(swapped, 10), pictures(plain, 10), strict=True))


@pytest.mark.parametrize("storage", ["fp8", "fp8_scaled", "int8", "nf4"])
def test_quantised_bases_train_nearly_the_same(
    storage: str, new_run: NewRun, trained: Path, server: ForkServer
) -> None:
    config = new_run(memory={"base_storage": storage}, save={"every_steps": 0, "release": False})
    server.run("train", [config], config.parent).expect(0)
    rows, plain = metrics(out(config)), metrics(out(trained))
    assert rows[0]["loss/total"] != plain[0]["loss/total"]
    assert max(abs(row["loss/total"] / other["loss/total"] - 1) for row, other in zip(rows, plain)) < 0.03


@pytest.mark.slow
def test_fp8_base_costs_less_than_another_seed(new_run: NewRun, server: ForkServer) -> None:
    """200 steps: on fixed batches a base in scaled fp8 is closer to the plain base than seeds are to each other.

    In bfloat16 where it is computed; a CPU that emulates it takes 3.7 times as long for a step of this model as in float32.
    """
    common: dict[str, Any] = {
        "train": {"max_steps": 200, "mixed_precision": "bf16" if has_bf16(torch.device("cpu")) else "no"},
        "save": {"every_steps": 0, "release": False},
        "log": {"every_steps": 20, "tensorboard": False},
    }
    found = {}
    for name, changes in {
        "plain": {},
        "fp8": {"memory": {"base_storage": "fp8_scaled"}},
        "eight": {"run": {"seed": 8}},
        "nine": {"run": {"seed": 9}},
    }.items():
        config = new_run(name, **changes, **common)
        server.run("train", [config], config.parent).expect(0)
        found[name] = fixed_batch_loss(load_config(config), 1.0)
    print(common["train"]["mixed_precision"], found)
    plain, eight, nine = found["plain"], found["eight"], found["nine"]
    spread = (abs(plain - eight) + abs(plain - nine) + abs(eight - nine)) / 3
    assert abs(found["fp8"] - plain) < spread, found


def option_file(
    folder: Path, photographs: Path, encoders: Path, model: Path, num_repeats: int = 3, **changes: Any
) -> Path:
    """The example of the specification at the size of the test: fp8, swapped blocks and input perturbation."""
    folder.mkdir(parents=True, exist_ok=True)
    data = folder / "data.toml"
    dataset = {
        "image_directory": str(photographs),
        "cache_directory": str(folder / "cache"),
        "caption_extension": ".txt",
        "num_repeats": num_repeats,
    }
    data.write_text(tomli_w.dumps({"general": {"resolution": 128, "enable_bucket": True}, "datasets": [dataset]}))
    options = {
        "architecture": "fd", "dit": str(model), "vae": str(encoders / "ae.safetensors"),
        "text_encoder": str(encoders / "clip" / "clip_l.safetensors"), "text_encoder2": str(encoders / "t5" / "t5_base.safetensors"),
        "dataset_config": str(data), "output_dir": str(folder / "out"), "output_name": "photos",
        "network_module": "networks.lora_flux", "network_dim": 4, "network_alpha": 4, "learning_rate": 1e-3,
        "optimizer_type": "adamw", "lr_scheduler": "constant", "max_train_steps": 4, "mixed_precision": "bf16", "sdpa": True,
        "gradient_checkpointing": True, "fp8_base": True, "fp8_scaled": True, "fp8_t5": True, "blocks_to_swap": 5,
        "timestep_sampling": "flux_shift", "ip_noise_gamma": 0.2, "ip_noise_gamma_random_strength": False, "seed": 42,
        **changes,
    }  # fmt: skip
    if "max_train_epochs" in changes:
        del options["max_train_steps"]
    path = folder / "flat.toml"
    path.write_text(tomli_w.dumps({"train": options, "cache": {"skip_existing": True, "batch_size": 16}}))
    return path


def test_option_file_of_musubi_tuner_runs_as_it_is(
    tmp_path: Path, photographs: Path, encoders: Path, server: ForkServer
) -> None:
    deep = make_flux(tmp_path / "deep.safetensors", depth=3, depth_single_blocks=6)
    own: dict[str, Any] = {
        "optimizer_type": "adamw8bit",
        "max_train_epochs": 1,
        "save_every_n_epochs": 1,
        "num_repeats": 1,
    }
    few = tmp_path / "few"
    few.mkdir()
    for path in photographs.iterdir():
        if path.stem in ("coffee", "moon", "rocket"):
            shutil.copy(path, few)
    path = option_file(tmp_path, few, encoders, deep, **own)
    result = server.run("train", [path], tmp_path).expect(0)
    assert "swap: 5 blocks stay in main memory (1 of 3 double_blocks, 4 of 6 single_blocks; " in result.out
    assert len(load_file(tmp_path / "out" / "photos.safetensors")) == 3 * (8 * 3 + 2 * 6)
    again = server.run("train", [path], tmp_path).expect(0)
    assert "this run is finished" in again.out and "encoded" not in again.out


FULL_DEPTH = {"hidden_size": 32, "num_heads": 2, "axes_dim": [4, 6, 6], "depth": 19, "depth_single_blocks": 38}
DEEP_OPTIONS: dict[str, Any] = {"blocks_to_swap": 25, "t5_max_length": 24, "learning_rate": 1e-2}


@pytest.mark.slow
def test_option_file_on_a_flux_of_full_depth(
    tmp_path: Path, photographs: Path, encoders: Path, server: ForkServer
) -> None:
    """19 double and 38 single blocks, 25 of them swapped: it learns, and goes on where it was killed."""
    full = make_flux(tmp_path / "full.safetensors", **FULL_DEPTH)
    (tmp_path / "prompts.txt").write_text("the moon --w 64 --h 96 --s 2\na tabby cat --w 64 --h 64 --s 2\n")
    options: dict[str, Any] = {
        **DEEP_OPTIONS, "max_train_steps": 20, "save_every_n_steps": 5, "save_state": True,
        "sample_prompts": str(tmp_path / "prompts.txt"), "sample_every_n_steps": 10,
    }  # fmt: skip
    whole = option_file(tmp_path / "whole", photographs, encoders, full, **options)
    result = server.run("train", [whole], whole.parent).expect(0)
    assert "swap: 25 blocks stay in main memory" in result.out
    assert "fetched on the spot" not in result.out
    assert len(lora(whole)) == 3 * (19 * 8 + 38 * 2)
    config = load_config(whole)
    assert fixed_batch_loss(config, 1.0) < 0.95 * fixed_batch_loss(config, 0.0)

    copy_tree(tmp_path / "whole" / "cache", tmp_path / "killed" / "cache")
    killed = option_file(tmp_path / "killed", photographs, encoders, full, **options)
    assert server.run("train", [killed], killed.parent, MUSUBI_FAULT="train.update:11").code == -9
    server.run("train", [killed], killed.parent).expect(0)
    for part, tensors in final(whole).items():
        assert_equal(final(killed)[part], tensors)
    assert metrics(out(killed)) == metrics(out(whole))
    for step in (10, 20):
        assert len(pictures(whole, step)) == 2
        assert all((a == b).all() for a, b in zip(pictures(killed, step), pictures(whole, step), strict=True))


@pytest.mark.slow
def test_option_file_on_a_flux_of_full_depth_in_two_processes(
    tmp_path: Path, photographs: Path, encoders: Path, python: Callable[..., Result]
) -> None:
    """With swap and without, bit for bit; and what one process learns, but for rounding.

    In float32, and of the whole: Adam divides by the gradient, so the smallest elements differ by more than rounding. Steps
    on other data would differ by as much as was learned.
    """
    full = make_flux(tmp_path / "full.safetensors", **FULL_DEPTH)
    found = {}
    for name, processes, changes in (
        ("alone", 1, {"blocks_to_swap": 0, "gradient_accumulation_steps": 2}),
        ("resident", 2, {"blocks_to_swap": 0}),
        ("swapped", 2, {}),
    ):
        if name != "alone":
            copy_tree(tmp_path / "alone" / "cache", tmp_path / name / "cache")
        options = {**DEEP_OPTIONS, "max_train_steps": 6, "mixed_precision": "no", **changes}
        run = option_file(tmp_path / name, photographs, encoders, full, **options)
        given = ["--set", f"distributed.num_processes={processes}"]
        result = python(REPOSITORY / "train.py", run, *given, cwd=run.parent).expect(0)
        assert ("swap: 25 blocks stay in main memory" in result.out) == (name == "swapped")
        found[name] = lora(run)
    assert_equal(found["swapped"], found["resident"])
    learned = norm([tensor for key, tensor in found["alone"].items() if key.endswith("lora_up.weight")])
    assert norm([found["swapped"][key] - tensor for key, tensor in found["alone"].items()]) < 1e-3 * learned


# Drawing


def test_drawing_by_command(trained: Path, server: ForkServer, tmp_path: Path) -> None:
    def draw(name: str, *options: str) -> np.ndarray:
        arguments = [trained, "--prompt", "a tabby cat --d 43", "--save_path", tmp_path / name, *options]
        server.run("flux_generate", arguments, tmp_path).expect(0)
        (path,) = (tmp_path / name).glob("*.png")
        return np.asarray(Image.open(path))

    file = str(out(trained) / "photos.safetensors")
    own, named, without = draw("a"), draw("b", "--lora_weight", file), draw("c", "--lora_weight", "none")
    half, merged = (
        draw("d", "--lora_multiplier", "0.5"),
        draw("e", "--lora_weight", file, file, "--lora_multiplier", "0.5", "0.5"),
    )
    assert (own == named).all()
    assert (own != without).any() and (own != half).any() and (half != without).any()
    twice = [trained, "--prompt", "a tabby cat --d 43", "--images_per_prompt", "2", "--save_path", tmp_path / "two"]
    server.run("flux_generate", twice, tmp_path).expect(0)
    first, second = (np.asarray(Image.open(path)) for path in sorted((tmp_path / "two").glob("photos_*.png")))
    assert (first == own).all() and (second != own).any()
    before = {path: path.read_bytes() for path in (tmp_path / "two").iterdir()}
    said = server.run("flux_generate", twice, tmp_path).expect(0).out
    assert {path: path.read_bytes() for path in before} == before
    assert {path.name for path in (tmp_path / "two").iterdir()} - {path.name for path in before} == {
        "photos_0000000043_01.png", "photos_0000000044_02.png", "contact_sheet_01.png",
    }  # fmt: skip
    assert "photos_0000000043_00.png exists already; numbering continues at 01" in said
    # Twice the half is the whole, up to rounding of colours.
    assert np.abs(merged.astype(int) - own.astype(int)).max() <= 2
    assert (pictures(trained, 20)[1] == draw("f", "--lora_multiplier", "0.5")).mean() > 0.99


def test_averaged_lora_is_drawn_unless_asked_otherwise(new_run: NewRun, server: ForkServer, tmp_path: Path) -> None:
    config = new_run(ema={"enabled": True, "decay": 0.9}, sample=SAMPLES)
    server.run("train", [config], config.parent).expect(0)

    def draw(name: str, *options: str) -> np.ndarray:
        arguments = [config, "--prompt", "a tabby cat --d 43", "--save_path", tmp_path / name, *options]
        server.run("flux_generate", arguments, tmp_path).expect(0)
        (path,) = (tmp_path / name).glob("*.png")
        return np.asarray(Image.open(path))

    averaged, raw = draw("a"), draw("b", "--raw_weights")
    assert (averaged != raw).any()


def test_schnell_trains_and_draws_where_it_is_allowed(new_run: NewRun, tmp_path: Path, server: ForkServer) -> None:
    schnell = make_flux(tmp_path / "schnell.safetensors", guidance_embed=False)
    common: dict[str, Any] = {"train": {"max_steps": 2}, "save": {"every_steps": 0}}
    config = new_run("refused", model={"path": str(schnell)}, **common)
    assert "set model.allow_schnell = true" in text_of(server.run("train", [config], config.parent), 1)
    sample = {**SAMPLES, "every_steps": 2}
    config = new_run("allowed", model={"path": str(schnell), "allow_schnell": True}, sample=sample, **common)
    server.run("train", [config], config.parent).expect(0)
    assert len(pictures(config, 2)) == 4


# Mistakes


def text_of(error: Result, code: int = 2) -> str:
    """What a refused command says; 2 = wrong input in the run file, 1 = a file that cannot be used."""
    return error.expect(code).err


@pytest.mark.parametrize(
    ("changes", "messages"),
    [
        ({"adapter": {"type": "none"}}, ['adapter.type: is "none"; full training of FLUX.1 is not supported']),
        (
            {"model": {"init": "scratch", "path": None}},
            ['model.init: is "scratch", but FLUX.1 is trained with an adapter'],
        ),
        (
            {"objective": {"shift": 2.0}},
            ["objective.shift: is TinyFlux's. For FLUX.1 write objective.discrete_flow_shift = 2.0"],
        ),
        ({"objective": {"timestep_sampling": "flux_shfit"}}, ["Did you mean 'flux_shift'?"]),
        (
            {"objective": {"timestep_sampling": "logit_normal"}},
            ["objective.timestep_sampling: is 'logit_normal', expected one of sigma, uniform"],
        ),
        (
            {"objective": {"text_dropout": 0.1, "lune_weight": 1.0}},
            [
                "objective.text_dropout: FLUX.1 is distilled for its embedded guidance",
                "objective.lune_weight: is a setting of TinyFlux-Deep; FLUX.1-dev does not have it",
            ],
        ),
        ({"experts": {"unet": "x"}}, ["experts.unet: FLUX.1 has no teachers"]),
        ({"adapter": {"only": ["single_blocks.*["]}}, ["adapter.only: 'single_blocks.*[' is not a regular expression"]),
        ({"adapter": {"merge": ["no.safetensors"]}}, ["adapter.merge: no.safetensors: no such file or folder"]),
        ({"adapter": {"rank_from_weights": True}}, ["adapter.rank_from_weights: needs adapter.init_from"]),
        (
            {"memory": {"blocks_to_swap": 54}},
            ["memory.blocks_to_swap: is 54, at most 53 of 19 double_blocks + 38 single_blocks"],
        ),
        (
            {"sample": {**SAMPLES, "prompts": ["a cat --w wide"]}},
            ["sample.prompts: entry 1: --w wide: expected a whole number"],
        ),
        ({"sample": {**SAMPLES, "prompts": ["a cat --x 3"]}}, ["sample.prompts: entry 1: --x is not an option"]),
    ],
    ids=str,
)
def test_mistakes_in_the_run_file(
    changes: dict[str, Any], messages: list[str], new_run: NewRun, server: ForkServer
) -> None:
    config = new_run(cached=False, **changes)
    err = text_of(server.run("train", [config], config.parent))
    assert all(message in err for message in messages), err
    assert not out(config).exists() or not any(out(config).glob("*.safetensors"))


def test_patterns_that_match_nothing(new_run: NewRun, server: ForkServer) -> None:
    config = new_run(adapter={"only": ["middle_blocks.*"]})
    assert (
        "adapter.only: 'middle_blocks.*' matches no layer. Patterns must match a whole path, such as double_blocks.0"
        in (text_of(server.run("train", [config], config.parent)))
    )


def test_encoders_that_are_swapped(new_run: NewRun, encoders: Path, server: ForkServer) -> None:
    t5, clip = str(encoders / "t5" / "t5_base.safetensors"), str(encoders / "clip" / "clip_l.safetensors")
    config = new_run(cached=False, model={"clip_path": t5})
    assert "is a T5 encoder, expected CLIP-L; are clip_path and t5_path swapped?" in (
        text_of(server.run("text", [config], config.parent), 1)
    )
    config = new_run("other", cached=False, model={"t5_path": clip})
    assert "is a CLIP text model, expected T5; are clip_path and t5_path swapped?" in (
        text_of(server.run("text", [config], config.parent), 1)
    )


def test_autoencoder_of_four_channels(new_run: NewRun, tmp_path: Path, server: ForkServer) -> None:
    save_single(autoencoder(4, scaling_factor=0.18215), tmp_path / "sd.safetensors")
    config = new_run(cached=False, model={"vae_path": str(tmp_path / "sd.safetensors")})
    assert "4 channels" in text_of(server.run("latents", [config], config.parent), 1)


def test_adapters_that_do_not_fit(new_run: NewRun, trained: Path, tmp_path: Path, server: ForkServer) -> None:
    file = tmp_path / "strange.safetensors"

    def start(tensors: dict[str, Tensor], name: str, metadata: dict[str, str] | None = None) -> str:
        save_file(tensors, file, metadata)
        # Without caches: what does not fit is said before anything is encoded.
        config = new_run(name, cached=False, adapter={"init_from": str(file)})
        result = server.run("train", [config], config.parent)
        assert "encoded" not in result.out
        return text_of(result, 1)

    good = lora(trained)
    assert "is an adapter for TinyFlux-Deep, this run is FLUX.1-dev" in start(
        good, "a", {"ss_base_model_version": "tinyflux"}
    )
    unknown = {**good, "lora_unet_middle_blocks_0_x.lora_down.weight": torch.zeros(2, 2)}
    assert "1 keys belong to no layer of FLUX.1-dev (lora_unet_middle_blocks_0_x.lora_down.weight)" in start(
        unknown, "b"
    )
    less = {key: tensor for key, tensor in good.items() if "single_blocks_1_linear2" not in key}
    err = start(less, "c")
    assert "does not fit these adapters: 3 keys missing: lora_unet_single_blocks_1_linear2.alpha" in err
    assert "adapter.rank_from_weights = true takes layers, ranks and alpha from the file" in err
    broken = {
        key: tensor * float("nan") if key.endswith("0_linear1.lora_up.weight") else tensor
        for key, tensor in good.items()
    }
    assert "values (lora_unet_single_blocks_0_linear1.lora_up.weight); the training that made it failed" in start(
        broken, "g"
    )
    assert "is not an adapter (first key: x)" in start({"x": torch.zeros(1)}, "d")
    only_text = {"lora_te1_x.lora_down.weight": torch.zeros(2, 2), "lora_te1_x.lora_up.weight": torch.zeros(2, 2)}
    assert "holds only text encoder keys" in start(only_text, "e")
    save_file({**good, **only_text}, file)
    config = new_run("f", adapter={"init_from": str(file)}, train={"max_steps": 2}, save={"every_steps": 0})
    printed = server.run("train", [config], config.parent).expect(0).out
    assert "not used: 2 keys (lora_te1_x.lora_down.weight, lora_te1_x.lora_up.weight)" in printed


def test_checkpoint_that_is_cut_short_or_another_model(
    new_run: NewRun, base: Path, tmp_path: Path, server: ForkServer
) -> None:
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(base.read_bytes()[:-1000])
    config = new_run(model={"path": str(cut)})
    assert "cut.safetensors: not a complete safetensors file" in text_of(
        server.run("train", [config], config.parent), 1
    )
    wide = make_flux(tmp_path / "wide.safetensors", context_in_dim=40)
    config = new_run("wide", model={"path": str(wide)})
    assert "the model takes t5_vec of 40, but model.t5_path gave 32" in text_of(
        server.run("train", [config], config.parent)
    )


def test_empty_folder_and_missing_caption(
    new_run: NewRun, photographs: Path, tmp_path: Path, server: ForkServer
) -> None:
    (tmp_path / "empty").mkdir()
    config = new_run(cached=False, datasets=[{"image_directory": str(tmp_path / "empty")}])
    assert "no images" in text_of(server.run("train", [config], config.parent)).lower()
    images = Path(shutil.copytree(photographs, tmp_path / "images"))
    (images / "moon.txt").unlink()
    config = new_run("other", cached=False, datasets=[{"image_directory": str(images)}])
    assert "moon" in text_of(server.run("train", [config], config.parent))


def test_commands_of_the_family_refuse_other_families(
    trained: Path, workshop: Path, photographs: Path, encoders: Path, python: Callable[..., Result], server: ForkServer
) -> None:
    from project import write_run

    config = write_run(workshop / "tinyflux_only", photographs, encoders)
    for module in ("flux_dev_train_network", "flux_dev_cache_latents", "flux_dev_cache_text_encoder_outputs"):
        err = python("-m", f"musubi_tuner.{module}", config).expect(2).err
        assert "model.arch is tinyflux, this command is for flux_dev" in err
    done = server.run("flux_latents", [trained, "--dry_run"], trained.parent).expect(0)
    assert "latents: would encode 0, up to date 9" in done.out
