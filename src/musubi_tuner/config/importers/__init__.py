"""Reading other trainers' option files. Every key of the source is in exactly one list of the report. Torch-free."""

from collections.abc import Mapping
from typing import Any

from musubi_tuner.config.importers.options import import_options
from musubi_tuner.config.importers.report import Imported, Report
from musubi_tuner.config.importers.tools import TITLES, is_typed, recognise
from musubi_tuner.models.registry import MODELS

__all__ = ["TITLES", "Imported", "Report", "import_options", "import_published", "is_typed", "recognise"]


def import_published(document: Mapping[str, Any]) -> Imported | None:
    """Translate the settings of a family's own trainer; None if they belong to no family."""
    for code in MODELS:
        published = MODELS[code].published
        imported = published.read_settings(dict(document)) if published else None
        if imported is not None:
            return imported
    return None
