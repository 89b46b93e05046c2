"""Checkpoints of the published trainer go on as states of ours.

The published trainer is played by `Published`: a plain loop over torch's own optimizer, scheduler and average, which saves
what that trainer saves.
"""

import json
import math
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tomli_w
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from musubi_tuner.config import load_config
from musubi_tuner.import_checkpoint import main
from musubi_tuner.models.tinyflux import TinyFluxConfig, TinyFluxDeep, initialize
from musubi_tuner.models.tinyflux.model import rotary_frequencies
from musubi_tuner.models.tinyflux.state_dict import example_inputs
from musubi_tuner.training.checkpoint import newest_good_state, read_tensors, read_values
from musubi_tuner.training.ema import EMA
from musubi_tuner.training.optimizers import build_optimizer, load_optimizer_state, set_learning_rate, trainable
from musubi_tuner.training.schedulers import make_schedule

pytestmark = pytest.mark.long

GEOMETRY = {
    "hidden_size": 16, "num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 16, "joint_attention_dim": 12,
    "pooled_projection_dim": 12, "num_double_layers": 1, "num_single_layers": 2, "axes_dims_rope": [2, 2, 4],
    "lune_expert_dim": 8, "lune_hidden_dim": 8, "lune_dropout": 0.0, "sol_hidden_dim": 8,
}  # fmt: skip
SETTINGS = {
    "learning_rate": 1e-2, "weight_decay": 0.1, "betas": [0.9, 0.95], "optimizer": "adamw", "warmup_steps": 2,
    "total_steps": 20, "lr_scheduler": "cosine", "min_lr": 1e-3, "ema_decay": 0.75, "dtype": "torch.float32",
    "text_dropout": 0.1, "save_every_steps": 0, "enable_lune": False, "enable_sol": False,
}  # fmt: skip
DEAD = {"sol_prior.spatial_to_qk_scale.weight", "sol_prior.spatial_to_qk_scale.bias"}
STEPS = 5


def batch(step: int, config: TinyFluxConfig) -> tuple[dict[str, Tensor], Tensor]:
    """Inputs of an update, and what to predict."""
    torch.manual_seed(step)
    return example_inputs(config, 2, 2, 2, 3), torch.randn(2, 4, config.in_channels)


def backward(model: TinyFluxDeep, step: int) -> None:
    """Gradients of an update; those of equal weights are equal."""
    inputs, target = batch(step, model.config)
    predicted, experts = model(**inputs, return_expert_pred=True)
    loss = (predicted - target).square().mean()
    for name in ("lune_pred", "sol_stats_pred", "sol_spatial_pred"):
        loss = loss if experts[name] is None else loss + 0.1 * (experts[name] - 0.3).square().mean()
    model.zero_grad()
    loss.backward()


