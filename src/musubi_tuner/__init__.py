"""Trainer for compact diffusion transformers, driven by one TOML file.

Importing this package imports neither torch nor any other heavy library, so that help, plans and
config errors answer at once.
"""

__version__ = "0.1.0"
