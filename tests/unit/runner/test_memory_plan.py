"""What the plan says of memory: the choice of blocks_to_swap, before any cache is made, and once only."""

import argparse
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tomli_w
import torch
from safetensors.torch import save_file

from musubi_tuner.config import RunConfig, calculate_steps, load_config
from musubi_tuner.data import workers
from musubi_tuner.data.buckets import place
from musubi_tuner.data.item import Item
from musubi_tuner.errors import EXIT_FAILED, ConfigError
from musubi_tuner.memory.compose import check_machine
from musubi_tuner.models.flux_dev import FluxConfig, build
from musubi_tuner.planning import probe
from musubi_tuner.planning.probe import Machine, ask_child, measure
from musubi_tuner.planning.report import batch_bytes
from musubi_tuner.runner.command import Runner
from musubi_tuner.training import generate_command
from musubi_tuner.training.generate import Generator

pytestmark = pytest.mark.long

FD = FluxConfig(hidden_size=256, num_heads=2, depth=1, depth_single_blocks=4, vec_in_dim=64, context_in_dim=64)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("base") / "flux.safetensors"
    save_file({key: torch.zeros(t.shape, dtype=torch.bfloat16) for key, t in build(FD).state_dict().items()}, path)
    path.with_suffix(".json").write_text(json.dumps(FD.to_dict()), encoding="utf-8")
    return path


def write(folder: Path, path: str, **memory: Any) -> Path:
    (folder / "images").mkdir(exist_ok=True)
    tables = {
        "schema_version": 1,
        "run": {"name": "x", "output_dir": str(folder / "out"), "device": "cpu"},
        "model": {"arch": "fd", "path": path, "t5_max_tokens": 64},
        "adapter": {"rank": 4},
        "train": {"max_steps": 10, "mixed_precision": "no"},
        "scheduler": {"warmup_steps": 1},
        "cache": {"run": "never"},
        "memory": memory,
        "datasets": [{"image_directory": str(folder / "images")}],
    }
    file = folder / "run.toml"
    file.write_text(tomli_w.dumps(tables), encoding="utf-8")
    return file


def a_runner(config: RunConfig, **options: Any) -> Runner:
    given = {"plan": False, "fresh": False, "cache_only": False, "skip_cache": False, **options}
    return Runner(config, argparse.Namespace(**given), {})


def a_plan(due: list[str] | None = None) -> Any:
    size = (64, 64)
    item = Item("a", "0:a", Path("a.png"), "text", Path("cache"), size, place(size, size), 1, 1)
    steps = calculate_steps([(1, 1)], num_processes=1, grad_accum_steps=1, max_steps=10, max_epochs=None)
    return SimpleNamespace(
        found=SimpleNamespace(items=[item], notes=[]),
        is_counted=True,
        steps=steps,
        due=due or [],
        missing={},
        held_out=[],
        status={},
        state=None,
    )


def test_plan_names_the_blocks_that_auto_chooses_and_the_free_memory(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    machine = Machine(free=36 << 20)
    monkeypatch.setattr(probe, "probe", lambda *_: machine)
    monkeypatch.setattr(workers, "SHARED_MEMORY", tmp_path)
    disk = shutil.disk_usage(tmp_path)._replace(total=300 << 10, free=300 << 10)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: disk)
    path = write(tmp_path, str(base), blocks_to_swap="auto", swap_ring=1)
    auto = a_runner(load_config(path, {"train.loader_workers": 2}))
    settled = auto._plan_memory(a_plan())
    assert settled is not None and settled.memory.blocks_to_swap == 2
    shown = capsys.readouterr().out
    assert f"warning: {tmp_path} (shared memory) has 0.3 MiB" in shown
    assert 'memory.blocks_to_swap = "auto" is 2: about ' in shown and "of 36.0 MiB free" in shown
    assert "of main memory for swapped blocks" in shown
    machine = Machine()
    monkeypatch.setattr("musubi_tuner.planning.report.estimate_lines", lambda *_: [])  # they take seconds
    settled = auto._plan_memory(a_plan())
    assert settled is not None and settled.memory.blocks_to_swap == 0
    assert "computes in main memory" in capsys.readouterr().out


