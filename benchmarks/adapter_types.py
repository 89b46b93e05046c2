"""What each type of adapter learns: python benchmarks/run.py adapter_types --work FOLDER [--types NAME ...] [--rate NAME=LR ...]

    python benchmarks/run.py adapter_types --sizes      numbers of parameters on the published models, without storage; seconds

A FLUX.1-shaped model is trained on the demo's pictures without one colour, once; then a short run of each type teaches it the colour.
The released files draw, and the demo's checker says what the pictures show. At the end all types are trained in turn in one process,
an update each, for the time of an update. Results are kept in FOLDER/results; a run whose result is there is not repeated, and after the
model is trained several of these commands can share a folder. One thread.
"""

import argparse
import json
import math
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from musubi_tuner.adapter_types import ADAPTERS, NORM
from musubi_tuner.adapters.attach import Placement, attach, make_adapters, own_arguments, placements_of
from musubi_tuner.config import load_config
from musubi_tuner.config.schema.adapter import AdapterSection
from musubi_tuner.device import set_threads
from musubi_tuner.files import write_json
from musubi_tuner.models import flux_dev, tinyflux
from musubi_tuner.models.registry import MODELS

RATES = {
    "lora": 2e-3, "locon": 2e-3, "dora": 2e-3, "loha": 2e-3, "lokr": 2e-3, "dylora": 2e-3, "ia3": 2e-2, "glora": 2e-3,
    "diag-oft": 5e-3, "boft": 5e-3, "native": 5e-4,
}  # fmt: skip
"""Highest learning rate of each type."""
RANK = 16
TYPES = [name for name in ADAPTERS if name != NORM]
PUBLISHED = {
    "fd": (flux_dev.build, flux_dev.FluxConfig()),
    "tf": (tinyflux.build, tinyflux.TinyFluxConfig()),
}  # fmt: skip
"""Geometries of FLUX.1-dev and TinyFlux-Deep."""
BATCH, TOKENS, TEXT = 16, 16, 12
"""Pictures of an update, and tokens of each and of its caption, as in the runs."""


def settings(name: str) -> dict[str, Any]:
    """The table [adapter] of a type."""
    sized = {key: value for key, value in (("rank", RANK), ("alpha", float(RANK))) if key in ADAPTERS[name].uses}
    return {"type": name, **sized}


def learned(root: Path, name: str, rate: float, steps: int) -> dict[str, Any]:
    """Train one type, draw with its file, and say what was found."""
    from new_colour import measure, prompts, train_py, write_run

    label = f"{name}-{rate:g}-{steps}"
    run = write_run(
        root, label, steps, {"new": 1, "mixed": 1}, adapter=settings(name), optimizer={"lr": rate}, run={"threads": 1}
    )  # fmt: skip
    train_py(run)
    config = load_config(run)
    new, others = prompts()
    trained = [(str(config.output_dir), 1.0)]
    scores = [
        measure(config, trained, wanted, root / f"{label}-{index}.png") for index, wanted in enumerate((new, others))
    ]
    file = config.output_dir / f"{label}.safetensors"
    with safe_open(str(file), "pt") as tensors:
        sizes = {key: tensors.get_slice(key).get_shape() for key in tensors.keys()}  # noqa: SIM118  # no mapping
    trained_numbers = sum(math.prod(shape) for key, shape in sizes.items() if not key.endswith((".alpha", ".on_input")))
    return {
        "rate": rate, "new": scores[0]["colour"], "new all": scores[0]["all"], "others": scores[1]["all"],
        "parameters": trained_numbers, "bytes": file.stat().st_size,
    }  # fmt: skip


def update_times(names: list[str], rounds: int) -> dict[str, float]:
    """Median seconds of an update of each type, one after the other in every round."""
    from musubi_tuner.models.flux_dev import Flux
    from new_colour import GEOMETRY

    updates = {}
    for name in names:
        torch.manual_seed(0)
        model = Flux(GEOMETRY).requires_grad_(False)
        section = AdapterSection.model_validate(settings(name))
        adapters = make_adapters(model, placements_of(model, MODELS["fd"].adapters, section), section)
        attach(model, adapters)
        updates[name] = _update(model, adapters)
    times: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(rounds):
        for name, update in updates.items():
            start = time.perf_counter()
            update()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(each[3:]) for name, each in times.items()}


def _update(model: nn.Module, adapters: nn.Module) -> Any:
    """An update of AdamW on random numbers, in float32."""
    from new_colour import GEOMETRY

    optimizer = torch.optim.AdamW(adapters.parameters(), lr=1e-4, fused=True)
    inputs = (
        torch.randn(BATCH, TOKENS, 64), torch.zeros(BATCH, TOKENS, 3), torch.randn(BATCH, TEXT, GEOMETRY.context_in_dim),
        torch.zeros(BATCH, TEXT, 3), torch.rand(BATCH), torch.randn(BATCH, GEOMETRY.vec_in_dim), torch.ones(BATCH),
    )  # fmt: skip

    def update() -> None:
        model(*inputs).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return update


