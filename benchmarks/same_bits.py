"""Does this tree train the same bits as another commit? python benchmarks/same_bits.py REF [--case NAME ...] [--repeat N] [--updates N]

Small runs are trained by a checkout of REF and by this tree on this machine, from inputs that are made once; each side writes its own
caches and its own run file. Weights, averages, optimizer tensors, pictures and metrics (without the clock) must be equal, bit for
bit. Headers, times and digests of settings may differ. Prints the step time of this tree against REF's as well.

Exit code: 0 if nothing differs, 1 if something does, 2 for a wrong call.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.append(str(REPOSITORY / "tests" / "e2e"))

from project import clean_environment, make_encoders, make_flux, make_photographs, write_flux_run, write_run  # noqa: E402

RENAMED: dict[str, str] = {}
"""Keys ``table.key`` of this tree that have another name in REF."""


@dataclass
class Case:
    """A run: tables that differ from the small run of the tests, and how it is started."""

    family: str
    tables: dict[str, Any] = field(default_factory=dict)
    killed_at: int | None = None

    def lasting(self, updates: int | None) -> "Case":
        """The case with a run of so many updates, drawing and saving at its end only; None = as it is."""
        if updates is None:
            return self
        tables = {**self.tables, "train": {**self.tables["train"], "max_steps": updates}}
        late = {name: {**tables.get(name, {}), "every_steps": updates} for name in ("save", "sample") if name in tables}
        return replace(self, tables={**tables, "save": {"every_steps": updates}, **late})


TRAIN = {"max_steps": 12, "mixed_precision": "no"}
SAMPLE = {"prompts": ["a cup of coffee", "the grey moon"], "every_steps": 6, "steps": 4, "width": 64, "height": 96}
CASES = {
    "full": Case("tf", {
        "train": {**TRAIN, "grad_accum_steps": 2, "masked_loss": True},
        "ema": {"decay": 0.9},
        "sample": SAMPLE,
        "masks": True,
    }),
    "bf16": Case("tf", {"train": {**TRAIN, "mixed_precision": "bf16"}, "save": {"every_steps": 5, "dtype": "bfloat16"}}),
    "validation": Case("tf", {
        "train": TRAIN,
        "validation": {"split": 0.3, "every_steps": 4, "times": 3},
        "save": {"every_steps": 0, "every_epochs": 1},
    }),
    "two processes": Case("tf", {"train": {**TRAIN, "loader_workers": 1}, "distributed": {"num_processes": 2}}),
    "resumed": Case("tf", {"train": TRAIN, "sample": SAMPLE, "save": {"every_steps": 3}}, killed_at=8),
    "tf lora": Case("tf", {"train": TRAIN, "model": {"init": "checkpoint"}, "adapter": {"type": "lora", "rank": 4}}),
    "fd lora": Case("fd", {"train": TRAIN, "objective": {"ip_noise_gamma": 0.1}, "sample": SAMPLE}),
    "fd swapped": Case("fd", {
        "train": {**TRAIN, "mixed_precision": "bf16"},
        "memory": {"base_storage": "fp8_scaled", "blocks_to_swap": 1, "gradient_checkpointing": True},
    }),
}  # fmt: skip


class Side:
    """One of the two trees, with the folder of its runs."""

    def __init__(self, tree: Path, folder: Path, inputs: Path, renamed: dict[str, str]) -> None:
        self.tree, self.folder, self.inputs, self.renamed = tree, folder, inputs, renamed

    def train(self, name: str, case: Case) -> Path:
        """Train a case anew and return its output folder."""
        config = self._write(name, case)
        if case.killed_at is not None:
            self._run(config, expected=(-9, 137), MUSUBI_FAULT=f"train.update:{case.killed_at}")
        self._run(config)
        return config.parent / "out"

    def _write(self, name: str, case: Case) -> Path:
        tables = {**case.tables}
        folder = self.folder / name
        shutil.rmtree(folder / "out", ignore_errors=True)
        general: dict[str, Any] = {"resolution": 128, "batch_size": 2}
        masked = tables.pop("masks", False)
        caches = self.folder / f"cache-{case.family}{'-masked' if masked else ''}"  # made by the first case of a kind
        dataset = {"image_directory": str(self.inputs / "photographs"), "cache_directory": str(caches)}
        if masked:
            dataset["mask_directory"] = str(self.inputs / "masks")
        tables["datasets"] = [dataset]
        for ours, theirs in self.renamed.items():
            (table, key), (other_table, other) = ours.split("."), theirs.split(".")
            if key in tables.get(table, {}):
                tables[table] = {k: v for k, v in tables[table].items() if k != key}
                tables[other_table] = {**tables.get(other_table, {}), other: case.tables[table][key]}
        photographs, encoders = self.inputs / "photographs", self.inputs / "encoders"
        if case.family == "fd":
            base = self.inputs / "flux" / "flux.safetensors"
            return write_flux_run(folder, photographs, encoders, base, general=general, **tables)
        if "adapter" in tables:
            trained = self.folder / "bf16" / "out" / "release"
            geometry = {"init": None, "init_scheme": None, "geometry": None, "path": str(trained)}
            tables["model"] = {**geometry, **{k: v for k, v in tables["model"].items() if k != "init"}}
        return write_run(folder, photographs, encoders, general=general, **tables)

    def _run(self, config: Path, expected: tuple[int, ...] = (0,), **environment: str) -> None:
        home = self.folder / "home"
        done = subprocess.run(
            [sys.executable, str(self.tree / "train.py"), str(config)],
            cwd=config.parent,
            env={
                **clean_environment(home),
                "PYTHONPATH": str(self.tree / "src"),
                "OMP_NUM_THREADS": "1",
                **environment,
            },
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )
        if done.returncode not in expected:
            raise SystemExit(f"{self.tree}: {config} ended with {done.returncode}\n{done.stdout}\n{done.stderr}")


def checkout(ref: str, folder: Path) -> Path:
    """The files of a commit."""
    folder.mkdir()
    archive = subprocess.run(["git", "-C", str(REPOSITORY), "archive", ref], capture_output=True)
    if archive.returncode:
        raise SystemExit(f"{ref}: {archive.stderr.decode().strip()}")
    subprocess.run(["tar", "-x", "-C", str(folder)], input=archive.stdout, check=True)
    return folder


def make_inputs(folder: Path) -> None:
    """Photographs with masks, encoders, a small FLUX.1."""
    make_photographs(folder / "photographs")
    make_encoders(folder / "encoders")
    make_flux(folder / "flux" / "flux.safetensors")
    (folder / "masks").mkdir()
    ramp = np.linspace(0, 255, 64, dtype=np.uint8)[None].repeat(64, axis=0)
    for name in ("astronaut", "coffee", "moon"):
        with Image.open(next((folder / "photographs").glob(f"{name}.[!t]*"))) as picture:
            Image.fromarray(ramp).resize(picture.size).save(folder / "masks" / f"{name}.png")


def differences(ours: Path, theirs: Path) -> Iterator[str]:
    """What differs between two output folders."""
    files = {side: sorted(str(p.relative_to(side)) for p in _compared(side)) for side in (ours, theirs)}
    if files[ours] != files[theirs]:
        yield f"files: {sorted(set(files[ours]) ^ set(files[theirs]))}"
    for name in sorted(set(files[ours]) & set(files[theirs])):
        if name.endswith(".safetensors"):
            yield from _tensor_differences(name, load_file(ours / name), load_file(theirs / name))
        elif name.endswith(".png"):
            with Image.open(ours / name) as a, Image.open(theirs / name) as b:
                if not np.array_equal(np.asarray(a), np.asarray(b)):
                    yield f"{name}: other pixels"
    rows = [[_values(line) for line in (side / "metrics.jsonl").read_text().splitlines()] for side in (ours, theirs)]
    for number, (a, b) in enumerate(zip(*rows)):
        if a != b:
            yield f"metrics.jsonl:{number + 1}: {sorted(k for k in {*a, *b} if a.get(k) != b.get(k))}"
    if len(rows[0]) != len(rows[1]):
        yield f"metrics.jsonl: {len(rows[0])} lines, {len(rows[1])} in the other"


def _compared(folder: Path) -> list[Path]:
    return [*folder.glob("*.safetensors"), *folder.glob("*-state/*.safetensors"), *folder.glob("sample/*.png")]


def _values(line: str) -> dict[str, Any]:
    return {key: value for key, value in json.loads(line).items() if key != "clock"}


def _tensor_differences(name: str, ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> Iterator[str]:
    if ours.keys() != theirs.keys():
        yield f"{name}: keys {sorted(ours.keys() ^ theirs.keys())[:4]}"
    for key in sorted(ours.keys() & theirs.keys()):
        a, b = ours[key], theirs[key]
        if a.dtype != b.dtype or a.shape != b.shape or not torch.equal(_bytes(a), _bytes(b)):
            gap = (a.double() - b.double()).abs().max().item() if a.shape == b.shape else float("nan")
            yield f"{name}: {key} differs by {gap:.3g}"
            return


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The same bits: NaN equals itself, and -0 is not 0."""
    return tensor.reshape(-1).view(torch.uint8)


