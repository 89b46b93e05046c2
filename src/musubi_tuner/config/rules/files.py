"""Rules for files that must exist, and for folders to write to."""

import os
from collections.abc import Iterator
from pathlib import Path

from musubi_tuner.config.diagnostics import Diagnostic, error, warning
from musubi_tuner.config.file_heads import head_problem, texts_in
from musubi_tuner.config.paths import exists, is_checkpoint_name, is_hub_id, is_published, is_there
from musubi_tuner.config.pipeline import unfinished_step
from musubi_tuner.config.prompts import Prompt, prompt_texts, prompts_file, sample_prompts
from musubi_tuner.config.rules.rule import Rules
from musubi_tuner.config.run_config import RunConfig
from musubi_tuner.config.schema import parameters
from musubi_tuner.errors import ConfigError, describe_unwritable
from musubi_tuner.models.spec import ModelSpec

FILES = Rules()
rule = FILES.rule

INPUTS = ("model.path", "model.vae_path", "model.clip_path", "model.t5_path", "model.clip_tokenizer", "model.t5_tokenizer",
          "experts.unet", "experts.vae", "experts.lune", "experts.sol", "adapter.init_from")  # fmt: skip
RUN_NAMES = {
    "none": 'for a new model write model.init = "scratch"',
    "latest": 'an interrupted run continues by itself (resume.from = "auto"); for another run write folder:latest',
}
"""Checkpoint names of other trainers -> what to write here."""


@rule("P02", "run.output_dir")
def _name_of_output(config: RunConfig) -> Iterator[Diagnostic]:
    """Libraries that read weights and states take paths in UTF-8 only; files under other names could not be read again."""
    folder = str(config.output_dir)
    try:
        os.fsencode(folder).decode("utf-8")
    except UnicodeEncodeError as problem:
        yield error("P02", "run.output_dir", f"is {folder!r}: {describe_unwritable(problem)}")
    except UnicodeDecodeError:
        yield error("P02", "run.output_dir", f"is {folder!r}, which is not valid UTF-8; choose another name")


def _idle_encoders(config: RunConfig) -> list[str]:
    """Keys of encoders that a run without pictures does not need: all but those that its sample prompts take."""
    if not config.is_precached:
        return []
    idle = [key for key in INPUTS if key not in ("model.path", "adapter.init_from")]
    if config.sample.prompts is None:
        return idle
    try:
        texts, path = prompt_texts(sample_prompts(config), config.sample.negative_prompt), prompts_file(config)
    except ConfigError:  # which another rule reports
        return idle
    known = path is not None and set(texts) <= set(texts_in(path))
    return [key for key in idle if key != "model.vae_path" and (known or key.startswith("experts."))]


@rule("P01", "model.init")
def _inputs(config: RunConfig) -> Iterator[Diagnostic]:
    # The demo makes its own files before anything reads them.
    inputs = [] if config.demo else [key for key in INPUTS if key not in _idle_encoders(config)]
    texts = [(key, config.get(key)) for key in inputs] + [("adapter.merge", text) for text in config.adapter.merge]
    for dataset in config.datasets:
        own = [name for name in dataset.experts if f"experts.{name}" in inputs]
        texts += [(f"{dataset.name}.experts.{name}", dataset.experts[name]) for name in own]
    for key, text in texts:
        if text is None or is_hub_id(text) or exists(config.locate(text)):
            continue
        if key in ("model.path", "adapter.init_from") and unfinished_step(
            config.step, config.output_dir.parent, [text]
        ):
            continue
        if key == "model.path" and is_published(text):
            if not config.spec.hub_id:
                yield error("P01", key, f"{text}: {config.spec.title} has no published repository; write owner/name")
        elif key == "model.path" and (text == "none" or is_checkpoint_name(text)):
            yield error("P01", key, f"{text}: {RUN_NAMES.get(text, f'write the folder too, as in folder:{text}')}")
        else:
            yield error("P01", key, f"{text}: no such file or folder (looked in {Path.cwd()} and the project)")


@rule("NA03", "model.revision model.path")
def _revision(config: RunConfig) -> Iterator[Diagnostic]:
    path = config.model.path
    if config.model.revision is not None and path is not None and not (is_hub_id(path) or is_published(path)):
        yield warning("NA03", "model.revision", "has no effect because model.path is no hub id", "model.path")


