"""Runs commands in forks of one process that has imported the heavy libraries already.

A start of Python with torch, diffusers and transformers costs about eight seconds; a test of interruptions needs dozens of
starts. Here every command still gets a process, an environment and a working directory of its own, and dies alone when
it is killed, but the imports are paid once. So is what torch works out at the first call of every operator with every shape when a
plan runs a step on tensors without storage: the server does it for the run files that it is started with. It never computes
anything, so a fork inherits no threads. And what such a step found is kept for later commands that plan the same step, since most
runs of a test differ in where they are killed only; tests/unit/memory/test_estimate.py has the steps themselves.

Protocol, one JSON object per line: {"command", "arguments", "cwd", "environment", "stdout", "stderr"} comes in,
{"pid"} and later {"code", "passed"} go out; ``code`` is negative for a signal, as subprocess has it, and ``passed`` are the fault
points that the command's own process came by, in order, if it was not killed.
"""

import atexit
import hashlib
import importlib
import json
import os
import pickle
import sys
import traceback
from pathlib import Path
from typing import Any

PASSED = ".passed"
STEPS = "steps"
"""Folder of what the steps found that were planned so far."""
NOT_OF_A_STEP = {
    **dict.fromkeys(
        ("dataset_config", "run", "cache", "optimizer", "scheduler", "distributed", "ema", "validation", "save", "sample", "log",
         "hub", "resume", "demo"), True),
    "model": {"path", "revision"},
    "train": {"max_steps", "max_epochs", "grad_accum_steps", "loader_workers", "on_nonfinite", "max_grad_norm"},
    "memory": {"blocks_to_swap", "swap_policy", "swap_ring", "swap_pinned", "base_storage"},
}  # fmt: skip
"""Settings that no single step depends on. The model behind its path is known by its outline."""


_passed: list[str] = []


def _note_fault_points() -> None:
    """Read MUSUBI_FAULT as a start does, and note the points that are passed; before other modules take `fault_point` from there."""
    files = importlib.reload(importlib.import_module("musubi_tuner.files"))
    fault_point = files.fault_point

    def noted(name: str) -> None:
        _passed.append(name)
        fault_point(name)

    files.fault_point = noted


def _import_everything() -> None:
    """What the commands would import one by one."""
    for name in ("torch.utils.data", "torch.utils.tensorboard", "torch._dynamo.aot_compile", "torch._subclasses.fake_tensor",
                 "diffusers.models.attention_processor",
                 "diffusers.models.transformers.transformer_2d", "diffusers.models.autoencoders.autoencoder_kl",
                 "diffusers.models.unets.unet_2d_condition", "transformers.models.clip.modeling_clip",
                 "transformers.models.t5.modeling_t5", "transformers.models.auto.tokenization_auto"):  # fmt: skip
        importlib.import_module(name)
    for name in ("caching.command", "caching.jobs", "encoders.autoencoder", "encoders.teachers", "encoders.text",
                 "runner.command", "planning.plan", "training.loop", "training.generate_command",
                 "training.generate", "models.flux_dev.family", "planning.report"):  # fmt: skip
        importlib.import_module(f"musubi_tuner.{name}")


def _remember_steps(folder: Path) -> None:
    """Let a plan take what the same step found before, in this command or an earlier one."""
    from musubi_tuner.planning import estimate

    run_step = estimate.run_step

    def remembered(config: Any, plan: Any, *words: Any, **named: Any) -> Any:
        outline = (plan.model, plan.model.config, plan.dtype, plan.shapes, plan.options)
        asked = repr((config.model_dump(exclude=NOT_OF_A_STEP), outline, words, named))
        path = folder / hashlib.sha256(asked.encode()).hexdigest()
        if path.exists():
            return pickle.loads(path.read_bytes())
        found = run_step(config, plan, *words, **named)
        half = path.with_suffix(f".{os.getpid()}")
        half.write_bytes(pickle.dumps(found))
        half.rename(path)
        return found

    estimate.run_step = remembered


def _plan(run_file: str) -> None:
    """Plan a run on the photographs: the steps of its smallest and its largest bucket, of which only the latter's operations count."""
    from project import ENDS

    from musubi_tuner.config import load_config
    from musubi_tuner.planning.estimate import estimate

    config = load_config(run_file, {})
    plan = config.spec.family.outline_model(config)
    for bucket in ENDS:
        estimate(config, plan, bucket, config.datasets[0].batch_size, count=bucket == ENDS[-1])


def _entry(command: str) -> Any:
    """The main function of a command, as its script calls it."""
    if command == "train":
        return importlib.import_module("musubi_tuner.runner.command").main
    commands = {"generate": "tinyflux_generate_image", "flux_generate": "flux_dev_generate_image",
                "flux_latents": "flux_dev_cache_latents"}  # fmt: skip
    if command in commands:
        return importlib.import_module(f"musubi_tuner.{commands[command]}").main
    job = importlib.import_module("musubi_tuner.caching.command").main
    return lambda arguments: job(command, arguments)


def _become(request: dict[str, Any]) -> int:
    """In the fork: take the place of a freshly started command, in a process group of its own like one in a terminal."""
    os.setsid()
    streams = [os.open(os.devnull, os.O_RDONLY)]
    streams += [os.open(request[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC) for name in ("stdout", "stderr")]
    for number, descriptor in enumerate(streams):
        os.dup2(descriptor, number)
    sys.stdin, sys.stdout, sys.stderr = (os.fdopen(n, "r" if n == 0 else "w", buffering=1) for n in range(3))
    os.chdir(request["cwd"])
    os.environ.update(request["environment"])
    _note_fault_points()
    sys.argv = [request["command"], *request["arguments"]]
    try:
        code = _entry(request["command"])(request["arguments"])
    except SystemExit as leaving:
        code = leaving.code if isinstance(leaving.code, int) else 1
    except BaseException:
        traceback.print_exc()
        code = 1
    Path(request["stdout"]).with_name(PASSED).write_text(" ".join(_passed), encoding="utf-8")
    return int(code)


def _fork(request: dict[str, Any], answers: Any) -> None:
    passed = Path(request["stdout"]).with_name(PASSED)
    passed.unlink(missing_ok=True)
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            code = _become(request)
            atexit._run_exitfuncs()  # what an interpreter does as it ends, such as removing semaphores
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(code)
    print(json.dumps({"pid": pid}), file=answers, flush=True)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    points = passed.read_text(encoding="utf-8").split() if passed.exists() else []
    print(json.dumps({"code": code, "passed": points}), file=answers, flush=True)


def main() -> None:
    """Serve until the input ends."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever a library prints while it is imported is no answer
    _note_fault_points()
    _import_everything()
    folder = Path(sys.argv[1], STEPS)
    folder.mkdir()
    _remember_steps(folder)
    for run_file in sys.argv[2:]:
        _plan(run_file)
    print(json.dumps({"ready": True}), file=answers, flush=True)
    for line in sys.stdin:
        _fork(json.loads(line), answers)


if __name__ == "__main__":
    main()
