"""Every form of weight file and folder that TinyFlux loads from, and what is said about the ones it cannot."""

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from musubi_tuner.errors import CheckpointError, NoAverageError
from musubi_tuner.models.tinyflux import TinyFluxConfig, TinyFluxDeep, from_pretrained, load_checkpoint, load_model
from musubi_tuner.models.tinyflux.model import rotary_frequencies
from musubi_tuner.models.tinyflux.state_dict import options_of
from musubi_tuner.weights.checkpoints import find_weights, read_weights, strip_wrappers
from tiny import TINY

pytestmark = pytest.mark.long

HEADER = {"config_json": TINY.to_json()}
Weights = dict[str, Tensor]


def weights(mark: float = 0.0) -> Weights:
    """A complete state dict; ``mark`` is the value of text_balance, by which a test knows the file again."""
    torch.manual_seed(0)
    state = {key: torch.randn(tensor.shape) for key, tensor in TinyFluxDeep(TINY).state_dict().items()}
    return {**state, "text_balance": torch.tensor(mark)}


def mark_of(model: TinyFluxDeep) -> float:
    return round(model.text_balance.item(), 3)


def write(path: Path, mark: float = 0.0, header: dict[str, str] | None = HEADER) -> Path:
    """A weight file that carries its config in the header."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(weights(mark), path, metadata=header)
    return path


def assert_holds(model: TinyFluxDeep, expected: Weights) -> None:
    state = model.state_dict()
    assert state.keys() == expected.keys()
    for key, tensor in expected.items():
        assert torch.equal(state[key], tensor), key


def message_of(source: str | Path, **options: Any) -> str:
    with pytest.raises(CheckpointError) as caught:
        load_model(source, **options)
    return str(caught.value)


# Where the geometry comes from


def test_config_beside_the_file(tmp_path: Path) -> None:
    path = write(tmp_path / "any.safetensors", header=None)
    (tmp_path / "config.json").write_text(TINY.to_json(), encoding="utf-8")
    model = load_model(path)
    assert model.config == TINY
    assert not model.training
    assert_holds(model, weights())


def test_config_in_the_header(tmp_path: Path) -> None:
    model = load_model(write(tmp_path / "any.safetensors"))
    assert model.config == TINY
    assert_holds(model, weights())


def test_config_in_the_header_wins_over_the_one_beside(tmp_path: Path) -> None:
    path = write(tmp_path / "any.safetensors")
    (tmp_path / "config.json").write_text(TinyFluxConfig().to_json(), encoding="utf-8")
    assert load_model(path).config == TINY


@pytest.mark.parametrize("name", ["cat.json", "model_config.json"])
def test_config_under_another_name(name: str, tmp_path: Path) -> None:
    path = write(tmp_path / "cat_ema.safetensors", header=None)
    (tmp_path / name).write_text(TINY.to_json(), encoding="utf-8")
    assert load_model(path).config == TINY


def test_no_config_and_other_shapes_than_published(tmp_path: Path) -> None:
    path = write(tmp_path / "any.safetensors", header=None)
    assert message_of(path) == (
        f"{path}: is not a TinyFlux-Deep v4.2 checkpoint: it has no config in its header or beside it, and "
        "img_in.weight [32, 4] does not belong to the published geometry. Put the model's config.json beside the file"
    )


def test_config_that_is_not_json(tmp_path: Path) -> None:
    path = write(tmp_path / "any.safetensors", header=None)
    config = tmp_path / "config.json"
    config.write_text("{", encoding="utf-8")
    assert message_of(path).startswith(f"{config}: not a JSON file (")


@pytest.mark.parametrize("content", [b"[]", b"3", b'{"_metadata": 3}', b'{"_metadata": {"options": 3}}', b"\xff\xfe"])
def test_config_of_another_kind_is_named(content: bytes, tmp_path: Path) -> None:
    path = write(tmp_path / "any.safetensors", header=None)
    config = tmp_path / "config.json"
    config.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        load_model(load_checkpoint(path))


def test_header_that_is_not_json(tmp_path: Path) -> None:
    path = write(tmp_path / "any.safetensors", header={"config_json": "{"})
    assert message_of(path).startswith(f"{path}: its header holds broken JSON (")


@pytest.mark.parametrize("header", [{"config_json": "[]"}, {**HEADER, "options_json": "3"}])
def test_header_of_another_kind_is_named(header: dict[str, str], tmp_path: Path) -> None:
    path = write(tmp_path / "any.safetensors", header=header)
    with pytest.raises(CheckpointError, match=r"any\.safetensors.*header"):
        load_model(load_checkpoint(path))


def test_config_that_does_not_fit_together(tmp_path: Path) -> None:
    path = write(tmp_path / "any.safetensors", header={"config_json": '{"hidden_size": 3}'})
    assert message_of(path).startswith(f"{path}: its config does not fit together: hidden_size 3 is not ")


def test_guidance_embedder_loads_under_its_legacy_names(tmp_path: Path) -> None:
    geometry = replace(TINY, guidance_embeds=True)
    torch.manual_seed(0)
    model = TinyFluxDeep(geometry)
    path = tmp_path / "any.safetensors"
    save_file(dict(model.state_dict()), path, metadata={"config_json": json.dumps(geometry.to_dict())})
    found = load_model(path)
    own = {key for key in found.state_dict() if key.startswith("guidance_in.")}
    assert own == {f"guidance_in.mlp.{layer}.{part}" for layer in (0, 2) for part in ("weight", "bias")}
    assert all(torch.equal(tensor, model.state_dict()[key]) for key, tensor in found.state_dict().items())


# Recorded options


def test_options_are_read_from_the_header(tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", header={**HEADER, "options_json": '{"expert_time": "aligned"}'})
    assert options_of(load_checkpoint(path)) == {"expert_time": "aligned"}


def test_options_are_read_beside_the_config_and_from_configs_of_old(tmp_path: Path) -> None:
    path, config = write(tmp_path / "a.safetensors", header=None), tmp_path / "config.json"
    old = {**TINY.to_dict(), "_metadata": {"options": {"sol_spatial_norm": "max"}}}
    config.write_text(json.dumps(old), encoding="utf-8")
    assert options_of(load_checkpoint(path)) == {"sol_spatial_norm": "max"}
    (tmp_path / "options.json").write_text('{"sol_spatial_norm": "mean"}', encoding="utf-8")
    assert options_of(load_checkpoint(path)) == {"sol_spatial_norm": "mean"}
    config.write_text(TINY.to_json(), encoding="utf-8")
    assert options_of(load_checkpoint(path)) == {"sol_spatial_norm": "mean"}
    write(path, header={**HEADER, "options_json": '{"expert_time": "aligned"}'})
    assert options_of(load_checkpoint(path)) == {"expert_time": "aligned"}
    # A config of its own name is of this file alone; the options are of the folder's config.
    write(path, header=None)
    config.rename(tmp_path / "a.json")
    assert options_of(load_checkpoint(path)) == {}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            b"PK\x03\x04" + bytes(60),
            r"is a torch file \(pickle\) under the name of a safetensors file; rename it to \.pt",
        ),
        (b"\x80\x02}q\x00." + bytes(60), "is a torch file"),
        (b"GGUF\x03\x00\x00\x00" + bytes(60), "is a GGUF file"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "is a Git LFS pointer"),
        (b"<!DOCTYPE html><html></html>", "is a web page"),
        (b"", "not a complete safetensors file"),
    ],
    ids=["zip", "pickle", "GGUF", "LFS", "page", "empty"],
)
def test_other_files_under_the_name_of_safetensors_are_named(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(path)


def test_unknown_options_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", header={**HEADER, "options_json": '{"text_order": "index"}'})
    with pytest.raises(CheckpointError) as caught:
        options_of(load_checkpoint(path))
    assert str(caught.value) == f"{path}: was trained with unknown options text_order; update musubi-tinyflux"


# Folders


def test_folder_takes_model_safetensors_before_other_names(tmp_path: Path) -> None:
    for mark, name in enumerate(("weights", "model", "pytorch_model"), 1):
        write(tmp_path / f"{name}.safetensors", mark)
    assert mark_of(load_model(tmp_path)) == 2
    assert mark_of(load_model(str(tmp_path))) == 2


def test_folder_with_averaged_weights_only(tmp_path: Path) -> None:
    write(tmp_path / "ema.safetensors", 1)
    assert mark_of(load_model(tmp_path, ema=True)) == 1
    assert message_of(tmp_path).startswith(f"{tmp_path}: holds no weights; looked for model.safetensors, ")


def test_folder_with_both_gives_the_one_asked_for(tmp_path: Path) -> None:
    write(tmp_path / "model.safetensors", 1)
    write(tmp_path / "ema.safetensors", 2)
    assert (mark_of(load_model(tmp_path)), mark_of(load_model(tmp_path, ema=True))) == (1, 2)


def test_folder_without_weights_lists_what_it_holds(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("", encoding="utf-8")
    assert message_of(tmp_path) == (
        f"{tmp_path}: holds no weights; looked for model.safetensors, pytorch_model.safetensors, weights.safetensors, "
        "model.pt, pytorch_model.pt, weights.pt, checkpoint.pt, checkpoints.json, final, best, step_N and epoch_N; "
        "found notes.txt"
    )


def test_folder_without_averaged_weights_says_so(tmp_path: Path) -> None:
    assert message_of(tmp_path, ema=True) == (
        f"{tmp_path}: holds no averaged weights; looked for ema.safetensors, model_ema.safetensors, "
        "ema_weights.safetensors, ema.pt, model_ema.pt, checkpoints.json, final, best, step_N and epoch_N; "
        "found nothing"
    )


def torch_checkpoint(path: Path, mark: float, average: float | None) -> Path:
    """What the published trainer writes: weights, and their average inside."""
    held: dict[str, Any] = {"model": weights(mark), "model_config": TINY.to_dict(), "step": 3}
    if average is not None:
        held["ema"] = {"shadow": weights(average), "decay": 0.9}
    torch.save(held, path)
    return path


@pytest.mark.parametrize("name", ["final.pt", "checkpoint.pt", "step_3.pt"])
def test_average_inside_the_torch_file_of_a_folder(name: str, tmp_path: Path) -> None:
    torch_checkpoint(tmp_path / name, 1, 2)
    asked = [tmp_path, tmp_path / name, *([f"{tmp_path}:{name[:-3]}"] if name != "checkpoint.pt" else [])]
    for source in asked:
        assert (mark_of(load_model(source)), mark_of(load_model(source, ema=True))) == (1, 2), source
    torch_checkpoint(tmp_path / name, 1, None)
    for source in asked:
        with pytest.raises(NoAverageError):
            load_model(source, ema=True)


def test_checkpoint_of_the_published_trainer_without_an_average_says_that(tmp_path: Path) -> None:
    """So that drawing goes on with the weights themselves."""
    write(tmp_path / "final.safetensors", 1)
    assert mark_of(load_model(f"{tmp_path}:final")) == 1
    with pytest.raises(NoAverageError) as caught:
        load_model(f"{tmp_path}:final", ema=True)
    assert str(caught.value).startswith(
        f"{tmp_path / 'final_ema.safetensors'}: no averaged weights beside final.safetensors"
    )
    write(tmp_path / "final_ema.safetensors", 2)
    assert mark_of(load_model(f"{tmp_path}:final", ema=True)) == 2


def test_explicit_ema_file_of_a_folder_wins_without_the_flag(tmp_path: Path) -> None:
    write(tmp_path / "model.safetensors", 1)
    write(tmp_path / "ema.safetensors", 2)
    write(tmp_path / "slow_average.safetensors", 3)
    assert mark_of(load_model(tmp_path, ema_file="slow_average.safetensors")) == 3
    assert message_of(tmp_path, ema_file="gone.safetensors") == f"{tmp_path / 'gone.safetensors'}: file not found"


def test_averaged_twin_of_a_file(tmp_path: Path) -> None:
    path = write(tmp_path / "cat.safetensors", 1)
    write(tmp_path / "cat_ema.safetensors", 2)
    write(tmp_path / "other.safetensors", 3)
    assert mark_of(load_model(path, ema=True)) == 2
    assert mark_of(load_model(tmp_path / "cat_ema.safetensors", ema=True)) == 2
    assert mark_of(load_model(path, ema_file="other.safetensors")) == 3


def test_averaged_twin_of_a_release_file(tmp_path: Path) -> None:
    path = write(tmp_path / "model.safetensors", 1)
    write(tmp_path / "ema.safetensors", 2)
    assert mark_of(load_model(path, ema=True)) == 2


def test_missing_averaged_twin_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "cat.safetensors")
    assert message_of(path, ema=True) == (
        f"{tmp_path / 'cat_ema.safetensors'}: no averaged weights beside cat.safetensors; "
        "take the model weights instead"
    )


def test_folder_of_the_published_trainer_gives_final_then_best_then_the_highest_number(tmp_path: Path) -> None:
    order = ["final", "best", "step_1000", "step_900", "epoch_12", "epoch_3"]
    for mark, name in enumerate(order):
        write(tmp_path / f"{name}.safetensors", mark)
        write(tmp_path / f"{name}_ema.safetensors", mark + 0.5)
    for name in ("final", "best", "step_1000", "step_900", "epoch_12"):
        mark = order.index(name)
        assert mark_of(load_model(tmp_path)) == mark
        assert mark_of(load_model(tmp_path, ema=True)) == mark + 0.5
        (tmp_path / f"{name}.safetensors").unlink()
        (tmp_path / f"{name}_ema.safetensors").unlink()
    assert mark_of(load_model(tmp_path)) == order.index("epoch_3")


# Run folders of this trainer


def run_folder(folder: Path) -> Path:
    """Two checkpoints: step_100 with averaged weights, final without."""
    write(folder / "cat-step00000100.safetensors", 1)
    write(folder / "cat-step00000100_ema.safetensors", 2)
    write(folder / "cat.safetensors", 3)
    entries = {
        "step_100": {"model": "cat-step00000100.safetensors", "ema": "cat-step00000100_ema.safetensors"},
        "final": {"model": "cat.safetensors", "ema": None},
    }
    (folder / "checkpoints.json").write_text(json.dumps({"checkpoints": entries}), encoding="utf-8")
    return folder


def test_run_folder_gives_its_final_checkpoint(tmp_path: Path) -> None:
    assert mark_of(load_model(run_folder(tmp_path / "run"))) == 3


def test_run_folder_without_a_final_checkpoint_gives_the_newest(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "run")
    entries = json.loads((folder / "checkpoints.json").read_text(encoding="utf-8"))
    del entries["checkpoints"]["final"]
    (folder / "checkpoints.json").write_text(json.dumps(entries), encoding="utf-8")
    assert mark_of(load_model(folder)) == 1


def test_checkpoint_of_a_run_folder_by_name(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "run")
    assert mark_of(load_model(f"{folder}:step_100")) == 1
    assert mark_of(load_model(f"{folder}:step_100", ema=True)) == 2


def test_explicit_ema_file_of_a_named_checkpoint_is_taken(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "run")
    write(folder / "slow_average.safetensors", 4)
    assert mark_of(load_model(f"{folder}:step_100", ema_file="slow_average.safetensors")) == 4


def test_unknown_checkpoint_of_a_run_folder_lists_the_known_ones(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "run")
    assert message_of(f"{folder}:step_200") == f"{folder}: no checkpoint 'step_200'; it has step_100, final"


def test_named_checkpoint_without_averaged_weights(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "run")
    assert message_of(f"{folder}:final", ema=True) == f"{folder}: checkpoint 'final' has no averaged weights"


def test_listed_file_that_is_gone_is_named(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "run")
    (folder / "cat.safetensors").unlink()
    assert message_of(f"{folder}:final") == f"{folder / 'cat.safetensors'}: listed in checkpoints.json, but not there"


@pytest.mark.parametrize("content", [None, "{", "[]", "{}", '{"checkpoints": {"step_100": "cat.safetensors"}}'])
def test_checkpoint_name_needs_a_readable_list(content: str | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "checkpoints.json").write_text(content, encoding="utf-8")
    assert message_of(f"{tmp_path}:step_100") == (
        f"{tmp_path}: has no readable checkpoints.json, so 'step_100' cannot be looked up; name a file"
    )


# Torch files


@pytest.mark.parametrize("form", ["model", "state_dict", "model_state_dict", "bare"])
@pytest.mark.parametrize("suffix", [".pt", ".bin", ".ckpt"])
def test_torch_file_with_its_config_inside(form: str, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"any{suffix}"
    content = weights() if form == "bare" else {form: weights(), "step": 7, "optimizer": {"state": {}}}
    torch.save({**content, "model_config": TINY.to_dict()}, path)
    model = load_model(path)
    assert model.config == TINY
    assert_holds(model, weights())


def test_torch_file_takes_model_before_state_dict(tmp_path: Path) -> None:
    path = tmp_path / "any.pt"
    torch.save({"state_dict": weights(1), "model": weights(2), "model_config": TINY.to_dict()}, path)
    assert mark_of(load_model(path)) == 2


def test_bare_torch_file_takes_the_config_beside_it(tmp_path: Path) -> None:
    torch.save(weights(1), tmp_path / "model.pt")
    (tmp_path / "config.json").write_text(TINY.to_json(), encoding="utf-8")
    assert mark_of(load_model(tmp_path)) == 1


class NeedsCode:
    """An object whose unpickling would run a command that leaves a file behind."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch {self.trace}",)