def step_seconds(out: Path) -> float:
    """Median time of an update, without the first three."""
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return statistics.median([row["clock"]["step_seconds"] for row in rows if "loss/total" in row][3:])


def main() -> int:
    """Run both sides and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ref", help="commit to compare with")
    parser.add_argument("--case", action="append", choices=sorted(CASES), help="only this one; may be repeated")
    parser.add_argument(
        "--repeat", type=int, default=1, help="train every case so often, the sides in turn, and keep the best time"
    )
    parser.add_argument("--updates", type=int, help="length of every run; hundreds of them make the times comparable")
    options = parser.parse_args()
    cases = {name: case.lasting(options.updates) for name, case in CASES.items()}
    wanted = options.case or list(CASES)
    if "tf lora" in wanted and "bf16" not in wanted:
        wanted = ["bf16", *wanted]  # which trains the model below it
    failed = False
    with tempfile.TemporaryDirectory(prefix="same-bits-") as name:
        folder = Path(name)
        make_inputs(folder / "inputs")
        ref = Side(checkout(options.ref, folder / "ref"), folder / "runs-ref", folder / "inputs", RENAMED)
        ours = Side(REPOSITORY, folder / "runs-ours", folder / "inputs", {})
        for case in wanted:
            times: list[list[float]] = [[], []]
            for _ in range(options.repeat):
                outs = [side.train(case, cases[case]) for side in (ours, ref)]
                for seconds, out in zip(times, outs):
                    seconds.append(step_seconds(out))
            found = list(differences(*outs))
            ratio = min(times[0]) / min(times[1])
            print(
                f"{case}: {'the same bits' if not found else 'DIFFERENT'}; an update takes {ratio:.3f} of REF's time",
                flush=True,
            )
            for line in found[:10]:
                print(f"  {line}", flush=True)
            failed |= bool(found)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
