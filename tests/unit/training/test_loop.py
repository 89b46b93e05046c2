"""Runs of a few updates inside the test's own process: what settings of a run file do, and what is left of a run.

The images are tensors in memory in the place of cache files, and the model has one block of each kind.
"""

import json
import math
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, make_dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tomli_w
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from musubi_tuner import assemble, merge_lora
from musubi_tuner.assemble import load_trainee
from musubi_tuner.config import RunConfig, load_config
from musubi_tuner.data.batch import Batch, load_batches
from musubi_tuner.data.buckets import place
from musubi_tuner.data.item import Item
from musubi_tuner.data.plan import MicroBatch, PlanItem
from musubi_tuner.data.split import hold_out_by_id
from musubi_tuner.encoders.locate import hash_file
from musubi_tuner.errors import CheckpointError, ConfigError, Interrupted, TrainingError
from musubi_tuner.memory.block_swap import BlockSwap
from musubi_tuner.models.tinyflux import TinyFluxConfig, TinyFluxDeep, from_pretrained, load_model
from musubi_tuner.models.tinyflux.model import rotary_frequencies
from musubi_tuner.models.tinyflux.upgrade_file import upgrade_file
from musubi_tuner.training import actions, loop, samples
from musubi_tuner.training import build as build_module
from musubi_tuner.training import role as role_module
from musubi_tuner.training import update as update_module
from musubi_tuner.training.checkpoint import read_values, refuse_second_branch
from musubi_tuner.training.ranks import Ranks
from musubi_tuner.training.release import config_texts
from musubi_tuner.training.schedulers import cosine_schedule, linear_schedule
from musubi_tuner.training.task import FlowPhase
from musubi_tuner.weights.checkpoints import find_weights

pytestmark = pytest.mark.long

SIZES = [(32, 32), (48, 32), (32, 32), (32, 32)]
IMAGES = 8
"""Six of one bucket and two of another: with batches of 2, an epoch is four micro-batches."""
GEOMETRY = {
    "hidden_size": 32, "num_attention_heads": 2, "attention_head_dim": 16, "joint_attention_dim": 12,
    "pooled_projection_dim": 10, "num_double_layers": 1, "num_single_layers": 1, "axes_dims_rope": [4, 6, 6],
    "lune_expert_dim": 6, "lune_hidden_dim": 16, "lune_dropout": 0.5, "sol_spatial_size": 4, "sol_hidden_dim": 12,
}  # fmt: skip
TEACHERS = {"expert_input": "random", "expert_time": "reference"}


def make_item(number: int) -> Item:
    size = SIZES[number % len(SIZES)]
    name = f"image {number}"
    return Item(name, f"0:{name}", Path(f"{name}.png"), "text", Path("cache"), size, place(size, size), 1, 2)


