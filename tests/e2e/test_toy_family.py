"""A new family is one folder and one registry line, and no shared module knows a family by name."""

import ast
import re
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from project import (
    REPOSITORY,
    ForkServer,
    Result,
    altered_package,
    copy_tree,
    differing,
    final_files,
    metrics,
    run_tables,
)
from safetensors.torch import load_file

SOURCE = REPOSITORY / "src" / "musubi_tuner"
SHARED = ("config", "data", "caching", "flow", "adapters", "memory", "training")
NAMES = re.compile(r"tiny_?flux|flux_?dev|flux_?flow|\bflux\b|\bFlux\b|\b(tf|fd|ff)\b", re.IGNORECASE)
ALGORITHMS = {"flux_shift", "flux2_shift", "flux_unshift", "qinglong_flux"}
"""Published names of functions and modes, which every family may use."""
OWN_NAMES = ("musubi-tinyflux", "toml/tinyflux.toml", "toml/tinyflux_dataset.toml")
"""The distribution's name, and run files that messages point at."""


def with_toy(root: Path) -> Path:
    """The package with the toy family in it, for PYTHONPATH."""
    head = "FAMILIES: dict[str, str] = {\n"
    line = '    "ty": "musubi_tuner.models.toy.options:SPEC",\n'
    altered_package(root, "models/registry.py", head, head + line)
    copy_tree(Path(__file__).with_name("toy_family"), root / "musubi_tuner" / "models" / "toy")
    return root


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_toy(tmp_path_factory.mktemp("with_toy"))


@pytest.fixture(scope="module")
def toy(package: Path, workshop: Path, home: Path) -> Iterator[ForkServer]:
    """Starts commands of that package."""
    server = ForkServer(workshop / "toy", home, PYTHONPATH=str(package))
    yield server
    server.close()


def test_the_trainer_trains_a_family_it_has_never_seen(
    toy: ForkServer, photographs: Path, encoders: Path, tmp_path: Path
) -> None:
    import tomli_w

    tables = run_tables(tmp_path, photographs, encoders)
    for name in ("experts", "objective"):
        del tables[name]
    del tables["cache"]["experts_batch_size"]
    model = {key: tables["model"][key] for key in ("vae_path", "clip_path", "t5_path", "t5_max_tokens")}
    tables["model"] = {"arch": "toy", "init": "scratch", "geometry": {"width": 16}, **model}
    tables["sample"] = {"prompts": ["a cat"], "every_steps": 20, "steps": 2}
    run = tmp_path / "run.toml"
    run.write_text(tomli_w.dumps(tables), encoding="utf-8")
    toy.run("train", [run], tmp_path).expect(0)
    rows = metrics(tmp_path / "out")
    assert len(rows) == 20
    assert sum(row["loss/main"] for row in rows[-5:]) < sum(row["loss/main"] for row in rows[:5])
    assert (tmp_path / "out" / "sample" / "samples_step_20.png").is_file()
    assert {path.name.rpartition("_ty")[2] for path in (tmp_path / "cache").glob("*.safetensors")} == {
        ".safetensors",
        "_te.safetensors",
    }

    # A LoRA on what was just trained.
    tables["model"] = {"arch": "ty", "path": str(tmp_path / "out" / "release"), **model}
    tables["run"] = {**tables["run"], "output_dir": str(tmp_path / "lora")}
    tables["adapter"] = {"type": "lora", "rank": 2}
    run.write_text(tomli_w.dumps(tables), encoding="utf-8")
    toy.run("train", [run], tmp_path).expect(0)
    assert "lora_unet_blocks_1_inner.lora_up.weight" in load_file(tmp_path / "lora" / "photos.safetensors")


def test_other_families_are_still_there(package: Path, python: Callable[..., Result]) -> None:
    code = "from musubi_tuner.models.registry import MODELS; print(*MODELS)"
    assert python("-c", code, PYTHONPATH=str(package)).expect(0).out.split() == ["ty", "tf", "fd", "ff"]


