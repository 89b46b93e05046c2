"""How soon a run on very many cached items begins, and in how much memory.

    python benchmarks/large_set.py FOLDER --items 1000000

writes caches of a data set without pictures into FOLDER unless they are there (latents of 16 x 16 cells, short texts), then starts a run of two updates on
them with a small model, twice: the first start learns what the files hold, the second one is measured.
"""

import argparse
import json
import os
import struct
import subprocess
import sys
import time
from pathlib import Path

import tomli_w

REPOSITORY = Path(__file__).parent.parent
CELLS = 2
SIDE = 16 * CELLS // 2


def safetensors(tensors: dict[str, tuple[str, list[int], bytes]], fingerprint: dict[str, object]) -> bytes:
    """A file of tensors, by key: dtype, shape and bytes."""
    header: dict[str, object] = {"__metadata__": {"fingerprint": json.dumps(fingerprint)}}
    end, data = 0, b""
    for key, (dtype, shape, raw) in tensors.items():
        header[key] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + len(raw)]}
        end, data = end + len(raw), data + raw
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + data


def write_caches(folder: Path, items: int) -> None:
    """Latents and texts of so many items, in one folder."""
    folder.mkdir(parents=True, exist_ok=True)
    made = sum(1 for _ in os.scandir(folder)) // 2
    latents = {f"latents_1x{CELLS}x{CELLS}_float32": ("F32", [16, CELLS, CELLS], bytes(64 * CELLS * CELLS))}
    text = {
        "t5_vec_bfloat16": ("BF16", [4, 16], bytes(2 * 4 * 16)),
        "t5_mask": ("BOOL", [4], b"\1" * 4),
        "clip_l_pooler_bfloat16": ("BF16", [16], bytes(2 * 16)),
    }
    shared = {"format": "1.0.1", "architecture": "tinyflux"}
    for number in range(made, items):
        name = f"{number:07d}"
        own = {
            **shared,
            "item": name,
            "bucket": [SIDE, SIDE],
            "resized": [SIDE, SIDE],
            "crop": [0, 0],
            "image": {"sha256": f"{number:064x}"},
        }
        (folder / f"{name}_{SIDE:04d}x{SIDE:04d}_tf.safetensors").write_bytes(safetensors(latents, own))
        own = {**shared, "item": name, "caption": f"picture number {number}"}
        (folder / f"{name}_tf_te.safetensors").write_bytes(safetensors(text, own))


def run_file(folder: Path) -> Path:
    """A small model on these caches."""
    tables = {
        "run": {"name": "large", "output_dir": str(folder / "out"), "device": "cpu", "threads": 1},
        "model": {
            "arch": "tf", "init": "scratch", "t5_max_tokens": 4,
            "geometry": {"hidden_size": 64, "num_attention_heads": 2, "attention_head_dim": 32, "num_double_layers": 1,
                         "num_single_layers": 1, "joint_attention_dim": 16, "pooled_projection_dim": 16, "axes_dims_rope": [8, 12, 12]},
        },
        "experts": {"enable_lune": False, "enable_sol": False},
        "train": {"max_steps": 2, "mixed_precision": "no"},
        "scheduler": {"warmup_steps": 0},
        "ema": {"warmup": True},
        "general": {"batch_size": 8},
        "datasets": [{"precached": True, "cache_directory": str(folder / "cache")}],
    }  # fmt: skip
    path = folder / "run.toml"
    path.write_text(tomli_w.dumps(tables), encoding="utf-8")
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--items", type=int, default=1_000_000)
    parser.add_argument("--starts", type=int, default=2)
    options = parser.parse_args()
    folder = options.folder.absolute()
    write_caches(folder / "cache", options.items)
    path = run_file(folder)
    for number in range(options.starts):
        begun, log = time.monotonic(), folder / "log"
        with log.open("wb") as out:
            run = subprocess.Popen([sys.executable, REPOSITORY / "train.py", path, "--fresh"], stdout=out, stderr=out)
            _, status, used = os.wait4(run.pid, 0)
        assert status == 0, log.read_text(encoding="utf-8")[-2000:]
        print(
            f"start {number + 1}: {options.items:,} items, {time.monotonic() - begun:.1f} s with two updates, "
            f"{used.ru_utime + used.ru_stime:.1f} s of CPU, at most {used.ru_maxrss / 2**20:.2f} GiB resident"
        )


if __name__ == "__main__":
    main()
