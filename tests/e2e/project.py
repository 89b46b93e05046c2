"""A small but complete project: real photographs, encoders of the real topologies at tiny width, and run files.

Everything is made in seconds and needs no network: the photographs ship inside scikit-image, the encoders have random
weights and are saved as single files with their config beside them, as they come from the hub.
"""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tomli_w
import torch
from PIL import Image
from safetensors.torch import save_file

REPOSITORY = Path(__file__).resolve().parents[2]
CAPTIONS = {
    "astronaut": "a woman in an orange space suit in front of a flag",
    "camera": "a man with a camera on a tripod, black and white",
    "coffee": "a cup of coffee with a spoon on a wooden table",
    "chelsea": "the face of a tabby cat with green eyes",
    "moon": "craters on the grey moon",
    "rocket": "a rocket on its launch pad at night",
    "coins": "rows of old coins on a dark ground",
    "stamp": "a small picture of a cup",
    "galaxies": "many galaxies in the black sky",
}
"""Nine photographs; 1:1, 3:2 and 2:3 are among them."""
WIDTH = 32
"""Of both text encoders and of the model."""
TEACHER_WIDTH = 16
"""Of the middle of the teachers' U-Net."""
GEOMETRY = {
    "hidden_size": WIDTH,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "joint_attention_dim": WIDTH,
    "pooled_projection_dim": WIDTH,
    "num_double_layers": 1,
    "num_single_layers": 1,
    "axes_dims_rope": [4, 6, 6],
    "lune_expert_dim": TEACHER_WIDTH,
    "lune_hidden_dim": 16,
    "sol_hidden_dim": 16,
}
ENDS = ((96, 160), (128, 128))
"""The photographs' smallest and largest bucket at 128 px."""
ORIENTATION = 0x0112


def make_photographs(folder: Path) -> Path:
    """Save the photographs with their captions: PNG and JPEG, grey, with alpha, turned by EXIF, and one to be enlarged."""
    import skimage.data

    folder.mkdir(parents=True)

    def image(name: str) -> Image.Image:
        return Image.fromarray(getattr(skimage.data, name)())

    image("astronaut").save(folder / "astronaut.png")
    assert image("camera").mode == "L"
    image("camera").save(folder / "camera.png")
    image("coffee").save(folder / "coffee.jpg", quality=92)
    cat = image("chelsea")
    ramp = np.linspace(0, 255, cat.width, dtype=np.uint8)[None].repeat(cat.height, axis=0)
    cat.putalpha(Image.fromarray(ramp))
    cat.save(folder / "chelsea.png")
    image("moon").convert("RGB").save(folder / "moon.webp", quality=90)
    turned = Image.Exif()
    turned[ORIENTATION] = 6
    image("rocket").save(folder / "rocket.jpg", quality=92, exif=turned)
    image("coins").save(folder / "coins.bmp")
    image("coffee").resize((100, 75)).save(folder / "stamp.png")
    image("hubble_deep_field").save(folder / "galaxies.jpg", quality=92)
    for name, caption in CAPTIONS.items():
        (folder / f"{name}.txt").write_text(caption + "\n", encoding="utf-8")
    return folder


def words() -> list[str]:
    """Vocabulary of the captions, without punctuation."""
    return sorted({word for caption in CAPTIONS.values() for word in caption.replace(",", " ,").split()})


def autoencoder(channels: int, **changes: Any) -> Any:
    """The four levels of FLUX's and SD1.5's autoencoder, narrow, with random weights."""
    from diffusers import AutoencoderKL

    torch.manual_seed(channels)
    return AutoencoderKL(
        **{
            "in_channels": 3,
            "out_channels": 3,
            "down_block_types": ["DownEncoderBlock2D"] * 4,
            "up_block_types": ["UpDecoderBlock2D"] * 4,
            "block_out_channels": [4, 8, 8, 8],
            "layers_per_block": 2,
            "latent_channels": channels,
            "norm_num_groups": 4,
            **changes,
        }
    ).eval()


