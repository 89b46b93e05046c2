"""The generated pages say what the code says."""

from pathlib import Path

from musubi_tuner.config.command_line import settings_help
from musubi_tuner.config.reference import reference_page
from musubi_tuner.config.schema import parameters
from musubi_tuner.models.registry import MODELS

ROOT = Path(__file__).parents[3]


def test_reference_page_is_up_to_date() -> None:
    page = (ROOT / "docs" / "config.md").read_text(encoding="utf-8")
    assert page == reference_page(), "run: python -m musubi_tuner.config.reference > docs/config.md"


def test_help_names_every_setting_with_its_sentence() -> None:
    text = settings_help()
    assert "  warmup_steps  (int; default tf: 1000; fd: 0)" in text
    assert "  text_dropout  (float; default tf: 0.1)" in text
    assert "  warmup_steps  (int; default 0)" in settings_help(MODELS["fd"])
    assert "text_dropout" not in settings_help(MODELS["fd"])
    for parameter in parameters():
        assert f"  {parameter.name}  (" in text
        assert parameter.help in text
        assert parameter.help.endswith("."), parameter.key