class Pictures:
    """Images in memory, with the interface of the cached dataset."""

    def __init__(
        self, config: Any, items: list[Item], kinds: list[str], texts: Any = (), dropping: bool = True
    ) -> None:
        self.items = list(items)
        self.places = None

    def __len__(self) -> int:
        return len(self.items)

    def row(self, index: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(index)
        width, height = self.items[index].bucket
        maps = torch.rand(2, 4, 4, generator=generator)
        return {
            "latents": torch.randn(16, height // 8, width // 8, generator=generator),
            "t5_vec": torch.randn(5, 12, generator=generator),
            "t5_mask": torch.tensor([1, 1, 1, 1, 0]),
            "clip_l_pooler": torch.randn(10, generator=generator),
            "t_buckets": torch.tensor([0.0, 1.0]),
            "lune_features": torch.randn(2, 6, generator=generator),
            "sol_stats": torch.rand(2, 3, generator=generator),
            "sol_spatial": maps / maps.sum(dim=(1, 2), keepdim=True),
        }

    def shapes(self) -> list[tuple[int, dict[str, tuple[int, ...]]]]:
        return [(0, {name: tuple(tensor.shape) for name, tensor in self.row(0).items()})]

    def plan_items(self) -> list[PlanItem]:
        return [PlanItem(item.key, item.bucket, item.num_repeats, item.batch_size) for item in self.items]

    def read(self, planned: MicroBatch, epoch: int) -> Batch:
        rows = [self.row(index) for index in planned.items]
        tensors = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
        valid = {name: torch.ones(len(rows), dtype=torch.bool) for name in tensors}
        items = [self.items[index].id for index in planned.items]
        ids = torch.zeros(len(rows), dtype=torch.int64)
        return Batch(tensors, valid, items, planned.presentations, ids)


class Started:
    """A run that is built, by the names under which the tests ask for its parts."""

    def __init__(self, config: RunConfig, items: list[Item]) -> None:
        config.output_dir.mkdir(parents=True, exist_ok=True)
        self.built = build_module.build_run(config, items, Ranks(config, lambda: None))
        self.folder = config.output_dir
        self.position = self.built.position
        self.role = self.built.role
        self.model = self.built.model
        self.trained = self.built.role.module
        assert self.built.saver is not None
        self.geometry = self.built.saver.geometry
        self.options = self.built.saver.options
        self.held_out = self.built.snapshot.identity["held_out"]

    def run(self) -> None:
        loop.run_to_end(self.built)


Start = Callable[..., Started]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the runs of this file are made."""
    return tmp_path_factory.mktemp("trainer")


@pytest.fixture(scope="module")
def start(folder: Path) -> Iterator[Start]:
    """Build the run of a run file: the folder's name, then changes by table; None leaves a key out."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    patch = pytest.MonkeyPatch()
    patch.setattr(build_module, "CachedDataset", Pictures)

    def begin(name: str, **changes: dict[str, Any]) -> Started:
        return Started(load_config(write(folder / name, **changes)), [make_item(n) for n in range(IMAGES)])

    yield begin
    patch.undo()
    for number, handler in handlers.items():
        signal.signal(number, handler)


def write(root: Path, **changes: dict[str, Any]) -> Path:
    """A run file of four updates, an epoch."""
    tables: dict[str, dict[str, Any]] = {
        "run": {"name": "tiny", "output_dir": str(root / "out"), "seed": 3, "device": "cpu", "threads": 1},
        "model": {"arch": "tf", "init": "scratch", "geometry": GEOMETRY},
        "experts": TEACHERS,
        "cache": {"run": "never"},
        "train": {"max_steps": 4, "mixed_precision": "no"},
        "optimizer": {"lr": 1e-2},
        "scheduler": {"warmup_steps": 0},
        "save": {"every_steps": 0, "every_epochs": 0, "state": False},
        "log": {"every_steps": 1, "tensorboard": False},
    }
    for table, values in changes.items():
        tables[table] = {**tables.get(table, {}), **values}
    root.mkdir(parents=True, exist_ok=True)
    document: dict[str, Any] = {
        name: {key: value for key, value in values.items() if value is not None} for name, values in tables.items()
    }
    document |= {"schema_version": 1, "datasets": [{"image_directory": str(root)}], "general": {"resolution": 32}}
    path = root / "run.toml"
    path.write_text(tomli_w.dumps(document), encoding="utf-8")
    return path


def lines(trainer: Started) -> list[dict[str, Any]]:
    """Lines of metrics.jsonl without the clock."""
    rows = [json.loads(line) for line in (trainer.folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [{key: value for key, value in row.items() if key != "clock"} for row in rows]


def updates(trainer: Started) -> list[dict[str, Any]]:
    return [row for row in lines(trainer) if "loss/total" in row]


def header(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return dict(file.metadata())


def entries(trainer: Started) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((trainer.folder / "checkpoints.json").read_text(encoding="utf-8"))["checkpoints"]
    return found


# Blocks in main memory


def test_blocks_that_were_not_copied_ahead_are_counted_at_the_end(
    start: Start, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    deep = {"geometry": {**GEOMETRY, "num_single_layers": 4}}
    start("ahead", model=deep, memory={"blocks_to_swap": 1}).run()
    assert "fetched on the spot" not in capsys.readouterr().out
    # A swap that forgets what is in its buffer, at the start and after each step, copies on the spot in all four updates.
    monkeypatch.setattr(BlockSwap, "refresh", lambda swap: setattr(swap.slots[0], "holder", -1))
    start("late", model=deep, memory={"blocks_to_swap": 1}).run()
    assert "note: 4 blocks had to be fetched on the spot instead of prefetched" in capsys.readouterr().out


# Waiting for the device


class Reads:
    """Counts what makes a host wait for a device: values that become numbers, tensors that come to the host, shapes that depend on values."""

    CALLS = frozenset({"item", "tolist", "__bool__", "__float__", "__int__", "__index__", "cpu", "numpy"})

    def __init__(self) -> None:
        self.found: list[str] = []

    @contextmanager
    def counting(self) -> Iterator[None]:
        reads = self

        class Calls(TorchFunctionMode):
            """Calls in Python; most end in an operation that is not counted a second time."""

            def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                name = getattr(func, "__name__", "")
                before = len(reads.found)
                result = func(*args, **(kwargs or {}))
                if name in reads.CALLS:
                    reads.found[before:] = [name]
                return result

        class Operations(TorchDispatchMode):
            """Operations, also of the backward pass and of the optimizer."""

            def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                chosen = args[1] if func is torch.ops.aten.index.Tensor else ()
                by_mask = any(index is not None and index.dtype == torch.bool for index in chosen)
                if by_mask or func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
                    reads.found.append(str(func))
                return func(*args, **(kwargs or {}))

        with Operations(), Calls():
            yield


def test_the_counter_counts() -> None:
    reads, one = Reads(), torch.ones(2)
    with reads.counting():
        one.sum().item()
        bool(one.isfinite().all())
        one.tolist()
        one[one > 0].mul_(2)
        (one + one)[torch.tensor([0])]
    assert reads.found == ["item", "__bool__", "tolist", "aten.index.Tensor"]


@pytest.mark.parametrize("case", ["teachers", "lora", "no_bins"])
def test_a_micro_batch_waits_for_nothing_and_an_update_once(
    case: str, start: Start, monkeypatch: pytest.MonkeyPatch, trained: Started
) -> None:
    changes: dict[str, Any] = {"train": {"grad_accum_steps": 2}, "log": {"every_steps": 100}, "ema": {"decay": 0.9}}
    if case == "no_bins":
        changes["log"]["noise_bins"] = 0
    if case == "lora":
        changes |= on_checkpoint(trained, adapter={"type": "lora", "rank": 2, "max_norm": 1.0})
    trainer = start(f"reads {case}", **changes)
    reads, phases = Reads(), dict[str, int]()
    inner = update_module._move

    def move(*arguments: Any) -> bool:
        phases["micro-batches"] = len(reads.found)
        finite = inner(*arguments)
        phases["step"] = len(reads.found) - phases["micro-batches"]
        return finite

    monkeypatch.setattr(update_module, "_move", move)
    counted: list[dict[str, int]] = []
    whole = loop.run_update

    def one(*arguments: Any, **settings: Any) -> Any:
        reads.found.clear()
        with reads.counting():
            outcome = whole(*arguments, **settings)
        counted.append(dict(phases))
        return outcome

    monkeypatch.setattr(loop, "run_update", one)
    trainer.run()
    assert counted == [{"micro-batches": 0, "step": 1}] * 4, reads.found


# Options of the model


OPTIONS: dict[str, Any] = {"text_positions": "index", "temperature_per_head": True, "timestep_scale": 1000.0}
RECORDED: dict[str, Any] = {**OPTIONS, "sol_spatial_norm": "mean", "t5_attn_mask": True, **TEACHERS}


@pytest.fixture(scope="module")
def trained(start: Start) -> Started:
    """A run of a new model with every option that differs from the published model."""
    trainer = start(
        "every option",
        model={"geometry": {**GEOMETRY, "guidance_embeds": True}, "t5_attn_mask": True, **OPTIONS},
        experts={**TEACHERS, "sol_spatial_norm": "mean"},
        save={"dtype": "bfloat16"},
        train={"max_steps": 2},
    )
    trainer.run()
    return trainer


def on_checkpoint(trained: Started, **changes: dict[str, Any]) -> dict[str, Any]:
    """Changes of a run file that continue the checkpoint of another run."""
    model = {"init": "checkpoint", "geometry": None, "path": str(trained.folder), "t5_attn_mask": True}
    return {**changes, "model": {**model, **changes.get("model", {})}}


@pytest.mark.parametrize("name", [*RECORDED, "guidance_embeds"])
def test_an_option_is_in_every_file_of_a_run_and_comes_back_from_each(name: str, trained: Started) -> None:
    files = [trained.folder / f"{part}.safetensors" for part in ("tiny", "tiny_ema", "release/model", "release/ema")]
    beside = "config.json" if name == "guidance_embeds" else "options.json"
    for folder in (trained.folder, trained.folder / "release"):
        assert json.loads((folder / beside).read_text(encoding="utf-8"))[name] == RECORDED.get(name, True)
    for path in files:
        key = "config_json" if name == "guidance_embeds" else "options_json"
        assert json.loads(header(path)[key])[name] == RECORDED.get(name, True)
    for model in (load_model(trained.folder), from_pretrained(trained.folder / "release", ema=True)):
        if name in OPTIONS:
            assert getattr(model.config.options, name) == OPTIONS[name]
        assert model.config == trained.geometry


def copy_configs(source: Path, target: Path) -> None:
    for name in ("config.json", "options.json"):
        (target / name).write_bytes((source / name).read_bytes())


@pytest.mark.parametrize("kind", ["header", "config beside", "torch file", "upgraded", "merged"])
def test_options_come_back_from_every_form_of_file(kind: str, trained: Started, start: Start, tmp_path: Path) -> None:
    source, path = trained.folder / "tiny.safetensors", tmp_path / "model.safetensors"
    tensors = load_file(source)
    if kind == "header":
        save_file(tensors, path, header(source))
    elif kind == "config beside":
        save_file(tensors, path)
        copy_configs(trained.folder, tmp_path)
    elif kind == "torch file":
        path = tmp_path / "model.pt"
        config = {**trained.geometry.to_dict(), "_metadata": {"options": RECORDED}}
        torch.save({"model": tensors, "model_config": config}, path)
    elif kind == "upgraded":
        upgrade_file(str(source), path)
        assert json.loads(header(path)["options_json"]) == RECORDED
    else:
        adapted = start(
            "adapter", **on_checkpoint(trained, adapter={"type": "lora", "rank": 2}, train={"max_steps": 1})
        )
        adapted.run()
        lora = adapted.folder / "tiny.safetensors"
        assert json.loads(header(lora)["options_json"]) == RECORDED
        base = tmp_path / "base" / "model.safetensors"
        base.parent.mkdir()
        save_file(tensors, base)  # its config and options lie beside it, and must get into the merged file
        copy_configs(trained.folder, base.parent)
        words = ["--dit", str(base), "--arch", "tf", "--lora_weight", str(lora), "--save_merged_model", str(path)]
        assert merge_lora.main(words) == 0
        assert json.loads(header(path)["options_json"]) == RECORDED
    assert asdict(load_model(path).config.options) == OPTIONS


PUBLISHED_FIELDS = (
    "hidden_size", "num_attention_heads", "attention_head_dim", "in_channels", "patch_size", "joint_attention_dim",
    "pooled_projection_dim", "num_double_layers", "num_single_layers", "mlp_ratio", "axes_dims_rope", "use_lune_expert",
    "lune_expert_dim", "lune_hidden_dim", "lune_dropout", "freeze_lune", "use_sol_prior", "sol_spatial_size", "sol_hidden_dim",
    "sol_geometric_weight", "freeze_sol", "use_t5_vec",
)  # fmt: skip
PublishedConfig = make_dataclass("PublishedConfig", PUBLISHED_FIELDS)
"""As strict as that of the published loader, which passes it all that config.json holds."""


def test_the_published_loader_takes_every_folder_and_file(start: Start, tmp_path: Path) -> None:
    trainer = start("published", model={"geometry": GEOMETRY, **OPTIONS}, experts=TEACHERS, train={"max_steps": 1})
    trainer.run()
    whole, release, upgraded = trainer.folder, trainer.folder / "release", tmp_path / "upgraded.safetensors"
    upgrade_file(str(whole), upgraded)
    configs = [(folder / "config.json").read_text(encoding="utf-8") for folder in (whole, release)]
    weights = [whole / "tiny.safetensors", whole / "tiny_ema.safetensors", *release.glob("*.safetensors"), upgraded]
    configs += [header(path)["config_json"] for path in weights]
    assert len(configs) == 7
    for text in configs:
        fields = asdict(PublishedConfig(**json.loads(text)))
        model = TinyFluxDeep(TinyFluxConfig(**fields))
        for path in weights:
            model.load_state_dict(load_file(path), strict=True)
    # A folder of an earlier version goes to the hub and into a release without what the loader refuses.
    old = {**trainer.geometry.to_dict(), "_metadata": {"options": trainer.options}}
    (tmp_path / "config.json").write_text(json.dumps(old), encoding="utf-8")
    texts = config_texts(tmp_path)
    assert texts == {name: (whole / name).read_text(encoding="utf-8") for name in ("config.json", "options.json")}


def test_options_that_v3_does_not_know_have_no_v3_form(trained: Started, tmp_path: Path) -> None:
    with pytest.raises(
        CheckpointError, match="text_positions, temperature_per_head, timestep_scale, which v3 does not know"
    ):
        upgrade_file(str(trained.folder), tmp_path / "v3.safetensors", to="v3")


@pytest.mark.parametrize(
    ("key", "value"), [("text_order", "index"), ("text_positions", "middle"), ("timestep_scale", 0)]
)
def test_an_option_that_is_not_known_is_refused_wherever_a_model_is_loaded(
    key: str, value: Any, trained: Started, tmp_path: Path
) -> None:
    source, path = trained.folder / "tiny.safetensors", tmp_path / "model.safetensors"
    options = json.dumps({**RECORDED, key: value})
    save_file(load_file(source), path, {**header(source), "options_json": options})
    with pytest.raises(CheckpointError, match=key):
        from_pretrained(path)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("text_positions", "zero", 'model.text_positions is "zero", and it was trained with "index"; remove the key'),
        ("temperature_per_head", False, "model.temperature_per_head is false, and it was trained with true"),
        ("timestep_scale", 1.0, "model.timestep_scale is 1.0, and it was trained with 1000.0"),
        ("t5_attn_mask", False, "model.t5_attn_mask is false, and it was trained with padding hidden; set it to true"),
    ],
)
def test_training_a_checkpoint_with_another_option_is_refused(
    key: str, value: Any, message: str, trained: Started, tmp_path: Path
) -> None:
    config = load_config(write(tmp_path, **on_checkpoint(trained, model={key: value})))
    family = config.spec.family
    for refused in (lambda _: load_trainee(config, torch.device("cpu")), family.outline_model, family.open_base):
        with pytest.raises(ConfigError) as caught:
            refused(config)
        assert message in str(caught.value) and str(trained.folder) in str(caught.value)


@pytest.mark.parametrize("written", [False, True])
def test_training_a_checkpoint_keeps_its_options(written: bool, trained: Started, tmp_path: Path) -> None:
    own = OPTIONS if written else {}
    config = load_config(write(tmp_path, **on_checkpoint(trained, model=own, experts={"expert_input": "auto"})))
    trainee = load_trainee(config, torch.device("cpu"))
    assert trainee.options == RECORDED
    assert trainee.geometry == trained.geometry
    assert config.spec.family.outline_model(config).model.config == trained.geometry


def test_another_choice_of_the_teachers_is_said(trained: Started, tmp_path: Path) -> None:
    config = load_config(write(tmp_path, **on_checkpoint(trained, experts={**TEACHERS, "sol_spatial_norm": "max"})))
    trainee = load_trainee(config, torch.device("cpu"))
    (note,) = [note for note in trainee.notes if note.startswith("note:")]
    assert note == f"note: {trained.folder} was trained with sol_spatial_norm = mean, and this run uses max"


def test_published_options_are_not_recorded(start: Start) -> None:
    trainer = start("published options", model={"text_positions": "zero", "timestep_scale": 1.0})
    assert set(trainer.options) == {"expert_input", "expert_time", "sol_spatial_norm", "t5_attn_mask"}


def test_exact_rotary_frequencies_survive_saving_in_bfloat16(trained: Started, start: Start, tmp_path: Path) -> None:
    """They are stored as they are, so they come back without the setting, and rounded ones stay rounded."""
    source, rounded = trained.folder / "tiny.safetensors", tmp_path / "rounded.safetensors"
    tensors = load_file(source)
    exact = {f"rope.freqs_{axis}": rotary_frequencies(width) for axis, width in enumerate(GEOMETRY["axes_dims_rope"])}  # type: ignore[arg-type]
    save_file({**tensors, **{key: t.bfloat16() for key, t in exact.items()}}, rounded, header(source))
    for choice in ("checkpoint", "exact"):
        model = {"path": str(rounded), "rope_freqs": choice}
        changes = on_checkpoint(trained, model=model, train={"max_steps": 1}, save={"dtype": "bfloat16"})
        trainer = start(f"rope {choice}", **changes)
        trainer.run()
        for name in ("tiny", "tiny_ema"):
            found = load_model(trainer.folder / f"{name}.safetensors").state_dict()
            for key, frequencies in exact.items():
                wanted = frequencies if choice == "exact" else frequencies.bfloat16().float()
                assert torch.equal(found[key], wanted)
    assert not torch.equal(exact["rope.freqs_2"], exact["rope.freqs_2"].bfloat16().float())


# Files of a run


def test_a_weight_file_says_what_it_is(trained: Started) -> None:
    for name, weights in (("tiny", "model"), ("tiny_ema", "ema")):
        found = header(trained.folder / f"{name}.safetensors")
        expected = {"format": "pt", "architecture": "tinyflux", "modelspec.architecture": "TinyFlux",
                    "modelspec.title": "tiny", "weights": weights, "step": "2", "epoch": "1"}  # fmt: skip
        assert found.items() >= expected.items()
        assert json.loads(found["config_json"]) == trained.geometry.to_dict()
        assert found["code_version"]


@pytest.fixture(scope="module")
def saved(start: Start) -> Started:
    """Eight updates, two epochs, with checkpoints at every second update and epoch; the last update ends an epoch."""
    trainer = start(
        "saved",
        train={"max_steps": 8},
        save={
            "every_steps": 2, "every_epochs": 1, "keep_last_steps": 2, "keep_last_states": 0, "best": True, "state": True,
        },
        optimizer={"lr": 1e-3},
    )  # fmt: skip
    trainer.run()
    return trainer


def test_epochs_have_files_and_names(saved: Started) -> None:
    assert find_weights(f"{saved.folder}:epoch_1") == saved.folder / "tiny-000001.safetensors"
    assert find_weights(f"{saved.folder}:epoch_1", ema=True) == saved.folder / "tiny-000001_ema.safetensors"
    assert (saved.folder / "tiny-000001-state" / "manifest.json").is_file()
    entry = entries(saved)["epoch_1"]
    assert (entry["kind"], entry["step"], entry["epoch"]) == ("epoch", 4, 1)
    assert header(saved.folder / "tiny-000001.safetensors")["epoch"] == "1"


def test_the_last_update_is_saved_once_and_found_by_all_its_names(saved: Started) -> None:
    names = ("final", "step_8", "epoch_2", "latest")
    for ema, suffix in ((False, ""), (True, "_ema")):
        assert {find_weights(f"{saved.folder}:{name}", ema=ema) for name in names} == {
            saved.folder / f"tiny{suffix}.safetensors"
        }
    assert not list(saved.folder.glob("tiny-step00000008*")) and not list(saved.folder.glob("tiny-000002*"))
    assert {name: entry["kind"] for name, entry in entries(saved).items()} == {
        "epoch_1": "epoch", "step_6": "step", "best": "best", "step_8": "step", "epoch_2": "epoch", "final": "final",
    }  # fmt: skip


def test_the_best_weights_at_the_last_update_are_one_file_of_two_names(saved: Started) -> None:
    assert entries(saved)["best"]["step"] == 8
    for suffix in ("", "_ema"):
        best, final = (saved.folder / f"{name}{suffix}.safetensors" for name in ("best", "tiny"))
        assert best.samefile(final)
    assert find_weights(f"{saved.folder}:best") == saved.folder / "best.safetensors"
    assert not (saved.folder / "tiny-step00000006.safetensors").samefile(saved.folder / "best.safetensors")


def test_without_links_the_best_weights_are_written_twice(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any) -> None:
        raise OSError("no links here")

    monkeypatch.setattr(os, "link", refuse)
    trainer = start("no links", save={"best": True})
    trainer.run()
    best, final = (load_file(trainer.folder / f"{name}.safetensors") for name in ("best", "tiny"))
    assert all(torch.equal(best[key], final[key]) for key in final)


def test_a_run_that_goes_on_keeps_its_best_and_its_former_end(start: Start, capsys: pytest.CaptureFixture[str]) -> None:
    save = {"every_steps": 4, "keep_last_steps": 0, "best": True, "state": True}
    first = start("goes on", save=save)
    first.run()
    assert entries(first)["step_4"]["model"] == "tiny.safetensors" and entries(first)["best"]["step"] == 4
    before = (first.folder / "best.safetensors").read_bytes()
    former = {suffix: (first.folder / f"tiny{suffix}.safetensors").read_bytes() for suffix in ("", "_ema")}
    capsys.readouterr()
    # A rate of training so high that the second epoch is worse.
    again = start("goes on", save=save, train={"max_steps": 6})
    again.run()
    assert "tiny.safetensors of step 4 is kept as tiny-step00000004.safetensors" in capsys.readouterr().out
    assert {name: entry["step"] for name, entry in entries(again).items()} == {"best": 4, "step_4": 4, "final": 6}
    for suffix, content in former.items():
        assert (again.folder / f"tiny-step00000004{suffix}.safetensors").read_bytes() == content
    assert find_weights(f"{again.folder}:step_4") == again.folder / "tiny-step00000004.safetensors"
    assert read_values(again.folder / "tiny-step00000004-state")["step"] == 4
    assert (again.folder / "best.safetensors").read_bytes() == before
    assert header(again.folder / "tiny.safetensors")["step"] == "6"


def test_a_former_end_is_pruned_as_any_checkpoint_on_the_way(start: Start) -> None:
    save = {"every_steps": 2, "keep_last_steps": 1, "state": True}
    start("pruned end", save=save).run()
    again = start("pruned end", save=save, train={"max_steps": 7})
    again.run()
    assert set(entries(again)) == {"step_6", "final"} and not list(again.folder.glob("tiny-step00000004*"))


@pytest.mark.parametrize("state", [False, True])
def test_a_finished_run_without_a_good_state_is_not_overwritten_by_a_new_start(state: bool, start: Start) -> None:
    first = start(f"no state {state}", save={"state": state})
    first.run()
    if state:
        (first.folder / "tiny-state" / "model.safetensors").unlink()
    else:
        with pytest.raises(ConfigError, match="--fresh"):
            refuse_second_branch(first.built.config)  # before anything is encoded
    before = (first.folder / "tiny.safetensors").read_bytes()
    with pytest.raises(
        ConfigError, match=r"holds the finished run 'tiny' \(tiny\.safetensors, step 4\) without a good state .*--fresh"
    ):
        start(f"no state {state}", train={"max_steps": 8}, save={"state": state})
    assert (first.folder / "tiny.safetensors").read_bytes() == before


def test_the_start_says_that_the_rate_jumps(start: Start, capsys: pytest.CaptureFixture[str]) -> None:
    first = start("jumps", save={"state": True})
    first.run()
    assert read_values(first.folder / "tiny-state")["schedule_end"] == 4
    capsys.readouterr()
    start("jumps", save={"state": True}, train={"max_steps": 8})
    # Cosine over 4 and over 8 updates: (1 + cos(3 pi / 4)) / 2 before, 1 / 2 from here.
    said = "warning: the learning rate jumps: 0.00146 at update 4, 0.005 at update 5, 3 times as high"
    assert said in capsys.readouterr().out
    start("jumps", save={"state": True}, train={"max_steps": 8}, scheduler={"total_steps": 4, "min_lr": 0.0})
    assert "jumps" not in capsys.readouterr().out


FALLING = {"type": "plateau", "patience": 0, "threshold": 0.99, "factor": 0.3, "min_lr": 1e-3}
"""No loss of an epoch is a hundredth of the first one, so the rate falls after every epoch but the first."""


def test_a_rate_that_follows_the_loss_falls_from_the_next_update_on(
    start: Start, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = start("plateau", scheduler=FALLING, train={"max_steps": 16})
    trainer.run()
    expected = [rate for rate in (1e-2, 1e-2, 3e-3, 1e-3) for _ in range(4)]
    assert [row["train/lr"] for row in updates(trainer)] == pytest.approx(expected, rel=1e-12)
    said = [line for line in capsys.readouterr().out.splitlines() if "falls" in line]
    first = next(row["epoch/loss"] for row in lines(trainer) if "epoch/loss" in row)
    tail = f"since epoch/loss has not improved on {first:.4g} in 1 measurement(s)"
    assert said == [
        f"step 8: the learning rate falls to 0.003, {tail}",
        f"step 12: the learning rate falls to 0.001, {tail}",
    ]


def test_a_rate_that_follows_the_loss_is_the_same_after_a_restart(start: Start) -> None:
    changes: dict[str, Any] = {"scheduler": FALLING, "save": {"state": True}}
    whole = start("plateau in one", train={"max_steps": 12}, **changes)
    whole.run()
    for stop in (6, 9):
        start("plateau in two", train={"max_steps": stop}, **changes).run()
    stored = read_values(whole.folder.parent.parent / "plateau in two" / "out" / "tiny-state")["plateau"]
    assert stored == {"model": {"share": 0.3, "lowest": stored["model"]["lowest"], "bad": 0, "resting": 0}}
    again = start("plateau in two", train={"max_steps": 12}, **changes)
    assert again.position.step == 9
    again.run()
    assert [row["train/lr"] for row in updates(again)] == [row["train/lr"] for row in updates(whole)]
    for name, tensor in whole.model.state_dict().items():
        assert tensor.equal(again.model.state_dict()[name]), name


def test_with_validation_the_rate_follows_its_loss(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for number in range(IMAGES):
        make_item(number).path.write_text(f"picture {number}")
    measured = iter([1.0, 0.5, 0.6, 0.4])
    monkeypatch.setattr(build_module.Validator, "measure", lambda *_: {"loss/val": next(measured)})
    trainer = start(
        "plateau validation",
        scheduler={**FALLING, "threshold": 0.1},
        validation={"split": 0.25, "every_steps": 1, "every_epochs": 0},
    )
    trainer.run()
    assert [row["train/lr"] for row in updates(trainer)] == pytest.approx([1e-2, 1e-2, 1e-2, 3e-3], rel=1e-12)
    assert "step 3: the learning rate falls to 0.003, since loss/val has not improved on 0.5" in capsys.readouterr().out


def test_the_two_newest_states_stay_and_the_weights_of_all(start: Start) -> None:
    save = {"every_steps": 1, "every_epochs": 1, "keep_last_steps": 0, "keep_last_epochs": 0, "state": True}
    trainer = start("states", train={"max_steps": 7}, save=save)
    trainer.run()
    assert sorted(path.name for path in trainer.folder.glob("*-state")) == ["tiny-state", "tiny-step00000006-state"]
    assert sorted(path.name for path in trainer.folder.glob("tiny-*.safetensors") if "ema" not in path.name) == [
        "tiny-000001.safetensors", *(f"tiny-step{step:08d}.safetensors" for step in range(1, 7)),
    ]  # fmt: skip


@pytest.mark.parametrize(("begin", "step"), [("step", 2), ("none", 0)])
def test_a_second_branch_in_the_folder_of_a_run_is_refused_with_the_way_out(
    begin: str, step: int, start: Start
) -> None:
    save = {"every_steps": 2, "keep_last_states": 0, "state": True}
    first = start(f"branch {begin}", save=save)
    first.run()
    before = {path: path.stat().st_mtime_ns for path in first.folder.rglob("*") if path.suffix == ".safetensors"}
    state = first.folder / "tiny-step00000002-state"
    with pytest.raises(ConfigError) as caught:
        start(f"branch {begin}", save=save, resume={"from": begin if begin == "none" else str(state)})
    message = str(caught.value)
    assert f"begins at step {step}, and {first.folder} holds later checkpoints (" in message and "final" in message
    assert message.endswith(
        'Write "auto" to continue from the newest, choose another run.output_dir (--fresh does) to branch off, or move them away'
    )
    assert {path: path.stat().st_mtime_ns for path in before} == before
    elsewhere = start(f"elsewhere {begin}", save=save, resume={"from": begin if begin == "none" else str(state)})
    assert elsewhere.position.step == step
    # The newest state is no step back.
    assert start(f"branch {begin}", save=save, resume={"from": str(first.folder / "tiny-state")}).position.step == 4


# What a run is asked for between updates


def test_files_in_control_save_draw_and_stop_between_two_updates(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = iter([set(), {"save"}, {"sample"}, {"stop"}])
    told: list[dict[str, Any]] = []
    drawn: list[int] = []
    control = SimpleNamespace(requests=lambda: next(asked), tell=lambda **values: told.append(values))
    prompts = SimpleNamespace(encoded=SimpleNamespace(prompts=["a cat"]))
    monkeypatch.setattr(actions, "recorder", lambda: control)
    monkeypatch.setattr(build_module, "prepare_prompts", lambda config, ranks: prompts)
    tables = {"train": {"max_steps": 8}, "save": {"every_epochs": 0, "state": False}, "sample": {"prompts": ["a cat"]}}
    trainer = start("control", **tables)
    monkeypatch.setattr(trainer.built.samples, "draw", lambda step, metrics: drawn.append(step) or 0)
    with pytest.raises(Interrupted, match="stopped after step 4; run the same command again") as stopped:
        trainer.run()
    assert stopped.value.exit_code == 0
    assert drawn == [3] and told == [{"phase": "stopped", "stopped": True}]
    assert sorted(path.name for path in trainer.folder.glob("*-state")) == [
        "tiny-step00000002-state", "tiny-step00000004-state",
    ]  # fmt: skip
    asked = iter([set()] * 8)
    assert start("control", **tables).position.step == 4


def test_a_request_for_samples_of_a_run_without_prompts_is_answered(
    start: Start, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = iter([{"sample"}, set()])
    control = SimpleNamespace(requests=lambda: next(asked))
    monkeypatch.setattr(actions, "recorder", lambda: control)
    start("no prompts", train={"max_steps": 2}, save={"every_epochs": 0}).run()
    assert "note: control/sample draws nothing, because the run file has no sample.prompts" in capsys.readouterr().out


# What is logged


def test_loader_workers_put_their_batches_into_shared_memory_themselves(
    trained: Started, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where there is no room, their error comes here; that of the thread which sends a batch would not."""

    def loader(source: Any, *, collate_fn: Callable[[Any], Any], **rest: Any) -> list[Any]:
        return [collate_fn(source[index]) for index in range(len(source))]

    monkeypatch.setattr("musubi_tuner.data.batch.DataLoader", loader)
    (batch,) = load_batches(trained.built.source, [MicroBatch((0, 2), (0, 1))], 0, workers=1)
    assert batch.tensors["latents"].is_shared()


def test_an_epoch_ends_with_the_mean_loss_of_its_updates(saved: Started) -> None:
    rows = lines(saved)
    epochs = [row for row in rows if "epoch/loss" in row]
    losses = [row["loss/total"] for row in rows if "loss/total" in row]
    assert [(row["step"], row["epoch/step"]) for row in epochs] == [(4, 4), (8, 8)]
    for row, own in zip(epochs, (losses[:4], losses[4:]), strict=True):
        assert set(row) == {"step", "epoch/loss", "epoch/step"}
        assert row["epoch/loss"] == pytest.approx(sum(own) / 4, rel=1e-12)


def test_tensorboard_shows_epochs_over_their_number(start: Start) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trainer = start("events", train={"max_steps": 8}, log={"every_steps": 4, "tensorboard": True})
    trainer.run()
    events = EventAccumulator(str(trainer.folder / "logs"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("epoch/step")] == [(1, 4.0), (2, 8.0)]
    assert [event.step for event in events.Scalars("epoch/loss")] == [1, 2]
    assert [event.step for event in events.Scalars("loss/total")] == [4, 8]


@pytest.mark.parametrize("accumulation", [1, 2])
def test_lines_hold_the_mean_loss_around_each_noise_level(
    accumulation: int, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[float, float]] = []
    losses = FlowPhase.losses

    def watched(*arguments: Any) -> Any:
        terms = losses(*arguments)
        seen.extend(zip(terms["main"].sigma_B.tolist(), terms["main"].per_sample_B.tolist()))
        return terms

    monkeypatch.setattr(FlowPhase, "losses", watched)
    changes: dict[str, Any] = {"train": {"grad_accum_steps": accumulation, "max_steps": 4 // accumulation}}
    trainer = start(f"levels {accumulation}", log={"every_steps": 2, "noise_bins": 4}, **changes)
    trainer.run()
    rows = updates(trainer)
    per_line = len(seen) // len(rows)
    for number, row in enumerate(rows):
        own = seen[number * per_line : (number + 1) * per_line]
        found = {tag: value for tag, value in row.items() if tag.startswith("loss/sigma_")}
        expected: dict[str, list[float]] = {}
        for sigma, loss in own:
            expected.setdefault(f"loss/sigma_{(math.floor(sigma * 4) + 0.5) / 4:.3f}", []).append(loss)
        assert found == pytest.approx({tag: sum(own) / len(own) for tag, own in expected.items()}, rel=1e-5)
        assert len(found) >= 2


def test_an_interrupted_run_writes_the_lines_of_an_undisturbed_one(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes: dict[str, Any] = {
        "train": {"max_steps": 8}, "log": {"every_steps": 4}, "save": {"every_steps": 6, "state": True},
    }  # fmt: skip
    whole = start("undisturbed", **changes)
    whole.run()

    def die(name: str) -> None:
        if name == "train.update" and broken.position.step == 6:
            raise KeyboardInterrupt

    broken = start("interrupted", **changes)
    with monkeypatch.context() as patch:
        patch.setattr(loop, "fault_point", die)
        with pytest.raises(KeyboardInterrupt):
            broken.run()
    again = start("interrupted", **changes)
    assert again.position.step == 6
    again.run()
    assert lines(again) == lines(whole)
    assert [row["step"] for row in lines(whole)] == [4, 4, 8, 8]


def test_a_run_that_goes_on_keeps_the_split_of_its_state(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether the state lists it, or is of a version that split by id, whatever the files hold now."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(build_module, "Validator", lambda *_, **__: None)
    changes: dict[str, Any] = {"validation": {"split": 0.4}, "save": {"state": True}}

    def mend(text: str) -> None:
        for number in range(IMAGES):
            make_item(number).path.write_text(f"{text} {number}")

    mend("picture")
    by_content = start("split", **changes)
    with monkeypatch.context() as patch:
        patch.setattr(build_module, "split_of_run", lambda config, items: hold_out_by_id(items, config.validation))
        by_id = start("split before", **changes)
    assert by_content.held_out != by_id.held_out
    for trainer in (by_content, by_id):
        trainer.run()
    folder = by_id.folder / "tiny-state"
    values = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    assert values.pop("held_out") == by_id.held_out
    (folder / "state.json").write_text(json.dumps(values), encoding="utf-8")
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    manifest["state.json"] = hash_file(folder / "state.json")
    (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    mend("mended")
    for name, begun in (("split", by_content), ("split before", by_id)):
        again = start(name, **changes, train={"max_steps": 6})
        assert again.position.step == 4 and again.held_out == begun.held_out
        again.run()
        written = json.loads((again.folder / "tiny-state" / "state.json").read_text(encoding="utf-8"))
        assert written["held_out"] == begun.held_out
    assert start("another", **changes).held_out != by_content.held_out


# Settings that must act


@pytest.mark.parametrize("limit", [1e-3, 0.0])
def test_gradients_are_clipped_to_the_limit_of_the_run_file(limit: float, start: Start) -> None:
    trainer = start(f"clipped {limit}", train={"max_grad_norm": limit, "max_steps": 1}, optimizer={"betas": [0.5, 0.9]})
    trainer.run()
    # After one update the first moment is half of the gradient that the optimizer was given.
    moments = [state["exp_avg"] for state in trainer.role.optimizer.state.values()]
    given = 2 * math.sqrt(sum(float(moment.double().square().sum()) for moment in moments))
    norm = updates(trainer)[0]["train/grad_norm"]
    assert norm > 0.01
    assert given == pytest.approx(limit or norm, rel=1e-3)


@pytest.mark.parametrize("on_cpu", [False, True])
def test_the_average_lies_where_the_run_file_says(
    on_cpu: bool, start: Start, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    places: list[Any] = []

    class Placed(role_module.EMA):
        def __init__(self, *values: Any, device: Any = None, **named: Any) -> None:
            places.append(device)
            super().__init__(*values, device=device, **named)

    monkeypatch.setattr(role_module, "EMA", Placed)
    start(f"placed {on_cpu}", ema={"on_cpu": on_cpu})
    assert places == ["cpu" if on_cpu else None]
    assert ("warning: ema.on_cpu saves nothing here" in capsys.readouterr().out) == on_cpu


@pytest.mark.parametrize(("decay", "warmup", "kept"), [(0.75, False, 0.75), (0.99, True, 0.1)])
def test_the_average_follows_the_run_file(decay: float, warmup: bool, kept: float, start: Start) -> None:
    trainer = start(f"average {decay}", ema={"decay": decay, "warmup": warmup}, train={"max_steps": 1})
    before = {key: value.clone() for key, value in trainer.trained.state_dict().items()}
    trainer.run()
    assert trainer.role.ema is not None
    after = trainer.trained.state_dict()
    for key, shadow in trainer.role.ema.shadow.items():
        torch.testing.assert_close(shadow, kept * before[key] + (1 - kept) * after[key], atol=1e-6, rtol=1e-4)
    assert any(not torch.equal(before[key], after[key]) for key in before)


def test_a_run_keeps_the_warm_up_of_its_average_that_it_began_with(start: Start) -> None:
    """A run of before, without warm-up, goes on under "auto", which means warm-up for a new run of its kind."""
    base = start("begun with")
    base.run()
    model = {"init": "checkpoint", "path": str(base.folder / "tiny.safetensors"), "geometry": None}
    changes = {"model": model, "scheduler": {"type": "constant"}, "save": {"state": True}}
    whole = start("in one", ema={"warmup": False}, **changes)
    whole.run()
    start("in two", ema={"warmup": False}, train={"max_steps": 2}, **changes).run()
    second = start("in two", **changes)
    second.run()
    assert second.role.ema is not None and whole.role.ema is not None
    assert all(torch.equal(value, whole.role.ema.shadow[key]) for key, value in second.role.ema.shadow.items())
    assert read_values(second.folder / "tiny-state")["config"]["ema.warmup"] is False
    assert load_config(second.folder / "tiny.config.toml").ema.warmup is False
    new = start("new", **changes)
    assert new.role.ema is not None and new.role.ema.warmup
    assert load_config(new.folder / "tiny.config.toml").ema.warmup is True
    new.run()
    # It stays so where the file says it, and another word of the file is another config.
    assert start("new", ema={"warmup": True}, **changes).position.step == 4
    with pytest.raises(ConfigError, match=r"ema\.warmup was True, now False"):
        start("new", ema={"warmup": False}, **changes)


def test_a_schedule_of_its_own_length_ends_before_or_after_the_run(start: Start) -> None:
    for length, expected in ((2, [1.0, 0.6, 0.2, 0.2]), (8, [1.0, 0.9, 0.8, 0.7])):
        scheduler = {"type": "linear", "min_lr": 2e-3, "total_steps": length}
        trainer = start(f"length {length}", scheduler=scheduler)
        trainer.run()
        assert [row["train/lr"] for row in updates(trainer)] == pytest.approx([1e-2 * rate for rate in expected])


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant"])
def test_the_rates_are_those_of_the_run_file(kind: str, start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler: dict[str, Any] = {"type": kind, "warmup_steps": 3, "warmup_type": "cosine"}
    if kind != "constant":
        scheduler["min_lr"] = 2e-3
    trainer = start(f"rates {kind}", scheduler=scheduler, train={"max_steps": 8})
    used: list[float] = []
    step = trainer.role.optimizer.step
    monkeypatch.setattr(
        trainer.role.optimizer,
        "step",
        lambda: (used.extend({g["lr"] for g in trainer.role.optimizer.param_groups}), step()),
    )
    trainer.run()
    shapes = {"cosine": cosine_schedule, "linear": linear_schedule, "constant": linear_schedule}
    least = 1.0 if kind == "constant" else 0.2
    expected = [1e-2 * shapes[kind](k, 3, 8, least, "cosine") for k in range(8)]
    assert used == pytest.approx(expected)
    assert [row["train/lr"] for row in updates(trainer)] == pytest.approx(expected)
    assert len(set(used)) > 3


@pytest.mark.parametrize("use_ema", [True, False])
def test_samples_take_the_average_if_the_run_file_says_so(
    use_ema: bool, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Tensor] = []

    def draw(model: torch.nn.Module, *arguments: Any, **settings: Any) -> list[Tensor]:
        drawn.append(model.get_parameter("img_in.weight").detach().clone())
        return []

    monkeypatch.setattr(build_module, "prepare_prompts", lambda *_: samples.PreparedPrompts(Prompts(), None))
    monkeypatch.setattr(samples, "draw", draw)
    monkeypatch.setattr(samples, "decode_images", lambda *arguments, **options: [])
    monkeypatch.setattr(samples, "save_samples", lambda *arguments: None)
    sample = {"prompts": ["a cat"], "every_steps": 4, "use_ema": use_ema}
    trainer = start(f"samples {use_ema}", sample=sample, ema={"decay": 0.9})
    trainer.run()
    assert trainer.role.ema is not None
    average, own = trainer.role.ema.shadow["img_in.weight"], trainer.trained.get_parameter("img_in.weight")
    assert not torch.equal(average, own)
    (weights,) = drawn
    assert torch.equal(weights, average if use_ema else own)


def test_a_failure_while_drawing_leaves_the_weights_that_train(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Tensor] = []

    def draw(model: torch.nn.Module, *arguments: Any, **settings: Any) -> list[Tensor]:
        seen.append(model.get_parameter("img_in.weight").detach().clone())
        raise RuntimeError("no picture")

    monkeypatch.setattr(build_module, "prepare_prompts", lambda *_: samples.PreparedPrompts(Prompts(), None))
    monkeypatch.setattr(samples, "draw", draw)
    plain = start("drawing nothing")
    plain.run()
    trainer = start("drawing fails", sample={"prompts": ["a cat"], "every_steps": 4}, ema={"decay": 0.9})
    with pytest.raises(RuntimeError, match="no picture"):
        trainer.run()
    own = trainer.trained.get_parameter("img_in.weight")
    assert not torch.equal(seen[0], own)
    assert torch.equal(own, plain.trained.get_parameter("img_in.weight"))


def test_prompts_of_a_file_are_drawn(folder: Path, start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    class Encoders:
        dtype = torch.float32

        def __init__(self, *arguments: Any) -> None:
            pass

        def encode(self, texts: list[str]) -> dict[str, Tensor]:
            return {"t5_vec": torch.zeros(len(texts), 5, 12)}

    monkeypatch.setattr("musubi_tuner.encoders.for_run.TextEncoders", Encoders)
    monkeypatch.setattr("musubi_tuner.encoders.for_run.load_vae", lambda *arguments: None)
    path = folder / "prompts.txt"
    path.write_text("a cat --s 3\n\n# a dog\na bird\n", encoding="utf-8")
    trainer = start("prompts of a file", sample={"prompts": str(path)})
    prepared = trainer.built.samples.prompts
    assert prepared is not None
    assert [prompt.text for prompt in prepared.encoded.prompts] == ["a cat", "a bird"]


def test_a_run_that_skips_too_many_updates_in_a_row_gives_up(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    losses, count = FlowPhase.losses, 0

    def spoiled(*arguments: Any) -> Any:
        nonlocal count
        count += 1
        terms = losses(*arguments)
        if count != 3:  # two bad updates, a good one, and then bad ones only
            terms["main"].per_sample_B = terms["main"].per_sample_B * math.nan
        return terms

    monkeypatch.setattr(FlowPhase, "losses", spoiled)
    trainer = start("gives up", train={"max_steps": 9, "on_nonfinite": "skip", "max_skipped_updates": 3})
    with pytest.raises(TrainingError, match=r"step 6: .*; 3 updates in a row were skipped, giving up"):
        trainer.run()
    assert (trainer.position.skipped, trainer.position.skipped_in_a_row) == (5, 3)


def test_parameters_of_adapters_are_counted_from_the_layers(
    trained: Started, start: Start, capsys: pytest.CaptureFixture[str]
) -> None:
    start("counted", **on_checkpoint(trained, adapter={"type": "lora", "rank": 2}))
    # Width 32, MLP of 4 times that: qkv, out_proj, fc1 and fc2 of the one single block, rank x (in + out) each.
    count = 2 * ((32 + 96) + (32 + 32) + (32 + 128) + (128 + 32))
    assert f"on 4 layers, {count:,} parameters; the model is frozen" in capsys.readouterr().out


def test_autoencoder_of_the_samples_waits_in_main_memory(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}

    def load(path: Path, **settings: Any) -> Any:
        given.update(settings)
        return SimpleNamespace(set_tiling=lambda enabled: None)

    monkeypatch.setattr("musubi_tuner.encoders.for_run.load_autoencoder", load)
    encoders = SimpleNamespace(encode=lambda texts: {}, dtype=torch.float32)
    monkeypatch.setattr("musubi_tuner.encoders.for_run.TextEncoders", lambda *_: encoders)
    model = {"vae_path": str(folder), "clip_path": str(folder), "t5_path": str(folder), "vae_dtype": "bfloat16"}
    config = load_config(write(folder / "waits", model=model, sample={"prompts": ["a cat"], "every_steps": 1}))
    ranks: Any = SimpleNamespace(main=True, device=torch.device("cuda"))
    prepared = samples.prepare_prompts(config, ranks)
    assert prepared is not None and [prompt.text for prompt in prepared.encoded.prompts] == ["a cat"]
    assert given["device"] == torch.device("cpu") and given["dtype"] == torch.bfloat16


class Prompts:
    """Stands for encoded prompts."""

    prompts: tuple[str, ...] = ()


@pytest.mark.parametrize("case", ["adapter", "frozen predictor"])
def test_what_is_frozen_drops_nothing_out_while_the_rest_trains(
    case: str, trained: Started, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    if case == "adapter":
        attached = assemble.attach_adapters
        # However the model comes from its file.
        monkeypatch.setattr(assemble, "attach_adapters", lambda model, config: attached(model.train(), config))
        adapter = {"type": "lora", "rank": 2, "dropout": 0.1}
        trainer = start("frozen", **on_checkpoint(trained, adapter=adapter))
        inside = set(trainer.trained.modules())
    else:
        trainer = start("frozen lune", model={"geometry": {**GEOMETRY, "freeze_lune": True}})
        inside = set(trainer.model.modules()) - set(trainer.model.get_submodule("lune_predictor").modules())
    modes = {name: module.training for name, module in trainer.model.named_modules() if module not in inside}
    assert modes and set(modes.values()) == {False}
    assert trainer.trained.training and any(name.startswith("lune_predictor") for name in modes)