class Published:
    """The published trainer: one group over all parameters that are not frozen, and an average of the whole state dict."""

    def __init__(self, *, optimizer: str = "adamw", **geometry: Any) -> None:
        self.config = TinyFluxConfig.from_dict({**GEOMETRY, **geometry})
        self.model = TinyFluxDeep(self.config)
        initialize(self.model, "reference", torch.Generator().manual_seed(0))
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter += 0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
        # There, the parameters that no forward pass uses are in the optimizer like all others.
        for name, parameter in self.model.named_parameters():
            if name in DEAD and not self.config.freeze_sol:
                parameter.requires_grad_(True)
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer: torch.optim.Optimizer
        if optimizer == "adamw":
            self.optimizer = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.1, betas=(0.9, 0.95))
        elif optimizer == "adamw_8bit":
            from bitsandbytes.optim import AdamW8bit

            self.optimizer = AdamW8bit(parameters, lr=1e-2, weight_decay=0.1, betas=(0.9, 0.95))
        else:
            from transformers.optimization import Adafactor

            self.optimizer = Adafactor(
                parameters, lr=1e-2, weight_decay=0.1, scale_parameter=False, relative_step=False
            )
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, self._rate)
        self.shadow = {key: value.clone() for key, value in self.model.state_dict().items()}
        self.step = 0

    @staticmethod
    def _rate(step: int) -> float:
        if step < 2:
            return step / 2
        return 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * (step - 2) / 18))

    def train(self, steps: int) -> "Published":
        for _ in range(steps):
            backward(self.model, self.step)
            torch.nn.utils.clip_grad_norm_([p for p in self.model.parameters() if p.requires_grad], 1.0)
            self.optimizer.step()
            self.scheduler.step()
            self.optimizer.zero_grad(set_to_none=True)
            for key, value in self.model.state_dict().items():
                self.shadow[key].lerp_(value, 0.25)
            self.step += 1
        return self

    def checkpoint(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "epoch": 2,
            "best_loss": 0.5,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "ema": {"shadow": self.shadow, "decay": 0.75},
            "trainer_config": SETTINGS,
            "model_config": self.config.to_dict(),
        }

    def save(self, path: Path, **changes: Any) -> Path:
        held = {**self.checkpoint(), **changes}
        torch.save({key: value for key, value in held.items() if value is not None}, path)
        return path


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Write a run file that says what `SETTINGS` says, for the model of a checkpoint."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "images").mkdir()
    for name in ("a", "b", "c"):
        Image.new("RGB", (64, 64), (ord(name), 0, 0)).save(tmp_path / "images" / f"{name}.png")
        (tmp_path / "images" / f"{name}.txt").write_text("a picture", encoding="utf-8")

    def write(path: Path, **changes: dict[str, Any]) -> Path:
        tables: dict[str, dict[str, Any]] = {
            "run": {"name": "old", "output_dir": str(tmp_path / "out"), "threads": 1, "device": "cpu"},
            "model": {"arch": "tf", "path": str(path)},
            "experts": {"enable_lune": False, "enable_sol": False},
            "cache": {"run": "never"},
            "optimizer": {"lr": 1e-2, "weight_decay": 0.1, "betas": [0.9, 0.95], "decay_all": True},
            "scheduler": {"warmup_steps": 2, "min_lr": 1e-3},
            "train": {"max_steps": 20, "mixed_precision": "no"},
            "ema": {"decay": 0.75},
            "save": {"best": True},
        }
        for name, table in changes.items():
            merged = {**tables.get(name, {}), **table}
            tables[name] = {key: value for key, value in merged.items() if value is not None}
        document = {"schema_version": 1, "general": {"resolution": 64}, "datasets": [{"image_directory": "images"}]}
        target = tmp_path / "run.toml"
        target.write_text(tomli_w.dumps({**document, **tables}), encoding="utf-8")
        return target

    return write