def flux_autoencoder() -> Any:
    """16 channels, with the scale and shift of FLUX.1."""
    return autoencoder(16, scaling_factor=0.3611, shift_factor=0.1159, use_quant_conv=False, use_post_quant_conv=False)


def save_single(model: Any, path: Path, prefix: str = "", leave_out: Sequence[str] = ()) -> None:
    """One safetensors file with the config as json beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {prefix + key: t.contiguous() for key, t in model.state_dict().items() if key not in leave_out}
    save_file(tensors, path)
    if hasattr(model, "save_config"):
        model.save_config(path.parent)
        (path.parent / "config.json").rename(path.with_suffix(".json"))
    else:
        path.with_suffix(".json").write_text(json.dumps(model.config.to_dict()), encoding="utf-8")


def make_encoders(folder: Path) -> Path:
    """Autoencoder, CLIP, T5, teacher U-Net with two overlays, teacher autoencoder."""
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    from musubi_tuner.demo.prepare import word_tokenizer

    save_single(flux_autoencoder(), folder / "ae.safetensors")
    save_single(autoencoder(4, scaling_factor=0.18215), folder / "sd_vae.safetensors")

    torch.manual_seed(1)
    # Like CLIP-L's own: padded with the end-of-text token, pooled at the first of them.
    tokenizer = word_tokenizer(words(), "<|startoftext|>", "<|endoftext|>", "<|endoftext|>", 77)
    clip = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer), hidden_size=WIDTH, intermediate_size=2 * WIDTH, projection_dim=WIDTH,
            num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=77,
            pad_token_id=tokenizer.pad_token_id, bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )  # fmt: skip
    published = "" if any(key.startswith("text_model.") for key in clip.state_dict()) else "text_model."
    save_single(clip, folder / "clip" / "clip_l.safetensors", prefix=published)
    tokenizer.save_pretrained(folder / "clip" / "tokenizer")

    torch.manual_seed(2)
    tokenizer = word_tokenizer(words(), None, "</s>", "<pad>", 128)
    t5 = T5EncoderModel(
        T5Config(
            vocab_size=len(tokenizer), d_model=WIDTH, d_kv=8, d_ff=2 * WIDTH, num_layers=2, num_heads=4,
            feed_forward_proj="gated-gelu", pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
        )
    )  # fmt: skip
    save_single(t5, folder / "t5" / "t5_base.safetensors", leave_out=("encoder.embed_tokens.weight",))
    tokenizer.save_pretrained(folder / "t5" / "tokenizer")

    torch.manual_seed(3)
    unet: Any = UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        layers_per_block=2,
        block_out_channels=(8, 8, TEACHER_WIDTH, TEACHER_WIDTH),
        norm_num_groups=4,
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        cross_attention_dim=WIDTH,
        attention_head_dim=2,
    )
    unet.save_pretrained(folder / "unet")
    for seed, name in enumerate(("lune", "sol")):
        save_overlay(folder / "unet", folder / f"{name}.safetensors", seed)
    return folder


def save_overlay(unet: Path, path: Path, seed: int) -> None:
    """A teacher: every weight of the U-Net moved a little."""
    from safetensors.torch import load_file

    generator = torch.Generator().manual_seed(seed)
    base = load_file(unet / "diffusion_pytorch_model.safetensors")
    save_file({key: t + 0.05 * torch.randn(t.shape, generator=generator) for key, t in base.items()}, path)


def run_tables(root: Path, images: Path, encoders: Path) -> dict[str, Any]:
    """A run file of a tiny TinyFlux, with output and caches below ``root``.

    One thread: a model of this size gains nothing from a second, and waits for it where the cores are busy.
    """
    return {
        "schema_version": 1,
        "run": {"name": "photos", "output_dir": str(root / "out"), "seed": 7, "threads": 1},
        "model": {
            "arch": "tf",
            "init": "scratch",
            "init_scheme": "adaln_zero",
            "vae_path": str(encoders / "ae.safetensors"),
            "clip_path": str(encoders / "clip" / "clip_l.safetensors"),
            "t5_path": str(encoders / "t5" / "t5_base.safetensors"),
            "t5_max_tokens": 24,
            "geometry": dict(GEOMETRY),
        },
        "experts": {
            "unet": str(encoders / "unet"),
            "vae": str(encoders / "sd_vae.safetensors"),
            "lune": str(encoders / "lune.safetensors"),
            "sol": str(encoders / "sol.safetensors"),
            "resolution": 192,
            "time_buckets": 4,
        },
        "cache": {"dtype": "float32", "latent_mode": "mean", "latents_batch_size": 2, "text_batch_size": 4,
                  "experts_batch_size": 2},
        "general": {"resolution": 128, "batch_size": 2},
        "datasets": [{"image_directory": str(images), "cache_directory": str(root / "cache")}],
        "objective": {"lune_warmup_steps": 5, "sol_warmup_steps": 5},
        "train": {"max_steps": 20, "mixed_precision": "no"},
        "optimizer": {"lr": 3e-3},
        "scheduler": {"warmup_steps": 2},
        "ema": {"decay": 0.9},
        "save": {"every_steps": 5, "every_epochs": 0, "keep_last_steps": 2},
        "log": {"every_steps": 1},
    }  # fmt: skip


def write_run(root: Path, images: Path, encoders: Path, file_name: str = "run.toml", **changes: Any) -> Path:
    """Write the run file into ``root`` and return it.

    Args:
        changes: by table; a value of None leaves the key out, a list or scalar replaces the whole table.
    """
    tables = run_tables(root, images, encoders)
    for table, values in changes.items():
        if isinstance(values, Mapping):
            merged = {**tables.get(table, {}), **values}
            tables[table] = {key: value for key, value in merged.items() if value is not None}
        else:
            tables[table] = values
    root.mkdir(parents=True, exist_ok=True)
    path = root / file_name
    path.write_text(tomli_w.dumps({key: value for key, value in tables.items() if value is not None}), encoding="utf-8")
    return path


def clean_environment(home: Path) -> dict[str, str]:
    """The environment of a user, without network and without what a test harness sets."""
    leave_out = ("OMP_NUM_THREADS", "MUSUBI_FAULT", "PYTEST_CURRENT_TEST", "WORLD_SIZE", "RANK", "LOCAL_RANK")
    kept = {key: value for key, value in os.environ.items() if key not in leave_out}
    return {**kept, "MUSUBI_CACHE_HOME": str(home), "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}


@dataclass
class Result:
    """What a command left: exit code (negative for a signal) and its output."""

    code: int
    out: str
    err: str
    passed: Sequence[str] = ()

    def expect(self, code: int) -> "Result":
        """Check the exit code, and that nothing ended in a traceback.

        Raises:
            AssertionError: with the whole output.
        """
        if self.code != code or "Traceback" in self.err:
            raise AssertionError(
                f"exit code {self.code}, expected {code}\n--- stdout\n{self.out}\n--- stderr\n{self.err}"
            )
        return self


def run_command(arguments: Sequence[str | Path], cwd: Path, home: Path, **environment: str) -> Result:
    """Run ``python arguments...`` as a user would."""
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=cwd,
        env={**clean_environment(home), **environment},
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=300,
    )
    return Result(done.returncode, done.stdout, done.stderr)


class ForkServer:
    """Client of fork_server.py: commands that start in a tenth of a second. See there for what it is and is not."""

    def __init__(self, folder: Path, home: Path, planned: Sequence[Path] = (), **environment: str) -> None:
        """Start the server.

        Args:
            planned: run files like those to come, see fork_server.py. environment: of all commands, too.
        """
        self.folder = folder
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / "server.log").open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, str(Path(__file__).with_name("fork_server.py")), str(self.folder), *map(str, planned)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                # Without GPUs, whose driver does not survive a fork. What runs on one is started with `run_command`.
                env={**clean_environment(home), "CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": "", **environment},
                text=True,
            )

    def start(self, command: str, arguments: Sequence[str | Path], cwd: Path, **environment: str) -> int:
        """Begin ``train``, ``generate``, ``latents``, ``text`` or ``experts`` and return its process id."""
        request = {
            "command": command,
            "arguments": [str(argument) for argument in arguments],
            "cwd": str(cwd),
            "environment": environment,
            "stdout": str(self.folder / "stdout"),
            "stderr": str(self.folder / "stderr"),
        }
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return int(self._answer("pid")["pid"])

    def finish(self) -> Result:
        """Wait for the command that was started."""
        answer = self._answer("code")
        out, err = ((self.folder / name).read_text(encoding="utf-8") for name in ("stdout", "stderr"))
        return Result(answer["code"], out, err, answer["passed"])

    def run(self, command: str, arguments: Sequence[str | Path], cwd: Path, **environment: str) -> Result:
        """Run a command to its end."""
        self.start(command, arguments, cwd, **environment)
        return self.finish()

    def _answer(self, key: str) -> dict[str, Any]:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            answer: dict[str, Any] = json.loads(line)
            if key in answer:
                return answer
        raise RuntimeError(f"the fork server ended: {(self.folder / 'server.log').read_text(encoding='utf-8')}")

    def close(self) -> None:
        """End the server; it ends when its input does."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.close()
        self.process.wait(timeout=60)
        self.process.stdout.close()


