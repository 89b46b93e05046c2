"""What the plan says of captions and sample prompts that the text encoders cut or do not know."""

from pathlib import Path
from typing import Any

import pytest

from musubi_tuner.planning.plan import describe, make_plan

NO_TEACHERS = {"enable_lune": False, "enable_sol": False}


@pytest.fixture(autouse=True)
def without_teachers(project: Any) -> None:
    project.tables["experts"] |= NO_TEACHERS
    project.tables["ema"] = {"enabled": False}  # of which the plan has a line of its own


def said(project: Any, **options: Any) -> list[str]:
    config = project.config()
    lines = describe(config, make_plan(config, 1, download=False, **options), 1).splitlines()
    return [line for line in lines if line.startswith(("note", "warning"))]


def test_captions_and_prompts_are_named_for_each_encoder(project: Any) -> None:
    project.picture("fits", caption="a red circle")
    project.picture("long", caption="red " * 9)
    project.picture("foreign", caption="ein roter Kreis")
    project.tables["sample"] = {"prompts": ["a red square", "blue " * 20 + "--n " + "green " * 11, "Kreis"]}
    t5, t5_unknown, clip, clip_unknown, *prompts = said(project)
    assert t5.startswith("note: T5 takes 8 tokens; 1 of 3 captions have more and are cut (long: 10)")
    assert "model.t5_max_tokens" in t5
    assert clip.startswith("note: CLIP takes 10 tokens; 1 of 3 captions have more and are cut (long: 11)")
    for line, name in ((t5_unknown, "T5"), (clip_unknown, "CLIP")):
        assert (
            line.startswith(f"warning: {name} knows no word of 1 of 3 captions") and 'foreign "ein roter Kreis"' in line
        )
    assert [line.partition(";")[0] for line in prompts[::2]] == [
        "note: T5 takes 8 tokens",
        "note: CLIP takes 10 tokens",
    ]
    assert "2 of 4 sample prompts" in prompts[0] and "(prompt 2: 21, negative of prompt 2: 12)" in prompts[0]
    assert '(prompt 3 "Kreis")' in prompts[1]


def test_what_is_encoded_is_not_counted_again_and_prompts_are(project: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    project.picture("long", caption="red " * 9)
    assert project.run("text") == 0
    with monkeypatch.context() as patch:
        patch.setattr("musubi_tuner.planning.plan.token_limits", lambda *_, **__: pytest.fail("tokenizers were opened"))
        assert said(project) == []
    project.tables["sample"] = {"prompts": ["a"], "negative_prompt": "red " * 8}
    assert [line for line in said(project) if "(negative prompt: 9)" in line and "1 of 2 sample prompts" in line]


def test_items_of_several_data_sets_and_captions_are_told_apart(project: Any) -> None:
    project.picture("x", caption="red " * 9)
    (project.root / "more.jsonl").write_text(
        f'{{"image_path": "images/x.png", "one": "red", "two": "{"blue " * 20}"}}', encoding="utf-8"
    )
    project.tables["datasets"].append({
        "image_jsonl_file": "more.jsonl", "cache_directory": "cache2", "caption_columns": ["one", "two"]
    })  # fmt: skip
    assert "2 of 3 captions have more and are cut (1:x caption 2: 21, 0:x: 10)" in said(project)[0]


def test_an_encoder_that_is_not_here_is_said_and_nothing_claimed(
    project: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    project.picture("long", caption="red " * 20)
    project.tables["model"]["t5_path"] = "owner/t5"
    clip, absent = said(project, only_look=True)
    assert (
        clip.startswith("note: CLIP")
        and absent == "note: texts are compared with the limits of T5 once its tokenizer is downloaded"
    )
