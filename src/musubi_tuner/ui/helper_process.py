"""Answers what the page asks that needs torch or a tokenizer: the plan, noise levels, tokens of captions.

It imports everything once, answers each question in a fork of itself, so that nothing is left over, and ends after ten idle minutes, or
with the server. Questions and answers are lines of JSON.
"""

import io
import json
import os
import select
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from typing import Any

import musubi_tuner.assemble
import musubi_tuner.planning.plan
import musubi_tuner.planning.report  # noqa: F401  # imported here once, instead of for every plan
from musubi_tuner.caching.text_check import token_limits
from musubi_tuner.config import load_documents
from musubi_tuner.encoders.tokens import count_tokens
from musubi_tuner.errors import ConfigError, UserError
from musubi_tuner.planning.noise_density import noise_density
from musubi_tuner.runner.command import main as train
from musubi_tuner.weights.hub import local_only

IDLE_SECONDS = 600.0
FORKS = hasattr(os, "fork")
HEADS = ("memory", "disk", "warning")
"""First words of lines of the plan that say what a run needs."""


def plan(path: str) -> dict[str, Any]:
    """What ``train.py --plan`` says of a run file."""

    said = io.StringIO()
    with redirect_stdout(said), redirect_stderr(said):
        code = train([path, "--plan"])
    text = said.getvalue()
    return {"code": code, "text": text, "needs": needs_of(text)}


def needs_of(text: str) -> list[str]:
    """Lines of a plan on memory and disk, and its warnings, each with the lines that go on with it."""
    found: list[str] = []
    inside = False
    for line in text.splitlines():
        if not line.startswith(" " * 8):
            inside = line.strip().startswith(HEADS)
            if inside:
                found.append(line.strip())
        elif inside and line.strip():
            found[-1] += f"; {line.strip()}"
    return found


def noise(document: dict[str, Any], step: int) -> list[float]:
    """Shares of noise levels; see `planning.noise_density`."""
    config = load_documents(document)[step]
    if not config.spec.task(config).denoises:
        raise ConfigError("this task trains no noise levels")
    with local_only():
        return noise_density(config, (config.datasets[0].resolution if config.datasets else (512, 512)))


def tokens(document: dict[str, Any], texts: list[str]) -> list[list[dict[str, Any]]]:
    """Tokens of each text, for each encoder whose tokenizer is here, beside what it takes."""
    limits = [
        limit for limit in token_limits(load_documents(document)[0], download=False) if limit.tokenizer is not None
    ]
    counted = [[count.tokens for count in count_tokens(limit.tokenizer, texts)] for limit in limits]  # type: ignore[arg-type]
    return [
        [
            {"name": limit.name, "tokens": own[place], "limit": limit.limit}
            for limit, own in zip(limits, counted, strict=True)
        ]
        for place in range(len(texts))
    ]


ANSWERS: dict[str, Callable[..., Any]] = {"plan": plan, "noise": noise, "tokens": tokens}


def answer_to(line: str) -> str:
    """The answer to a line, as a line."""
    values = json.loads(line)
    try:
        found = {"answer": ANSWERS[values.pop("what")](**values)}
    except (UserError, OSError) as problem:
        found = {"problem": str(problem)}
    except Exception as problem:  # of a run file that is being typed; the terminal shows the rest
        sys.excepthook(type(problem), problem, problem.__traceback__)
        found = {"problem": f"{type(problem).__name__}: {problem}"}
    return json.dumps(found)


def main() -> None:
    """Answer lines of standard input until it ends, or nobody asked for a while."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what anything prints is no answer
    lost = json.dumps({"problem": "it ended without an answer; the memory may be too small"})
    while not FORKS or select.select([sys.stdin], [], [], IDLE_SECONDS)[0]:
        line = sys.stdin.readline()
        if not line:
            break
        child = os.fork() if FORKS else 0
        if child == 0:
            print(answer_to(line), file=answers, flush=True)
            if FORKS:
                os._exit(0)
        elif os.waitpid(child, 0)[1]:
            print(lost, file=answers, flush=True)


if __name__ == "__main__":
    main()
