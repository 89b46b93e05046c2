"""Pictures drawn from a run that is not running: the command that draws, started for the page. Torch-free."""

import json
import secrets
import subprocess
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from musubi_tuner.config.prompts import from_object
from musubi_tuner.config.read import read_toml
from musubi_tuner.errors import ConfigError
from musubi_tuner.files import write_text
from musubi_tuner.models.registry import MODELS
from musubi_tuner.ui import runs
from musubi_tuner.ui.answers import Drawing

FOLDER = "drawn"
"""Of a run, for these pictures."""
LINES = 8
"""Of the command's last ones, which are shown where it failed."""


@dataclass
class _Job:
    process: "subprocess.Popen[bytes]"
    log: Path
    before: set[Path]


@dataclass
class Drawings:
    """What is drawn, one command per run at a time."""

    _jobs: dict[str, _Job] = field(default_factory=dict)
    _one_at_a_time: threading.Lock = field(default_factory=threading.Lock)

    def begin(self, place: runs.Place, prompt: dict[str, Any], images: int, checkpoint: str) -> Drawing:
        """Draw pictures of a prompt.

        Args:
            prompt: as an object of a prompt file. checkpoint: name of one of the run's; empty = its newest.

        Raises:
            ConfigError: for a wrong prompt, a run that is running, and one that is drawn from already.
        """
        from_object({key: value for key, value in prompt.items() if value is not None}, "the prompt")
        if not 1 <= images <= 64:
            raise ConfigError(f"images is {images}, expected 1 to 64")
        if runs.summary(place)["state"] in (runs.RUNNING, "stopping"):
            raise ConfigError(f"{place.folder.name}: runs; ask it for samples, or draw when it has ended")
        model = read_toml(place.config).get("model")
        family = model.get("arch") if isinstance(model, dict) else None
        if not isinstance(family, str) or family not in MODELS:
            raise ConfigError(f"{place.config}: has no model.arch, so the command that draws is not known")
        with self._one_at_a_time:
            if self.state(place)["state"] == "running":
                raise ConfigError(f"{place.folder.name}: pictures are being drawn already")
            folder = place.folder / FOLDER
            prompts = place.folder / "logs" / f"draw-{secrets.token_hex(4)}.json"
            prompts.parent.mkdir(exist_ok=True)
            write_text(prompts, json.dumps([{key: value for key, value in prompt.items() if value is not None}]))
            words = [f"musubi_tuner.{MODELS[family].full_name}_generate_image", str(place.config), "--from_file", str(prompts),
                     "--save_path", str(folder), "--images_per_prompt", str(images), *runs.options_of(place)]  # fmt: skip
            if checkpoint:
                words += ["--checkpoint", checkpoint]
            log, before = prompts.with_suffix(".log"), set(folder.glob("*.png"))
            self._jobs[place.id] = _Job(runs.launch(words, log, place.directory), log, before)
        return self.state(place)

    def state(self, place: runs.Place) -> Drawing:
        """How far the drawing of a run is."""
        job = self._jobs.get(place.id)
        if job is None:
            return {"state": "none", "message": "", "pictures": []}
        code = job.process.poll()
        made = sorted(set((place.folder / FOLDER).glob("*.png")) - job.before)
        pictures = [path.relative_to(place.folder).as_posix() for path in made]
        if code is None:
            return {"state": "running", "message": "", "pictures": pictures}
        if code == 0:
            return {"state": "finished", "message": "", "pictures": pictures}
        said = job.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return {"state": "failed", "message": "\n".join(said[-LINES:]), "pictures": pictures}
