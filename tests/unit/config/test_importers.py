"""Option files of musubi-tuner: every key ends in exactly one list, and nothing is ignored."""

import tomllib
from pathlib import Path
from typing import Any

import pytest
import tomli_w
import torch
from safetensors.torch import save_file

from musubi_tuner.config import RunConfig, load_config
from musubi_tuner.config.__main__ import main
from musubi_tuner.config.importers import Imported, import_options, recognise
from musubi_tuner.config.write import resolved_toml
from musubi_tuner.errors import ConfigError

EXAMPLE = """
[train]
architecture = "fd"
dit = "models/flux1-dev.safetensors"
vae = "models/ae.safetensors"
text_encoder = "models/clip_l.safetensors"
text_encoder2 = "models/t5xxl_fp8_e4m3fn_scaled.safetensors"
dataset_config = "toml/data.toml"
output_dir = "data/output/example"
output_name = "flux_lora"
network_module = "networks.lora_flux"
network_dim = 16
network_alpha = 16
learning_rate = 8e-5
optimizer_type = "adamw8bit"
lr_scheduler = "constant"
max_train_epochs = 16
save_every_n_epochs = 1
mixed_precision = "bf16"
sdpa = true
gradient_checkpointing = true
fp8_base = true
fp8_scaled = true
fp8_t5 = true
blocks_to_swap = 25
timestep_sampling = "flux_shift"
weighting_scheme = "none"
guidance_scale = 1.0
ip_noise_gamma = 0.2
ip_noise_gamma_random_strength = false
seed = 42

[accelerate]
num_processes = 1
num_cpu_threads_per_process = 1

[cache]
run = "auto"
skip_existing = true
batch_size = 16
"""


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the files that the example names."""
    for name in ("flux1-dev", "ae", "clip_l", "t5xxl_fp8_e4m3fn_scaled"):
        path = tmp_path / "models" / f"{name}.safetensors"
        path.parent.mkdir(exist_ok=True)
        save_file({"x": torch.zeros(1)}, path)
    (tmp_path / "toml").mkdir()
    (tmp_path / "images").mkdir()
    (tmp_path / "toml" / "data.toml").write_text(
        '[general]\ncaption_extension = ".txt"\n[[datasets]]\nimage_directory = "images"\n'
    )
    monkeypatch.chdir(tmp_path)
    return tmp_path


def flat(**changes: Any) -> dict[str, Any]:
    """The example with changes; None leaves a key out."""
    return {key: value for key, value in {**tomllib.loads(EXAMPLE)["train"], **changes}.items() if value is not None}


def load(project: Path, **changes: Any) -> RunConfig:
    path = project / "flat.toml"
    path.write_text(tomli_w.dumps({"anything": flat(**changes)}))
    return load_config(path)


def problems(project: Path, **changes: Any) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load(project, **changes)
    return [line.strip() for line in str(caught.value).splitlines()[1:]]


def imported(document: dict[str, Any]) -> Imported:
    return import_options(document, Path)


def source_keys(document: dict[str, Any]) -> list[str]:
    keys = []
    for name, value in document.items():
        if isinstance(value, dict):
            keys += [f"{name}.{key}" if name in ("accelerate", "cache") else key for key in value]
        else:
            keys.append(name)
    return sorted(keys)


def test_example_is_the_run_it_says(project: Path) -> None:
    path = project / "flat.toml"
    path.write_text(EXAMPLE)
    config = load_config(path)
    assert config.cache.text_batch_size == 16 and config.run.threads == 1
    assert config.memory.base_storage == "fp8_scaled" and config.memory.blocks_to_swap == 25
    assert config.spec.code == "fd"
    assert config.adapter.type == "lora"
    assert (config.adapter.rank, config.adapter.alpha) == (16, 16.0)
    assert config.optimizer.type == "AdamW8bit" and config.optimizer.lr == 8e-5
    assert config.train.max_epochs == 16 and config.train.max_steps is None
    assert config.save.every_epochs == 1 and not config.save.every_steps
    assert config.objective.ip_noise_gamma == 0.2
    assert config.objective.timestep_sampling == "flux_shift"
    assert config.model.fp8_t5 and config.memory.gradient_checkpointing
    assert config.model.t5_path == "models/t5xxl_fp8_e4m3fn_scaled.safetensors"
    # What musubi-tuner assumes and we do not:
    assert config.objective.timestep_offset == 0.001
    assert config.save.keep_last_epochs == 0
    assert config.datasets[0].resolution == (960, 544) and not config.datasets[0].enable_bucket
    assert not [finding for finding in config.findings if finding.level == "warning"]
    notes = "\n".join(str(finding) for finding in config.findings)
    assert "optimizer_type: 'adamw8bit' -> optimizer.type = 'AdamW8bit' (renamed)" in notes
    assert not config.memory.swap_pinned and "memory.swap_pinned = False" in notes
    assert "objective.timestep_offset = 0.001" in notes and "sdpa: is not needed" in notes


def test_resolved_config_of_an_imported_run_is_the_same_run(project: Path) -> None:
    config = load(project)
    typed = project / "typed.toml"
    typed.write_text(resolved_toml(config))
    again = load_config(typed)
    assert again.model_dump(exclude={"dataset_config"}) == config.model_dump(exclude={"dataset_config"})
    assert again.datasets == config.datasets


def test_every_key_is_in_one_list() -> None:
    document = tomllib.loads(EXAMPLE)
    document["train"] |= {
        "huggingface_token": "hf_x", "wandb_api_key": "x", "metadata_title": "t", "metadata_reso": "512", "no_such_key": 1, "compile": False,
        "compile_backend": "inductor", "network_args": ["verbose=True"], "optimizer_args": ["weight_decay=0.1"],
        "save_last_n_steps": 30, "save_every_n_steps": 10, "save_last_n_steps_state": 30, "max_train_steps": 5,
        "lr_warmup_steps": 0.1, "num_timestep_buckets": 10, "log_with": "wandb", "logging_dir": "x", "save_precision": "bf16",
        "dynamo_backend": "NO", "script": "flux_dev_train_network.py", "persistent_data_loader_workers": True,
    }  # fmt: skip
    document["accelerate"]["mixed_precision"] = "bf16"
    document["accelerate"]["gpu"] = 1
    found = imported(document).report
    assert sorted(found.keys()) == source_keys(document)
    assert found.secrets_removed == ["huggingface_token", "wandb_api_key"]
    assert "hf_x" not in "\n".join(str(d) for d in found.diagnostics())


@pytest.mark.parametrize(
    ("changes", "key", "value"),
    [
        ({"learning_rate": "1e-4"}, "optimizer.lr", 1e-4),
        ({"optimizer_type": "AdamW"}, "optimizer.type", "AdamW"),
        ({"optimizer_args": ["weight_decay=0.1", "betas=0.9,0.95"]}, "optimizer.betas", [0.9, 0.95]),
        ({"network_args": ["exclude_patterns=[r'.*double_blocks.*']"]}, "adapter.exclude", [".*double_blocks.*"]),
        ({"network_args": ["loraplus_lr_ratio=4"]}, "adapter.loraplus_lr_ratio", 4.0),
        ({"network_dim": None}, "adapter.rank", 4),
        ({"network_alpha": None}, "adapter.alpha", 1.0),
        ({"mixed_precision": None}, "train.mixed_precision", "no"),
        ({"timestep_sampling": None}, "objective.timestep_sampling", "sigma"),
        ({"learning_rate": None}, "optimizer.lr", 2e-6),
        ({"max_train_epochs": None}, "train.max_steps", 1600),
        ({"max_train_epochs": None, "num_train_epochs": 3}, "train.max_steps", None),
        ({"max_train_epochs": None, "lr_warmup_steps": 0.1}, "scheduler.warmup_ratio", 0.1),
        ({"save_precision": "fp16"}, "save.dtype", "float16"),
        ({"lr_warmup_steps": "5%"}, "scheduler.warmup_ratio", 0.05),
        ({"lr_warmup_steps": "100"}, "scheduler.warmup_steps", 100),
        ({"lr_scheduler": "reduce_lr_on_plateau"}, "scheduler.type", "plateau"),
        ({"save_every_n_steps": 10, "save_last_n_steps": 30}, "save.keep_last_steps", 4),
        ({"save_every_n_steps": 10, "save_last_n_steps_state": 30}, "save.keep_last_states", 4),
        ({"save_last_n_epochs_state": 3}, "save.keep_last_states", 3),
        ({"huggingface_repo_id": "me/cats", "save_state_to_huggingface": True}, "hub.upload_state", True),
        ({"huggingface_repo_id": "me/cats", "huggingface_repo_visibility": "public"}, "hub.private", False),
        (
            {"save_every_n_steps": 10, "save_last_n_steps_state": 30, "save_last_n_epochs_state": 3},
            "save.keep_last_states",
            4,
        ),
        ({}, "save.keep_last_states", 0),
        ({"num_timestep_buckets": 10}, "objective.timestep_stratified", True),
        ({"discrete_flow_shift": 3, "timestep_sampling": "shift"}, "objective.discrete_flow_shift", 3.0),
        ({"min_timestep": 200}, "objective.min_timestep", 200),
        ({"scale_weight_norms": 1.0}, "adapter.max_norm", 1.0),
        ({"gradient_accumulation_steps": 4}, "train.grad_accum_steps", 4),
        ({"training_comment": "a cat"}, "save.comment", "a cat"),
        ({"architecture": None, "script": "flux_dev_train_network.py"}, "model.arch", "fd"),
        ({"architecture": None}, "model.arch", "fd"),
        ({"vae_dtype": "bf16"}, "model.vae_dtype", "bfloat16"),
        ({"fp8_scaled": None}, "memory.base_storage", "fp8"),
        ({"fp8_scaled": None, "fp8_base": None, "fp8_base_unet": True}, "memory.base_storage", "fp8"),
        ({"cpu_offload_checkpointing": True}, "memory.checkpoint_offload", True),
        ({"fp8_scaled": False, "fp8_base": False}, "memory.base_storage", "none"),
        ({"use_pinned_memory_for_block_swap": False}, "memory.swap_pinned", False),
        ({"block_swap_ring_size": 3}, "memory.swap_ring", 3),
    ],
    ids=str,
)
def test_values(changes: dict[str, Any], key: str, value: Any, project: Path) -> None:
    assert load(project, **changes).get(key) == value


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"timestep_smapling": "shift"}, "timestep_smapling: unknown key. Did you mean 'timestep_sampling'?"),
        ({"timestep_sampling": "flux_shfit"}, "objective.timestep_sampling: is 'flux_shfit', expected one of"),
        (
            {"optimizer_type": "sophia"},
            'optimizer_type: is "sophia", expected one of AdamW, AdamW8bit, PagedAdamW',
        ),
        (
            {"network_module": "networks.loha"},
            "network_module: networks.loha: is not supported; known: networks.lora_tinyflux",
        ),
        ({"network_args": ["rank_drop=0.1"]}, "network_args: rank_drop is not supported; known: exclude_patterns"),
        ({"network_args": ["foo"]}, "network_args: 'foo' is not of the form key=value"),
        ({"flash3": True}, 'flash3: is true, which is not supported; use memory.attention = "flash"'),
        ({"sage_attn": True}, "sage_attn: is true, which has no backward pass"),
        ({"dynamo_backend": "INDUCTOR"}, "dynamo_backend: is 'INDUCTOR'; use compile and compile_backend"),
        (
            {"optimizer_args": ["relative_step=False"]},
            "optimizer_args: relative_step is not supported; known: betas, weight_decay, eps",
        ),
        ({"deepspeed": True}, "deepspeed: is true, which is not supported: distributed.fsdp shards the model"),
        (
            {"fused_optimizer_groups": 4},
            "fused_optimizer_groups: is 4, which is written as optimizer.fused_backward",
        ),
        ({"full_fp16": True}, "full_fp16: is true, which is not supported: float16 weights lose small steps"),
        ({"log_with": "aim"}, 'log_with: is "aim", expected one of none, tensorboard, wandb, all'),
        ({"blocks_to_swap": 54}, "memory.blocks_to_swap: is 54, at most 53 of 19 double_blocks + 38 single_blocks"),
        ({"max_train_epochs": None, "max_train_steps": "10.5"}, "train.max_steps: is 10.5, expected a whole number"),
        ({"optimizer_type": ["adamw"]}, "optimizer_type: is ['adamw'], expected a text"),
        ({"learning_rate": "fast"}, "optimizer.lr: is 'fast', expected a number"),
        ({"text_encoder1": "models/ae.safetensors"}, "text_encoder1: models/ae.safetensors: is not a T5 file"),
    ],
    ids=str,
)
def test_refusals(changes: dict[str, Any], expected: str, project: Path) -> None:
    found = problems(project, **changes)
    assert any(line.startswith(expected) for line in found), found


def test_kernels_and_compilation_carry_over(project: Path) -> None:
    path = project / "flat.toml"
    options = {"flash_attn": True, "split_attn": True, "gradient_checkpointing_cpu_offload": True, "compile": True,
               "compile_mode": "max-autotune-no-cudagraphs", "compile_dynamic": True, "compile_cache_size_limit": 64,
               "mixed_precision": "bf16"}  # fmt: skip
    path.write_text(tomli_w.dumps(flat(**options)))
    memory = load_config(path, {}).memory
    assert (memory.attention, memory.checkpoint_offload, memory.compile) == ("flash", True, True)
    assert (memory.compile_mode, memory.compile_dynamic, memory.compile_limit) == (
        "max-autotune-no-cudagraphs",
        "true",
        64,
    )


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ([], {"relative_step": True, "scale_parameter": True}),
        (["relative_step=False", "scale_parameter=False"], {}),
        (["relative_step=False", "clip_threshold=2.0"], {"scale_parameter": True, "clip_threshold": 2.0}),
        (["relative_step=False", "warmup_init=True"], {"relative_step": True, "scale_parameter": True, "warmup_init": True}),
    ],
)  # fmt: skip
def test_adafactor_has_the_rate_that_it_has_there(given: list[str], expected: dict[str, Any], project: Path) -> None:
    path = project / "flat.toml"
    path.write_text(tomli_w.dumps(flat(optimizer_type="adafactor", optimizer_args=given)))
    assert load_config(path, {}).optimizer.args == expected


def test_arguments_of_optimizers_are_taken_over(project: Path) -> None:
    path = project / "flat.toml"
    args = ["d_coef=2", "betas=0.9,0.99", "safeguard_warmup=True", "decouple=True", "weight_decay=0.02"]
    path.write_text(tomli_w.dumps(flat(optimizer_type="prodigy", learning_rate=1.0, optimizer_args=args)))
    optimizer = load_config(path, {}).optimizer
    assert (optimizer.type, optimizer.lr, optimizer.betas, optimizer.weight_decay) == (
        "Prodigy",
        1.0,
        [0.9, 0.99],
        0.02,
    )
    assert optimizer.args == {"d_coef": 2, "safeguard_warmup": True, "decouple": True}


@pytest.mark.parametrize(
    ("module", "args", "expected"),
    [
        ("lycoris.kohya", ["algo=lokr", "factor=8", "decompose_both=True", "dropout=0.0"],
         {"type": "lokr", "lokr_factor": 8, "lokr_decompose_both": True}),
        ("lycoris.kohya", ["algo=locon", "dora_wd=True"], {"type": "dora"}),
        ("lycoris.kohya", ["algo=full"], {"type": "native"}),
        ("lycoris.kohya", ["algo=diag-oft", "constraint=0.1", "rescaled=True"], {"type": "diag-oft", "constraint": 0.1, "rescaled": True}),
        ("lycoris.kohya", ["algo=dylora", "block_size=4", "rs_lora=True"], {"type": "dylora", "block_size": 4, "rs_lora": True}),
        ("networks.lora_tinyflux", [], {"type": "lora"}),
        ("networks.lora_tinyflux", [f"block_dims={','.join(['4'] * 57)}"], {"block_rank": [4] * 57}),
    ],
)  # fmt: skip
def test_types_of_adapters_are_taken_over(
    module: str, args: list[str], expected: dict[str, Any], project: Path
) -> None:
    path = project / "flat.toml"
    path.write_text(tomli_w.dumps(flat(network_module=module, network_args=args)))
    adapter = load_config(path, {}).adapter
    assert {name: getattr(adapter, name) for name in expected} == expected


def test_half_weights_and_fused_steps_are_taken_over(project: Path) -> None:
    path = project / "flat.toml"
    half = {"full_bf16": True, "mixed_precision": "bf16", "optimizer_type": "prodigy", "fused_backward_pass": True}
    path.write_text(tomli_w.dumps(flat(**half)))
    train = load_config(path, {}).train
    assert (train.full_half, train.stochastic_rounding, train.max_grad_norm) == (True, False, 1.0)
    path.write_text(tomli_w.dumps(flat(**half | {"optimizer_type": "AdamW8bit"})))
    config = load_config(path, {})
    assert (config.train.stochastic_rounding, config.optimizer.fused_backward, config.train.max_grad_norm) == (
        True,
        True,
        0,
    )


def test_epochs_of_the_command_line_win_over_steps(project: Path) -> None:
    path = project / "flat.toml"
    path.write_text(tomli_w.dumps(flat(max_train_epochs=None, max_train_steps=100)))
    config = load_config(path, {"max_train_epochs": 50})
    assert (config.train.max_epochs, config.train.max_steps) == (50, None)


def test_precision_of_the_launcher_counts_where_the_file_is_silent(project: Path) -> None:
    path = project / "flat.toml"
    path.write_text(tomli_w.dumps({"a": flat(mixed_precision=None), "accelerate": {"mixed_precision": "bf16"}}))
    assert load_config(path).train.mixed_precision == "bf16"


def test_one_key_with_two_values(project: Path) -> None:
    path = project / "flat.toml"
    path.write_text(tomli_w.dumps({"a": flat(), "b": {"network_dim": 8}}))
    with pytest.raises(ConfigError, match="network_dim: is set twice, to 16 and 8; keep one"):
        load_config(path)


def test_first_encoder_of_kontext_is_t5_by_content(project: Path) -> None:
    save_file({"encoder.block.0.layer.0.SelfAttention.q.weight": torch.zeros(1)}, project / "models" / "t5.safetensors")
    changes = {
        "text_encoder1": "models/t5.safetensors",
        "text_encoder2": "models/clip_l.safetensors",
        "text_encoder": None,
    }
    config = load(project, **changes)
    assert config.model.t5_path == "models/t5.safetensors"
    assert config.model.clip_path == "models/clip_l.safetensors"


def test_command_line_wins_over_the_option_file(project: Path) -> None:
    path = project / "flat.toml"
    path.write_text(tomli_w.dumps(flat()))
    assert load_config(path, {"learning_rate": 1e-3}).optimizer.lr == 1e-3


@pytest.mark.parametrize(
    ("document", "tool"),
    [
        ({"train": {"dit": "x"}}, "musubi"),
        ({"network_module": "networks.lora_flux"}, "musubi"),
        ({"model": {}, "pretrained_model_name_or_path": "x", "network_module": "networks.lora"}, "kohya"),
        ({"x": 1}, None),
    ],
)
def test_tools_are_told_apart(document: dict[str, Any], tool: str | None) -> None:
    assert recognise(document) == tool


def test_command_writes_a_run_file(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (project / "flat.toml").write_text(tomli_w.dumps({"a": flat()}))
    assert main(["import", "flat.toml", "-o", "run.toml"]) == 0
    said = capsys.readouterr().out
    assert "carried    learning_rate -> optimizer.lr = 8e-05" in said
    assert "unless it sets them: resolution = [960, 544], enable_bucket = false" in said
    assert load_config(project / "run.toml").adapter.rank == 16
    assert main(["import", "flat.toml", "-o", "run.toml"]) == 2
    assert "exists already" in capsys.readouterr().err


@pytest.mark.parametrize(("architecture", "written"), [("tf", [("ema.warmup", False)]), ("fd", [])])
def test_an_average_is_warmed_up_only_where_the_option_file_says_so(
    architecture: str, written: list[tuple[str, bool]]
) -> None:
    imported = import_options({"train": flat(architecture=architecture, network_module=None)}, Path)
    assert [pair for pair in imported.report.defaulted if pair[0].startswith("ema.")] == written
    assert imported.document.get("ema", {}) == ({"warmup": False} if written else {})
