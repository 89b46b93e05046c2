"""YAML files and command lines of the published FluxFlow trainer say here what they say there."""

import copy
import json
import os
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import tomli_w
import yaml
from PIL import Image

from musubi_tuner import fluxflow_train
from musubi_tuner.config import load_config
from musubi_tuner.config.__main__ import main
from musubi_tuner.config.load import load_steps
from musubi_tuner.config.write import dataset_toml
from musubi_tuner.models.fluxflow.trainer_names import URL, VGG
from musubi_tuner.models.fluxflow.trainer_settings import read_settings

PIPELINE = """
data:
  data_path: images
  captions_file: captions.txt
  fixed_prompt_prefix: style anime
  img_size: 512
model:
  vae_dim: 64
  feature_maps_dim: 128
  text_embedding_dim: 1024
  pretrained_bert_model: distilbert-base-uncased
training:
  batch_size: 4
  workers: 8
  training_steps: 2
  pipeline:
    defaults:
      use_ema: true
    steps:
      - name: vae_warmup
        n_epochs: 10
        train_vae: true
        kl_beta: 0.001
        stop_condition: {loss_name: loss_recon, threshold: 0.02}
        optimizers:
          vae: {optimizer_type: AdamW, lr: 2e-5, weight_decay: 0.01}
        schedulers:
          vae: {scheduler_type: CosineAnnealingLR, eta_min_factor: 0.1}
      - name: vae_gan
        n_epochs: 40
        train_vae: true
        gan_training: true
        train_spade: true
        lambda_adv: 0.5
        optimization:
          optimizers:
            vae: {type: RMSprop, lr: 1e-5, alpha: 0.95, momentum: 0.9, centered: true}
            discriminator: {type: AdamW, lr: 5e-6, betas: [0.0, 0.9], amsgrad: true}
          schedulers:
            vae: {type: LinearLR, start_factor: 0.1, end_factor: 1.0, total_iters: 5000}
      - name: flow
        n_epochs: 100
        train_diff: true
        freeze_vae: true
        cfg_dropout_prob: 0.1
        transition_on: {mode: loss_threshold, metric: flow_loss, threshold: 0.1, max_epochs: 80}
        optimizers:
          flow: {type: Lion, lr: 5e-7, betas: [0.9, 0.95]}
output:
  output_path: outputs/full
  checkpoint_save_interval: 100
  sample_captions: ["a photo of a cat"]
  generate_diagrams: true
"""

Convert = Callable[..., dict[str, Any]]


