"""Files of other trainers as people write them: each imports, says what it lost, and is a run that can start."""

import json
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from musubi_tuner.config import RunConfig, load_config
from musubi_tuner.config.__main__ import main
from musubi_tuner.config.importers.documents import read_document
from musubi_tuner.config.importers.read import read_foreign, shell_options
from musubi_tuner.config.importers.report import Report
from musubi_tuner.config.importers.tools import is_typed, recognise
from musubi_tuner.errors import ConfigError

WEIGHTS = ("flux1-dev", "ae", "clip_l", "t5xxl_fp16", "t5xxl")
KOHYA_COMMAND = """
#!/bin/bash
# train on my cat
accelerate launch --mixed_precision bf16 --num_cpu_threads_per_process 1 sd-scripts/flux_train_network.py \\
  --pretrained_model_name_or_path flux1-dev.safetensors --clip_l clip_l.safetensors --t5xxl t5xxl_fp16.safetensors \\
  --ae ae.safetensors --cache_latents_to_disk --save_model_as safetensors --sdpa --persistent_data_loader_workers \\
  --max_data_loader_n_workers 2 --seed 42 --gradient_checkpointing --mixed_precision bf16 --save_precision bf16 \\
  --network_module networks.lora_flux --network_dim 4 --network_train_unet_only --optimizer_type adamw8bit \\
  --learning_rate 1e-4 --cache_text_encoder_outputs --cache_text_encoder_outputs_to_disk --fp8_base --highvram \\
  --max_train_epochs 4 --save_every_n_epochs 1 --train_data_dir images --resolution 1024,1024 --output_dir out \\
  --output_name flux-lora-name --timestep_sampling shift --discrete_flow_shift 3.1582 --model_prediction_type raw \\
  --guidance_scale 1.0 --loss_type l2
"""
KOHYA: dict[str, str] = {
    "command.sh": KOHYA_COMMAND,
    "low_memory.toml": """
[model_arguments]
pretrained_model_name_or_path = "flux1-dev.safetensors"
ae = "ae.safetensors"
clip_l = "clip_l.safetensors"
t5xxl = "t5xxl.safetensors"
[training_arguments]
network_module = "networks.lora_flux"
network_dim = 16
network_alpha = 8
network_args = ["train_blocks=all", "verbose=False"]
learning_rate = 4e-4
optimizer_type = "AdaFactor"
lr_scheduler = "constant_with_warmup"
lr_warmup_steps = 100
max_train_steps = 2000
max_grad_norm = 0.0
blocks_to_swap = 18
gradient_checkpointing = true
mixed_precision = "bf16"
save_precision = "bf16"
fp8_base = true
train_batch_size = 1
output_dir = "out"
output_name = "low"
train_data_dir = "images"
resolution = "768"
enable_bucket = true
min_bucket_reso = 256
max_bucket_reso = 1024
bucket_reso_steps = 64
timestep_sampling = "flux_shift"
model_prediction_type = "raw"
guidance_scale = 1.0
cache_latents = true
cache_text_encoder_outputs = true
""",
    "without_paths.toml": """
network_module = "networks.lora_flux"
network_dim = 8
network_train_unet_only = true
cache_latents = true
t5xxl_max_token_length = 512
output_dir = "out"
output_name = "no-paths"
max_train_steps = 100
""",
    "noise.toml": """
pretrained_model_name_or_path = "flux1-dev.safetensors"
ae = "ae.safetensors"
clip_l = "clip_l.safetensors"
t5xxl = "t5xxl.safetensors"
network_module = "networks.lora_flux"
network_alpha = 16
network_dim = 16
output_dir = "out"
output_name = "noise"
train_data_dir = "images"
resolution = 512
max_train_steps = 500
noise_offset = 0.05
adaptive_noise_scale = 0.005
ip_noise_gamma = 0.1
loss_type = "huber"
huber_c = 0.2
huber_schedule = "exponential"
min_snr_gamma = 5
shuffle_caption = true
keep_tokens = 1
caption_dropout_rate = 0.1
caption_extension = ".txt"
flip_aug = false
clip_skip = 1
wandb_api_key = "secret"
log_with = "tensorboard"
logging_dir = "logs"
mixed_precision = "bf16"
""",
    "lycoris.toml": """
pretrained_model_name_or_path = "flux1-dev.safetensors"
ae = "ae.safetensors"
clip_l = "clip_l.safetensors"
t5xxl = "t5xxl.safetensors"
network_module = "lycoris.kohya"
network_args = ["algo=lora", "preset=full"]
network_dim = 16
network_alpha = 16
unet_lr = 5e-5
learning_rate = 1e-4
output_dir = "out"
output_name = "lyco"
train_data_dir = "kohya"
max_train_epochs = 2
resolution = 512
caption_extension = ".txt"
""",
}
MUSUBI: dict[str, str] = {
    "plain.toml": """
architecture = "fd"
dit = "flux1-dev.safetensors"
vae = "ae.safetensors"
text_encoder = "clip_l.safetensors"
text_encoder2 = "t5xxl.safetensors"
dataset_config = "data.toml"
output_dir = "out"
output_name = "plain"
network_module = "networks.lora_flux"
network_dim = 32
max_train_steps = 1000
timestep_sampling = "flux_shift"
sdpa = true
mixed_precision = "bf16"
""",
    "with_a_model_table.toml": """
[model]
dit = "flux1-dev.safetensors"
vae = "ae.safetensors"
text_encoder = "clip_l.safetensors"
text_encoder2 = "t5xxl.safetensors"
[training]
architecture = "fd"
network_module = "networks.lora_flux"
network_dim = 16
dataset_config = "data.toml"
output_dir = "out"
output_name = "tables"
max_train_epochs = 8
lr_warmup_steps = 0.1
num_timestep_buckets = 10
[memory]
blocks_to_swap = 20
fp8_base = true
fp8_scaled = true
gradient_checkpointing = true
""",
    "shifted.toml": """
script = "flux_dev_train_network.py"
dit = "flux1-dev.safetensors"
vae = "ae.safetensors"
text_encoder = "clip_l.safetensors"
text_encoder2 = "t5xxl.safetensors"
dataset_config = "data.toml"
output_dir = "out"
output_name = "shifted"
network_module = "networks.lora_flux"
network_dim = 16
timestep_sampling = "shift"
discrete_flow_shift = 3.0
weighting_scheme = "none"
max_train_steps = 400
save_every_n_steps = 100
save_last_n_steps = 300
optimizer_type = "adafactor"
optimizer_args = ["relative_step=False", "scale_parameter=False", "warmup_init=False"]
max_grad_norm = 0
""",
    "samples.toml": """
architecture = "fd"
dit = "flux1-dev.safetensors"
vae = "ae.safetensors"
text_encoder = "clip_l.safetensors"
text_encoder2 = "t5xxl.safetensors"
dataset_config = "data.toml"
output_dir = "out"
output_name = "samples"
network_module = "networks.lora_flux"
network_dim = 16
max_train_steps = 400
sample_prompts = "prompts.txt"
sample_every_n_steps = 100
sample_at_first = true
compile = true
compile_mode = "default"
""",
    "command.sh": """
accelerate launch --num_processes 1 src/musubi_tuner/flux_dev_train_network.py --dit flux1-dev.safetensors --vae ae.safetensors \\
  --text_encoder clip_l.safetensors --text_encoder2 t5xxl.safetensors --dataset_config data.toml --sdpa --mixed_precision bf16 \\
  --optimizer_type adamw8bit --learning_rate 1e-4 --gradient_checkpointing --network_module networks.lora_flux --network_dim 32 \\
  --max_train_epochs 16 --save_every_n_epochs 1 --seed 42 --output_dir out --output_name command
""",
}
AI_TOOLKIT: dict[str, str] = {
    "example.yaml": """
job: extension
config:
  name: my_first_flux_lora_v1
  process:
    - type: sd_trainer
      training_folder: out
      device: cuda:0
      trigger_word: p3r5on
      network: {type: lora, linear: 16, linear_alpha: 16}
      save: {dtype: float16, save_every: 250, max_step_saves_to_keep: 4, push_to_hub: false}
      datasets:
        - {folder_path: images, caption_ext: txt, caption_dropout_rate: 0.05, shuffle_tokens: false,
           cache_latents_to_disk: true, resolution: [512, 768, 1024]}
      train:
        batch_size: 1
        steps: 2000
        gradient_accumulation_steps: 1
        train_unet: true
        train_text_encoder: false
        gradient_checkpointing: true
        noise_scheduler: flowmatch
        optimizer: adamw8bit
        lr: 1.0e-4
        ema_config: {use_ema: true, ema_decay: 0.99}
        dtype: bf16
      model: {name_or_path: black-forest-labs/FLUX.1-dev, is_flux: true, quantize: true}
      sample:
        sampler: flowmatch
        sample_every: 250
        width: 1024
        height: 1024
        prompts: ["[trigger] holding a sign", "a bear [trigger]"]
        neg: ""
        seed: 42
        walk_seed: true
        guidance_scale: 4
        sample_steps: 20
meta: {name: "[name]", version: "1.0"}
""",
    "shuffled.yaml": """
job: extension
config:
  name: shuffled
  process:
    - type: sd_trainer
      training_folder: out
      network: {type: lora, linear: 8, linear_alpha: 4, conv: 0, dropout: 0.1}
      datasets:
        - {folder_path: images, caption_ext: .txt, shuffle_tokens: true, token_dropout_rate: 0.1, num_repeats: 3, resolution: 512}
      train: {steps: 100, lr: 0.0002, optimizer: adamw, optimizer_params: {weight_decay: 0.05}, lr_scheduler: cosine,
              timestep_type: sigmoid, loss_type: mae, dtype: bf16, max_grad_norm: 0.5, noise_offset: 0.02}
      model: {name_or_path: black-forest-labs/FLUX.1-dev, arch: flux, quantize_te: true, low_vram: true}
""",
    "regularised.yaml": """
job: extension
config:
  name: reg
  process:
    - type: sd_trainer
      training_folder: out
      network: {type: lora, rank: 4}
      datasets:
        - {folder_path: images, resolution: 512, default_caption: a cat}
        - {folder_path: more, resolution: 512, is_reg: true}
      train: {steps: 100, lr: 0.0001, reg_weight: 0.5, dtype: bf16, disable_sampling: true, timestep_type: linear}
      model: {name_or_path: black-forest-labs/FLUX.1-dev, is_flux: true}
      logging: {log_every: 10, use_wandb: false}
""",
    "masked.yaml": """
job: extension
config:
  name: masked
  process:
    - type: sd_trainer
      training_folder: out
      network: {type: lora, linear: 4, linear_alpha: 4}
      datasets: [{folder_path: images, mask_path: masks, resolution: [768]}]
      train: {steps: 10, lr: 0.0001, dtype: bf16, skip_first_sample: true, content_or_style: balanced}
      model: {name_or_path: black-forest-labs/FLUX.1-dev, is_flux: true}
      sample: {sample_every: 5, samples: [{prompt: a cat, seed: 3, width: 512}, {prompt: a dog}]}
""",
    "lokr.yaml": """
job: extension
config:
  name: lokr
  process:
    - type: sd_trainer
      network: {type: lokr, lokr_full_rank: true, lokr_factor: 8}
      datasets: [{folder_path: images, resolution: 512, flip_y: true}]
      train: {steps: 10, lr: 0.0001, dtype: bf16, diff_output_preservation: true}
      model: {name_or_path: black-forest-labs/FLUX.1-dev, is_flux: true}
""",
}
PLAN: dict[str, Any] = {
    "project_name": "cat", "model_type": "Flux", "model_path": "flux1-dev.safetensors", "vae_path": "ae.safetensors",
    "clip_l_path": "clip_l.safetensors", "clip_g_path": "", "t5xxl_path": "t5xxl.safetensors", "dataset_dir": "images",
    "resolution": 1024, "train_batch_size": 2, "num_repeats": 10, "epochs": 5, "max_train_steps": 0, "seed": 42, "flip_aug": False,
    "shuffle_caption": True, "learning_rate": 1e-4, "unet_lr": 1e-4, "text_encoder_lr": 0, "lr_scheduler": "cosine",
    "lr_scheduler_number": 3, "lr_warmup_ratio": 0.05, "lr_warmup_steps": 0, "lr_power": 1.0, "min_snr_gamma_enabled": True,
    "min_snr_gamma": 5.0, "ip_noise_gamma_enabled": False, "ip_noise_gamma": 0.05, "multinoise": False,
    "multires_noise_discount": 0.25, "clip_skip": 2, "max_token_length": 225, "enable_bucket": True, "min_bucket_reso": 256,
    "max_bucket_reso": 2048, "bucket_reso_steps": 64, "gradient_checkpointing": True, "mixed_precision": "bf16",
    "lora_type": "LoRA", "network_dim": 16, "network_alpha": 8, "conv_dim": 0, "factor": -1, "block_dims": "",
    "optimizer_type": "AdamW8bit", "optimizer_args": "{}", "weight_decay": 0.01, "cache_latents": True, "output_dir": "out",
    "output_name": "cat", "save_every_n_epochs": 1, "save_model_as": "safetensors", "save_precision": "fp16",
    "sample_sampler": "euler_a", "logging_dir": "", "wandb_key": "", "v2": False,
}  # fmt: skip


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the weights and pictures that the files name."""
    for name in WEIGHTS:
        (tmp_path / f"{name}.safetensors").touch()
    for folder in ("images", "more", "masks", "kohya/5_sks_cat", "kohya/1_dog", "kohya/0_off", "kohya/notes"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "prompts.txt").write_text("a cat --w 512 --h 512\n", encoding="utf-8")
    data = (
        '[general]\ncaption_extension = ".txt"\nresolution = [1024, 1024]\n[[datasets]]\nimage_directory = "images"\n'
    )
    (tmp_path / "data.toml").write_text(data, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def imported(name: str, text: str, *options: str) -> tuple[int, Report]:
    """Exit code of the command, and the report."""
    Path(name).write_text(text, encoding="utf-8")
    report = read_foreign(Path(name)).report
    return main(["import", name, "-o", "run.toml", *options]), report


def run_of(name: str, text: str, *options: str) -> RunConfig:
    code, _ = imported(name, text, *options)
    assert code == 0
    return load_config("run.toml")


def source_keys(name: str, text: str) -> set[str]:
    if name.endswith(".sh"):
        options, unfilled = shell_options(text)
        return {*options, *(key for key, _ in unfilled)}
    document = tomllib.loads(text) if name.endswith(".toml") else json.loads(text)
    return {key for value in document.values() if isinstance(value, dict) for key in value} | {
        key for key, value in document.items() if not isinstance(value, dict)
    }


@pytest.mark.parametrize("name", KOHYA)
def test_files_of_sd_scripts(name: str, project: Path) -> None:
    code, report = imported(name, KOHYA[name], "--dataset_config", "data.toml")
    found = report.keys()
    keys = {key.removeprefix("accelerate.").partition(" ")[0] for key in found}
    assert code == 0 and source_keys(name, KOHYA[name]) - {"accelerate"} <= keys
    assert len(found) == len(set(found))


def test_a_command_of_sd_scripts_is_the_run_it_says(project: Path) -> None:
    config = run_of("command.sh", KOHYA_COMMAND)
    assert (config.spec.code, config.adapter.type, config.adapter.rank, config.adapter.alpha) == ("fd", "lora", 4, 1.0)
    assert config.optimizer.type == "AdamW8bit" and config.optimizer.lr == 1e-4
    assert config.get("objective.timestep_sampling") == "shift" and config.get("objective.guidance_scale") == 1.0
    assert config.get("objective.discrete_flow_shift") == pytest.approx(3.1582)
    assert config.datasets[0].resolution == (1024, 1024) and not config.datasets[0].enable_bucket
    assert config.memory.base_storage == "fp8" and config.train.max_epochs == 4 and config.scheduler.type == "constant"


def test_a_file_of_sd_scripts_without_paths_keeps_its_defaults(project: Path) -> None:
    text = KOHYA["without_paths.toml"]
    found = read_foreign(_written("f.toml", text))
    assert recognise(tomllib.loads(text)) == "kohya"
    assert found.document["objective"]["guidance_scale"] == 3.5 and found.general["caption_extension"] == ".caption"


def _written(name: str, text: str) -> Path:
    Path(name).write_text(text, encoding="utf-8")
    return Path(name)


@pytest.mark.parametrize("option", ["train_data_dir", "image_dir"])
def test_folders_with_repeats_become_data_sets(option: str, project: Path) -> None:
    config = run_of("lycoris.toml", KOHYA["lycoris.toml"].replace("train_data_dir", option))
    found = [
        (d.image_directory and d.image_directory.name, d.num_repeats, d.text.class_tokens) for d in config.datasets
    ]
    assert found == [("1_dog", 1, "dog"), ("5_sks_cat", 5, "sks_cat")]
    left_out = dict(read_foreign(Path("lycoris.toml")).report.dropped_harmless)[f"(folders of {option})"]
    assert left_out.endswith("left out, as in sd-scripts: 0_off, notes")
    assert config.optimizer.lr == 5e-5  # unet_lr decides


def test_noise_and_captions_of_sd_scripts_carry_over(project: Path) -> None:
    config = run_of("noise.toml", KOHYA["noise.toml"])
    text = config.datasets[0].text
    assert (text.shuffle_caption, text.keep_tokens, text.caption_dropout_rate) == (True, 1, 0.1)
    assert config.cache.text_variants == 8
    assert (config.get("objective.loss"), config.get("objective.huber_delta")) == ("pseudo_huber", 0.2)
    lost = {key for key, _ in read_foreign(Path("noise.toml")).report.dropped_changes_result}
    assert lost == {
        "clip_skip",
        "noise_offset",
        "adaptive_noise_scale",
        "min_snr_gamma",
        "(model_prediction_type)",
        "(network_train_unet_only)",
    }
    assert config.get("objective.ip_noise_gamma") == 0.1 and not config.get("objective.noise_offset")
    assert "secret" not in Path("run.toml").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", MUSUBI)
def test_files_of_musubi_tuner(name: str, project: Path) -> None:
    code, report = imported(name, MUSUBI[name])
    found = report.keys()
    keys = {key.removeprefix("accelerate.").partition(" ")[0] for key in found}
    assert code == 0 and source_keys(name, MUSUBI[name]) - {"accelerate"} <= keys
    assert load_config("run.toml").spec.code == "fd"


def test_a_model_table_does_not_make_a_file_of_musubi_tuner_typed(project: Path) -> None:
    text = MUSUBI["with_a_model_table.toml"]
    assert not is_typed(tomllib.loads(text))
    assert load_config(_written("f.toml", text)).scheduler.warmup_ratio == 0.1
    assert is_typed({"model": {"arch": "fd"}}) and is_typed({"run": {}})


@pytest.mark.parametrize("name", AI_TOOLKIT)
def test_jobs_of_ai_toolkit(name: str, project: Path) -> None:
    code, report = imported(name, AI_TOOLKIT[name])
    assert sorted(report.keys()) == sorted(set(report.keys()))
    assert code == 0
    if name == "lokr.yaml":
        adapter = load_config("run.toml").adapter
        assert (adapter.type, adapter.lokr_full, adapter.lokr_factor) == ("lokr", True, 8)
        assert {key for key, _ in report.dropped_changes_result} >= {
            "datasets[0].flip_y",
            "train.diff_output_preservation",
        }
    else:
        assert load_config("run.toml").adapter.type == "lora"


def test_the_example_of_ai_toolkit_is_the_run_it_says(project: Path) -> None:
    config = run_of("example.yaml", AI_TOOLKIT["example.yaml"])
    assert [dataset.resolution[0] for dataset in config.datasets] == [512, 768, 1024]
    assert len({dataset.cache_directory for dataset in config.datasets}) == 3
    assert config.datasets[0].text.trigger_word == "p3r5on" and config.datasets[0].text.caption_dropout_rate == 0.05
    assert (config.model.path, config.model.vae_path) == (
        "black-forest-labs/FLUX.1-dev:transformer", "black-forest-labs/FLUX.1-dev:vae",
    )  # fmt: skip
    assert config.sample.prompts == ["p3r5on holding a sign", "a bear p3r5on"] and config.sample.guidance == 4.0
    assert (config.ema.enabled, config.ema.decay) == (True, 0.99) and config.memory.base_storage == "fp8"
    assert (config.run.name, config.run.output_dir) == ("my_first_flux_lora_v1", "out/my_first_flux_lora_v1")


def test_the_plan_with_its_defaults_imports_for_flux(project: Path) -> None:
    code, report = imported("plan.json", json.dumps(PLAN))
    assert code == 0
    lost = [key for key, _ in report.dropped_changes_result]
    assert sorted(lost) == ["clip_skip", "max_token_length", "sample_sampler"]
    assert sorted(report.keys()) == sorted(PLAN)
    config = load_config("run.toml")
    assert (config.train.max_epochs, config.datasets[0].num_repeats, config.scheduler.warmup_ratio) == (5, 10, 0.05)


JOB = "job: x\nconfig: {{name: a, process: [{}]}}"


def test_what_the_shell_would_fill_in_is_asked_for(project: Path) -> None:
    options, unfilled = shell_options(
        'python flux_train_network.py --output_dir "$OUT" --seed 3 --network_args a=1 b=2\n'
    )
    assert options == {"script": "flux_train_network.py", "seed": 3, "network_args": ["a=1", "b=2"]}
    assert [key for key, _ in unfilled] == ["output_dir"]


TRAINING = "python src/flux_train_network.py --seed 3\n"


@pytest.mark.parametrize(
    ("text", "script", "others"),
    [
        (f"python flux_cache_latents.py --vae x\npython tools/cache_text_encoder_outputs.py --t5 y\n{TRAINING}",
         "src/flux_train_network.py", []),
        (f"{TRAINING}python tools/extract_lora.py --dim 4\n", "src/flux_train_network.py", ["extract_lora.py"]),
        ("python flux_cache_latents.py --vae x\n", "flux_cache_latents.py", []),
    ],
)  # fmt: skip
def test_of_several_commands_the_first_that_trains_is_taken_and_others_are_asked_about(
    text: str, script: str, others: list[str]
) -> None:
    options, asked = shell_options(text)
    assert options["script"] == script
    assert [(key, reason.partition(" ")[0]) for key, reason in asked] == [("(script)", other) for other in others]


def test_options_of_the_launcher_are_reported(project: Path) -> None:
    text = KOHYA_COMMAND.replace(" launch ", " launch --multi_gpu --gpu_ids 0,1 --num_proceses 2 --num_machines 1 ")
    report = read_foreign(_written("command.sh", text)).report
    assert ("accelerate.num_proceses", " Did you mean 'num_processes'?") in report.unknown
    assert "accelerate.gpu_ids" in {key for key, _ in report.dropped_changes_result}
    assert {"accelerate.multi_gpu", "accelerate.num_machines"} <= {key for key, _ in report.dropped_harmless}


@pytest.mark.parametrize(
    ("name", "text"),
    [("plain.toml", MUSUBI["plain.toml"]), ("settings.json", '{"learning_rate": 1e-4, "grad_clip": 1}')],
)
def test_data_sets_that_are_taken_in_replace_the_file_that_names_them(name: str, text: str, project: Path) -> None:
    _written("more.toml", '[[datasets]]\nimage_directory = "more"\n')
    assert [dataset.image_directory for dataset in run_of(name, text, "--dataset", "more.toml").datasets] == [
        Path("more")
    ]


@pytest.mark.parametrize(
    ("process", "key", "value"),
    [
        ("train: {min_denoising_steps: 200}", "objective.max_timestep", 800),
        ("train: {min_denoising_steps: 999}", "objective.max_timestep", 1),
        ("train: {min_denoising_steps: '200'}", "objective.max_timestep", 800),
        ("train: {gradient_accumulation_steps: 4, steps: 2000}", "train.max_steps", 500),
        ("train: {gradient_accumulation: 4, steps: 2000}", "train.max_steps", 2000),
        ("train: {lr_scheduler: constant_with_warmup}", "scheduler.warmup_steps", 1000),
        (
            "train: {lr_scheduler: constant_with_warmup, lr_scheduler_params: {num_warmup_steps: 50}}",
            "scheduler.warmup_steps",
            50,
        ),
        ("train: {lr_scheduler: cosine, lr_scheduler_params: {eta_min: 0.00001}}", "scheduler.min_lr", 1e-5),
        ("train: {lr_scheduler: cosine_with_restarts}", "scheduler.type", "cosine_with_restarts"),
        ("train: {cfg_scale: 3.5}", "objective.guidance_scale", 3.5),
        ("network: {type: lora}", "adapter.exclude", []),
        ("sample: {prompts: [a]}", "sample.every_steps", 100),
        ("sample: {prompts: [a]}", "sample.at_first", True),
        ("sample: {prompts: [a, b --seed 3], seed: 7}", "sample.prompts", ["a --d 7", "b --d 3"]),
        (
            "sample: {prompts: [a --cfg 3 --steps 9 --ctrl_img x.png], walk_seed: true}",
            "sample.prompts",
            ["a --g 3 --s 9"],
        ),
        ("datasets: [{folder_path: images, mask_path: masks, mask_min_value: 0.1}]", "train.mask_background", 0.1),
        ("train: {max_denoising_steps: 600}", "objective.min_timestep", 400),
        ("train: {max_denoising_steps: 999}", "objective.min_timestep", 0),
        ('train: {lr: "1e-4"}', "optimizer.lr", 1e-4),
        ('train: {steps: "20"}', "train.max_steps", 20),
        ("save: {push_to_hub: true, hf_repo_id: me/cats}", "hub.repo_id", "me/cats"),
        ("save: {hf_repo_id: me/cats}", "hub.repo_id", None),
        ("train: {disable_sampling: true}, sample: {prompts: [a]}", "sample.prompts", None),
        ("sample: {prompts: [a]}, train: {disable_sampling: true}", "sample.prompts", None),
        ("sample: {samples: [{prompt: a cat, seed: 0, width: 512}]}", "sample.prompts", ["a cat --w 512 --d 0"]),
        ("datasets: [{folder_path: images, mask_path: masks}]", "train.masked_loss", True),
        ("datasets: [{folder_path: images, alpha_mask: true}]", "train.masked_loss", True),
        ("datasets: [{folder_path: images}]", "train.masked_loss", None),
    ],
)
def test_keys_of_ai_toolkit_mean_what_they_say(process: str, key: str, value: Any, project: Path) -> None:
    section, _, name = key.partition(".")
    found = read_foreign(_written("a.yaml", JOB.format(f"{{{process}}}"))).document.get(section, {}).get(name)
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    ("text", "became", "key"),
    [
        (JOB.format("{train: {content_or_style: style}}"), "dropped_changes_result", "train.content_or_style"),
        (JOB.format("{train: {content_or_style: balanced}}"), "dropped_harmless", "train.content_or_style"),
        (JOB.format("{train: {linear_timesteps: true}}"), "dropped_changes_result", "train.linear_timesteps"),
        (JOB.format("{train: {linear_timesteps2: false}}"), "dropped_harmless", "train.linear_timesteps2"),
        (JOB.format("{network: {network_kwargs: {only_if_contains: [x]}}}"), "dropped_changes_result", "network.network_kwargs"),
        (JOB.format("{network: {network_kwargs: {}}}"), "dropped_harmless", "network.network_kwargs"),
        (JOB.format("{sample: {samples: [{prompt: a, ctrl_img: x}]}}"), "dropped_changes_result", "(sample.samples)"),
        (JOB.format("{sample: {sample_every: 5}}"), "dropped_harmless", "sample.sample_every"),
        (JOB.format("{train: {ema_config: {ema_decay: 0.9}}}"), "dropped_harmless", "train.ema_config.ema_decay"),
        (JOB.format("{save: {push_to_hub: false, hf_repo_id: me/cats}}"), "dropped_harmless", "save.hf_repo_id"),
        (JOB.format("{model: {is_xl: true}}"), "refused", "model.is_xl"),
        (JOB.format("{train: {lr_scheduler: linear}}"), "dropped_changes_result", "train.lr_scheduler"),
        (JOB.format("{train: {gradient_accumulation_steps: -1}}"), "refused", "train.gradient_accumulation_steps"),
        ("optimizer_args: ''\ndynamo_backend: 'no'\nvae_batch_size: 0\nnetwork_module: networks.lora_flux\ndit: x", "dropped_harmless", "vae_batch_size"),
        ("wandb_api_key: ''\nnetwork_module: networks.lora_flux\ndit: x", "dropped_harmless", "wandb_api_key"),
        (JOB.format("{train: {min_denoising_steps: null}}"), "dropped_harmless", "train.min_denoising_steps"),
        (JOB.format("{train: {force_first_sample: true, skip_first_sample: false}}"), "dropped_harmless", "train.force_first_sample"),
        ("reg_data_dir: ''\nnetwork_module: networks.lora_flux\ndit: x", "dropped_harmless", "reg_data_dir"),
        (JOB.format("{train: {max_denoising_steps: 1001}}"), "refused", "train.max_denoising_steps"),
        ("job: x\nextra: 1\nconfig: {name: a, process: [{type: x}]}", "unknown", "extra"),
        ("job: x\nconfig: {name: a, extra: 1, process: [{type: x}]}", "unknown", "config.extra"),
    ],
)  # fmt: skip
def test_what_becomes_of_keys_of_ai_toolkit(text: str, became: str, key: str, project: Path) -> None:
    report = read_foreign(_written("a.yaml", text)).report
    assert key in [entry[0] for entry in getattr(report, became)]
    assert report.keys().count(key) == (not key.startswith("("))


@pytest.mark.parametrize(
    ("name", "text", "code", "expected"),
    [
        ("a.yaml", "job: [", 2, "not valid YAML"),
        ("a.txt", "nothing here", 2, "no command with a .py script and --options"),
        ("a.json", '{"x": 1}', 2, "is not the training_config.json of a known trainer"),
        ("a.toml", 'schema_version = 1\n[run]\nname = "x"', 2, "is already a run file"),
        ("a.yaml", JOB.format("5"), 1, "expected a list with one process"),
        ("a.yaml", JOB.format("{datasets: 5}"), 1, "is 5, expected a list"),
        ("a.yaml", JOB.format("{train: {max_denoising_steps: abc}}"), 1, "expected a whole number"),
        ("a.yaml", JOB.format("{type: sd_trainer, model: {is_flux: true}}"), 1, "trains the whole model"),
    ],
)
def test_files_of_no_trainer_and_odd_jobs_end_in_our_words(
    name: str, text: str, code: int, expected: str, project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["import", str(_written(name, text)), "-o", "run.toml"]) == code
    said = capsys.readouterr()
    assert expected in (said.err if code == 2 else said.out)


def test_a_kontext_file_says_that_another_model_is_trained(project: Path) -> None:
    text = MUSUBI["shifted.toml"].replace("flux_dev_train_network.py", "flux_kontext_train_network.py")
    report = read_foreign(_written("k.toml", text)).report
    assert any(key == "script" and "Kontext" in reason for key, reason in report.dropped_changes_result)


@pytest.mark.parametrize("order", [1, -1])
def test_the_order_of_keys_decides_nothing(order: int, project: Path) -> None:
    document = dict(list(PLAN.items())[::order]) | {"min_snr_gamma_enabled": False}
    found = read_foreign(_written("plan.json", json.dumps(document)))
    assert found.document["objective"].get("min_snr_gamma", 0) == 0


def test_two_values_of_one_setting_need_a_person(project: Path) -> None:
    report = read_foreign(_written("f.toml", KOHYA["noise.toml"] + 'vae = "other.safetensors"\n')).report
    assert any("another name of model.vae_path" in reason for _, reason in report.needs_you)


@pytest.mark.parametrize("arch", ["fd"])
def test_an_exported_run_is_the_same_when_imported(arch: str, project: Path) -> None:
    run_of("command.sh", KOHYA_COMMAND)
    for to in ("kohya", "musubi"):
        assert main(["export", "run.toml", "--to", to, "-o", f"{to}.toml"]) == 0
        options = tomllib.loads(Path(f"{to}.toml").read_text(encoding="utf-8"))
        assert (options["network_dim"], options["network_alpha"], options["learning_rate"]) == (4, 1.0, 1e-4)
        assert options["seed"] == 42 and options["max_grad_norm"] == 1.0 and options["lr_scheduler"] == "constant"
        assert main(["import", f"{to}.toml", "-o", f"{to}_again.toml", "--dataset_config", "data.toml"]) == 0
        again, first = load_config(f"{to}_again.toml"), load_config("run.toml")
        for key in ("optimizer.lr", "optimizer.type", "adapter.rank", "adapter.alpha", "train.max_epochs", "memory.base_storage",
                    "objective.timestep_sampling", "objective.discrete_flow_shift", "objective.guidance_scale", "save.dtype"):  # fmt: skip
            assert again.get(key) == first.get(key), (to, key)


def test_an_export_says_what_only_this_program_decides(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_of("command.sh", KOHYA_COMMAND)
    capsys.readouterr()
    changes = [
        "train.mixed_precision=auto",
        "memory.blocks_to_swap=auto",
        'sample.prompts=["a cat"]',
        "save.every_steps=0",
    ]
    words = [word for change in changes for word in ("--set", change)]
    assert main(["export", "run.toml", "--to", "musubi", "-o", "musubi.toml", *words]) == 0
    said, options = capsys.readouterr().out, tomllib.loads(Path("musubi.toml").read_text(encoding="utf-8"))
    assert not {"mixed_precision", "blocks_to_swap", "sample_prompts", "save_every_n_steps"} & set(options)
    assert 'train.mixed_precision: is "auto"' in said and 'memory.blocks_to_swap: is "auto"' in said
    assert "sample.prompts: are in the run file" in said and "save.every_steps" not in said
    assert options["save_every_n_epochs"] == 1


@pytest.mark.parametrize(
    ("adapter", "optimizer", "shown"),
    [
        ({"type": "lokr", "lokr_factor": 8, "rs_lora": True}, {"type": "Prodigy", "lr": 1.0, "args": {"d_coef": 2.0}}, "prodigyopt.Prodigy"),
        ({"type": "dora"}, {"type": "Lion", "lr": 1e-5}, "lion_pytorch.Lion"),
        ({"type": "native"}, {"type": "Adafactor", "args": {"clip_threshold": 2.0}}, "Adafactor"),
        ({"type": "diag-oft", "constraint": 0.5}, {"type": "CAME"}, "came_pytorch.CAME"),
    ],
    ids=lambda value: value.get("type") if isinstance(value, dict) else value,
)  # fmt: skip
def test_types_of_adapters_and_optimizers_are_exported_and_read_again(
    adapter: dict[str, Any], optimizer: dict[str, Any], shown: str, project: Path
) -> None:
    run_of("command.sh", KOHYA_COMMAND)
    document = tomllib.loads(Path("run.toml").read_text(encoding="utf-8"))
    document["adapter"] |= adapter
    document["optimizer"] = optimizer
    Path("run.toml").write_text(tomli_w.dumps(document), encoding="utf-8")
    first = load_config("run.toml")
    assert main(["export", "run.toml", "--to", "kohya", "-o", "kohya.toml"]) == 0
    options = tomllib.loads(Path("kohya.toml").read_text(encoding="utf-8"))
    assert options["optimizer_type"] == shown and options["network_module"] == "lycoris.kohya"
    assert main(["import", "kohya.toml", "-o", "again.toml", "--dataset_config", "data.toml"]) == 0
    again = load_config("again.toml")
    for key in ("adapter.type", *(f"adapter.{name}" for name in adapter), "optimizer.type", "optimizer.lr", "optimizer.betas", "optimizer.weight_decay"):  # fmt: skip
        assert again.get(key) == first.get(key), key
    assert again.optimizer.args.items() >= first.optimizer.args.items()


def test_an_export_of_a_rate_that_follows_the_loss_is_constant(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_of("command.sh", KOHYA_COMMAND)
    capsys.readouterr()
    words = ["--set", "scheduler.type=plateau", "--set", "scheduler.patience=3", "--set", "scheduler.warmup_steps=5%"]
    assert main(["export", "run.toml", "--to", "kohya", "-o", "kohya.toml", *words]) == 0
    said, options = capsys.readouterr().out, tomllib.loads(Path("kohya.toml").read_text(encoding="utf-8"))
    assert (options["lr_scheduler"], options["lr_warmup_steps"]) == ("constant_with_warmup", 0.05)
    assert 'scheduler.type: is "plateau", and schedules there do not see the loss' in said
    assert "scheduler.patience: is 3" in said


def test_words_of_windows_and_names_like_dates(project: Path) -> None:
    text = "python flux_train_network.py --train_data_dir C:\\data\\img --output_name 2024-01-01 --seed 3\n"
    options, _ = shell_options(text, windows=True)
    assert (
        options["train_data_dir"] == "C:\\data\\img" and options["output_name"] == "2024-01-01" and options["seed"] == 3
    )


def test_data_set_files_that_are_none(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _written("d.toml", "datasets = 5\n")
    assert main(["import", str(_written("f.toml", KOHYA["noise.toml"])), "-o", "run.toml", "--dataset", "d.toml"]) == 2
    assert "expected a table [general] and a list of tables" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.yaml", "config: 1\nconfig: 2", "line 2: the key 'config' is there twice; keep one"),
        ("a.yaml", "1: 2", "line 1: the key '1' is no text; put it in quotes"),
        ("a.yaml", "a: [1\nb: 2", "not valid YAML: line 2"),
        ("a.yaml", "a: &a [*a]", "is nested more than 50 levels deep"),
        ("a.yaml", "a: &a [x, x]\n" + "".join(f"{n}: &{n} [{', '.join([f'*{b}'] * 40)}]\n" for b, n in zip("abcd", "bcde")),
         "has more than 1,000,000 values"),
        ("a.yaml", "a: !!python/object:os.system x", "line 1: could not determine a constructor"),
        ("a.json", '{"a": 1, "a": 2}', "the key 'a' is there twice; keep one"),
        ("a.json", '{"a": NaN}', "NaN is no number in JSON"),
        ("a.json", "[" * 3000, "not valid JSON: nested too deeply"),
        ("a.sh", 'python flux_train_network.py --output_name "cat', "a quote is not closed"),
        ("a.bat", 'python flux_train_network.py --output_name "cat', "a quote is not closed"),
        ("a.toml", '[[datasets]]\nimage_directory = "x"', "is a data set file; import the file of the training, with --dataset"),
        ("a.json", '{"LoRA_type": "Flux1", "epoch": 1}', "is a file of the bmaltais GUI"),
    ],
)  # fmt: skip
def test_what_no_file_of_a_trainer_holds_is_refused(name: str, content: str, message: str, project: Path) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        read_foreign(_written(name, content))


def test_yaml_is_read_as_ai_toolkit_reads_it(project: Path) -> None:
    text = "lr: 1e-4\nname: 2024-13-45\nbase: &b {a: 1}\nown:\n  <<: *b\n  a: 2\n"
    assert read_document(_written("a.yaml", text)) == {
        "lr": 1e-4,
        "name": "2024-13-45",
        "base": {"a": 1},
        "own": {"a": 2},
    }


@pytest.mark.parametrize(
    ("line", "options"),
    [
        ("python train.py --seed 42 2>&1 | tee log.txt", {"seed": 42}),
        ("cd x && python train.py --seed 42; echo done", {"seed": 42}),
        ("python train.py --name '<sks>' --keep_tokens_separator '|||' > log.txt", {"name": "<sks>", "keep_tokens_separator": "|||"}),
        ('python train.py --name "a # b" --seed 42 # don\'t stop', {"name": "a # b", "seed": 42}),
    ],
)  # fmt: skip
def test_what_belongs_to_the_shell_is_no_value(line: str, options: dict[str, Any]) -> None:
    assert shell_options(line) == ({"script": "train.py", **options}, [])


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"datasets": 5}, "expected [[datasets]]"),
        ({"datasets": [5]}, "expected [[datasets]]"),
        ({"network_args": ["betas=" + "(" * 5000], "loss_type": []}, "is not supported"),
        ({"base_weights": [None]}, "write a value"),
    ],
)
def test_values_of_no_use_are_refused_by_their_key(options: dict[str, Any], reason: str, project: Path) -> None:
    report = read_foreign(_written("plan.json", json.dumps({**PLAN, **options})), "plan").report
    assert any(key in options and reason in text for key, text in report.refused), report.refused


def test_tables_of_a_data_set_stay_its_own_and_the_folder_of_the_output_is_looked_for(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = '[[datasets]]\nimage_directory = "images"\n[datasets.experts]\nresolution = 512\n'
    _written("other.toml", data)
    command = ["import", str(_written("low.toml", KOHYA["low_memory.toml"])), "--dataset", "other.toml", "-o"]
    assert main([*command, "nowhere/run.toml"]) == 2 and "there is no folder nowhere" in capsys.readouterr().err
    main([*command, "run.toml"])
    assert tomllib.loads(Path("run.toml").read_text(encoding="utf-8"))["datasets"][0]["experts"] == {"resolution": 512}


def test_words_of_windows_commands() -> None:
    text = (
        "REM --seed 7\r\n"
        'python sd-scripts\\flux_train_network.py --seed="42" --clip_l="C:\\my models\\x" --ae "%MODEL%\\ae" --name D:\\a ^\r\n'
        "  --max_train_steps 5 > log.txt & echo done"
    )
    options, unfilled = shell_options(text, windows=True)
    assert options == {
        "script": "sd-scripts\\flux_train_network.py", "seed": 42, "clip_l": "C:\\my models\\x", "name": "D:\\a", "max_train_steps": 5
    }  # fmt: skip
    assert [key for key, _ in unfilled] == ["ae"]


def test_words_of_a_variable_are_not_the_value_before_them() -> None:
    options, unfilled = shell_options('python train.py --guidance_scale 1 "${ARGS[@]}" --seed ' + "9" * 5000)
    assert options["guidance_scale"] == 1 and [key for key, _ in unfilled] == ["(${ARGS[@]})"]


SUBSETS = """
[general]
shuffle_caption = true
validation_seed = 3
[[datasets]]
resolution = 512
[[datasets.subsets]]
image_dir = "images"
[[datasets]]
resolution = 768
[[datasets.subsets]]
image_dir = "images"
"""


@pytest.mark.parametrize("option", ["--dataset", "--dataset_config", ""])
def test_subsets_become_data_sets_however_their_file_is_named(option: str, project: Path) -> None:
    _written("subsets.toml", SUBSETS)
    text = KOHYA["low_memory.toml"] if option else KOHYA["low_memory.toml"] + '\ndataset_config = "subsets.toml"\n'
    code, _ = imported("low.toml", text, *([option, "subsets.toml"] if option else []))
    config = load_config("run.toml")
    assert code == 0 and [dataset.resolution[0] for dataset in config.datasets] == [512, 768]
    assert config.datasets[1].cache_directory == Path("images/cache_2") and config.cache.text_variants == 8


def test_kinds_of_layers_of_sd_scripts_are_paths_here(project: Path) -> None:
    text = KOHYA["low_memory.toml"].replace("train_blocks=all", 'train_blocks=single", "img_mod_dim=0", "single_dim=4')
    found = read_foreign(_written("low.toml", text)).document["adapter"]
    assert found["only"] == [r"single_blocks\..*"] and found["exclude"] == [r".*\.img_mod\..*"]
    assert found["rank_patterns"] == {r"single_blocks\.\d+\.linear[12]": 4}
