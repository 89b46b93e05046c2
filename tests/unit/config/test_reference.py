"""The generated pages say what the code says."""

import json
import re
import tomllib
from pathlib import Path

from musubi_tuner.config.command_line import settings_help
from musubi_tuner.config.fields import TABS
from musubi_tuner.config.json_schema import json_schema
from musubi_tuner.config.reference import reference_page
from musubi_tuner.config.schema import item_parameters, parameters
from musubi_tuner.models.registry import MODELS

ROOT = Path(__file__).parents[3]


def test_reference_page_is_up_to_date() -> None:
    page = (ROOT / "docs" / "parameters.md").read_text(encoding="utf-8")
    assert page == reference_page(), "run: python -m musubi_tuner.config.reference > docs/parameters.md"


def test_help_names_every_setting_with_its_sentence() -> None:
    text = settings_help()
    assert "  warmup_steps  (int or share; default tf: 1000; fd: 0; ff: 0)" in text
    assert "  text_dropout  (float; default tf: 0.1; ff: 0.1)" in text
    assert "  warmup_steps  (int or share; default 0)" in settings_help(MODELS["fd"])
    assert "text_dropout" not in settings_help(MODELS["fd"])
    for parameter in parameters():
        assert f"  {parameter.name}  (" in text
        assert parameter.help in text
        assert parameter.help.endswith("."), parameter.key


def test_schema_of_run_files_is_up_to_date_and_knows_all_their_keys() -> None:
    written = json.loads((ROOT / "toml" / "run.schema.json").read_text(encoding="utf-8"))
    assert written == json.loads(json.dumps(json_schema())), (
        "run: python -m musubi_tuner.config schema > toml/run.schema.json"
    )
    files = [path for path in (ROOT / "toml").glob("*.toml") if "[run]" in path.read_text(encoding="utf-8")]
    assert len(files) > 5
    for path in files:
        assert path.read_text(encoding="utf-8").startswith("#:schema run.schema.json\n")
        for name, value in tomllib.loads(path.read_text(encoding="utf-8")).items():
            properties = written["properties"][name].get("properties", {})
            assert not isinstance(value, dict) or set(value) <= set(properties), (path.name, name)


def test_schema_of_a_count_that_may_be_a_share_takes_all_three_forms() -> None:
    field = json_schema()["properties"]["scheduler"]["properties"]["warmup_steps"]
    whole, share, text = field["anyOf"]
    assert (whole["type"], whole["minimum"], field["default"], field["x-unit"]) == ("integer", 0, 0, "updates")
    assert (share["type"], share["minimum"], share["exclusiveMaximum"]) == ("number", 0, 1)
    assert [bool(re.search(text["pattern"], word)) for word in ("5%", "99.9 %", ".5%", "100%", "5", "-5%")] == [
        True
    ] * 3 + [False] * 3


def test_every_setting_has_what_a_form_needs() -> None:
    for parameter in (*parameters(), *item_parameters()):
        assert parameter.help.endswith(".") and parameter.label and parameter.tab in TABS, parameter.key
        if parameter.when is not None:
            known = {p.key for p in (*parameters(), *item_parameters())} | {
                "datasets.mask_source",
                "model.geometry.guidance_embeds",
            }
            assert set(parameter.when.about()) <= known, parameter.key
        default = None if parameter.required else parameter.default
        if isinstance(default, int | float) and not isinstance(default, bool):
            assert parameter.limit("ge") is None or default >= parameter.limit("ge"), parameter.key
            assert parameter.limit("le") is None or default <= parameter.limit("le"), parameter.key


def test_schema_of_one_family_has_its_own_types() -> None:
    densities = json_schema("fd")["properties"]["objective"]["properties"]["timestep_sampling"]["enum"]
    assert "flux_shift" in densities and "logit_normal" not in densities
    rank = json_schema("tf")["properties"]["adapter"]["properties"]["rank"]
    assert (rank["minimum"], rank["maximum"], rank["default"], rank["x-tab"]) == (1, 1024, 16, "adapter")