def sizes() -> str:
    """Trained parameters of each type on the published models, on the layers that a family adapts by default."""
    models = {code: build(config) for code, (build, config) in PUBLISHED.items()}
    lines = ["| `type` | " + " | ".join(MODELS[code].title for code in models) + " |", "|---" * (1 + len(models)) + "|"]
    for name in TYPES:
        cells = []
        for code, model in models.items():
            section = AdapterSection.model_validate(settings(name))
            placements = placements_of(model, MODELS[code].adapters, section)
            with torch.device("meta"):
                numbers = sum(_numbers(model, placement, section) for placement in placements)
            cells.append(f"{numbers / 1e6:,.2f} M")
        lines.append(f"| `{name}` | {' | '.join(cells)} |")
    return "\n".join(lines)


def _numbers(model: nn.Module, placement: Placement, section: AdapterSection) -> int:
    layer: Any = model.get_submodule(placement.path)
    own = placement.own or own_arguments(section.type, section)
    made = ADAPTERS[section.type].load()(layer.in_features, layer.out_features, placement.rank, placement.alpha, **own)
    return sum(parameter.numel() for parameter in made.parameters())


def table(found: dict[str, Any], times: dict[str, float]) -> str:
    """A line for each type."""
    lines = [
        "| `type` | learning rate | new colour | new pictures all right | known ones all right | trained | file, KB | update / LoRA's |"
    ]
    lines.append("|---" * 8 + "|")
    for name, row in found.items():
        lines.append(
            f"| `{name}` | {row['rate']:g} | {row['new']:.1%} | {row['new all']:.1%} | {row['others']:.1%} | {row['parameters']:,} "
            f"| {row['bytes'] / 1000:,.0f} | {times[name] / times['lora']:.2f} |"
        )
    return "\n".join(lines)


def main(arguments: list[str]) -> int:
    """Train what is missing and print the table."""
    import sys

    sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))
    from new_colour import make_base, make_project, measure, prompts, train_py, write_run

    parser = argparse.ArgumentParser(prog="adapter_types", description="What each type of adapter learns.")
    parser.add_argument("--work", type=Path, help="folder for runs and results")
    parser.add_argument("--sizes", action="store_true", help="only numbers of parameters")
    parser.add_argument("--types", nargs="+", choices=TYPES, default=TYPES, help="only these")
    parser.add_argument("--rate", nargs="+", default=[], metavar="NAME=LR", help="another learning rate of a type")
    parser.add_argument("--base_steps", type=int, default=1800, help="updates of the model (default: 1800)")
    parser.add_argument("--steps", type=int, default=300, help="updates of each adapter (default: 300)")
    parser.add_argument("--rounds", type=int, default=40, help="timed updates of each type, 0 = no table (default: 40)")
    options = parser.parse_args(arguments)
    if options.sizes:
        print(sizes())
        return 0
    if options.work is None:
        parser.error("--work: name a folder for runs and results")
    rates = RATES | {name: float(rate) for name, _, rate in (each.partition("=") for each in options.rate)}
    set_threads(1, 1)
    work = options.work.resolve()
    root, results = work / "toml", work / "results"
    before = results / "before.json"
    if not before.exists():
        if not (root / "mixed").exists():
            make_project(work)
        if not (results / "base.txt").exists():
            make_base(root, options.base_steps)
            results.mkdir()
            (results / "base.txt").write_text(f"{options.base_steps} updates\n", encoding="utf-8")
        run = write_run(root, "start", 100, {"new": 1, "mixed": 1})
        train_py(run, "--cache_only")
        config = load_config(run)
        new, others = (
            measure(config, [], wanted, root / f"before-{index}.png") for index, wanted in enumerate(prompts())
        )
        write_json(before, {"updates": options.base_steps, "new": new["colour"], "others": others["all"]})
    print(before.read_text(encoding="utf-8"), flush=True)
    rows = {}
    for name in options.types:
        kept = results / f"{name}-{rates[name]:g}-{options.steps}.json"
        if not kept.exists():
            write_json(kept, learned(root, name, rates[name], options.steps))
            print(kept.name, kept.read_text(encoding="utf-8"), flush=True)
        rows[name] = json.loads(kept.read_text(encoding="utf-8"))
    if options.rounds:
        print(table(rows, update_times(list(dict.fromkeys(["lora", *options.types])), options.rounds)))
    return 0
