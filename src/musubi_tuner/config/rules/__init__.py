"""Rules between settings, by subject. Torch-free; what needs a device or the weights is checked in the plan.

Each rule names the settings that it reads, and is skipped if one of them has a wrong value: so all mistakes of a file that do not
hide each other are reported together.
"""

from collections.abc import Collection, Iterator
from dataclasses import replace

from musubi_tuner.config.diagnostics import Diagnostic, error, warning
from musubi_tuner.config.rules.adapter import ADAPTER
from musubi_tuner.config.rules.effect import NO_EFFECT, without_effect
from musubi_tuner.config.rules.files import FILES
from musubi_tuner.config.rules.items import ITEMS
from musubi_tuner.config.rules.memory import MEMORY
from musubi_tuner.config.rules.movement import MOVEMENT
from musubi_tuner.config.rules.training import TRAINING
from musubi_tuner.config.run_config import RunConfig

GROUPS = (TRAINING, ADAPTER, MEMORY, ITEMS, FILES, MOVEMENT)
"""All rules of the framework."""


def validate(config: RunConfig, wrong: Collection[str] = ()) -> list[Diagnostic]:
    """Everything that can be known about a config without torch.

    Args:
        wrong: keys without a usable value, for which the config has the default; rules that read them are skipped.
    """
    return [
        *TRAINING.check(config, wrong),
        *ADAPTER.check(config, wrong),
        *MEMORY.check(config, wrong),
        *ITEMS.check(config, wrong),
        *without_effect(config, set(config.set_keys()), wrong, moving=False),
        *_denoiser(config),
        *(config.spec.rules.check(config, wrong) if config.spec.rules else ()),
        *FILES.check(config, wrong),
        *_until(config, wrong),
        *_roles(config, wrong),
    ]


def _denoiser(config: RunConfig) -> Iterator[Diagnostic]:
    """Settings of denoisers, in a run that trains none; those of a file of steps may be for another step."""
    facts, step = config.spec.task(config), config.step
    for key in config.set_keys():
        table, _, name = key.partition(".")
        elsewhere = step is not None and name.partition(".")[0] not in (step.own.get(table) or {})
        if not facts.has(key) and not elsewhere:
            yield error(
                "NA01", key, f"applies to denoisers, and this run of {config.spec.title} trains none; remove it"
            )


def _until(config: RunConfig, wrong: Collection[str]) -> Iterator[Diagnostic]:
    until = config.step.until if config.step else None
    if (
        until
        and until.metric.startswith("loss/val")
        and not config.validation.split
        and "validation.split" not in wrong
    ):
        text = f"is {until.metric!r}, but nothing is validated: validation.split is 0; set it"
        yield error("V89", "until.metric", text, "validation.split")


def _roles(config: RunConfig, wrong: Collection[str]) -> Iterator[Diagnostic]:
    """Rules of [roles], and of the weights of each role: under the role's key if it sets it, else under the run's."""
    roles = config.spec.task(config).roles
    for name in sorted({*type(config.roles).model_fields} - {"freeze", *roles}):
        if config.role_keys(name):
            text = f"is not a role of this run, which trains {', '.join(roles)}"
            yield error("NA01", f"roles.{name}", text)
    for name in config.frozen:
        if name not in roles:
            text = f"{name!r} is not a role of this run, which trains {', '.join(roles)}"
            yield error("NA01", "roles.freeze", text)
        for key in sorted(config.role_keys(name)):
            text = "has no effect because roles.freeze names the role"
            yield warning(NO_EFFECT, f"roles.{name}.{key}", text, "roles.freeze")
    moving = [name for name in roles if name not in config.frozen]
    if not moving:
        yield error("V43", "roles.freeze", "names all roles, so nothing would be trained; leave one out")
    of_run: dict[Diagnostic, int] = {}
    for name in moving:
        own, of_role = config.role_keys(name), config.for_role(name)
        written = own | set(config.set_keys())
        problems = [*MOVEMENT.check(of_role, wrong), *without_effect(of_role, written, wrong, moving=True)]
        for problem in problems:
            if problem.key in own:
                yield replace(problem, keys=(f"roles.{name}.{problem.key}", *problem.keys[1:]))
            else:
                of_run[problem] = of_run.get(problem, 0) + 1
    for problem, count in of_run.items():
        # What has no effect for one role may have one for another.
        takers = [name for name in moving if problem.key not in config.role_keys(name)]
        if problem.level == "error" or count == len(takers):
            yield problem
