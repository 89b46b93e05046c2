"""What the server answers, as types: its routes are checked against them, and the page's own types are made from them.

``python -m musubi_tuner.ui --types`` prints them; see CONTRIBUTING.md.
"""

from typing import Any, Literal, NotRequired

from typing_extensions import TypedDict

from musubi_tuner.errors import ConfigError

State = Literal["running", "stopping", "stopped", "finished", "failed", "lost"]
"""Of a run; lost = its process is gone, and it did not say how it ended."""

QueueState = Literal["waiting", "started", "ended"]
Kind = Literal["switch", "whole", "number", "choice", "text", "value"]
"""Of a control."""


class NotThere(ConfigError):
    """What was asked for is not there: the answer is a 404."""


class Done(TypedDict):
    """Nothing more to say."""

    ok: bool


class Opened(TypedDict):
    """A session. csrf: what each change must send."""

    csrf: str


class Tab(TypedDict):
    """One of the seven."""

    name: str
    title: str


class OwnWords(TypedDict):
    """What a family says otherwise of a setting."""

    help: str
    choices: list[Any]
    kind: Kind


class FormField(TypedDict):
    """One setting. kind: of the control. names: other names of it. families: codes of those that have it. own: by family, where it differs."""

    key: str
    name: str
    table: str
    tab: str
    label: str
    help: str
    kind: Kind
    unit: str
    default: Any
    required: bool
    expert: bool
    secret: bool
    path: bool
    choices: list[Any]
    low: float | None
    high: float | None
    step: float | None
    names: list[str]
    families: list[str]
    free: bool
    own: dict[str, OwnWords]


class FamilyEntry(TypedDict):
    """A family. defaults: by key, where they are its own. roles: modules that train on their own; empty where there is one."""

    code: str
    full_name: str
    title: str
    defaults: dict[str, Any]
    roles: list[str]


class Schema(TypedDict):
    """The form."""

    tabs: list[Tab]
    fields: list[FormField]
    families: list[FamilyEntry]


class System(TypedDict):
    """Where the server works."""

    project: str
    version: str
    disk_free: int
    disk_total: int


class Finding(TypedDict):
    """One thing that was found. step: place in [[steps]] where the setting stands; absent = in the file itself."""

    code: str
    level: Literal["error", "warning", "info"]
    keys: list[str]
    reason: str
    fix: list[tuple[str, Any]]
    step: int | None


class Resolved(TypedDict):
    """Settings as they would be used. idle: keys that do nothing. origins: of those that neither the file nor a plain default gives."""

    resolved: dict[str, Any]
    idle: list[str]
    origins: dict[str, str]


class Checked(Resolved):
    """What a run file comes to. steps: of a file that has them; then ``resolved`` is empty, and ``idle`` what is idle in all."""

    number: int
    diagnostics: list[Finding]
    not_applicable: dict[str, str]
    title: str
    steps: list[Resolved]


class BucketRow(TypedDict):
    """Pictures of one size. cropped: mean share. enlarged: largest factor."""

    width: int
    height: int
    images: int
    presentations: int
    batches: int
    last_batch: int
    cropped: float
    enlarged: float


class Rate(TypedDict):
    """A learning rate over the updates."""

    label: str
    steps: list[int]
    values: list[float]


class Preview(TypedDict):
    """What the data and the budget come to; ``problem`` says why there is none of the rest."""

    number: int
    problem: str
    images: int
    total: int
    per_epoch: int
    epochs: int
    about: bool
    sentence: str
    besides: str
    buckets: list[BucketRow]
    notes: list[str]
    rates: list[Rate]
    captions: list[str]


class PlanText(TypedDict):
    """What train.py --plan says. code: 0 if it could be made. needs: its lines on memory, disk and what is short."""

    code: int
    text: str
    needs: list[str]


class Density(TypedDict):
    """How often a noise level is trained: shares of the levels in so many equal parts of 0 to 1. problem: why there is none."""

    number: int
    problem: str
    shares: list[float]


class TokenCount(TypedDict):
    """Tokens of a text for one encoder, and how many it takes."""

    name: str
    tokens: int
    limit: int


class Toml(TypedDict):
    """A run file as text."""

    text: str


class Parsed(TypedDict):
    """A run file as tables."""

    document: dict[str, Any]


class Config(Toml, Parsed):
    """A saved config. tag: identifies what was read."""

    tag: str


class Imported(Parsed):
    """A file of another tool as ours, with what became of its keys."""

    report: dict[str, Any]


class Difference(TypedDict):
    """A setting whose values differ; absent where one has none."""

    key: str
    ours: Any
    theirs: Any