@rule("P08", "model.path model.arch")
def _weights(config: RunConfig) -> Iterator[Diagnostic]:
    """Files that are not weights, or are of another model, by their first bytes."""
    if config.demo:
        return
    for key, text in [
        *((key, config.get(key)) for key in INPUTS),
        *(("adapter.merge", text) for text in config.adapter.merge),
    ]:
        if isinstance(text, str) and is_there(path := config.locate(text)) and path.is_file():
            arch = config.spec.code if key == "model.path" else None
            problem = head_problem(path, arch)
            if problem:
                yield error("P08", key, f"{text}: {problem}", "model.arch")


@rule("P01", "resume.from")
def _state(config: RunConfig) -> Iterator[Diagnostic]:
    text = config.resume.from_
    if text not in ("auto", "none") and not config.locate(text).is_dir():
        reason = f'{text}: no such state; give a folder whose name ends in -state, or write "auto" for the newest state of this run'
        yield error("P01", "resume.from", reason)


@rule("P01", "model.vae_path model.clip_path model.t5_path cache.run")
def _encoders(config: RunConfig) -> Iterator[Diagnostic]:
    caches, idle = config.spec.task(config).caches, _idle_encoders(config)
    for kind, keys in config.spec.encoders.needed(config).items():
        for key in keys:
            if kind in caches and key not in idle and config.get(key) is None and config.cache.run != "never":
                what = (
                    {"latents": "images", "text": "captions"}[kind]
                    if not config.is_precached
                    else "and draw sample.prompts"
                )
                yield error("P01", key, f"is needed to encode {what}", "cache.run")


@rule("P01 NA02", "sample.prompts adapter.type")
def _prompts(config: RunConfig) -> Iterator[Diagnostic]:
    prompts = config.sample.prompts
    if isinstance(prompts, str) and not config.locate(prompts).is_file():
        text = f"{prompts}: no such file; give a prompt file, or a list of prompts"
        yield error("P01", "sample.prompts", text)
    elif prompts is not None:
        try:
            parsed = sample_prompts(config)
        except ConfigError as problem:
            yield error("P01", "sample.prompts", str(problem))
        else:
            for prompt in parsed:
                for text in prompt_problems(prompt, config.spec, config.adapter.type != "none"):
                    yield error("NA02", "sample.prompts", text)


def prompt_problems(prompt: Prompt, spec: ModelSpec, adapters: bool) -> list[str]:
    """Options of a prompt that a family does not support, with or without adapters."""
    found = []
    own = {parameter.key for parameter in parameters(spec)}
    for option, name in (("l", "cfg_scale"), ("fs", "shift")):
        key, value = f"sample.{name}", getattr(prompt, name)
        if value is not None and key not in own:
            reason = spec.why_not(key, value) or f"{spec.title} has no {key}"
            found.append(f"'{prompt.text}': --{option} has no effect: {reason}")
    if prompt.multiplier is not None and not adapters:
        found.append(f"'{prompt.text}': --m sets the strength of an adapter, and there is none; remove it")
    return found


@rule("P01", "cache.run")
def _data(config: RunConfig) -> Iterator[Diagnostic]:
    if config.demo or config.cache.run == "never":
        return
    for dataset in config.datasets:
        folder, listing, masks = dataset.image_directory, dataset.image_jsonl_file, dataset.mask_directory
        if folder is not None and not folder.is_dir():
            yield error("P01", f"{dataset.name}.image_directory", f"{folder}: no such folder")
        if dataset.precached and not dataset.cache_directory.is_dir():
            yield error("P01", f"{dataset.name}.cache_directory", f"{dataset.cache_directory}: no such folder")
        if listing is not None and not listing.is_file():
            yield error("P01", f"{dataset.name}.image_jsonl_file", f"{listing}: no such file")
        if dataset.captions_file is not None and not dataset.captions_file.is_file():
            yield error("P01", f"{dataset.name}.captions_file", f"{dataset.captions_file}: no such file")
        if masks is not None and not masks.is_dir():
            yield error("P01", f"{dataset.name}.mask_directory", f"{masks}: no such folder")


@rule("P02", "run.output_dir")
def _output(config: RunConfig) -> Iterator[Diagnostic]:
    problem = unwritable(config.output_dir)
    if problem:
        yield error("P02", "run.output_dir", problem)


def unwritable(folder: Path) -> str | None:
    """Why files cannot be written below ``folder`` (which need not exist yet), or None."""
    for place in (folder, *folder.absolute().parents):
        if place.exists():
            if not place.is_dir():
                return f"{place} is a file, expected a folder"
            if not os.access(place, os.W_OK | os.X_OK):
                return f"{place}: no permission to write; choose another folder"
            return None
    return None
