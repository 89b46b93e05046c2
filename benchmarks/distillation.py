"""Does distillation pay? The demo with teachers and without, at the same seeds and budget.

    python benchmarks/run.py distillation --work FOLDER [--steps 1000] [--seeds 1 2 3]

Three ways to train, everything else being equal:

    taught       the demo as it is: the predictors are taught by the teachers, whose features are never fed to the model
    untaught     no teacher: the same model and predictors, which learn from the main loss alone
    fed          as published: nine samples in ten are fed the teachers' features, and the predictors are taught

One tenth of the pictures is kept for validation. What is left of each run: its validation loss (averaged weights, fixed
noise, 8 noise levels, no teacher fed: as pictures are drawn) and the checker's score, over all prompts and over
combinations that were never trained. Results go to FOLDER/distillation.json; a run whose result is there is not repeated.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

from musubi_tuner.files import write_json

ROOT = Path(__file__).resolve().parents[1]
WAYS = {
    "taught": {},
    "untaught": {"objective.lune_weight": 0.0, "objective.sol_weight": 0.0},
    "fed": {"objective.lune_teacher_dropout": 0.1, "objective.sol_teacher_dropout": 0.1},
}
MEASURED = ("validation loss", "all", "unseen_all")


def train(work: Path, way: str, seed: int, steps: int) -> dict[str, float]:
    """Train and score one run; returns what was measured."""
    output = work / f"{way}-{seed}"
    settings = {
        "run.name": output.name,
        "run.output_dir": str(output),
        "run.seed": seed,
        "train.max_steps": steps,
        "validation.split": 0.1,
        "validation.every_epochs": 0,
        "save.every_steps": 0,
        "sample.every_steps": 0,
    } | WAYS[way]
    command = [sys.executable, "train.py", "toml/demo.toml"]
    command += [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
    with (work / f"{output.name}.log").open("w") as log:
        subprocess.run(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, check=True)
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    score = json.loads((output / "accuracy.json").read_text())
    losses = [row["loss/val"] for row in rows if "loss/val" in row]
    return {"validation loss": losses[-1], "all": score["all"], "unseen_all": score["unseen_all"]}


def table(results: dict[str, dict[str, float]], seeds: list[int]) -> str:
    """Mean over the seeds and, in brackets, the lowest and the highest, a line per way."""
    lines = ["| | " + " | ".join(MEASURED) + " |", "|---" * (1 + len(MEASURED)) + "|"]
    for way in WAYS:
        cells = []
        for name in MEASURED:
            values = [results[f"{way}-{seed}"][name] for seed in seeds]
            form = "{:.4f}" if name == "validation loss" else "{:.1%}"
            mean, low, high = (form.format(value) for value in (statistics.mean(values), min(values), max(values)))
            cells.append(f"{mean} ({low} to {high})")
        lines.append(f"| {way} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(arguments: list[str]) -> int:
    """Train every way with every seed and print the table."""
    parser = argparse.ArgumentParser(description="The demo with teachers and without.")
    parser.add_argument("--work", type=Path, required=True, help="folder for runs and results")
    parser.add_argument("--steps", type=int, default=1000, help="updates of each run")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="seeds of each way")
    args = parser.parse_args(arguments)
    work = args.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    found = work / "distillation.json"
    kept = json.loads(found.read_text()) if found.exists() else {"steps": args.steps, "runs": {}}
    if kept["steps"] != args.steps:
        print(f"{found}: holds runs of {kept['steps']} updates; take another folder for {args.steps}", file=sys.stderr)
        return 2
    for seed in args.seeds:
        for way in WAYS:
            name = f"{way}-{seed}"
            if name in kept["runs"]:
                continue
            kept["runs"][name] = train(work, way, seed, args.steps)
            write_json(found, kept)
            print(name, kept["runs"][name], flush=True)
    print(table(kept["runs"], args.seeds))
    return 0
