"""Settings that a person wrote and that have no effect; the condition is part of the field (see `config.when`)."""

from collections.abc import Collection, Iterator

from musubi_tuner.config.diagnostics import Diagnostic, warning
from musubi_tuner.config.run_config import ROLE_TABLES, RunConfig
from musubi_tuner.config.schema import parameters

NO_EFFECT = "NA03"


def idle(config: RunConfig) -> dict[str, str]:
    """Settings that have no effect in a run -> why."""
    return {
        parameter.key: parameter.when.reason(config.get)
        for parameter in parameters(config.spec)
        if parameter.when is not None and not parameter.when.holds(config.get)
    }


def without_effect(
    config: RunConfig, written: Collection[str], wrong: Collection[str] = (), *, moving: bool
) -> Iterator[Diagnostic]:
    """Warnings of written settings that have no effect. A value that means "off" gives no warning.

    Args:
        written: keys that a person set. wrong: keys without a usable value.
        moving: settings of the tables that a role may override, or those of all other tables.
    """
    reasons = idle(config)
    for parameter in parameters(config.spec):
        key = parameter.key
        if key not in reasons or key not in written or (parameter.section in ROLE_TABLES) is not moving:
            continue
        assert parameter.when is not None
        about = parameter.when.about()
        if parameter.is_neutral(config.get(key)) or any(each in wrong for each in about):
            continue
        yield warning(parameter.extra("rule") or NO_EFFECT, key, f"has no effect because {reasons[key]}", *about)