@pytest.fixture
def imported(run: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Import a checkpoint into a run; returns what the command printed, or, of another exit code, its error."""

    def call(path: Path, *options: str, code: int = 0, **changes: Any) -> str:
        assert main([str(path), str(run(path, **changes)), *options]) == code
        printed = capsys.readouterr()
        return printed.err if code else printed.out

    return call


def state_of(folder: Path) -> Path:
    found = newest_good_state(folder, "old")
    assert found is not None
    return found[0]


def continued(folder: Path, run_file: Path, geometry: TinyFluxConfig) -> tuple[nn.Module, Any, EMA, int]:
    """Model, optimizer, average and step of a state, restored as the trainer does it."""
    config, state = load_config(run_file), state_of(folder)
    values = read_values(state)
    model = TinyFluxDeep(geometry)
    missing, unexpected = model.load_state_dict(read_tensors(state, "model"), strict=False)
    assert not missing and not unexpected
    optimizer = build_optimizer(trainable(model), config.optimizer)
    load_optimizer_state(optimizer, read_tensors(state, "optimizer"), values["optimizer"])
    average = EMA(model, config.ema.decay)
    assert average.load_shadow(read_tensors(state, "ema")).loaded == len(average.shadow)
    average.updates = values["ema_updates"]
    return model, optimizer, average, values["position"]["step"]


def update(model: Any, optimizer: torch.optim.Optimizer, average: EMA, step: int, total: int = 20) -> None:
    """One update as the trainer does it, on the inputs of a step."""
    schedule = make_schedule("cosine", lr=1e-2, min_lr=1e-3, warmup_steps=2, warmup_type="linear", total_steps=total)
    set_learning_rate(optimizer, 1e-2 * schedule(step))
    backward(model, step)
    torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.grad is not None], 1.0)
    optimizer.step()
    average.update(model)


def moments(loop: Published) -> dict[str, dict[str, Any]]:
    """What the optimizer remembers, by the name of the parameter."""
    return {name: loop.optimizer.state[p] for name, p in loop.model.named_parameters() if p in loop.optimizer.state}


def loaded_moments(state: Path) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {
        name: dict(entries) for name, entries in read_values(state)["optimizer"].items()
    }
    for key, tensor in read_tensors(state, "optimizer").items():
        name, _, entry = key.partition("/")
        found[name][entry] = tensor
    return found


@pytest.mark.parametrize(("optimizer", "prefix"), [("adamw", ""), ("adamw", "_orig_mod."), ("adafactor", "")])
def test_training_goes_on_as_the_plain_loop_does(
    optimizer: str, prefix: str, tmp_path: Path, imported: Callable[..., str]
) -> None:
    loop = Published(optimizer=optimizer).train(STEPS)
    named = {prefix + key: value for key, value in loop.model.state_dict().items()}
    path = loop.save(tmp_path / "step_5.pt", model=named)
    imported(path, optimizer={"type": "AdamW" if optimizer == "adamw" else "Adafactor"})
    model, ours, average, step = continued(tmp_path / "out", tmp_path / "run.toml", loop.config)
    assert step == STEPS
    for key, value in loop.model.state_dict().items():
        assert torch.equal(model.state_dict()[key], value), key
        assert torch.equal(average.shadow[key], loop.shadow[key]), key
    for _ in range(3):
        update(model, ours, average, step)
        step += 1
    loop.train(3)
    for key, value in loop.model.state_dict().items():
        torch.testing.assert_close(model.state_dict()[key], value, rtol=2e-5, atol=2e-6, msg=key)
        torch.testing.assert_close(average.shadow[key], loop.shadow[key], rtol=2e-5, atol=2e-6, msg=key)


WIDE = {"hidden_size": 72, "attention_head_dim": 36, "axes_dims_rope": [12, 12, 12]}
"""With parameters of more than 4,096 values, whose moments have 8 bits, not all of them whole blocks."""


@pytest.mark.parametrize("nested", [True, False])
def test_moments_of_8_bits_go_on_bit_for_bit(nested: bool, tmp_path: Path, imported: Callable[..., str]) -> None:
    loop = Published(optimizer="adamw_8bit", **WIDE).train(STEPS)
    state = loop.optimizer.state_dict()
    if not nested:  # as before bitsandbytes 0.49
        state["state"] = {
            k: {"step": v["step"], **v["__bnb_optimizer_quant_state__"]} for k, v in state["state"].items()
        }
    imported(loop.save(tmp_path / "step_5.pt", optimizer=state), optimizer={"type": "AdamW8bit"})
    expected, found = moments(loop), loaded_moments(state_of(tmp_path / "out"))
    assert found.keys() == expected.keys()
    assert {found[name]["state1"].dtype for name in found} == {torch.uint8, torch.float32}
    for name, entries in expected.items():
        assert found[name].keys() == entries.keys() and found[name]["step"] == STEPS
        assert all(torch.equal(found[name][entry], entries[entry]) for entry in entries if entry != "step"), name
    model, ours, average, step = continued(tmp_path / "out", tmp_path / "run.toml", loop.config)
    for _ in range(2):
        update(model, ours, average, step)
        step += 1
    loop.train(2)
    for key, value in loop.model.state_dict().items():
        torch.testing.assert_close(model.state_dict()[key], value, rtol=2e-5, atol=2e-6, msg=key)


def test_moments_of_8_bits_go_on_in_float32(tmp_path: Path, imported: Callable[..., str]) -> None:
    from bitsandbytes.functional import dequantize_blockwise

    loop = Published(optimizer="adamw_8bit", **WIDE).train(STEPS)
    printed = imported(loop.save(tmp_path / "step_5.pt"))
    assert "its moments have 8 bits in the file; AdamW continues from their values in float32" in printed
    found, coded = loaded_moments(state_of(tmp_path / "out")), 0
    for name, held in moments(loop).items():
        assert found[name].keys() == {"step", "exp_avg", "exp_avg_sq"} and found[name]["step"] == STEPS
        for number, entry in (("1", "exp_avg"), ("2", "exp_avg_sq")):
            expected = held[f"state{number}"]
            if expected.dtype == torch.uint8:
                coded += 1
                levels, largest = held[f"qmap{number}"], held[f"absmax{number}"]
                expected = dequantize_blockwise(expected, absmax=largest, code=levels, blocksize=256)
            torch.testing.assert_close(found[name][entry], expected, rtol=1e-6, atol=0)
    assert coded > 10
    model, ours, average, step = continued(tmp_path / "out", tmp_path / "run.toml", loop.config)
    update(model, ours, average, step)
    assert all(parameter.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("lost", ["absmax1", "qmap2"])
@pytest.mark.parametrize("kind", ["AdamW", "AdamW8bit"])
def test_broken_moments_of_8_bits_are_refused(
    lost: str, kind: str, tmp_path: Path, imported: Callable[..., str]
) -> None:
    loop = Published(optimizer="adamw_8bit", **WIDE).train(1)
    state = loop.optimizer.state_dict()
    for held in state["state"].values():
        inside = held["__bnb_optimizer_quant_state__"]
        if lost in inside:
            inside[lost] = inside[lost][:-1]
    error = imported(loop.save(tmp_path / "step_1.pt", optimizer=state), code=1, optimizer={"type": kind})
    assert lost in error and "or use --fresh_optimizer to keep the weights" in error


def test_without_moments_it_does_not(tmp_path: Path, imported: Callable[..., str]) -> None:
    loop = Published().train(STEPS)
    printed = imported(loop.save(tmp_path / "step_5.pt"), "--fresh_optimizer")
    assert "optimizer: begins with empty moments" in printed
    model, ours, average, step = continued(tmp_path / "out", tmp_path / "run.toml", loop.config)
    assert step == STEPS and not ours.state
    update(model, ours, average, step)
    loop.train(1)
    difference = (model.img_in.weight - loop.model.img_in.weight).abs().max()  # type: ignore[union-attr, operator]
    assert difference > 1e-3


@pytest.mark.parametrize("geometry", [{}, {"freeze_lune": True}, {"freeze_sol": True}, {"use_t5_vec": False}], ids=str)
def test_every_moment_goes_to_the_parameter_of_its_name(
    geometry: dict[str, Any], tmp_path: Path, imported: Callable[..., str]
) -> None:
    loop = Published(**geometry).train(STEPS)
    printed = imported(loop.save(tmp_path / "step_5.pt"))
    expected, found = moments(loop), loaded_moments(state_of(tmp_path / "out"))
    assert DEAD.isdisjoint(expected) and found.keys() == expected.keys()
    assert f"optimizer: moments of {len(found)} of {len(found)} parameters" in printed
    for name, entries in expected.items():
        assert found[name].keys() == entries.keys() == {"step", "exp_avg", "exp_avg_sq"}
        assert found[name]["step"] == STEPS
        for entry, value in entries.items():
            assert torch.equal(found[name][entry], value), f"{name} {entry}"


def test_the_order_of_the_moments_is_that_of_the_file(tmp_path: Path, imported: Callable[..., str]) -> None:
    """A model that registers its parts in another order numbers its parameters otherwise."""
    loop = Published().train(STEPS)
    names = [name for name, p in loop.model.named_parameters() if p.requires_grad]
    state, order = loop.optimizer.state_dict(), list(reversed(range(len(names))))
    turned = {**state, "state": {order.index(i): held for i, held in state["state"].items()}}
    weights = loop.model.state_dict()
    buffers = {key: tensor for key, tensor in weights.items() if key not in names}
    imported(
        loop.save(
            tmp_path / "step_5.pt", model={**{names[i]: weights[names[i]] for i in order}, **buffers}, optimizer=turned
        )
    )
    expected, found = moments(loop), loaded_moments(state_of(tmp_path / "out"))
    assert found.keys() == expected.keys()
    for name, entries in expected.items():
        assert torch.equal(found[name]["exp_avg"], entries["exp_avg"]), name


def test_state_begins_an_epoch(tmp_path: Path, imported: Callable[..., str]) -> None:
    path = Published().train(STEPS).save(tmp_path / "step_5.pt")
    printed = imported(path)
    state = state_of(tmp_path / "out")
    values = read_values(state)
    assert state.name == "old-step00000005-state"
    assert values["position"] == {
        "step": 5, "epoch": 2, "update": 0, "images": 0, "skipped": 0, "skipped_in_a_row": 0
    }  # fmt: skip
    assert values["best"] == {"metric": "epoch/loss", "value": 0.5}
    assert values["ema_updates"] == 5 and values["metrics_bytes"] == 0 and values["window"] == {}
    assert "best: epoch/loss 0.5000; best.safetensors is written when a lower one comes" in printed
    assert "data: the file does not record which images of epoch 3 were trained" in printed
    assert printed.endswith(f"{state}: step 5 of 20\n")
    assert [path.name for path in (tmp_path / "out").iterdir() if path.name.startswith(".tmp-")] == []


def test_report_names_what_differs(tmp_path: Path, imported: Callable[..., str]) -> None:
    path = Published().train(STEPS).save(tmp_path / "step_5.pt")
    printed = imported(path, objective={"text_dropout": 0.1, "drop_experts_with_text": False})
    assert "differs:" not in printed  # the run says what the file says
    other = {"lr": 2e-2, "decay_all": False}
    printed = imported(path, run={"output_dir": str(tmp_path / "two")}, optimizer=other, ema={"decay": 0.9})
    assert "differs: optimizer.lr was 0.01, is 0.02 in this run" in printed
    assert "differs: optimizer.decay_all was True, is False in this run" in printed
    assert "differs: ema.decay was 0.75, is 0.9 in this run" in printed
    # Rate after warm-up: r + (1 - r) (1 + cos(pi 3 / 18)) / 2 with r = 0.1 there and 0.05 here.
    assert "differs: the learning rate would have continued at 0.00939711, here it continues at 0.0187272" in printed


def test_report_computes_the_rate_over_the_length_of_the_schedule(tmp_path: Path, imported: Callable[..., str]) -> None:
    """There the rate falls over total_steps, whatever ends the run; the importer of settings writes scheduler.total_steps."""
    path = Published().train(STEPS).save(tmp_path / "step_5.pt")
    longer = {"train": {"max_steps": 30}, "scheduler": {"total_steps": 20}}
    assert "differs: the learning rate" not in imported(path, **longer)
    two = {"output_dir": str(tmp_path / "two")}
    assert "differs: the learning rate" in imported(path, run=two, **(longer | {"scheduler": {"total_steps": 25}}))


def test_run_that_follows_its_validation_leaves_the_best_value_behind(
    tmp_path: Path, imported: Callable[..., str]
) -> None:
    path = Published().save(tmp_path / "step_0.pt", best_loss=math.inf)
    assert "best: not in the file" in imported(path)
    path = Published().save(tmp_path / "step_0.pt", best_loss=0.25)
    folders = [{"output_dir": str(tmp_path / name)} for name in ("two", "three")]
    text = "best: epoch/loss 0.2500 is left out, because "
    assert f"{text}the run follows the validation loss" in imported(path, run=folders[0], validation={"split": 0.34})
    assert f"{text}save.best is off" in imported(path, run=folders[1], save={"best": False})


def test_regularisation_images_are_not_held_out(tmp_path: Path, run: Callable[..., Path]) -> None:
    path = Published().save(tmp_path / "step_0.pt")
    run_file = run(path, validation={"split": 0.5})
    document = tomllib.loads(run_file.read_text(encoding="utf-8"))
    document["datasets"].append({"image_directory": "regular", "is_reg": True})
    run_file.write_text(tomli_w.dumps(document), encoding="utf-8")
    (tmp_path / "regular").mkdir()
    for number in range(9):
        Image.new("RGB", (64, 64), (0, number, 0)).save(tmp_path / "regular" / f"{number}.png")
        (tmp_path / "regular" / f"{number}.txt").write_text("a picture", encoding="utf-8")
    assert main([str(path), str(run_file)]) == 0
    held_out = read_values(state_of(tmp_path / "out"))["held_out"]
    assert held_out and all(key.startswith("0:") for key in held_out)


def test_average_that_is_not_in_the_file_begins_as_the_model(tmp_path: Path, imported: Callable[..., str]) -> None:
    loop = Published().train(STEPS)
    printed = imported(loop.save(tmp_path / "step_5.pt", ema=None))
    assert "average: not in the file; starts as a copy of the model" in printed
    state = state_of(tmp_path / "out")
    assert read_values(state)["ema_updates"] == 0
    average = read_tensors(state, "ema")
    for key, value in loop.model.state_dict().items():
        assert torch.equal(average[key], value), key


def test_run_without_an_average_leaves_it_behind(tmp_path: Path, imported: Callable[..., str]) -> None:
    path = Published().train(STEPS).save(tmp_path / "step_5.pt")
    printed = imported(path, ema={"enabled": False, "decay": None})
    assert "average: left out, because ema.enabled is false" in printed
    assert read_tensors(state_of(tmp_path / "out"), "ema") == {}


def test_average_takes_from_the_model_what_it_lacks(tmp_path: Path, imported: Callable[..., str]) -> None:
    loop = Published().train(STEPS)
    shadow = {key: value for key, value in loop.shadow.items() if not key.startswith("lune_predictor.")}
    printed = imported(loop.save(tmp_path / "step_5.pt", ema={"shadow": shadow}))
    assert "average: lacks lune_predictor (13); copied from the model" in printed
    average = read_tensors(state_of(tmp_path / "out"), "ema")
    assert torch.equal(average["lune_predictor.input_proj.weight"], loop.model.lune_predictor.input_proj.weight)
    assert torch.equal(average["img_in.weight"], loop.shadow["img_in.weight"])


def test_exact_rotary_frequencies_stay_exact(tmp_path: Path, imported: Callable[..., str]) -> None:
    loop = Published()
    for held in (loop.model.state_dict(), loop.shadow):
        held["rope.freqs_2"] += 0.5
    path = loop.save(tmp_path / "step_0.pt")
    imported(path)
    assert torch.equal(read_tensors(state_of(tmp_path / "out"), "model")["rope.freqs_2"], rotary_frequencies(4) + 0.5)
    imported(path, run={"output_dir": str(tmp_path / "two")}, model={"rope_freqs": "exact"})
    for part in ("model", "ema"):
        found = read_tensors(state_of(tmp_path / "two"), part)["rope.freqs_2"]
        assert torch.equal(found, rotary_frequencies(4)), part


def save_v41(loop: Published, folder: Path, *, average: bool = True) -> Path:
    """The torch file without weights, and the weights beside it as that trainer wrote them."""
    held = loop.checkpoint()
    config = json.dumps(loop.config.to_dict())
    (folder / "config.json").write_text(config, encoding="utf-8")
    for name, tensors in (("step_5", loop.model.state_dict()), ("step_5_ema", loop.shadow)):
        if average or not name.endswith("_ema"):
            save_file({key: value.bfloat16() for key, value in tensors.items()}, folder / f"{name}.safetensors")
    kept = {key: held[key] for key in ("step", "epoch", "optimizer", "scheduler")}
    torch.save({**kept, "loss": 0.3, "ema_decay": 0.75}, folder / "step_5.pt")
    return folder / "step_5.pt"


def test_weights_of_v41_lie_beside_the_file(tmp_path: Path, imported: Callable[..., str]) -> None:
    loop = Published().train(STEPS)
    printed = imported(save_v41(loop, tmp_path))
    assert "weights: from step_5.safetensors, average: from step_5_ema.safetensors" in printed
    assert "weights: were rounded to bfloat16 when they were saved" in printed
    assert "best: not in the file" in printed  # its loss is the last one, not the lowest
    state = state_of(tmp_path / "out")
    for part, tensors in (("model", loop.model.state_dict()), ("ema", loop.shadow)):
        found = read_tensors(state, part)
        for key, value in tensors.items():
            assert found[key].dtype == torch.float32 and torch.equal(found[key], value.bfloat16().float()), key
    found, expected = loaded_moments(state), moments(loop)
    assert found.keys() == expected.keys()
    for name, entries in expected.items():
        assert torch.equal(found[name]["exp_avg"], entries["exp_avg"]), name


def test_v41_without_its_weights_or_in_another_order_is_refused(tmp_path: Path, imported: Callable[..., str]) -> None:
    path = save_v41(Published().train(STEPS), tmp_path, average=False)
    tensors = load_file(tmp_path / "step_5.safetensors")
    extra = {"single_blocks.0.attn.sin_basis": torch.zeros(2), "guidance_in.mlp.0.bias": torch.zeros(16)}
    save_file({**tensors, **extra}, tmp_path / "step_5.safetensors")
    assert "it embeds guidance (guidance_in.mlp.0.bias), and the run's model does not" in imported(path, code=1)
    # Without Sol, v4.1 has layers all the same that v4.2 has with Sol only; where they were among the others is not known.
    loop = Published(use_sol_prior=False).train(STEPS)
    save_v41(loop, tmp_path, average=False)
    unused = {"single_blocks.0.attn.spatial_to_mod.bias": torch.zeros(2)}
    save_file({**load_file(tmp_path / "step_5.safetensors"), **unused}, tmp_path / "step_5.safetensors")
    assert "parameters is not recorded, and the model has others" in imported(path, code=1)
    printed = imported(path, "--fresh_optimizer")
    assert "weights: left out spatial_to_mod, which the model does not use" in printed
    (tmp_path / "step_5.safetensors").rename(tmp_path / "other.safetensors")
    model = {"path": str(tmp_path / "other.safetensors")}
    expected = f"error: {path}: holds no weights, and step_5.safetensors is not beside it"
    assert expected in imported(path, code=1, model=model)


def v3_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    gate = "lune_predictor.expert_gate"
    shaped = {key: value.view(1) if key == gate else value for key, value in tensors.items()}
    return {key.replace("lune_predictor.", "expert_predictor."): value for key, value in shaped.items()}


V3_CONFIG = {key: value for key, value in GEOMETRY.items() if not key.startswith(("lune_", "sol_"))} | {
    "use_expert_predictor": True, "expert_dim": 8, "expert_hidden_dim": 8, "expert_dropout": 0.0, "use_sol_prior": False,
    "use_t5_vec": False,
}  # fmt: skip


def test_names_of_v3_go_over_where_the_model_is_the_same(tmp_path: Path, imported: Callable[..., str]) -> None:
    loop = Published(use_sol_prior=False, use_t5_vec=False).train(STEPS)
    gate = loop.optimizer.state[loop.model.lune_predictor.expert_gate]
    plain = {entry: value.clone() for entry, value in gate.items()}
    for entry in ("exp_avg", "exp_avg_sq"):
        gate[entry] = gate[entry].view(1)
    ema = {"shadow": v3_names(loop.shadow)}
    path = loop.save(tmp_path / "step_5.pt", model=v3_names(loop.model.state_dict()), ema=ema, model_config=V3_CONFIG)
    assert "weights: 13 tensors have other names here" in imported(path)
    state = state_of(tmp_path / "out")
    found = loaded_moments(state)
    assert found.keys() == moments(loop).keys()
    for entry, value in plain.items():
        assert torch.equal(found["lune_predictor.expert_gate"][entry], value), entry
    assert read_tensors(state, "model")["lune_predictor.expert_gate"].shape == ()
    assert torch.equal(
        read_tensors(state, "ema")["lune_predictor.expert_gate"], loop.shadow["lune_predictor.expert_gate"]
    )


def test_v3_is_not_continued_as_a_model_with_more_parts(tmp_path: Path, imported: Callable[..., str]) -> None:
    loop = Published(use_sol_prior=False, use_t5_vec=False).train(STEPS)
    config = {key: value for key, value in V3_CONFIG.items() if key not in ("use_sol_prior", "use_t5_vec")}
    path = loop.save(tmp_path / "step_5.pt", model=v3_names(loop.model.state_dict()), model_config=config)
    error = imported(path, code=1)
    assert f"error: {path}: cannot be continued by {tmp_path / 'run.toml'}: " in error
    assert "keys missing (text_balance, " in error
    assert (
        "A run can only continue with the same model; for another one give the weights as model.path of a new run"
        in error
    )


def changed(loop: Published, **changes: Any) -> dict[str, Any]:
    """The optimizer's state with changes to its group or entries."""
    state = loop.optimizer.state_dict()
    for key, value in changes.items():
        if key in ("groups", "params"):
            [group] = state["param_groups"]
            half = len(group["params"]) // 2
            parts = [{**group, "params": group["params"][:half]}, {**group, "params": group["params"][half:]}]
            state["param_groups"] = parts if key == "groups" else [{**group, "params": value}]
        else:
            state["state"] = {index: {**entries, key: value} for index, entries in state["state"].items()}
    return state


def renumbered(loop: Published) -> dict[str, Any]:
    """The optimizer's state as if the parameters had been given in the reverse order."""
    state = loop.optimizer.state_dict()
    last = len(state["param_groups"][0]["params"]) - 1
    return {**state, "state": {last - index: entries for index, entries in state["state"].items()}}


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda loop: changed(loop, groups=2), "its optimizer has 2 groups of parameters, expected 1"),
        (lambda loop: changed(loop, params=[1, 0]), "the parameters of its optimizer are not numbered from 0"),
        (lambda loop: changed(loop, params=[0, 1]), "its optimizer has 2 parameters, its model 96"),
        (renumbered, "final_linear.bias: exp_avg is [], expected [16]"),
        (
            lambda loop: changed(loop, state1=torch.zeros(2)),
            "its moments (exp_avg, exp_avg_sq, state1, step) are of an",
        ),
        (lambda loop: changed(loop, exp_avg="?"), "exp_avg of text_balance is a str"),
        (lambda loop: {"state": {}}, "its optimizer has no param_groups and state"),
        (lambda loop: {"state": {}, "param_groups": [{"lr": 1.0}]}, "are not numbered from 0"),
        (lambda loop: {**changed(loop), "state": {0: 1.0}}, "does not hold its moments by name"),
    ],
    ids=["groups", "numbers", "count", "order", "8bit", "kind", "none", "no numbers", "no names"],
)
def test_moments_that_fit_no_parameter_are_refused_and_may_be_left_behind(
    change: Callable[[Published], dict[str, Any]], expected: str, tmp_path: Path, imported: Callable[..., str]
) -> None:
    loop = Published().train(1)
    path = loop.save(tmp_path / "step_1.pt", optimizer=change(loop))
    error = imported(path, code=1)
    assert expected in error and "or use --fresh_optimizer to keep the weights" in error
    assert not (tmp_path / "out").exists() or newest_good_state(tmp_path / "out", "old") is None
    assert "step 1 of 20" in imported(path, "--fresh_optimizer")


