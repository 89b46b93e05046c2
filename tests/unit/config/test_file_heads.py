"""What is no weight file is found by its first bytes; the model of another family by the names in its header."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from musubi_tuner.config.file_heads import head_problem


def safetensors(path: Path, *names: str, cut: int = 0) -> Path:
    header = json.dumps({name: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} for name in names}).encode()
    path.write_bytes((len(header) + cut).to_bytes(8, "little") + header + b"\0" * 4)
    return path


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "is a Git LFS pointer"),
        (b"\n<!DOCTYPE HTML><html>", "is a web page"),
        (b"GGUF\x03", "is a GGUF file"),
        (b"PK\x03\x04archive", "is a torch pickle with the extension .safetensors"),
        (b"", None),
    ],
)
def test_files_that_are_no_weights(content: bytes, expected: str | None, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)
    found = head_problem(path)
    assert found is None if expected is None else found is not None and found.startswith(expected)


def test_a_file_that_was_cut_off(tmp_path: Path) -> None:
    found = head_problem(safetensors(tmp_path / "a.safetensors", "x", cut=1000))
    assert found is not None and found.startswith("is a truncated safetensors file")


@pytest.mark.parametrize(
    ("name", "arch", "expected"),
    [
        ("double_blocks.0.attn.txt_qkv.weight", "fd", "holds TinyFlux-Deep, but model.arch is"),
        ("double_blocks.0.attn.txt_qkv.weight", "tf", None),
        ("model.diffusion_model.double_blocks.0.img_mod.lin.weight", "tf", "holds FLUX.1-dev, but model.arch is"),
        ("double_blocks.0.img_mod.lin.weight", "fd", None),
        ("model.diffusion_model.input_blocks.0.0.weight", "fd", "holds a U-Net of Stable Diffusion"),
        ("anything", "fd", None),
    ],
)
def test_models_are_told_apart(name: str, arch: str, expected: str | None, tmp_path: Path) -> None:
    found = head_problem(safetensors(tmp_path / "a.safetensors", name), arch)
    assert found is None if expected is None else found is not None and found.startswith(expected)


def test_a_checkpoint_of_the_other_family_is_refused_in_a_run_file(
    problems: Callable[..., list[str]], project: Path
) -> None:
    safetensors(project / "model.safetensors", "single_blocks.0.attn.qkv.weight")
    found = problems(model='arch = "fd"', without=("experts.unet",))
    assert found == [
        'model.path: model.safetensors: holds TinyFlux-Deep, but model.arch is "fd"; write arch = "tf", or name another file'
    ]
