"""The reference page of all settings: ``python -m musubi_tuner.config.reference > docs/parameters.md``. Torch-free."""

import sys

from musubi_tuner.config.command_line import table_doc, type_and_default
from musubi_tuner.config.schema import flat_names, item_parameters, parameters


def reference_page() -> str:
    """The page as Markdown."""
    flags: dict[str, list[str]] = {}
    for name, parameter in flat_names().items():
        flags.setdefault(parameter.key, []).append(f"`--{name}`")
    lines = [
        "# Settings of a run file",
        "",
        "Made from the code by `python -m musubi_tuner.config.reference`; do not edit.",
        "",
        "Every setting outside `[[datasets]]` can also be given as `--set table.key=value`. An optional value that is absent means off, unless",
        "its meaning says otherwise. `[accelerate]` is another name of `[distributed]`. Options of `[general]` on the command line override",
        "the file; the keys of a data set override both. A setting marked * may change when a run is resumed; if another one outside",
        "`[general]` and `[[datasets]]` has changed, resuming is refused with a list of the differences. If families differ, types and",
        "defaults are listed with the code of each family that has the setting.",
    ]
    section = None
    for parameter in (*parameters(), *item_parameters()):
        if parameter.section != section:
            section = parameter.section
            title = f"## [{section}]" if section else "## Top level"
            title = "## [[datasets]]" if section == "datasets" else title
            lines += ["", title, ""]
            if section:
                lines += [table_doc(section), ""]
            lines += ["| key | type | default | option | meaning |", "|---|---|---|---|---|"]
        kind, default = type_and_default(parameter)
        items = parameter.section in ("general", "datasets")  # changed items are another data set
        star = "*" if parameter.extra("resume") == "free" and not items else ""
        cells = [
            f"`{parameter.name}`{star}",
            kind,
            f"`{default}`" if default not in ("absent", "required") else default,
            " ".join(flags.get(parameter.key, [])),
            parameter.help,
        ]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.stdout.write(reference_page())