def stop_group(config: Path, server: ForkServer, number: signal.Signals, ready: Callable[[], bool]) -> Result:
    """Train, and signal the whole process group at some moment, as Ctrl-C in a terminal and service managers do.

    Args:
        config: of one process or of several, which the command starts. ready: whether the moment has come.

    Raises:
        AssertionError: if the moment does not come within two minutes. A run that does not end within two minutes after it is
            killed, which its exit code then says.
    """
    pid = server.start("train", [config], config.parent)

    def kill() -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)

    def finish() -> Result:
        limit = threading.Timer(120, kill)
        limit.start()
        try:
            return server.finish()
        finally:
            limit.cancel()

    try:
        end = time.monotonic() + 120
        while not ready():
            assert time.monotonic() < end, "the moment did not come"
            time.sleep(0.001)
    except BaseException:
        kill()
        finish()  # so that the server is ready for the next one
        raise
    os.killpg(pid, number)
    return finish()


def metrics(folder: Path) -> list[dict[str, Any]]:
    """Lines of updates in metrics.jsonl, without the wall clock."""
    return [row for row in all_lines(folder) if "loss/total" in row]


def all_lines(folder: Path) -> list[dict[str, Any]]:
    """Lines of metrics.jsonl, those of epochs and validations too, without the wall clock."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [{key: value for key, value in row.items() if key != "clock"} for row in rows]


Content = tuple[dict[str, Any], bytes]
"""Header of a safetensors file, and the bytes of its tensors."""


def content(path: Path) -> Content:
    """Everything in a safetensors file but the order of its metadata, which the library leaves to chance."""
    raw = path.read_bytes()
    begin = 8 + int.from_bytes(raw[:8], "little")
    return json.loads(raw[8:begin]), raw[begin:]


def final_files(folder: Path, name: str = "photos") -> dict[str, Content]:
    """What a finished run must reproduce: weights, average, and the tensors of the final state."""
    paths = [folder / f"{name}.safetensors", folder / f"{name}_ema.safetensors"]
    paths += [folder / f"{name}-state" / f"{part}.safetensors" for part in ("model", "ema", "optimizer")]
    return {path.relative_to(folder).as_posix(): content(path) for path in paths}


def cache_paths(folder: Path) -> list[Path]:
    """The complete cache files of a folder."""
    return [path for path in sorted(folder.glob("*.safetensors")) if not path.name.startswith(".")]


def cache_files(folder: Path) -> dict[str, Content]:
    """Content of the cache files of a folder, by name."""
    return {path.name: content(path) for path in cache_paths(folder)}


def differing(ours: Mapping[str, Any], expected: Mapping[str, Any]) -> list[str]:
    """Names whose content differs, or that only one side has."""
    return [name for name in sorted({*ours, *expected}) if ours.get(name, ()) != expected.get(name, ())]


def altered_package(root: Path, name: str, old: str, new: str) -> Path:
    """A copy of the package in which a piece of one file is another; for PYTHONPATH."""
    target = root / "musubi_tuner"
    shutil.copytree(REPOSITORY / "src" / "musubi_tuner", target, ignore=shutil.ignore_patterns("__pycache__"))
    text = (target / name).read_text(encoding="utf-8")
    assert text.count(old) == 1, f"{name} does not have this once: {old}"
    (target / name).write_text(text.replace(old, new), encoding="utf-8")
    return root


def copy_tree(source: Path, target: Path) -> Path:
    """Copy a folder with its modification times, which caches and indexes compare."""
    shutil.copytree(source, target)
    return target


TRAINING_POINTS = ("train.update", "state.model", "state.ema", "state.optimizer", "state.written", "state.renamed",
                   "checkpoint.listed", "file.written", "file.renamed")  # fmt: skip
"""Fault points that every run passes while it trains."""
SAVES = {"every_steps": 5, "every_epochs": 2, "keep_last_steps": 2, "keep_last_epochs": 1}
"""Checkpoints of both kinds, and older ones to delete."""
STAMPS = {"modelspec.date", "ss_config_sha256", "ss_session_id", "ss_training_started_at", "ss_training_finished_at"}
"""What the metadata of a LoRA say of the clock, and of the run's folder."""


