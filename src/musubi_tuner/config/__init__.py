"""What a person may write in a run file, and what is made of it. Torch-free."""

from musubi_tuner.config.diagnostics import Diagnostic
from musubi_tuner.config.load import load_config, load_document, load_documents
from musubi_tuner.config.rules import validate
from musubi_tuner.config.run_config import RunConfig
from musubi_tuner.config.steps import Steps, calculate_steps, sentence

__all__ = [
    "Diagnostic",
    "RunConfig",
    "Steps",
    "calculate_steps",
    "load_config",
    "load_document",
    "load_documents",
    "sentence",
    "validate",
]