class Names(TypedDict):
    """Of saved configs and templates."""

    saved: list[str]
    templates: list[str]


class Tag(TypedDict):
    """Of what has been saved."""

    tag: str


class Entry(TypedDict):
    """A file or a folder of this machine."""

    name: str
    path: str
    folder: bool
    size: int


class Listing(TypedDict):
    """A folder. parent: absent at the top of what may be seen. roots: tops that may be seen."""

    path: str
    parent: str | None
    roots: list[str]
    entries: list[Entry]


class OpenedSet(TypedDict):
    """A data set whose pictures can be shown, or why they cannot."""

    id: str
    name: str
    folder: str
    count: int
    problem: str


class CaptionState(TypedDict):
    """A caption with its tag; None where there is no file. locked: why it cannot be edited."""

    caption: str | None
    tag: str | None
    locked: str


class Picture(CaptionState):
    """A picture of a data set. crop: left, top, width and height that are trained, as shares of the picture."""

    name: str
    problem: str
    size: tuple[int, int] | None
    bucket: tuple[int, int] | None
    crop: tuple[float, float, float, float] | None
    version: int


class Change(TypedDict):
    """A caption before and after a replacement."""

    name: str
    before: str
    after: str


class Replaced(TypedDict):
    """What a replacement changed, or would change. undo: captions that can be put back."""

    count: int
    changes: list[Change]
    undo: int
    problem: str


class TagCount(TypedDict):
    """A part of captions between commas, and in how many of them it is."""

    tag: str
    count: int


class Undone(TypedDict):
    """Captions that are as they were. kept: files that were edited since."""

    count: int
    kept: list[str]


class QueueAnswer(TypedDict):
    """The queue. paused: nothing is started until that is taken back."""

    paused: bool
    entries: "list[Queued]"


class Queued(TypedDict):
    """A run file of the queue."""

    number: int
    name: str
    state: QueueState
    run: str | None
    reason: str


class Ending(TypedDict):
    """How a start of a run ended."""

    code: int | None
    signal: int | None
    message: str | None
    ended: float | None


class Run(TypedDict):
    """A run of this machine."""

    id: str
    name: str
    folder: str
    config: str
    pid: int | None
    state: State
    exit: Ending | None
    phase: str | None
    done: int | None
    total: int | None
    step: int | None
    steps: int | None
    loss: float | None
    seconds_left: float | None
    message: str | None
    started: float | None
    updated: float | None
    host: str | None
    part: str | None


class StepState(TypedDict):
    """A step of the file of a run."""

    name: str
    status: str | None
    step: int | None


class Sample(TypedDict):
    """A picture of a run. group: what it shows, such as a prompt or a plot. step: update at which it was drawn; absent = none."""

    part: str
    name: str
    path: str
    time: float
    group: str
    step: int | None


class Checkpoint(TypedDict):
    """Weights of a run."""

    part: str
    name: str
    step: int | None
    epoch: int | None
    kind: str | None
    model: str | None
    ema: str | None
    metric: str | None
    value: float | None


class RunDetail(Run):
    """A run with what it made. draws: whether pictures can be drawn from it."""

    steps_of_file: list[StepState]
    samples: list[Sample]
    checkpoints: list[Checkpoint]
    toml: str
    draws: bool


class Curve(TypedDict):
    """Values by update."""

    steps: list[int]
    values: list[float]


class Series(TypedDict):
    """One of a run's curves. tags: of all of them. lost: updates whose value was not finite. borders: first update of each step. starts: of each start but the first."""

    tags: list[str]
    curves: dict[str, Curve]
    lost: dict[str, list[int]]
    borders: dict[str, int]
    starts: list[int]


class Log(TypedDict):
    """A piece of a log. offset: behind it, in bytes."""

    text: str
    offset: int
    size: int


class Started(TypedDict):
    """A run that was started. id: absent while it has not recorded itself."""

    id: str | None
    pid: int
    folder: str


class PictureFacts(TypedDict):
    """How a sample was drawn: what its file says."""

    facts: dict[str, str]


class Drawing(TypedDict):
    """Pictures that are being drawn. state: running, or how it ended. message: the last lines, where it failed."""

    state: Literal["none", "running", "finished", "failed"]
    message: str
    pictures: list[str]


class Secrets(TypedDict):
    """Which secrets the server has; never what they are."""

    set: dict[str, bool]


class Problem(TypedDict):
    """Why a request was refused."""

    code: str
    message: str
    tag: NotRequired[str | None]


class Failure(TypedDict):
    """The body of every error."""

    error: Problem