def everything(folder: Path) -> dict[str, Any]:
    """What a run leaves, by path: tensors, updates and pictures with their content, other files as names; no logs."""

    def read(path: Path) -> Any:
        if path.suffix == ".safetensors":
            header, tensors = content(path)
            kept = {key: text for key, text in header.pop("__metadata__", {}).items() if key not in STAMPS}
            return header, kept, tensors
        if path.name == "metrics.jsonl":
            return all_lines(path.parent)
        return path.read_bytes() if path.suffix == ".png" else None

    paths = {path.relative_to(folder): path for path in folder.rglob("*") if path.is_file()}
    return {name.as_posix(): read(path) for name, path in paths.items() if name.parts[0] != "logs"}


@dataclass
class Place:
    """Where the runs of a test file are made, from photographs, encoders and caches that all files share."""

    folder: Path
    photographs: Path
    encoders: Path
    caches: Path
    server: ForkServer

    def write(self, name: str, **tables: Any) -> Path:
        """A run file with its caches in a new folder."""
        copy_tree(self.caches, self.folder / name / "cache")
        return write_run(self.folder / name, self.photographs, self.encoders, **tables)


class Rehearsal:
    """One run file that is trained undisturbed once, and then again with its plug pulled."""

    def __init__(self, server: ForkServer, write: Callable[..., Path]) -> None:
        """Train undisturbed.

        Args:
            write: a run file into a new folder of that name.
        """
        self.server, self.new = server, write
        self.reference = self.new("undisturbed")
        self.passed = self.start(self.reference).expect(0).passed
        self.files = everything(self.reference.parent / "out")
        assert not [name for name in self.files if ".tmp-" in name]

    def start(self, config: Path, **environment: str) -> Result:
        """The training command."""
        return self.server.run("train", [config], config.parent, **environment)

    def passes(self, point: str) -> int:
        """How often an undisturbed run passes a fault point."""
        assert point in self.passed, f"{point} is not passed; was it renamed?"
        return self.passed.count(point)

    def assert_equal(self, config: Path) -> None:
        """Compare a run with the undisturbed one, byte for byte; only the wall clock may differ."""
        different = differing(everything(config.parent / "out"), self.files)
        assert different == [], different


