"""A LoRA on TinyFlux through the same trainer: on an ordinary, a quantised and a streamed base, with teachers and without."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from project import GEOMETRY, ForkServer, copy_tree, metrics, write_run
from safetensors.torch import load_file, save_file
from torch import Tensor


@pytest.fixture(scope="module")
def base(workshop: Path, photographs: Path, encoders: Path, caches: Path, server: ForkServer) -> Path:
    """The release of a TinyFlux with more blocks than the other tests have."""
    root = workshop / "tinyflux_base"
    copy_tree(caches, root / "cache")
    deep = {**GEOMETRY, "num_double_layers": 3, "num_single_layers": 4}
    config = write_run(root, photographs, encoders, model={"geometry": deep}, train={"max_steps": 5})
    server.run("train", [config], root).expect(0)
    return root / "out" / "release"


@pytest.fixture(scope="module")
def train(
    tmp_path_factory: pytest.TempPathFactory, photographs: Path, encoders: Path, caches: Path, base: Path,
    server: ForkServer,
) -> Callable[..., Any]:  # fmt: skip
    """Train a LoRA in a new folder and return its output, or with another exit code what was printed."""

    def run(name: str, code: int = 0, **changes: Any) -> Any:
        root = tmp_path_factory.mktemp(name)
        copy_tree(caches, root / "cache")
        tables: dict[str, Any] = {
            "model": {"init": None, "init_scheme": None, "geometry": None, "path": str(base)},
            "adapter": {"type": "lora", "preset": "full", "rank": 4, "alpha": 4.0},
            "ema": {"enabled": False, "decay": None},
            "experts": {"expert_input": "noised_image", "expert_time": "aligned", "sol_spatial_norm": "max"},
            "optimizer": {"lr": 1e-2},
        }
        config = write_run(root, photographs, encoders, **{**tables, **changes})
        result = server.run("train", [config], root).expect(code)
        return result if code else root / "out"

    return run


@pytest.fixture(scope="module")
def plain(train: Callable[..., Any]) -> Path:
    """Output of a LoRA on an ordinary base. Read only."""
    out: Path = train("plain")
    return out


def lora(out: Path) -> dict[str, Tensor]:
    return load_file(out / "photos.safetensors")


def test_lora_learns_and_its_base_stays(plain: Path, base: Path) -> None:
    tensors = lora(plain)
    assert len(tensors) == 3 * (4 * 3 + 4 * 4)
    assert "lora_unet_double_blocks_2_attn_img_qkv.lora_up.weight" in tensors
    assert any(bool((t != 0).any()) for key, t in tensors.items() if key.endswith("lora_up.weight"))
    rows = metrics(plain)
    assert sum(row["loss/main"] for row in rows[-5:]) < sum(row["loss/main"] for row in rows[:5])
    # Teachers are fed, and the frozen predictors learn nothing from them.
    assert all(row["loss/total"] == row["loss/main"] and "loss/lune" not in row for row in rows)
    before, after = load_file(base.parent / "photos.safetensors"), load_file(base / "model.safetensors")
    assert all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_streamed_blocks_train_the_same(checkpointing: bool, plain: Path, train: Callable[..., Any]) -> None:
    expected = lora(plain)
    swapped = lora(train("swapped", memory={"blocks_to_swap": 3, "gradient_checkpointing": checkpointing}))
    assert all(torch.equal(expected[key], swapped[key]) for key in expected)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("a cat --fs 3", "--fs has no effect: TinyFlux draws with objective.shift"),
        ("a cat --l 4", "--l has no effect: TinyFlux's classifier-free guidance is sample.guidance"),
        ("a cat --m 0.5", "--m sets the strength of an adapter, and there is none"),
    ],
)
def test_options_of_prompts_that_cannot_act_are_refused_at_the_start(
    prompt: str, message: str, new_run: Callable[..., Path], server: ForkServer
) -> None:
    config = new_run(sample={"prompts": [prompt], "every_steps": 5})
    assert message in server.run("train", [config], config.parent).expect(2).err
    config = new_run()
    arguments = [config, "--prompt", prompt, "--images_per_prompt", "2"]
    assert server.run("generate", arguments, config.parent).expect(2).err.count(message) == 1


def test_padding_is_hidden_in_pictures_where_it_was_in_the_training_of_the_adapter(
    plain: Path, train: Callable[..., Any], server: ForkServer, tmp_path: Path
) -> None:
    marked = tmp_path / "marked.safetensors"
    save_file(lora(plain), marked, metadata={"options_json": json.dumps({"t5_attn_mask": True})})
    drawn = {}
    for name, extra in {
        "plain": [],
        "marked": ["--lora_weight", str(marked)],
        "hidden": ["--set", "model.t5_attn_mask=true"],
    }.items():
        arguments = [plain.parent / "run.toml", "--prompt", "a cat", "--set", "sample.steps=2", *extra]
        arguments += ["--save_path", str(tmp_path / name)]
        printed = server.run("generate", arguments, tmp_path).expect(0).out
        said = f"note: padding is hidden (model.t5_attn_mask = true), as in the training of {marked}"
        assert (said in printed) == (name == "marked")
        (path,) = (tmp_path / name).glob("photos_*.png")
        with Image.open(path) as picture:
            drawn[name] = picture.tobytes()
    assert drawn["marked"] == drawn["hidden"] != drawn["plain"]
    for key, value in (("init_from", str(marked)), ("merge", [str(marked)])):
        adapter = {"type": "lora", key: value, "preset": "full", "rank": 4, "alpha": 4.0}
        error = train(f"refused {key}", code=2, adapter=adapter)
        assert f"adapter.{key}: {marked} was trained with padding hidden; set model.t5_attn_mask to true" in error.err


@pytest.mark.parametrize("storage", ["fp8_scaled", "nf4"])
def test_quantised_base(storage: str, plain: Path, train: Callable[..., Any]) -> None:
    rows, quantised = metrics(plain), metrics(train("small", memory={"base_storage": storage}))
    assert rows[0]["loss/main"] != quantised[0]["loss/main"]
    assert max(abs(a["loss/main"] / b["loss/main"] - 1) for a, b in zip(rows, quantised)) < 0.1


def test_own_settings_by_layer_on_a_quantised_and_streamed_base(train: Callable[..., Any]) -> None:
    adapter = {
        "type": "lora", "kinds": ["single_attn", "double_mlp", "modulation"], "rank": 2, "alpha": 2.0,
        "targets": [
            {"pattern": "single_blocks.[0-1].**", "rank": 3, "depth": 2},
            {"pattern": "**.linear", "lr_scale": 0.0},
            {"pattern": "double_blocks.2.**", "enabled": False},
        ],
    }  # fmt: skip
    out = train("mixed", adapter=adapter, memory={"base_storage": "fp8_scaled", "blocks_to_swap": 3})
    tensors = lora(out)
    rates = [(row["train/lr"], row["train/lr_x0"]) for row in metrics(out) if "train/lr" in row]
    assert max(rate for rate, _ in rates) > 0 and all(frozen == 0 for _, frozen in rates)
    assert len(tensors) == 3 * (2 * (4 + 2) + 4 * 3)
    ranks = {key.removesuffix(".lora_down.weight"): len(t) for key, t in tensors.items() if "lora_down" in key}
    assert ranks["lora_unet_single_blocks_1_attn_qkv"] == 6 and ranks["lora_unet_single_blocks_2_attn_qkv"] == 2
    for key, tensor in tensors.items():
        if key.endswith("lora_up.weight"):
            assert bool((tensor != 0).any()) is not key.endswith("linear.lora_up.weight"), key
