"""LoRA teaches a frozen FLUX.1-shaped model a colour it has never seen; the demo's checker measures it. About four minutes.

A small FLUX.1 is trained on the demo's pictures without the purple ones, in the demo's way, and frozen. Then the trainer
trains a LoRA on the purple pictures with some of the others mixed in. The pictures are those that the released file draws.
"""

from pathlib import Path

import pytest

from musubi_tuner.config import load_config
from musubi_tuner.demo.pictures import held_out
from musubi_tuner.device import set_threads
from new_colour import NEW, make_base, make_project, measure, prompts, train_py, write_run

LORA_STEPS = 600


@pytest.mark.slow
@pytest.mark.timeout(3600)  # a CPU that is shared with another test needs more than a quarter of an hour
def test_lora_teaches_a_new_colour(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    set_threads(None, 1)
    root = make_project(tmp_path)
    make_base(root)
    lora = write_run(root, "lora", LORA_STEPS, {"new": 1, "mixed": 1})
    train_py(lora)
    config = load_config(lora)
    purple, others = prompts()
    trained = [(str(config.output_dir), 1.0)]
    found = {
        "purple before": measure(config, [], purple, tmp_path / "before.png"),
        "purple after": measure(config, trained, purple, tmp_path / "after.png"),
        "others before": measure(config, [], others, tmp_path / "others_before.png"),
        "others after": measure(config, trained, others, tmp_path / "others_after.png"),
    }
    unseen = {one.caption for one in held_out(24, 0) if one.colour == NEW}
    never = [one for one in purple if one.caption in unseen]
    if never:
        found["purple never shown, after"] = measure(config, trained, never, tmp_path / "never.png")
    with capsys.disabled():
        for name, result in found.items():
            print(f"\n{name}: {result}", end="")
    assert found["purple before"]["colour"] == 0
    assert found["purple after"]["colour"] >= 0.75
    assert found["purple after"]["all"] >= 0.7
    assert found["others after"]["all"] >= found["others before"]["all"] - 0.15