def test_moments_of_another_optimizer_are_refused(tmp_path: Path, imported: Callable[..., str]) -> None:
    path = Published().train(1).save(tmp_path / "step_1.pt")
    error = imported(path, code=1, optimizer={"type": "Adafactor"})
    assert 'optimizer.type is "Adafactor", and its moments are of AdamW; set optimizer.type = "AdamW", or use' in error


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"step": 20}, "is at step 20, and the run ends at 20; raise train.max_steps or max_epochs"),
        ({"step": 1.5}, "step is 1.5, expected a whole number"),
        ({"epoch": None}, "is no checkpoint of the published trainer; it has no epoch"),
        ({"model": {"img_in.weight": 3}}, "model: expected tensors by name"),
        ({"model": "nothing"}, "holds no weights, and step_5.safetensors is not beside it"),
    ],
    ids=["end", "step", "keys", "tensors", "model"],
)
def test_files_that_no_run_goes_on_from(
    changes: dict[str, Any], expected: str, tmp_path: Path, imported: Callable[..., str]
) -> None:
    loop = Published()
    model = {"path": str(loop.save(tmp_path / "model.pt"))}
    path = loop.save(tmp_path / "step_5.pt", **changes)
    assert f"error: {path}: {expected}" in imported(
        path, code=2 if "step" in changes and expected[:5] == "is at" else 1, model=model
    )