def test_torch_file_that_needs_code_is_refused_and_runs_none(tmp_path: Path) -> None:
    path, trace = tmp_path / "any.pt", tmp_path / "trace"
    torch.save({"model": weights(), "extra": NeedsCode(trace)}, path)
    message = message_of(path)
    assert message.startswith(f"{path}: cannot be read as plain weights (")
    assert message.endswith("Files that need code to unpickle are not opened; convert it to safetensors")
    assert not trace.exists()


def test_refusal_of_a_torch_file_does_not_advise_to_unpickle_it_anyway(tmp_path: Path) -> None:
    path = tmp_path / "any.pt"
    torch.save({"model": weights(), "extra": NeedsCode(tmp_path / "trace")}, path)
    assert "weights_only" not in message_of(path)


@pytest.mark.parametrize("length", [0, 1, 30, 1000, 200_000, -1])
@pytest.mark.parametrize("zipped", [True, False])
def test_torch_file_cut_short_is_named(zipped: bool, length: int, tmp_path: Path) -> None:
    path = tmp_path / "any.pt"
    torch.save(weights(), path, _use_new_zipfile_serialization=zipped)
    path.write_bytes(path.read_bytes()[:length])
    assert message_of(path).startswith(f"{path}: cannot be read as plain weights (")


@pytest.mark.parametrize("content", [b"hello world", b"<html>not found</html>", b"\x80\x02."])
def test_file_of_another_kind_under_a_torch_name_is_named(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "any.pt"
    path.write_bytes(content)
    assert message_of(path).startswith(f"{path}: cannot be read as plain weights (")


def test_torch_file_without_a_dictionary(tmp_path: Path) -> None:
    path = tmp_path / "any.pt"
    torch.save([1, 2], path)
    assert message_of(path) == f"{path}: holds a list, expected a dictionary of tensors"


def test_torch_file_of_a_run_without_its_weights(tmp_path: Path) -> None:
    path = tmp_path / "any.pt"
    torch.save({"step": 3, "epoch": 1, "optimizer": {"state": {}}}, path)
    assert message_of(path) == f"{path}: holds no tensors"


# Safetensors files


@pytest.mark.parametrize("length", [0, 4, 100, 200_000, -1])
def test_safetensors_file_cut_short_is_named(length: int, tmp_path: Path) -> None:
    path = write(tmp_path / "any.safetensors")
    path.write_bytes(path.read_bytes()[:length])
    message = message_of(path)
    assert message.startswith(f"{path}: not a complete safetensors file (")
    assert message.endswith("copy or download it again")


def test_safetensors_file_without_tensors(tmp_path: Path) -> None:
    path = tmp_path / "any.safetensors"
    save_file({}, path)
    assert message_of(path) == f"{path}: holds no tensors"


def test_loaded_parameters_own_their_storage(tmp_path: Path) -> None:
    path = write(tmp_path / "any.safetensors")
    model = load_model(path)
    size = path.stat().st_size
    with path.open("r+b") as file:
        start = 8 + int.from_bytes(file.read(8), "little")
        file.seek(start)
        file.write(b"\x00" * (size - start))
    assert not any(tensor.any() for tensor in read_weights(path).tensors.values())
    assert_holds(model, weights())


def test_training_a_loaded_model_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    path = write(tmp_path / "any.safetensors")
    before = path.read_bytes()
    with torch.no_grad():
        for parameter in load_model(path).parameters():
            parameter.add_(1.0)
    assert path.read_bytes() == before


# Names and shapes inside the file


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "module._orig_mod.", "_orig_mod.module."])
def test_prefixes_of_wrappers_are_stripped(prefix: str, tmp_path: Path) -> None:
    path = tmp_path / "any.safetensors"
    save_file({prefix + key: tensor for key, tensor in weights().items()}, path, metadata=HEADER)
    assert_holds(load_model(path), weights())