def test_memory_is_planned_before_the_caches_and_training_is_handed_the_result(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[Any] = []
    monkeypatch.setattr("musubi_tuner.planning.plan.make_plan", lambda *_, **__: a_plan(["latents", "text"]))
    monkeypatch.setattr("musubi_tuner.planning.plan.describe", lambda *_: "the plan")

    def plan_memory(runner: Runner, *_: Any, **__: Any) -> RunConfig:
        done.append("memory")
        memory = runner.config.memory.model_copy(update={"blocks_to_swap": 3})
        return runner.config.model_copy(update={"memory": memory})

    monkeypatch.setattr(Runner, "_plan_memory", plan_memory)
    monkeypatch.setattr(
        Runner, "_stage", lambda self, arguments, environment=None: done.append((arguments[-1], environment)) or 0
    )
    monkeypatch.setattr(
        "musubi_tuner.training.loop.train", lambda config, items: done.append(config.memory.blocks_to_swap)
    )
    config = load_config(write(tmp_path, str(base)), {"cache.run": "auto", "model.vae_path": str(base),
                                                      "model.clip_path": str(base), "model.t5_path": str(base)})  # fmt: skip
    assert a_runner(config).run() == 0
    assert done == ["memory", ("latents", None), ("text", None), 3]
    done.clear()
    runner = a_runner(config)
    runner.processes = 2
    monkeypatch.setattr(
        "musubi_tuner.runner.command.run_children", lambda words, ranks: done.append((words, ranks)) or 0
    )
    assert runner.run() == 0
    words, ranks = done[-1]
    assert "--skip_cache" in words
    assert words[-2:] == ["--set", "memory.blocks_to_swap=3"]
    assert [(rank["RANK"], rank["WORLD_SIZE"]) for rank in ranks] == [("0", "2"), ("1", "2")]


def test_a_model_on_the_hub_is_planned_when_it_is_here(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda *_, **__: pytest.fail("the hub was asked"))
    runner = a_runner(load_config(write(tmp_path, "owner/model:flux.safetensors", blocks_to_swap=2)))
    assert runner._plan_memory(a_plan()) is None
    assert capsys.readouterr().out == "  memory   is estimated once the checkpoint is downloaded\n"
    repository = tmp_path / "hub" / "models--owner--model"
    for name, text in (("refs/main", "c0ffee"), ("snapshots/c0ffee/README.md", "")):
        (repository / name).parent.mkdir(parents=True)
        (repository / name).write_text(text)
    assert runner._plan_memory(a_plan()) is None  # another file of it is here
    capsys.readouterr()
    shutil.copy(base, repository / "snapshots" / "c0ffee" / "flux.safetensors")
    settled = runner._plan_memory(a_plan())
    assert settled is not None and settled.memory.blocks_to_swap == 2
    assert "  memory   about " in capsys.readouterr().out


def test_what_this_machine_lacks_is_said_before_anything_is_made(base: Path, tmp_path: Path) -> None:
    run_file = write(tmp_path, str(base), compile=True, compile_backend="inducktor")
    with pytest.raises(ConfigError, match=r"memory\.compile_backend: 'inducktor' is unknown"):
        a_runner(load_config(run_file))._plan_memory(a_plan())


@pytest.mark.parametrize(
    ("capability", "memory", "tried"),
    [((8, 6), {"base_storage": "fp8_scaled"}, True), ((8, 9), {"base_storage": "fp8_scaled"}, False),
     ((8, 6), {"base_storage": "int8"}, False), ((8, 6), {"base_storage": "fp8", "compile": False}, False)],
)  # fmt: skip
def test_compiled_float8_is_tried_out_on_older_gpus(
    capability: tuple[int, int],
    memory: dict[str, Any],
    tried: bool,
    base: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[str] = []
    monkeypatch.setattr("musubi_tuner.memory.compose.check_compiler", lambda *_: None)
    monkeypatch.setattr("musubi_tuner.memory.compose.check_float8", lambda memory, _: asked.append(memory.base_storage))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    config = load_config(write(tmp_path, str(base), **{"compile": True, **memory}))
    check_machine(config, torch.device("cuda"))
    assert asked == (["fp8_scaled"] if tried else [])


@pytest.mark.parametrize(
    "memory", [{"blocks_to_swap": 2}, {"gradient_checkpointing": True, "checkpoint_offload": True}]
)
def test_a_device_that_nothing_can_be_moved_to_is_refused_before_anything_is_made(
    memory: dict[str, Any], base: Path, tmp_path: Path
) -> None:
    config = load_config(write(tmp_path, str(base), **memory))
    (key,) = {"blocks_to_swap", "checkpoint_offload"} & memory.keys()
    with pytest.raises(ConfigError, match=rf"memory\.{key}: is not supported on mps"):
        check_machine(config, torch.device("mps"))


def test_flash_attention_needs_the_half_precision_that_auto_may_not_give(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("musubi_tuner.memory.compose.use_attention", lambda *_: None)
    config = load_config(write(tmp_path, str(base)))
    memory = config.memory.model_copy(update={"attention": "flash"})
    with pytest.raises(
        ConfigError, match=r'"flash" computes in bf16 or fp16, but train\.mixed_precision = "auto" is "no"'
    ):
        check_machine(config.model_copy(update={"memory": memory}), CPU)


def test_a_child_checks_and_the_device_is_measured(base: Path, tmp_path: Path) -> None:
    config = load_config(write(tmp_path, str(base), blocks_to_swap=1))
    found = measure(config, 1)
    assert found.free is None and found.rates is not None and found.rates.copied > 1e6
    with pytest.raises(ConfigError, match="'nocompiler' is unknown"):
        ask_child(config, {"memory.compile": True, "memory.compile_backend": "nocompiler",
                           "memory.gradient_checkpointing": True}, 1)  # fmt: skip


# Drawing from the same run file


def test_drawing_checks_the_machine_before_it_looks_for_the_checkpoint(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load_config(write(tmp_path, str(base), blocks_to_swap=2))
    monkeypatch.setattr("musubi_tuner.training.generate.choose_device", lambda _: torch.device("mps"))
    with pytest.raises(ConfigError, match=r"memory\.blocks_to_swap: is not supported on mps"):
        Generator.from_run(config, "missing")


def test_a_lack_of_memory_while_drawing_names_what_to_change(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has 1.12 GiB free.")

    monkeypatch.setattr(Generator, "from_run", full)
    arguments = [str(write(tmp_path, str(base))), "--prompt", "a cat", "--save_path", str(tmp_path)]
    assert generate_command.main("fd", "", arguments) == EXIT_FAILED
    message = capsys.readouterr().err
    for part in ("error: ", "2.50 GiB", "--batch_size", 'memory.blocks_to_swap = "auto"'):
        assert part in message


def test_the_largest_batch_has_the_largest_bucket_and_one_caption_each(base: Path, tmp_path: Path) -> None:
    config = load_config(write(tmp_path, str(base)))
    plan = config.spec.family.outline_model(config)
    items = [
        Item(name, f"0:{name}", Path(name), "", Path("cache"), size, place(size, size), 1, 3, more_captions=("b", "c"))
        for name, size in (("small", (64, 64)), ("large", (128, 64)), ("again", (64, 64)))
    ]
    latents, t5, clip = 16 * 16 * 8 * 4, 64 * 64 * 2, 64 * 2
    assert batch_bytes(config, items, plan) == 3 * (latents + t5 + clip)
