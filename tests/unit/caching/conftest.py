"""Real cache jobs in small: encoders made once per session, and projects with a few pictures that use them."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from musubi_tuner.caching.file_format import KINDS
from musubi_tuner.caching.job import JobOptions
from musubi_tuner.config import RunConfig, load_config
from musubi_tuner.data.item import Item
from musubi_tuner.data.sources import scan
from musubi_tuner.headers import read_header

WORDS = ["a", "blue", "circle", "green", "red", "square", "triangle"]


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Networks this small only lose by sharing out their work."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def hash_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where hashes of large files are remembered in this test."""
    monkeypatch.setenv("MUSUBI_CACHE_HOME", str(tmp_path / "user"))
    return tmp_path / "user" / "hashes"


@pytest.fixture(scope="session")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with ``vae``, ``t5``, ``clip``, ``unet`` and ``expert_vae`` in the layouts of real ones."""
    from diffusers import UNet2DConditionModel
    from safetensors.torch import save_file
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    from musubi_tuner.demo.prepare import word_tokenizer
    from musubi_tuner.encoders.linear_patch import LinearPatchAutoencoder, LinearPatchConfig

    root = tmp_path_factory.mktemp("encoders")
    torch.manual_seed(0)
    for name, channels in (("vae", 16), ("expert_vae", 4)):
        autoencoder = LinearPatchAutoencoder(LinearPatchConfig(latent_channels=channels))
        (root / name).mkdir()
        (root / name / "config.json").write_text(json.dumps(autoencoder.config.to_dict()))
        save_file(autoencoder.state_dict(), root / name / "diffusion_pytorch_model.safetensors")
    tokenizer = word_tokenizer(WORDS, None, "</s>", "<pad>", 8)
    T5EncoderModel(
        T5Config(vocab_size=len(tokenizer), d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    ).save_pretrained(root / "t5")
    tokenizer.save_pretrained(root / "t5")
    tokenizer = word_tokenizer(WORDS, "<|startoftext|>", "<|endoftext|>", "<|endoftext|>", 10)
    clip = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, projection_dim=16, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=10, eos_token_id=0, bos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    CLIPTextModel(clip).save_pretrained(root / "clip")
    tokenizer.save_pretrained(root / "clip")
    UNet2DConditionModel.from_config(
        {
            "sample_size": 8,
            "in_channels": 4,
            "out_channels": 4,
            "layers_per_block": 1,
            "block_out_channels": [8, 16],
            "norm_num_groups": 4,
            "cross_attention_dim": 16,
            "attention_head_dim": 2,
            "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
            "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
        }
    ).save_pretrained(root / "unet")
    return root


RUN = {
    "run": {"name": "t", "output_dir": "out", "device": "cpu"},
    "model": {"arch": "tf", "init": "scratch", "t5_max_tokens": 8},
    "experts": {"resolution": 64, "time_buckets": 3, "seed": 7, "expert_input": "noised_image"},
    "scheduler": {"warmup_steps": 0},
    "train": {"max_steps": 10},
    "general": {"resolution": 64, "enable_bucket": True, "batch_size": 2},
}


class Project:
    """A folder with pictures, captions and a run file."""

    def __init__(self, root: Path, encoders: Path) -> None:
        self.root = root
        paths = {
            "model": {"vae_path": "vae", "t5_path": "t5", "clip_path": "clip"},
            "experts": {"unet": "unet", "vae": "expert_vae"},
        }
        self.tables: dict[str, Any] = {name: dict(table) for name, table in RUN.items()}
        for table, entries in paths.items():
            self.tables[table] |= {key: str(encoders / name) for key, name in entries.items()}
        self.tables["cache"] = {}
        self.tables["datasets"] = [{"image_directory": "images", "cache_directory": "cache"}]
        (root / "images").mkdir()

    def picture(self, name: str, size: tuple[int, int] = (64, 64), caption: str = "a red circle") -> Path:
        """Write a picture of noise that depends on its name, with its caption."""
        path = self.root / "images" / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        seed = list(name.encode())
        pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
        path.with_suffix(".txt").write_text(caption)
        return path

    def config(self, **tables: dict[str, Any]) -> RunConfig:
        """The run file with keys replaced in the named tables, loaded."""
        import tomli_w

        document = dict(self.tables)
        for name, entries in tables.items():
            document[name] = document.get(name, {}) | entries
        path = self.root / "run.toml"
        path.write_text(tomli_w.dumps({"schema_version": 1} | document))
        return load_config(path)

    def items(self, config: RunConfig | None = None) -> list[Item]:
        return scan((config or self.config()).datasets, "tf").items

    def run(self, kind: str, config: RunConfig | None = None, **options: Any) -> int:
        """Run a real cache job and return its exit code."""
        from musubi_tuner.caching.jobs import run_jobs

        config = config or self.config()
        family = config.spec.family.checkpoint_options(config)
        return run_jobs(config, kind, JobOptions(**options), family)

    def files(self) -> dict[str, tuple[dict[str, str], dict[str, tuple[Any, ...]]]]:
        """All cache files by path below the cache folder: metadata, and dtype, shape and bytes of every tensor.

        The library writes metadata in random order, so the bytes of whole files are no measure.
        """
        root, found = self.root / "cache", {}
        for path in sorted(root.rglob("[!.]*.safetensors")):
            header, raw = read_header(path), path.read_bytes()
            tensors = {
                key: (entry.dtype, entry.shape, raw[entry.start : entry.end]) for key, entry in header.tensors.items()
            }
            found[path.relative_to(root).as_posix()] = (header.metadata, tensors)
        return found


@pytest.fixture
def project(tmp_path: Path, encoders: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    """An empty project, which is the working directory."""
    root = tmp_path / "project"
    root.mkdir()
    monkeypatch.chdir(root)
    return Project(root, encoders)


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory, encoders: Path) -> Path:
    """Pictures and caches of a project of two items whose jobs are done."""
    root = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        project = Project(root, encoders)
        project.picture("a")
        project.picture("b", (128, 64), caption="a blue square")
        for kind in KINDS:
            assert project.run(kind) == 0
    return root


@pytest.fixture
def cached(project: Project, finished: Path) -> Project:
    """A project of two items whose latents, text and experts are cached; a copy keeps contents and times."""
    for name in ("images", "cache"):
        shutil.copytree(finished / name, project.root / name, dirs_exist_ok=True)
    return project


@pytest.fixture
def summary(capsys: pytest.CaptureFixture[str]) -> Callable[[], list[str]]:
    """Lines printed to standard output since the last call."""
    return lambda: capsys.readouterr().out.splitlines()


@pytest.fixture(scope="session")
def project_class() -> type[Project]:
    """For fixtures of a module, which make one of their own."""
    return Project
