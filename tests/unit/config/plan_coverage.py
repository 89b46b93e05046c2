"""The page docs/plan_coverage.md: python tests/unit/config/plan_coverage.py > docs/plan_coverage.md"""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent))

from names_of_others import PLAN

from musubi_tuner.config.foreign import FOREIGN
from musubi_tuner.config.names import answer
from musubi_tuner.config.schema import flat_names, item_parameters, parameters
from musubi_tuner.models.registry import MODELS

TESTS = {
    "general": "data/test_caption_variants.py, data/test_sources.py, config/test_datasets.py",
    "datasets": "config/test_datasets.py", "objective": "flow/test_noise.py, training/test_task.py", "adapter": "adapters/test_lora.py",
    "optimizer": "training/test_optimizers.py", "scheduler": "config/test_every_rule.py, training/test_optimizers.py",
    "memory": "memory/test_compose.py", "save": "training/test_due.py", "sample": "training/test_sampling.py",
    "validation": "training/test_validation.py", "hub": "training/test_hub.py", "cache": "caching/test_text_check.py",
    "log": "training/test_trackers.py", "run": "config/test_load.py", "model": "config/test_load.py", "train": "training/test_update.py",
    "resume": "config/test_every_rule.py", "ema": "training/test_update.py", "distributed": "config/test_load.py",
}  # fmt: skip
"""Table -> tests that show its settings act."""


def row(name: str) -> str:
    """A name, what it is here, in each family, and the test that shows it."""
    everything = [*parameters(), *item_parameters()]
    of_items = (p for p in item_parameters() if p.name == name and p.section == "general")
    own = next(of_items, None) or flat_names().get(name) or next((p for p in everything if p.name == name), None)
    entry = FOREIGN.get(name)
    key = entry.key if entry is not None and entry.key else own.key if own is not None and entry is None else ""
    if key:
        section, families = key.partition(".")[0], []
        for code in MODELS:
            has = section in ("general", "datasets") or key in {p.key for p in parameters(MODELS[code])}
            families.append("supported" if has else MODELS[code].why_not(key, True) or "refused: not of this family")
        what = f"`{key}`" + (f", {entry.rule}" if entry is not None and entry.rule else "")
        return f"| `{name}` | {what} | {' | '.join(families)} | {TESTS.get(section, '')} |"
    found = answer(name, True, None)
    assert entry is not None and found is not None, name
    why = (
        f"refused unless it is off: it {entry.refused}" if entry.refused else f"accepted and left out: {entry.harmless}"
    )
    return f"| `{name}` | {why} | | | config/test_names.py |"


def page() -> str:
    """The page as Markdown."""
    titles = " | ".join(MODELS[code].title for code in MODELS)
    return "\n".join(
        [
            "# Names of a training plan",
            "",
            "Made by `python tests/unit/config/plan_coverage.py`; do not edit. What each name is in a run file, as an option, in an",
            "imported file: a setting, another name of one, or the reason why there is none. Tests lie below `tests/unit/`.",
            "",
            f"| name | here | {titles} | shown by |",
            "|---" * (3 + len(MODELS)) + "|",
            *(row(name).replace("||", "|") for name in PLAN),
            "",
        ]
    )


if __name__ == "__main__":
    sys.stdout.write(page())