JOBS = ("latents", "text", "experts")
SAMPLED = {"latent_mode": "sample", "dtype": "auto"}
"""Every random draw that caching knows."""


class CacheRehearsal:
    """The three cache jobs, done undisturbed once, and then again with their plug pulled."""

    def __init__(self, folder: Path, server: ForkServer, photographs: Path, encoders: Path) -> None:
        self.folder, self.server = folder, server
        self.inputs = (photographs, encoders)
        config = self.new("undisturbed")
        for job in JOBS:
            server.run(job, [config], config.parent).expect(0)
        self.files = cache_files(config.parent / "cache")

    def new(self, name: str) -> Path:
        """A run file without caches in a new folder."""
        return write_run(self.folder / name, *self.inputs, cache=SAMPLED)

    def of_job(self, job: str) -> dict[str, Content]:
        """What an undisturbed job makes."""
        endings = {"text": "_tf_te.safetensors", "experts": "_tf_experts.safetensors", "latents": "_tf.safetensors"}
        return {name: file for name, file in self.files.items() if name.endswith(endings[job])}

    def interrupt(self, name: str, job: str, point: str) -> int:
        """Kill a job at a fault point, run it again, and compare what it made; returns how many files the first left."""
        config = self.new(name)
        cache, expected = config.parent / "cache", self.of_job(job)
        killed = self.server.run(job, [config], config.parent, MUSUBI_FAULT=point)
        killed.expect(-signal.SIGKILL)
        before = {path: path.stat().st_mtime_ns for path in cache_paths(cache)}
        again = self.server.run(job, [config], config.parent).expect(0)
        assert f"{job}: encoded {len(expected) - len(before)}, up to date {len(before)}, failed 0" in again.out
        assert differing(cache_files(cache), expected) == []
        assert {path: path.stat().st_mtime_ns for path in before} == before
        assert not list(cache.glob(".tmp-*")) + list(cache.glob(".*.half"))
        return len(before)