def test_marks_of_compiled_blocks_are_stripped() -> None:
    assert strip_wrappers("double_blocks.0._orig_mod.attn.img_qkv.weight") == "double_blocks.0.attn.img_qkv.weight"
    assert strip_wrappers("module.double_blocks.0.attn.img_qkv.weight") == "double_blocks.0.attn.img_qkv.weight"
    assert strip_wrappers("time_in.mlp.0.weight") == "time_in.mlp.0.weight"


def test_gate_of_shape_one_is_accepted(tmp_path: Path) -> None:
    path, state = tmp_path / "any.safetensors", weights()
    save_file({**state, "lune_predictor.expert_gate": torch.tensor([0.5])}, path, metadata=HEADER)
    gate = load_model(path).lune_predictor.expert_gate
    assert gate.shape == ()
    assert gate.item() == 0.5


def test_missing_rotary_frequencies_are_computed(tmp_path: Path) -> None:
    path = tmp_path / "any.safetensors"
    save_file({key: value for key, value in weights().items() if not key.startswith("rope.")}, path, metadata=HEADER)
    model = load_model(path)
    for axis, width in enumerate(TINY.axes_dims_rope):
        assert torch.equal(getattr(model.rope, f"freqs_{axis}"), rotary_frequencies(width))


def test_rotary_frequencies_are_those_of_the_file_unless_exact_ones_are_asked_for(tmp_path: Path) -> None:
    path, state = tmp_path / "any.safetensors", weights()
    rounded = {f"rope.freqs_{axis}": rotary_frequencies(width).bfloat16() for axis, width in enumerate((4, 6, 6))}
    save_file({**state, **rounded}, path, metadata=HEADER)
    as_stored, exact = load_model(path), load_model(path, rope_freqs="exact")
    for axis, width in enumerate((4, 6, 6)):
        stored = getattr(as_stored.rope, f"freqs_{axis}")
        assert stored.dtype == torch.float32
        assert torch.equal(stored, rounded[f"rope.freqs_{axis}"].float())
        assert torch.equal(getattr(exact.rope, f"freqs_{axis}"), rotary_frequencies(width))
    assert not torch.equal(as_stored.rope.freqs_1, exact.rope.freqs_1)


