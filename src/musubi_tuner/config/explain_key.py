"""What a setting is, or what a name of another trainer means here: text for ``config explain``. Torch-free."""

from musubi_tuner.config.command_line import type_and_default
from musubi_tuner.config.diagnostics import did_you_mean
from musubi_tuner.config.fields import Parameter
from musubi_tuner.config.foreign import FOREIGN
from musubi_tuner.config.schema import flat_names, item_parameters, parameters
from musubi_tuner.errors import ConfigError
from musubi_tuner.models.registry import MODELS


def explain_key(key: str) -> str:
    """Type, default, meaning and other names of a setting, by its key or any name; or what a name of another trainer means here.

    Raises:
        ConfigError: if the name is unknown, with the nearest names.
    """
    everything = {parameter.key: parameter for parameter in (*parameters(), *item_parameters())}
    parameter = everything.get(key) or flat_names().get(key)
    if parameter is not None:
        return _setting(parameter)
    last = [each for each in everything.values() if each.name == key]
    if last:
        return "\n\n".join(_setting(each) for each in last)
    entry = FOREIGN.get(key) or FOREIGN.get(key.rpartition(".")[2])
    if entry is None:
        reasons = {code: MODELS[code].why_not(key, None) for code in MODELS}
        told = "\n".join(f"{MODELS[code].title}: {reason}" for code, reason in reasons.items() if reason)
        if told:
            return f"{key}\n{told}"
        raise ConfigError(
            f"{key}: no setting has this name.{did_you_mean(key, [*everything, *flat_names(), *FOREIGN])}"
        )
    if entry.refused:
        return f"{key}: is refused unless it is off: it {entry.refused}"
    if not entry.key:
        return f"{key}: is accepted and left out: {entry.harmless}"
    rule = f" ({entry.rule})" if entry.rule else ""
    return f"{key}: is another name of {entry.key}{rule}\n\n{_setting(everything[entry.key])}"


def _setting(parameter: Parameter) -> str:
    kind, default = type_and_default(parameter)
    lines = [parameter.key, f"  {parameter.help}", f"  type     {kind}", f"  default  {default}"]
    if parameter.extra("unit"):
        lines.append(f"  unit     {parameter.extra('unit')}")
    if parameter.when is not None:
        lines.append(f"  effect   depends on {', '.join(parameter.when.about())}")
    names = sorted(name for name, other in flat_names().items() if other.key == parameter.key)
    names += sorted(name for name, entry in FOREIGN.items() if entry.key == parameter.key)
    if names:
        lines.append(f"  also     {', '.join(dict.fromkeys(names))}")
    if parameter.extra("resume") == "free" and parameter.section not in ("general", "datasets"):
        lines.append("  resume   may change when a run is resumed")
    return "\n".join(lines)