FLUX = {
    "in_channels": 64, "vec_in_dim": WIDTH, "context_in_dim": WIDTH, "hidden_size": 48, "mlp_ratio": 4.0, "num_heads": 3,
    "depth": 2, "depth_single_blocks": 3, "axes_dim": [4, 6, 6],
}  # fmt: skip
"""A FLUX.1 of 0.3 million parameters."""


def make_flux(path: Path, seed: int = 5, **changes: Any) -> Path:
    """A small FLUX.1 with random weights under the published names, with its config beside it."""
    from musubi_tuner.models.flux_dev import Flux, FluxConfig

    torch.manual_seed(seed)
    model = Flux(FluxConfig.from_dict({**FLUX, **changes}))
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({key: tensor.contiguous() for key, tensor in model.state_dict().items()}, path)
    path.with_suffix(".json").write_text(json.dumps(model.config.to_dict()), encoding="utf-8")
    return path


def flux_tables(root: Path, images: Path, encoders: Path, base: Path) -> dict[str, Any]:
    """A run file of a LoRA on a small FLUX.1, with output and caches below ``root``."""
    tables = run_tables(root, images, encoders)
    for name in ("experts", "ema"):
        del tables[name]
    del tables["cache"]["experts_batch_size"]
    model = {key: tables["model"][key] for key in ("vae_path", "clip_path", "t5_path", "t5_max_tokens")}
    return {
        **tables,
        "model": {"arch": "fd", "path": str(base), **model},
        "adapter": {"rank": 4, "alpha": 4.0},
        "objective": {},
        "scheduler": {"type": "constant", "warmup_steps": 2},
        "optimizer": {"lr": 1e-2},
    }


def write_flux_run(root: Path, images: Path, encoders: Path, base: Path, **changes: Any) -> Path:
    """Like `write_run`, for a LoRA on a small FLUX.1."""
    tables = flux_tables(root, images, encoders, base)
    for table, values in changes.items():
        merged = {**tables.get(table, {}), **values} if isinstance(values, Mapping) else values
        tables[table] = {k: v for k, v in merged.items() if v is not None} if isinstance(merged, dict) else merged
    root.mkdir(parents=True, exist_ok=True)
    path = root / "run.toml"
    path.write_text(tomli_w.dumps(tables), encoding="utf-8")
    return path
