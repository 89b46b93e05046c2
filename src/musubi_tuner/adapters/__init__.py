"""Adapters: small trained changes to a frozen model. Attach, detach, merge; files and their conversion."""

from musubi_tuner.adapters.attach import AdapterSet, attach, detach
from musubi_tuner.adapters.convert import convert
from musubi_tuner.adapters.files import load_adapter, read_adapter, save_adapter
from musubi_tuner.adapters.lora import LoRALinear
from musubi_tuner.adapters.merging import merge

__all__ = [
    "AdapterSet",
    "LoRALinear",
    "attach",
    "convert",
    "detach",
    "load_adapter",
    "merge",
    "read_adapter",
    "save_adapter",
]