@pytest.fixture
def convert(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Convert:
    """Write a file, import it, and return the run file as tables; ``code`` is the expected exit code."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "images").mkdir()
    (tmp_path / "captions.txt").write_text("a.png\ta cat\n", encoding="utf-8")

    def run(text: str, name: str = "guide.yaml", code: int = 0) -> dict[str, Any]:
        (tmp_path / name).write_text(text, encoding="utf-8")
        assert main(["import", name, "-o", "run.toml"]) == code
        run.said = capsys.readouterr().out  # type: ignore[attr-defined]
        return tomllib.loads((tmp_path / "run.toml").read_text(encoding="utf-8"))

    return run


def test_a_pipeline_becomes_steps(convert: Convert, tmp_path: Path) -> None:
    found = convert(PIPELINE)
    assert found["model"] == {
        "arch": "ff", "init": "scratch", "layout": "published", "bert_path": "distilbert/distilbert-base-uncased",
        "geometry": {"vae_dim": 64, "feature_maps_dim": 128, "text_embedding_dim": 1024, "feature_maps_dim_disc": 8},
    }  # fmt: skip
    assert found["general"] == {"resolution": 512, "batch_size": 4, "caption_prefix": "style anime."}
    assert found["datasets"] == [{"image_directory": "images", "captions_file": "captions.txt"}]
    assert found["train"] == {"loader_workers": 8, "grad_accum_steps": 2}
    warm, gan, flow = found["steps"]
    assert warm["until"] == {"metric": "loss/recon", "below": 0.02}
    assert warm["train"] == {"max_epochs": 10} and warm["objective"] == {"train_vae": True, "kl_beta": 0.001}
    assert warm["roles"]["vae"]["optimizer"] == {"type": "AdamW", "lr": 2e-5, "weight_decay": 0.01}
    assert warm["roles"]["vae"]["scheduler"] == {"type": "cosine", "min_lr": 2e-6}
    assert gan["start"] == "previous"
    assert gan["roles"]["vae"]["optimizer"]["args"] == {"alpha": 0.95, "momentum": 0.9, "centered": True}
    assert gan["roles"]["vae"]["scheduler"] == {"type": "constant", "warmup_steps": 5000}
    assert gan["roles"]["discriminator"]["optimizer"] == {
        "type": "AdamW", "lr": 5e-6, "weight_decay": 0.0, "betas": [0.0, 0.9], "args": {"amsgrad": True},
    }  # fmt: skip
    assert flow["optimizer"] == {"type": "Lion", "lr": 5e-7, "weight_decay": 0.0, "betas": [0.9, 0.95]}
    assert flow["objective"] == {"train_diff": True, "text_dropout": 0.1} and "roles" not in flow
    assert flow["scheduler"] == {"type": "cosine", "min_lr": 5e-8} and flow["ema"] == {"enabled": True, "decay": 0.9999}
    assert flow["until"] == {"metric": "loss/main", "below": 0.1} and flow["train"] == {"max_epochs": 80}
    configs = load_steps(tmp_path / "run.toml", {})
    assert [config.spec.task(config).roles for config in configs] == [("vae",), ("vae", "discriminator"), ("model",)]
    assert configs[1].for_role("discriminator").optimizer.betas == [0.0, 0.9]


def test_a_flat_file_has_the_optimizers_of_the_source(convert: Convert) -> None:
    found = convert(
        "data: {data_path: images}\ntraining: {train_vae: true, train_diff_full: true, lr: 1e-5, n_epochs: 2, gan_training: true}\n"
        "output: {output_path: out, sample_sizes: [256, 512x384]}\n"
    )
    roles = found["roles"]
    assert {role: table["optimizer"]["type"] for role, table in roles.items()} == {
        "vae": "AdamW", "discriminator": "AdamW", "flow": "Lion", "text_encoder": "AdamW",
    }  # fmt: skip
    assert (roles["vae"]["optimizer"]["lr"], roles["text_encoder"]["optimizer"]["lr"]) == (1e-5, pytest.approx(1e-6))
    assert found["sample"] == {"every_steps": 50}  # while an autoencoder trains, nothing is drawn from texts
    assert found["train"]["max_epochs"] == 2 and found["general"] == {"batch_size": 2, "resolution": 1024}
    assert roles["vae"]["scheduler"] == {"type": "cosine", "min_lr": 1e-6} and roles["flow"]["ema"] == {"decay": 0.9999}


def test_pictures_are_drawn_with_checkpoints_unless_they_are_not_wanted(convert: Convert) -> None:
    text = "data: {{data_path: images}}\ntraining: {{train_diff: true, n_epochs: 1, model_checkpoint: x}}\noutput: {{checkpoint_save_interval: 50, sample_captions: [a cat], {}}}\n"
    found = convert(text.format("samples_per_checkpoint: 2"))
    assert found["sample"] == {"prompts": ["a cat"], "every_steps": 100}
    assert "prompts" not in read_settings(yaml.safe_load(text.format("no_samples: true"))).document.get("sample", {})  # type: ignore[union-attr]


def test_a_gan_alone_is_one_without_the_losses_of_the_reconstruction(convert: Convert) -> None:
    found = convert("data: {data_path: images}\ntraining: {gan_training: true, n_epochs: 1}\n")
    assert found["objective"] == {"gan_training": True, "train_vae": True, "train_reconstruction": False}


@pytest.mark.parametrize(
    ("step", "message"),
    [
        ("{name: a, n_epochs: 1, train_vae: true, freeze: [compressor]}", "freezes vae, which the step trains"),
        ("{name: a, n_epochs: 1}", "has no mode"),
        ("{name: a, n_epochs: 1, train_vae: true, kl_betta: 1}", "Did you mean 'kl_beta'"),
        ("{name: a, n_epochs: 1, train_vae: true, dataset: gone}", "is no data set"),
        ("{name: a, n_epochs: 1, train_vae: true, optimizers: {vaee: {lr: 1}}}", "Did you mean 'vae'"),
        ("{name: a, n_epochs: 1, train_vae: true, optimizers: {vae: {type: Adagrad}}}", "Adagrad"),
        ("{name: a, n_epochs: 1, train_vae: true, schedulers: {vae: {type: StepLR}}}", "StepLR has no step_size"),
        ("{name: a, n_epochs: 1, train_vae: true, stop_condition: {loss_name: fid, threshold: 1}}", "known metrics"),
    ],
)
def test_mistakes_of_a_step_are_named(step: str, message: str, convert: Convert) -> None:
    convert(f"data: {{data_path: images}}\ntraining: {{pipeline: {{steps: [{step}]}}}}\n", code=1)
    assert message in convert.said  # type: ignore[attr-defined]


def test_streams_and_an_empty_list_of_steps(convert: Convert, tmp_path: Path) -> None:
    found = convert(
        "data: {use_webdataset: true, webdataset_token: hf_planted}\ntraining: {pipeline: {steps: []}}\n", code=1
    )
    said = convert.said  # type: ignore[attr-defined]
    assert "No pipeline steps defined" in said and "is a secret and is not imported" in said
    assert found["datasets"] == [
        {"shards": URL, "shard_image_key": "png", "shard_samples": 10_000, "missing_caption": "skip"}
    ]
    assert "hf_planted" not in said and not any("hf_planted" in path.read_text() for path in tmp_path.glob("run*"))


def test_the_data_set_of_a_step_is_a_stream_or_a_folder_with_its_own_batch_size(
    convert: Convert, tmp_path: Path
) -> None:
    (tmp_path / "lion.json").write_text(json.dumps({"optimizers": {"vae": {"type": "Lion", "lr": 2e-6}},
                                                    "schedulers": {"vae": {"type": "ExponentialLR", "gamma": 0.99}}}))  # fmt: skip
    found = convert(
        "training:\n  batch_size: 3\n  pipeline:\n    default_dataset: near\n    defaults: {workers: 5}\n    datasets:\n"
        "      near: {type: local, image_folder: images, captions_file: captions.txt, batch_size: 8, workers: 2}\n"
        "      far: {type: webdataset, webdataset_url: 'hf://datasets/me/pictures/*.tar', webdataset_token: t, webdataset_size: 500,\n"
        "            webdataset_image_key: jpg, webdataset_caption_key: text}\n    steps:\n"
        "      - {name: a, n_epochs: 1, train_vae: true, optim_sched_config: lion.json}\n"
        "      - {name: b, n_epochs: 1, train_vae: true, dataset: far}\n      - {name: c, n_epochs: 1, train_vae: true, batch_size: 1}\n"
    )
    near, far = found["datasets"]
    assert near == {"name": "near", "image_directory": "images", "captions_file": "captions.txt"}
    assert far == {"name": "far", "shards": "hf://datasets/me/pictures/*.tar", "shard_image_key": "jpg", "shard_caption_key": "text",
                   "epoch_samples": 500, "shard_samples": 1000, "missing_caption": "skip"}  # fmt: skip
    a, b, c = found["steps"]
    assert [step["use"] for step in (a, b, c)] == [["near"], ["far"], ["near"]]
    assert [step["train"]["loader_workers"] for step in (a, b, c)] == [2, 5, 2]
    assert [step.get("general") for step in (a, b, c)] == [{"batch_size": 8}, None, {"batch_size": 1}]
    assert a["roles"]["vae"]["optimizer"] == {"type": "Lion", "lr": 2e-6, "weight_decay": 0.0}
    assert a["roles"]["vae"]["scheduler"] == {"type": "exponential", "gamma": 0.99}
    configs = load_steps(tmp_path / "run.toml", {})
    assert [(c.datasets[0].batch_size, bool(c.datasets[0].stream)) for c in configs] == [
        (8, False),
        (3, True),
        (1, False),
    ]


GUIDE: dict[str, tuple[str, tuple[str, ...]]] = {
    "first run": ("--data_path images --captions_file captions.txt --train_vae --n_epochs 50 --batch_size 2 --lr 1e-5", ("vae",)),
    "with GAN and SPADE": (
        "--data_path images --captions_file captions.txt --output_path out --train_vae --train_spade --n_epochs 50 --batch_size 2 --lr 1e-5 "
        "--lr_min 0.1 --vae_dim 128 --feature_maps_dim 128 --feature_maps_dim_disc 8 --lambda_adv 0.9 --kl_beta 0.0001 "
        "--kl_warmup_steps 5000 --checkpoint_save_interval 50 --gan_training --workers 8", ("vae", "discriminator"),
    ),
    "flow": (
        "--data_path images --captions_file captions.txt --output_path out --model_checkpoint vae.safetensors --train_diff_full "
        "--n_epochs 100 --batch_size 2 --lr 5e-7 --sample_captions 'a cat on a couch' 'mountains at sunset' --checkpoint_save_interval 100",
        ("flow", "text_encoder"),
    ),
    "all together": (
        "--data_path images --captions_file captions.txt --output_path out --model_checkpoint vae.safetensors --train_vae --train_spade "
        "--train_diff_full --n_epochs 20 --lr 1e-6 --lambda_adv 0.5 --kl_beta 0.001 --sample_captions 'a cat' --gan_training",
        ("vae", "flow", "text_encoder", "discriminator"),
    ),
    "little memory": (
        "--data_path images --captions_file captions.txt --output_path out --train_vae --train_spade --n_epochs 100 --batch_size 1 "
        "--training_steps 4 --lr 1e-5 --vae_dim 32 --feature_maps_dim 32 --feature_maps_dim_disc 32 --img_size 512 --use_fp16 --workers 4",
        ("vae",),
    ),
    "stream": (
        "--use_webdataset --webdataset_token hf_planted --webdataset_url hf://datasets/me/pictures/dataset_*.tar --webdataset_image_key "
        "png --webdataset_caption_key caption --output_path out --train_vae --n_epochs 10 --batch_size 2", ("vae",),
    ),
    "style": (
        "--data_path images --captions_file captions.txt --fixed_prompt_prefix 'style anime' --train_vae --gan_training --use_lpips "
        "--initial_clipping_norm 0.5 --no_samples --preserve_lr --test_image_address a.png b.png --kl_free_bits 0.5", ("vae", "discriminator"),
    ),
}  # fmt: skip
"""Command lines as in the guide of 0.5.1, and the roles that they train."""


@pytest.mark.parametrize("name", GUIDE)
def test_command_lines_of_the_guide_train_what_they_say(name: str, tmp_path: Path, convert: Convert) -> None:
    line, roles = GUIDE[name]
    (tmp_path / "vae.safetensors").touch()
    made: list[str] = []
    assert fluxflow_train._write(shlex.split(line), made, {}) == 0
    config = load_config(made[0])
    assert set(config.spec.task(config).roles) == set(roles)
    assert "hf_planted" not in Path(made[0]).read_text(encoding="utf-8")
    if name == "little memory":
        assert config.train.grad_accum_steps == 4 and config.datasets[0].resolution == (512, 512)
    if name == "style":
        assert (
            config.get("general.caption_prefix") == "style anime."
            or config.datasets[0].text.caption_prefix == "style anime."
        )
        assert config.get("model.vgg_path") == VGG and config.train.max_grad_norm == 0.5


KEYS: dict[str, Any] = {
    "fixed_prompt_prefix": "anime", "use_webdataset": True, "img_size": 512, "tokenizer_name": "me/words", "model_checkpoint": "x.safetensors",
    "vae_dim": 64, "text_embedding_dim": 512, "feature_maps_dim": 64, "feature_maps_dim_disc": 16, "pretrained_bert_model": "me/bert",
    "n_epochs": 3, "batch_size": 3, "workers": 3, "lr": 1e-4, "lr_min": 0.5, "training_steps": 2, "use_fp16": True,
    "initial_clipping_norm": 0.5, "gan_training": True, "use_lpips": True, "train_spade": True, "train_diff": True, "train_diff_full": True,
    "kl_beta": 0.1, "kl_warmup_steps": 7, "kl_free_bits": 0.5, "lambda_adv": 0.9, "lambda_lpips": 0.2, "optim_sched_config": "lion.json",
    "output_path": "out2", "log_interval": 7, "checkpoint_save_interval": 7, "samples_per_checkpoint": 3, "no_samples": True, "use_ema": False,
    "use_gradient_checkpointing": True,
}  # fmt: skip
"""Settings of the published trainer that change what is trained, saved or shown, and values that are not its defaults."""
SAID = {
    "webdataset_token": "t", "reduced_min_sizes": [256], "preserve_lr": True, "test_image_address": ["a.png"],
    "log_level": "DEBUG", "log_file": "x.log", "webdataset_size": 5, "model_type": "bezier", "adaptive_weights": True, "channels": 3,
}  # fmt: skip
"""Settings that are reported instead: secrets, what this program does by itself, and what it cannot do."""


@pytest.mark.parametrize("key", [*KEYS, *SAID])
def test_every_key_of_the_command_line_acts_or_is_reported(key: str, tmp_path: Path, convert: Convert) -> None:
    (tmp_path / "lion.json").write_text('{"optimizers": {"vae": {"type": "Lion"}}}')
    base = {"data_path": "images", "train_vae": True, "output_path": "out"}
    plain, changed = read_settings(dict(base)), read_settings({**base, key: {**KEYS, **SAID}[key]})
    assert plain is not None and changed is not None
    acts = any(getattr(plain, part) != getattr(changed, part) for part in ("document", "general", "datasets"))
    assert acts == (key in KEYS)
    assert key in changed.report.keys()  # noqa: SIM118 (not a mapping)


def test_the_shell_example_plans(tmp_path: Path, convert: Convert) -> None:
    Image.new("RGB", (512, 512)).save(tmp_path / "images" / "a.png")
    program = tmp_path / "bin" / "fluxflow-train"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m musubi_tuner.fluxflow_train "$@"\n')
    program.chmod(0o755)
    example = Path(__file__).resolve().parents[3] / "docs" / "fluxflow_example.sh"
    places = {
        "DATA_PATH": "images",
        "CAPTIONS_FILE": "captions.txt",
        "OUTPUT_PATH": "out",
        "PATH": f"{program.parent}:{os.environ['PATH']}",
    }
    ended = subprocess.run(
        ["sh", str(example), "--validate-pipeline"],
        cwd=tmp_path,
        env={**os.environ, **places},
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stderr
    assert "vae: AdamW at 1e-05" in ended.stdout and "discriminator: AdamW" in ended.stdout


def test_the_command_takes_the_file_and_flags(
    tmp_path: Path, convert: Convert, capsys: pytest.CaptureFixture[str]
) -> None:
    """Flags lay over the file, and what is planned is the run file beside the output."""
    (tmp_path / "guide.yaml").write_text(PIPELINE.replace("outputs/full", str(tmp_path / "out")), encoding="utf-8")
    Image.new("RGB", (512, 512)).save(tmp_path / "images" / "a.png")
    assert (
        fluxflow_train.main(["--config", "guide.yaml", "--batch_size", "1", "--workers", "0", "--validate-pipeline"])
        == 0
    )
    said = capsys.readouterr().out
    assert "01-vae_warmup" in said and "03-flow" in said
    written = tomllib.loads((tmp_path / "out" / "fluxflow.toml").read_text(encoding="utf-8"))
    assert written["general"]["batch_size"] == 1 and written["datasets"][0]["image_directory"] == str(
        tmp_path / "images"
    )


def test_the_command_names_mistakes(tmp_path: Path, convert: Convert, capsys: pytest.CaptureFixture[str]) -> None:
    assert fluxflow_train.main(["--data_path", "images", "--train_vae", "--kl_betta", "1", "--output_path", "out"]) == 2
    assert "Did you mean 'kl_beta'" in capsys.readouterr().err
    assert fluxflow_train.main(["--lr", "1"]) == 2
    assert fluxflow_train.main(["--data_path", "images", "--train_vae", "--output_path", "3"]) == 2
    assert "output_path: is 3, expected a path" in capsys.readouterr().err
    assert fluxflow_train.main(["--config", "gone.yaml"]) == 2
    assert fluxflow_train.main([]) == 0


def leaves(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths of everything in a document."""
    if path:
        yield path
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in entries:
        yield from leaves(inner, (*path, key))


def test_recomputation_is_asked_of_the_steps_that_have_it() -> None:
    steps = [{"name": "a", "n_epochs": 1, "train_vae": True}, {"name": "b", "n_epochs": 1, "train_diff": True}]
    found = read_settings({"training": {"pipeline": {"steps": steps}, "use_gradient_checkpointing": True}})
    assert found is not None and "memory" not in found.document
    assert [step.get("memory") for step in found.document["steps"]] == [{"gradient_checkpointing": True}, None]
    alone = read_settings({"data_path": "images", "train_diff": True, "use_gradient_checkpointing": True})
    assert alone is not None and "memory" not in alone.document
    assert any("a flow alone" in reason for _, reason in alone.report.dropped_harmless)


def test_a_plateau_follows_what_falls() -> None:
    for mode, refused in (("min", False), ("max", True)):
        own = {"schedulers": {"vae": {"type": "ReduceLROnPlateau", "mode": mode}}}
        found = read_settings({"data_path": "images", "train_vae": True, "training": own})
        assert found is not None
        assert any("mode" in source for source, _ in found.report.refused) == refused


def test_no_wrong_value_anywhere_gives_a_traceback() -> None:
    """Each value in turn is something else; reading reports, and the result can be written."""
    whole, written = yaml.safe_load(PIPELINE), 0
    for path in leaves(whole):
        for wrong in ("x", [], ["x"], {}, {"x": 1}, None, True, -1, float("nan")):
            document = copy.deepcopy(whole)
            inner = document
            for key in path[:-1]:
                inner = inner[key]
            inner[path[-1]] = wrong
            imported = read_settings(document)
            if imported is None or any(found.level == "error" for found in imported.report.diagnostics()):
                continue
            with suppress(TypeError):  # a value without TOML, which the command names
                assert tomllib.loads(
                    "\n".join([tomli_w.dumps(imported.document), *map(dataset_toml, imported.datasets)])
                )
                written += 1
    assert written > 100


def test_keys_that_would_do_nothing_are_reported(convert: Convert) -> None:
    step = (
        "{name: a, n_epochs: 1, train_diff: true, kl_beta: 1, optimizers: {flow: {type: Lion, lr: 1e-5, momentum: 0.9}}, "
        "schedulers: {flow: {type: StepLR, step_size: 5, gama: 1}}}"
    )
    convert(f"data: {{data_path: images}}\ntraining: {{model_checkpoint: x, pipeline: {{steps: [{step}]}}}}\n", code=1)
    said = convert.said  # type: ignore[attr-defined]
    for text in (
        "kl_beta: is not needed: acts on the autoencoder",
        "Lion has no such argument",
        "Did you mean 'gamma'",
    ):
        assert text in said
    convert_again = "{name: a, n_epochs: 1, gan_training: true, freeze: [compressor]}"
    found = read_settings(yaml.safe_load(f"training: {{pipeline: {{steps: [{convert_again}]}}}}"))
    assert found is not None and any("freezes vae" in reason for _, reason in found.report.refused)


def test_steps_without_a_data_set_have_that_of_the_whole_file() -> None:
    found = read_settings(
        yaml.safe_load(
            "data: {data_path: images}\ntraining:\n  pipeline:\n    datasets: {more: {image_folder: more}}\n    steps:\n"
            "      - {name: a, n_epochs: 1, train_vae: true}\n      - {name: b, n_epochs: 1, train_vae: true, dataset: more}\n"
        )
    )
    assert found is not None and [step["use"] for step in found.document["steps"]] == [["data"], ["more"]]
    assert [entry["name"] for entry in found.datasets] == ["data", "more"]
