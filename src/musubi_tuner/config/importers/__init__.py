"""Reading other trainers' option files. Every key of the source is in exactly one list of the report. Torch-free."""

from musubi_tuner.config.importers.musubi import import_musubi, looks_flat
from musubi_tuner.config.importers.report import Imported, Report

__all__ = ["Imported", "Report", "import_musubi", "looks_flat"]
