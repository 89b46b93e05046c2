"""The order of an epoch: the only place that decides what is trained when. Torch-free.

Items are grouped by bucket, every bucket is shuffled and cut into micro-batches, then the micro-batches are shuffled.
The shuffles are keyed by (seed, epoch), so order depends neither on restarts nor on who asks. Nothing is dropped and
nothing repeats beyond ``num_repeats``; the last micro-batch of a bucket may be short.

An update is K = processes x accumulation consecutive micro-batches of this list; rank r runs its share. The last
update of an epoch may have fewer: the ranks without one run an empty share.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from musubi_tuner.config.captions import CaptionSettings
from musubi_tuner.randomness import keyed_random, uniform


@dataclass(frozen=True)
class PlanItem:
    """What the plan knows of an item.

    Attributes:
        id: unique in the run; decides the order before the shuffle.
        bucket: only items of one bucket share a micro-batch.
        num_repeats: presentations per epoch.
        micro_batch: batch size, if not the plan's; items of different sizes never share a micro-batch.
    """

    id: str
    bucket: Hashable
    num_repeats: int = 1
    micro_batch: int | None = None


@dataclass(frozen=True)
class MicroBatch:
    """Images that go through the model together.

    Attributes:
        items: positions in the list given to `plan_epoch`.
        presentations: running number in the epoch of each, the key of its random draws.
    """

    items: tuple[int, ...]
    presentations: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.items)


@dataclass(frozen=True)
class PlanGroups:
    """What the plan knows of very many items, which are sorted by their ids already.

    Attributes:
        alike: what items have in common; ids are not used. number: of each item.
    """

    alike: Sequence[PlanItem]
    number: Sequence[int]


def plan_epoch(items: Sequence[PlanItem] | PlanGroups, seed: int, epoch: int, micro_batch: int = 1) -> list[MicroBatch]:
    """Micro-batches of one epoch, in the order they are trained.

    Args:
        items: in any order; the result does not depend on it but for the positions it names.
        seed: of the run. epoch: from 0.
        micro_batch: images per micro-batch, for items that do not say.
    """
    groups: dict[tuple[str, int], list[int]] = {}
    if isinstance(items, PlanGroups):
        own = [
            (groups.setdefault((repr(item.bucket), item.micro_batch or micro_batch), []), item.num_repeats)
            for item in items.alike
        ]
        for position, number in enumerate(items.number):
            members, repeats = own[number]
            members.extend([position] * repeats)
        groups = {group: members for group, members in groups.items() if members}
    else:
        for position in sorted(range(len(items)), key=lambda i: items[i].id):
            item = items[position]
            group = (repr(item.bucket), item.micro_batch or micro_batch)
            groups.setdefault(group, []).extend([position] * item.num_repeats)
    batches: list[list[int]] = []
    for (bucket, size), members in sorted(groups.items()):
        keyed_random(seed, "bucket order", epoch, bucket, size).shuffle(members)
        batches += [members[start : start + size] for start in range(0, len(members), size)]
    keyed_random(seed, "batch order", epoch).shuffle(batches)
    planned: list[MicroBatch] = []
    begun = 0
    for batch in batches:
        planned.append(MicroBatch(tuple(batch), tuple(range(begun, begun + len(batch)))))
        begun += len(batch)
    return planned


def caption_of(
    captions: int,
    seed: int,
    epoch: int,
    presentation: int,
    text: CaptionSettings | None = None,
    *,
    of_epoch: int = 1,
    dropping: bool = True,
) -> int:
    """Which of an item's captions a presentation takes: one draw for everything that is made from captions.

    Args:
        text: of the data set; where it drops captions by an empty one, that is the last.
        of_epoch: presentations in an epoch, by which token warm-up counts.
        dropping: false takes whole captions, none left out.
    """
    if text is not None and text.drops and text.drop_as_empty:
        if dropping and text.is_dropped(epoch, uniform(seed, "caption_dropout", epoch, presentation)):
            return captions - 1
        captions -= 1
    if text is not None and text.token_warmup_step:
        captions //= 2  # the second half is for the warm-up
        at = epoch + presentation / of_epoch
        if dropping and at < text.warmup_epochs:
            return captions + int(captions * at / text.warmup_epochs)
    return 0 if captions == 1 else int(captions * uniform(seed, "caption", epoch, presentation))


def number_of_view(views: int, seed: int, epoch: int, presentation: int) -> int:
    """Which of the versions of its picture a presentation takes."""
    return 0 if views < 2 else int(views * uniform(seed, "view", epoch, presentation))


@dataclass(frozen=True)
class Update:
    """One optimizer step.

    Attributes:
        micro_batches: all of it, over all ranks; at most processes x accumulation.
        share: those of one rank, with their index in the update; None where the rank has nothing left to do.
        samples: images in the whole update, by which its summed loss is divided.
    """

    micro_batches: tuple[MicroBatch, ...]
    share: tuple[tuple[int, MicroBatch | None], ...]
    samples: int


def updates_of_epoch(
    planned: Sequence[MicroBatch], *, num_processes: int, grad_accum_steps: int, rank: int
) -> list[Update]:
    """Cut an epoch's plan into updates, and pick the share of one rank.

    Every rank runs ``grad_accum_steps`` micro-batches in every update, so that collective operations match.
    """
    per_update = num_processes * grad_accum_steps
    updates = []
    for start in range(0, len(planned), per_update):
        batches = tuple(planned[start : start + per_update])
        indices = range(rank * grad_accum_steps, (rank + 1) * grad_accum_steps)
        share = tuple((index, batches[index] if index < len(batches) else None) for index in indices)
        updates.append(Update(batches, share, sum(len(batch) for batch in batches)))
    return updates