def test_unknown_choice_of_rotary_frequencies_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "any.safetensors")
    with pytest.raises(ValueError, match="rope_freqs"):
        load_model(path, rope_freqs="exactly")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_are_converted_to_the_dtype_asked_for(dtype: torch.dtype, tmp_path: Path) -> None:
    model = load_model(write(tmp_path / "any.safetensors"), dtype=dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert {buffer.dtype for buffer in model.buffers()} == {torch.float32}
    assert torch.equal(model.img_in.weight, weights()["img_in.weight"].to(dtype))


def test_model_for_drawing_is_bfloat16_and_in_eval_mode(tmp_path: Path) -> None:
    model = from_pretrained(write(tmp_path / "any.safetensors"))
    assert model.dtype == torch.bfloat16
    assert not model.training


def test_float32_masters_from_a_bfloat16_file(tmp_path: Path) -> None:
    path = tmp_path / "any.safetensors"
    save_file({key: value.bfloat16() for key, value in weights().items()}, path, metadata=HEADER)
    assert {parameter.dtype for parameter in load_model(path).parameters()} == {torch.float32}


def test_missing_and_unexpected_keys_are_counted_and_named(tmp_path: Path) -> None:
    path, state = tmp_path / "any.safetensors", weights()
    del state["img_in.bias"]
    save_file({**state, "vector_in.mlp.0.bias": torch.zeros(3)}, path, metadata=HEADER)
    assert message_of(path) == (
        f"{path}: is not a TinyFlux-Deep v4.2 checkpoint: 1 of 87 keys missing (img_in.bias); "
        "1 of 87 keys unexpected (vector_in.mlp.0.bias)"
    )


def test_tensor_of_another_size_is_named(tmp_path: Path) -> None:
    path = tmp_path / "any.safetensors"
    save_file({**weights(), "img_in.weight": torch.zeros(32, 5)}, path, metadata=HEADER)
    assert message_of(path) == (
        f"{path}: is not a TinyFlux-Deep v4.2 checkpoint: 1 of 87 keys of another shape "
        "(img_in.weight is [32, 5], expected [32, 4])"
    )


def test_transposed_matrix_is_not_poured_into_another_shape(tmp_path: Path) -> None:
    path, state = tmp_path / "any.safetensors", weights()
    save_file({**state, "img_in.weight": state["img_in.weight"].T.contiguous()}, path, metadata=HEADER)
    assert message_of(path) == (
        f"{path}: is not a TinyFlux-Deep v4.2 checkpoint: 1 of 87 keys of another shape "
        "(img_in.weight is [4, 32], expected [32, 4])"
    )


# Files of something else


@pytest.mark.parametrize(
    "key",
    ["lora_unet_double_blocks_0_attn_img_qkv.lora_down.weight", "model.double_blocks.0.attn.img_qkv.lora_A.weight"],
)
@pytest.mark.parametrize("header", [None, HEADER], ids=["no config", "config"])
def test_lora_file_is_called_a_lora(key: str, header: dict[str, str] | None, tmp_path: Path) -> None:
    path = tmp_path / "any.safetensors"
    save_file({key: torch.zeros(2, 32)}, path, metadata=header)
    assert message_of(path).startswith(f"{path}: is not a TinyFlux-Deep v4.2 checkpoint but a LoRA: ")


def test_file_of_another_model_without_config(tmp_path: Path) -> None:
    path = tmp_path / "any.safetensors"
    save_file({"conv_in.weight": torch.zeros(8, 4, 3, 3)}, path)
    assert message_of(path) == (
        f"{path}: is not a TinyFlux-Deep v4.2 checkpoint: it has no config in its header or beside it, and "
        "conv_in.weight [8, 4, 3, 3] does not belong to the published geometry. "
        "Put the model's config.json beside the file"
    )


def test_file_of_another_model_beside_a_config(tmp_path: Path) -> None:
    path = tmp_path / "any.safetensors"
    save_file({"conv_in.weight": torch.zeros(8, 4, 3, 3)}, path, metadata=HEADER)
    assert message_of(path) == (
        f"{path}: is not a TinyFlux-Deep v4.2 checkpoint: 84 of 87 keys missing (text_balance, img_in.weight, "
        "img_in.bias, txt_in.weight, ...); 1 of 1 keys unexpected (conv_in.weight)"
    )


# Sources that are not there


@pytest.mark.parametrize(
    "source",
    ["/no/such/model.safetensors", "./no/such", "../no/such", "a/b/c", "owner/model.safetensors", "gone:step_1"],
)
def test_missing_path_is_not_taken_for_a_hub_id(source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError) as caught:
        find_weights(source)
    assert str(caught.value) == f"{source}: file not found, and not a hub id of the form owner/name"


def test_home_folder_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path / "any.safetensors", 1)
    assert mark_of(load_model("~/any.safetensors")) == 1
    assert mark_of(load_model(f"~/{run_folder(tmp_path / 'run').name}:step_100")) == 1


