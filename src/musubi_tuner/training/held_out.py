"""The validation split of a run: a resumed run keeps the split of its state, even if the rule has changed."""

from collections.abc import Mapping, Sequence

from musubi_tuner.config import RunConfig
from musubi_tuner.data.item import Item
from musubi_tuner.data.split import hold_out, hold_out_again, hold_out_by_id, pictures_of
from musubi_tuner.training.checkpoint import peek_state

_SHOWN = 3


def split_of_run(config: RunConfig, items: Sequence[Item]) -> tuple[Sequence[Item], list[Item]]:
    """The trained and the held-out items; see `hold_out`."""
    return _recorded(config, items) or new_split(config, items)


def new_split(
    config: RunConfig, items: Sequence[Item], pictures: Mapping[str, str] | None = None
) -> tuple[Sequence[Item], list[Item]]:
    """The split of a new run; regularisation images are trained and not measured, except copies of what is measured."""
    if not config.validation.split:
        return items, []
    pictures = pictures or pictures_of(items)
    measurable = [item for item in items if not config.datasets[item.dataset].is_reg]
    _, held_out = hold_out(measurable, config.validation, {item.key: pictures[item.key] for item in measurable})
    held = {pictures[item.key] for item in held_out}
    return [item for item in items if pictures[item.key] not in held], held_out


def split_note(config: RunConfig, items: Sequence[Item]) -> str | None:
    """A message if the split of the state differs from that of a new run; None if it does not."""
    recorded = _recorded(config, items)
    if recorded is None:
        return None
    pictures = pictures_of(items)
    trained, held_out = recorded
    before = {item.key for item in held_out}
    after = {item.key for item in new_split(config, items, pictures)[1]}
    if before == after:
        return None
    text = (
        f"this run keeps the validation split of its state; a new run would hold out {len(after)} images, and "
        f"{len(before ^ after)} images would change sides"
    )
    measured = {pictures[item.key]: item for item in held_out}
    both = [f"{item.path} as {measured[pictures[item.key]].path}" for item in trained if pictures[item.key] in measured]
    if both:
        shown = ", ".join(both[:_SHOWN]) + (", ..." if len(both) > _SHOWN else "")
        text += f". {len(both)} of the trained files are copies of held-out pictures ({shown}), so loss/val is too low"
    return f"{'warning' if both else 'note'}: {text}. Use --fresh to start over with the new split"


def _recorded(config: RunConfig, items: Sequence[Item]) -> tuple[Sequence[Item], list[Item]] | None:
    """The split of the state from which the run is resumed; None without a state, or if its data sets are different."""
    if not config.validation.split:
        return None
    values = peek_state(config)
    if values is None:
        return None
    if "held_out" not in values:
        return hold_out_by_id(items, config.validation)
    known = {item.key for item in items}
    keys = values["held_out"]
    # A state that knows other items is refused where it is read.
    return hold_out_again(items, keys) if keys and known.issuperset(keys) else None