def words_of(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and text of every name and string of a module, without strings that stand alone: those are documentation."""
    alone = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in alone:
            yield node.lineno, node.value
        elif isinstance(node, ast.Name):
            yield node.lineno, node.id
        elif isinstance(node, ast.Attribute):
            yield node.lineno, node.attr
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.lineno, node.name
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.lineno, node.module


@pytest.mark.parametrize("folder", SHARED)
def test_shared_modules_name_no_family(folder: str) -> None:
    found = []
    for path in sorted((SOURCE / folder).rglob("*.py")):
        for line, text in words_of(ast.parse(path.read_text(encoding="utf-8"))):
            for name in (*OWN_NAMES, *ALGORITHMS):
                text = text.replace(name, "")
            if NAMES.search(text):
                found.append(f"{path.name}:{line}: {text!r}")
    assert found == []


def test_the_search_finds_names() -> None:
    tree = ast.parse('from musubi_tuner.models.tinyflux import x\nif code == "fd":\n    Flux()\n"""tf"""\nflux_shift()')
    found = [text for _, text in words_of(tree) if NAMES.search(text)]
    assert found == ["musubi_tuner.models.tinyflux", "fd", "Flux"]


def gan_run(root: Path, photographs: Path, **changes: dict[str, Any]) -> Path:
    """A run file of the second task of the toy family: a GAN on live pictures."""
    import tomli_w

    tables: dict[str, Any] = {
        "schema_version": 1,
        "run": {"name": "photos", "output_dir": str(root / "out"), "seed": 7, "threads": 1, "device": "cpu"},
        "model": {"arch": "toy", "init": "scratch", "geometry": {"width": 6, "gan": True}},
        "general": {"resolution": 64, "batch_size": 1},
        "datasets": [{"image_directory": str(photographs), "cache_directory": str(root / "cache")}],
        "train": {"max_steps": 6, "mixed_precision": "no", "grad_accum_steps": 2},
        "optimizer": {"lr": 1e-2},
        "scheduler": {"type": "constant", "warmup_steps": 0},
        "ema": {"decay": 0.5},
        "save": {"every_steps": 2, "every_epochs": 0, "release": False},
        "log": {"every_steps": 1, "tensorboard": False},
    }
    for table, values in changes.items():
        tables[table] = {**tables.get(table, {}), **values}
    root.mkdir(parents=True)
    path = root / "run.toml"
    path.write_text(tomli_w.dumps(tables), encoding="utf-8")
    return path


def test_a_task_of_two_roles_trains_and_goes_on_after_a_kill_between_its_phases(
    toy: ForkServer, photographs: Path, tmp_path: Path
) -> None:
    """And two processes train what one trains with twice the accumulation."""
    own = {"optimizer": {"lr": 5e-3}, "ema": {"enabled": False}, "max_grad_norm": 0.5}
    roles = {"discriminator": own}
    whole = gan_run(tmp_path / "whole", photographs, roles=roles)
    toy.run("train", [whole], tmp_path).expect(0)
    rows = metrics(whole.parent / "out")
    assert rows[-1]["loss/recon"] < rows[0]["loss/recon"]
    assert {"train/lr_vae", "train/lr_discriminator", "train/grad_norm_vae"} <= set(rows[0])
    assert not (whole.parent / "cache").exists()

    assert (rows[0]["train/lr_vae"], rows[0]["train/lr_discriminator"]) == (1e-2, 5e-3)
    resolved = tomllib.loads((whole.parent / "out" / "photos.config.toml").read_text(encoding="utf-8"))
    assert resolved["roles"] == {"freeze": [], "discriminator": own} and "objective" not in resolved
    killed = gan_run(tmp_path / "killed", photographs, roles=roles)
    toy.run("train", [killed], tmp_path, MUSUBI_FAULT="train.phase:4").expect(-9)
    again = toy.run("train", [killed], tmp_path).expect(0)
    assert "continuing from photos-step00000002-state: step 2 of 6" in again.out
    assert differing(final_files(killed.parent / "out"), final_files(whole.parent / "out")) == []

    changed = toy.run("train", [killed, "--set", "roles.vae.optimizer.lr=0.1"], tmp_path)
    assert "roles.vae.optimizer.lr was 0.01, now 0.1" in changed.expect(2).err

    two = gan_run(
        tmp_path / "two", photographs, roles=roles, train={"grad_accum_steps": 1}, distributed={"num_processes": 2}
    )
    toy.run("train", [two], tmp_path).expect(0)
    ours, theirs = (load_file(path.parent / "out" / "photos.safetensors") for path in (two, whole))
    assert ours.keys() == theirs.keys()
    for key, tensor in theirs.items():
        assert (ours[key] - tensor).abs().max() <= 1e-5, key


def test_settings_of_roles_are_checked_like_those_of_the_run(
    toy: ForkServer, photographs: Path, tmp_path: Path
) -> None:
    def refused(*words: str, **roles: Any) -> str:
        path = gan_run(
            tmp_path / str(len(list(tmp_path.iterdir()))), photographs, roles=roles, validation={"split": 0.2}
        )
        return toy.run("train", [path, "--plan", *words], tmp_path).expect(2).err

    text = refused(vae={"lr": 1.0, "optimizer": 3}, discriminator={"max_grad_norm": -1.0})
    assert "roles.vae.lr: unknown key. It is written [roles.vae.optimizer] lr." in text
    assert "roles.vae.optimizer: is 3, expected table" in text
    assert "roles.discriminator.max_grad_norm: is -1.0, expected" in text
    text = refused(vae={"optimizer": {"lrr": 1.0, "lr": "x"}}, discriminator={"ema": {"decay": 2.0}})
    assert "roles.vae.optimizer.lrr: unknown key. Did you mean 'lr'?" in text
    assert "roles.vae.optimizer.lr: is 'x', expected a number" in text
    assert "roles.discriminator.ema.decay: is 2.0, expected" in text
    words = ["roles.vae.scheduler.min_lr=0.5", "roles.discriminator.max_grad_norm=0", "scheduler.type=cosine"]
    text = refused(*(word for each in words for word in ("--set", each)), vae={"ema": {"init": "checkpoint"}})
    assert "roles.vae.scheduler.min_lr: is 0.5, above optimizer.lr = 0.01" in text
    assert 'roles.vae.ema.init: is "checkpoint", but model.init is "scratch"' in text
    assert "validation.split: applies to denoisers" in text and "max_grad_norm" not in text
    words = [
        "general.random_crop=true",
        "general.shuffle_caption=true",
        "general.is_reg=true",
        "train.prior_loss_weight=0.5",
    ]
    text = refused(*(word for each in words for word in ("--set", each)))
    assert "general.random_crop: changes pictures at random" in text
    assert "general.shuffle_caption: changes captions at random" in text
    assert "general.is_reg: applies to denoisers" in text and "train.prior_loss_weight: applies to denoisers" in text
    assert "roles.freeze: names all roles" in refused(freeze=["vae", "discriminator"])
    assert "roles.freeze" in refused(freeze=["critic"])
    assert "cannot be absent for a role" in refused("--set", "roles.vae.scheduler.total_steps=none")


def test_the_document_quotes_the_family_that_is_tested_and_a_record_of_an_optimizer() -> None:
    text = (REPOSITORY / "docs" / "extending.md").read_text(encoding="utf-8")
    quoted = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    paths = [
        *Path(__file__).with_name("toy_family").glob("*.py"),
        REPOSITORY / "src" / "musubi_tuner" / "optimizers.py",
    ]
    files = [path.read_text(encoding="utf-8") for path in paths]
    assert len(quoted) == 11
    assert [block for block in quoted if not any(block in file for file in files)] == []