# Names of checkpoints, and torch files of the published trainer


def test_latest_is_the_newest_checkpoint_of_a_folder(tmp_path: Path) -> None:
    assert mark_of(load_model(f"{run_folder(tmp_path / 'run')}:latest")) == 3
    for mark, name in enumerate(("best", "step_900", "step_1000")):
        write(tmp_path / "published" / f"{name}.safetensors", mark)
    published = tmp_path / "published"
    assert mark_of(load_model(f"{published}:latest")) == 2
    assert mark_of(load_model(f"{published}:step_900")) == 1
    assert mark_of(load_model(f"{published}:best")) == 0


def test_torch_file_under_a_trainers_name_is_found_in_a_folder(tmp_path: Path) -> None:
    torch.save({"model": weights(1), "model_config": TINY.to_dict(), "step": 5}, tmp_path / "step_5.pt")
    assert mark_of(load_model(tmp_path)) == 1


def test_torch_file_without_weights_leads_to_those_beside_it(tmp_path: Path) -> None:
    torch.save({"step": 5, "epoch": 1, "optimizer": {"state": {}}}, tmp_path / "step_5.pt")
    write(tmp_path / "step_5.safetensors", 2)
    assert mark_of(load_model(tmp_path / "step_5.pt")) == 2


def test_explicit_ema_file_may_be_a_whole_path(tmp_path: Path) -> None:
    write(tmp_path / "model.safetensors", 1)
    other = write(tmp_path / "elsewhere" / "average.safetensors", 2)
    assert mark_of(load_model(tmp_path, ema_file=str(other))) == 2
    assert message_of(tmp_path, ema_file=f"{other}x") == f"{other}x: file not found"