def test_shapes_of_another_model_are_named(tmp_path: Path, imported: Callable[..., str]) -> None:
    model = {"path": str(Published(lune_hidden_dim=4).save(tmp_path / "model.pt"))}
    path = Published().save(tmp_path / "step_0.pt")
    error = imported(path, code=1, model=model)
    assert "of another shape (lune_predictor.input_proj.weight is [8, 28], expected [4, 28]" in error


def test_files_of_other_kinds(tmp_path: Path, imported: Callable[..., str]) -> None:
    loop = Published()
    model = {"path": str(loop.save(tmp_path / "model.pt"))}
    weights = tmp_path / "step_5.safetensors"
    save_file(loop.model.state_dict(), weights)
    assert f"{weights}: holds weights only; give the .pt file" in imported(weights, code=1, model=model)
    assert "gone.pt: file not found" in imported(tmp_path / "gone.pt", code=1, model=model)
    (tmp_path / "text.pt").write_text("not a torch file")
    assert "text.pt: cannot be read as plain weights" in imported(tmp_path / "text.pt", code=1, model=model)


def test_run_folder_must_be_empty(tmp_path: Path, imported: Callable[..., str]) -> None:
    path = Published().save(tmp_path / "step_0.pt")
    imported(path)
    error = imported(path, code=2)
    assert f"run.output_dir {tmp_path / 'out'}: holds checkpoints of this run already; choose another folder" in error


def test_runs_that_cannot_go_on_from_such_a_file(tmp_path: Path, imported: Callable[..., str]) -> None:
    path = Published().save(tmp_path / "step_0.pt")
    error = imported(path, code=2, resume={"from": "none"})
    assert 'error: resume.from: is "none", so the run would not continue from what is imported; write "auto"' in error
    error = imported(path, code=2, adapter={"type": "lora"}, ema={"enabled": False, "decay": None})
    assert 'is of a whole model, and adapter.type is "lora"; write "none"' in error
    (tmp_path / "flux.safetensors").touch()
    flux = {"arch": "fd", "path": str(tmp_path / "flux.safetensors")}
    none = {"enable_lune": None, "enable_sol": None}
    error = imported(path, code=2, model=flux, experts=none, ema={"enabled": False, "decay": None})
    assert "FLUX.1" in error and "has no trainer of its own to import from" in error
