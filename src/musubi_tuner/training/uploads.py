"""What of a run goes to the hub, when, and where it arrives.

    checkpoint_runs/<run>/   weights, averages, config.json, options.json, <name>.config.toml; states if hub.upload_state
    samples/                 pictures, their sheets and prompts
    logs/                    TensorBoard event files, metrics.jsonl
    the root                 the release: model.safetensors, ema.safetensors, config.json, options.json, README.md

Of the run's own schedule of saves, [hub] may take every checkpoint, or the newest at times of its own.
"""

import glob
import shlex
from pathlib import Path

from musubi_tuner.config import RunConfig
from musubi_tuner.config.command_line import override_arguments
from musubi_tuner.training.checkpoint import CheckpointList, Entry
from musubi_tuner.training.hub import Commit, HubUploader
from musubi_tuner.training.metrics import FILE
from musubi_tuner.training.release import config_texts, release_files


class RunUploads:
    """The uploads of one start of a run; used by the main process only.

    Args:
        patient: see `HubUploader`.
    """

    def __init__(self, config: RunConfig, *, patient: bool = False) -> None:
        self.config, self.settings = config, config.hub
        self.folder, self.name = config.output_dir, config.run.name
        self.place = f"checkpoint_runs/{self.settings.run_name or self.name}"
        self.uploader = HubUploader(self.settings, self.folder, patient=patient)
        self._last: Entry | None = None
        self._released: Entry | None = None

    def saved(self, entry: Entry) -> None:
        """Upload a checkpoint that was just saved, if all are wanted or if it is the last one."""
        own_schedule = bool(self.settings.every_steps or self.settings.every_epochs)
        if not own_schedule or entry.kind == "final":
            self.checkpoint(entry)
        if entry.kind == "final":
            self._end_with_release()

    def newest(self) -> None:
        """Upload the newest checkpoint, unless it was the last that was uploaded."""
        saved = self._checkpoints()
        if saved:
            newest = max(saved, key=lambda entry: entry.step)
            if self._last is None or newest.model != self._last.model:
                self.checkpoint(newest)

    def _checkpoints(self) -> list[Entry]:
        """The checkpoints that have weights, but for the best, each once whatever its names."""
        entries = CheckpointList.read(self.folder, self.name).entries.values()
        return list({entry.model: entry for entry in entries if entry.model and entry.kind != "best"}.values())

    def checkpoint(self, entry: Entry) -> None:
        """Upload a checkpoint with the configs, and the logs so far."""
        names = [entry.model, entry.ema, f"{self.name}.config.toml"]
        if self.settings.upload_state and entry.state:
            names += [f"{entry.state}/{path.name}" for path in sorted((self.folder / entry.state).glob("*"))]
        paths = {name: self.folder / name for name in names if name and (self.folder / name).exists()}
        held: dict[str, Path | str] = {**paths, **config_texts(self.folder)}
        files = {f"{self.place}/{name}": content for name, content in held.items()}
        self.uploader.upload("checkpoint", f"Checkpoint step {entry.step}", files)
        self._last = entry
        self.logs(entry.step)

    def release(self, entry: Entry) -> None:
        """Make a checkpoint what `owner/name` loads."""
        self.uploader.upload("release", f"Release step {entry.step}", release_files(self.config, entry))
        self._released = entry

    def samples(self, step: int | None = None) -> None:
        """Upload the pictures of one step, or all that there are."""
        if not self.settings.upload_samples:
            return
        folder = self.folder / "sample"
        patterns = ["[!.]*"]
        if step is not None:
            pictures = f"{glob.escape(self.name)}_{step:08d}_*.png"
            patterns = [pictures, f"samples_step_{step}.png", f"prompts_step_{step}.txt"]
        paths = sorted(path for pattern in patterns for path in folder.glob(pattern))
        if paths:
            message = "Samples" if step is None else f"Samples step {step}"
            self.uploader.upload("samples", message, {f"samples/{path.name}": path for path in paths})

    def logs(self, step: int | None = None) -> None:
        """Upload the event files and the metrics as they are when their turn comes."""
        if not self.settings.upload_logs:
            return
        events = self.config.log_folder
        files = {f"logs/{path.relative_to(events).as_posix()}": path for path in sorted(events.rglob("*tfevents*"))}
        if (self.folder / FILE).exists():
            files[f"logs/{FILE}"] = self.folder / FILE
        if files:
            message = "Logs" if step is None else f"Logs step {step}"
            self.uploader.upload("logs", message, files, growing=True)

    def everything(self) -> None:
        """Upload what the run folder holds."""
        for entry in self._checkpoints():
            self.checkpoint(entry)
        self._end_with_release()
        self.samples()

    def finish(self) -> None:
        """Upload the logs, wait for what is left, and say what arrived and what did not."""
        self.logs()
        left, limit = self.uploader.left, f", at most {self.settings.finish_seconds} s (hub.finish_seconds)"
        if left:
            print(f"hub: waiting for {left} upload(s){'' if self.uploader.patient else limit}", flush=True)
        self.uploader.close()
        for line in self.summary():
            print(line, flush=True)

    def summary(self) -> list[str]:
        """What arrived, and what did not, with the way out; why it did not was said when it happened."""
        done, failed = self.uploader.uploaded, self.uploader.failed
        lines = [f"hub: uploaded to {self.settings.repo_id}: {_listed(done)}"] if done else []
        if failed:
            lines.append(f"warning: hub: not uploaded, as said above: {', '.join(commit.message for commit in failed)}")
            lines.append(f"to upload what this run's folder holds: {self._command()}")
        return lines

    def _end_with_release(self) -> None:
        """Upload the release, unless it is the best one and this start uploaded it when it was found."""
        entry = CheckpointList.read(self.folder, self.name).entries.get(self.settings.release)
        if entry and entry != self._released:
            self.release(entry)

    def _command(self) -> str:
        """The command that uploads by hand, with the changes of this command line."""
        words = [str(self.config.path), *override_arguments(self.config.options)]
        return shlex.join(["python", "-m", "musubi_tuner.upload_run", *words])


def _listed(commits: list[Commit]) -> str:
    """Commits in a few words."""
    of = {
        kind: [commit for commit in commits if commit.kind == kind]
        for kind in ("checkpoint", "samples", "logs", "release")
    }
    pictures = {name for commit in of["samples"] for name in commit.files}
    parts = [
        f"{len(of['checkpoint'])} checkpoint(s)" if of["checkpoint"] else "",
        f"{len(pictures)} sample file(s)" if pictures else "",
        "logs" if of["logs"] else "",
        f"the {of['release'][-1].message.lower()}" if of["release"] else "",
    ]
    return ", ".join(part for part in parts if part)
