"""Optimizers: one record for each, from which settings, checks, memory estimate, importers and docs take what they need. Torch-free.

The constructors are those of torch, bitsandbytes, transformers and of small packages (extra ``optim``); `training.optimizers` calls
them. The arguments are checked against these records, which a test compares with the installed packages.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from musubi_tuner.units import Bytes

Name = Literal[
    "AdamW", "AdamW8bit", "PagedAdamW", "PagedAdamW8bit", "PagedAdamW32bit", "AdEMAMix8bit", "Adam", "Lion", "Lion8bit", "PagedLion8bit",
    "SGD", "SGDNesterov", "SGDNesterov8bit", "RMSprop", "Adafactor", "CAME", "Muon", "Prodigy", "DAdaptation", "DAdaptAdam",
    "DAdaptAdaGrad", "DAdaptAdan", "DAdaptAdanIP", "DAdaptLion", "DAdaptSGD", "AdamWScheduleFree", "SGDScheduleFree",
    "RAdamScheduleFree",
]  # fmt: skip
SMALL_8BIT, BLOCK_8BIT = 4096, 256
"""Parameters with fewer values keep float32 moments in bitsandbytes' 8-bit optimizers; codes of so many values share a float32 scale."""


@dataclass(frozen=True)
class Argument:
    """An argument of a constructor.

    Attributes:
        default: what it is unless optimizer.args sets it; its type is that of the argument, where ``kind`` does not say otherwise.
        ge, gt, le, lt: limits of a number. kind: "" = as the default; "number or none", "list of 2 numbers", ... choices: of a text.
    """

    default: Any
    ge: float | None = None
    gt: float | None = None
    le: float | None = None
    lt: float | None = None
    kind: str = ""
    choices: tuple[str, ...] = ()

    @property
    def expected(self) -> str:
        """What a value must be, in words."""
        if self.choices:
            return f"one of {', '.join(self.choices)}"
        words = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}
        limits = {"at least": self.ge, "above": self.gt, "at most": self.le, "below": self.lt}
        said = [f"{text} {limit:g}" for text, limit in limits.items() if limit is not None]
        return " ".join([self.kind or words[type(self.default)], " and ".join(said)]).strip()

    def accepts(self, value: Any) -> bool:
        """Whether a value can be passed."""
        if self.choices:
            return value in self.choices
        if self.kind.startswith("list"):
            count = 2 if "2" in self.kind else 3
            return isinstance(value, list) and len(value) == count and all(_is_number(each) for each in value)
        if isinstance(self.default, bool):
            return isinstance(value, bool)
        if not _is_number(value) or (isinstance(self.default, int) and not isinstance(value, int)):
            return False
        number, never = float(value), math.inf
        above = number >= (-never if self.ge is None else self.ge) and number > (-never if self.gt is None else self.gt)
        below = number <= (never if self.le is None else self.le) and (self.lt is None or number < self.lt)
        return above and below


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


Shape = Sequence[int]
StateSize = Callable[[Shape, Mapping[str, Any]], Bytes]
"""(shape of a parameter, arguments) -> what is remembered of it, without counters and code tables."""


@dataclass(frozen=True)
class Optimizer:
    """One optimizer.

    Attributes:
        source: ``module:class``. about: a sentence. package: on PyPI; "torch" and what a usual installation has need no extra.
        arguments: that optimizer.args may set. given: passed always, unless optimizer.args says otherwise.
        betas: how many there are; as "momentum" the first alone is passed. eps: whether there is one number.
        defaults: key of [optimizer] or another table -> its value with this optimizer, unless the run file sets it.
        state: see `StateSize`. remembers: entries of a parameter group that change.
        finds_rate: it estimates the learning rate, and lr is a factor of it. averages: it is schedule-free: the weights to use are an
            average that it keeps. signs: it steps by the sign of the moment. alone: parameters can be stepped one at a time.
        elementwise: a value moves by itself, and what is remembered has the shape of the parameter.
        on_device: it runs on the device alone. elsewhere: names of other trainers, in lower case, beside its own.
    """

    source: str
    about: str
    state: StateSize
    package: str = "torch"
    arguments: Mapping[str, Argument] = field(default_factory=dict)
    given: Mapping[str, Any] = field(default_factory=dict)
    betas: Literal[0, 2, 3, "momentum"] = 2
    eps: bool = True
    defaults: Mapping[str, Any] = field(default_factory=dict)
    remembers: tuple[str, ...] = ()
    finds_rate: bool = False
    averages: bool = False
    signs: bool = False
    alone: bool = False
    elementwise: bool = False
    on_device: bool = False
    elsewhere: tuple[str, ...] = ()

    @property
    def extra(self) -> str:
        """Extra of this project that has its package; "" = a usual installation has it."""
        return "" if self.package in ("torch", "bitsandbytes", "transformers") else "optim"

    @property
    def way_out(self) -> str:
        """What to do where its package is missing."""
        return f'pip install ".[{self.extra}]"' if self.extra else f"pip install {self.package}"

    @property
    def module(self) -> str:
        """What must be importable."""
        return self.source.partition(".")[0].partition(":")[0]

    def complete(self, args: Mapping[str, Any]) -> dict[str, Any]:
        """All arguments with their values."""
        return {**{name: each.default for name, each in self.arguments.items()}, **self.given, **args}


def _moments(count: int, least_8bit: bool = False) -> StateSize:
    """So many float32 values for each value; or, in 8 bits, codes with a scale for a block of them."""

    def size(shape: Shape, args: Mapping[str, Any]) -> Bytes:
        values = math.prod(shape)
        if least_8bit and values >= args["min_8bit_size"]:
            return count * (values + 4 * -(-values // BLOCK_8BIT))
        return 4 * count * values

    return size


def _if(argument: str, count: int = 1) -> StateSize:
    """Float32 values for each value where an argument is on."""
    return lambda shape, args: 4 * count * math.prod(shape) if args[argument] else 0


def _rows_and_columns(shape: Shape) -> Bytes:
    return 4 * (math.prod(shape[:-1]) + math.prod(shape[:-2]) * shape[-1])


def _adam(shape: Shape, args: Mapping[str, Any]) -> Bytes:
    return 4 * math.prod(shape) * (3 if args["amsgrad"] else 2)


def _adafactor(shape: Shape, args: Mapping[str, Any]) -> Bytes:
    second = _rows_and_columns(shape) if len(shape) >= 2 else 4 * math.prod(shape)
    return second + (0 if args["beta1"] is None else 4 * math.prod(shape))


def _came(shape: Shape, args: Mapping[str, Any]) -> Bytes:
    return 4 * math.prod(shape) + (2 * _rows_and_columns(shape) if len(shape) >= 2 else 4 * math.prod(shape))


def _muon(shape: Shape, args: Mapping[str, Any]) -> Bytes:
    return 4 * math.prod(shape) * (1 if len(shape) == 2 else 2)


def _prodigy(shape: Shape, args: Mapping[str, Any]) -> Bytes:
    return 8 * math.prod(shape) + 8 * -(-math.prod(shape) // args["slice_p"])


def _rmsprop(shape: Shape, args: Mapping[str, Any]) -> Bytes:
    return 4 * math.prod(shape) * (1 + bool(args["momentum"]) + bool(args["centered"]))


_BNB = {"min_8bit_size": Argument(SMALL_8BIT, ge=0)}
_AMSGRAD = {"amsgrad": Argument(False)}
_SGD = {"momentum": Argument(0.9, ge=0, lt=1), "dampening": Argument(0.0, ge=0, le=1)}
_GROWS = {"d0": Argument(1e-6, gt=0), "growth_rate": Argument(math.inf, ge=1)}
_DECOUPLES = {"decouple": Argument(True), **_GROWS}
_FREE = {"r": Argument(0.0, ge=0), "weight_lr_power": Argument(2.0, ge=0)}
_WARMS = {**_FREE, "warmup_steps": Argument(0, ge=0)}
_CLIPS = {"clip_threshold": Argument(1.0, gt=0)}
_FACTOR = {"optimizer.lr": 1.0}
"""The rate of optimizers that find theirs is a factor of what they find."""
_SIGNS = {"optimizer.lr": 3e-5, "optimizer.betas": [0.9, 0.99]}
_CONSTANT = {"scheduler.type": "constant", "scheduler.warmup_steps": 0, "ema.enabled": False}
"""Schedule-free optimizers average by themselves."""
_KEEPS = ("k", "weight_sum", "lr_max", "scheduled_lr")
_FOUND = ("d", "k", "gsq_weighted")
_ADAN = {"optimizer.betas": [0.98, 0.92, 0.99], **_FACTOR}


def _eight_bit(moments: int) -> StateSize:
    return _moments(moments, least_8bit=True)


def _ademamix(shape: Shape, args: Mapping[str, Any]) -> Bytes:
    return _eight_bit(3)(shape, args)


OPTIMIZERS: dict[Name, Optimizer] = {
    "AdamW": Optimizer(
        "torch.optim:AdamW", "Adam with decoupled weight decay", _adam, arguments=_AMSGRAD, alone=True, elementwise=True,
        elsewhere=("adamw_torch", ""),
    ),
    "AdamW8bit": Optimizer(
        "bitsandbytes.optim:AdamW8bit", "AdamW with moments in 8 bits", _eight_bit(2), "bitsandbytes", _BNB, on_device=True, alone=True,
        elsewhere=("adamw_8bit", "adam8bit", "adam_8bit", "adamw8", "adamw_bnb_8bit"),
    ),
    "PagedAdamW": Optimizer(
        "bitsandbytes.optim:PagedAdamW", "AdamW whose moments leave a full GPU", _moments(2), "bitsandbytes", on_device=True,
        elsewhere=("paged_adamw", "pagedadam"),
    ),
    "PagedAdamW8bit": Optimizer(
        "bitsandbytes.optim:PagedAdamW8bit", "AdamW8bit whose moments leave a full GPU", _eight_bit(2), "bitsandbytes", _BNB,
        on_device=True, elsewhere=("paged_adamw_8bit",),
    ),
    "PagedAdamW32bit": Optimizer(
        "bitsandbytes.optim:PagedAdamW32bit", "PagedAdamW under its other name", _moments(2), "bitsandbytes", on_device=True,
        elsewhere=("paged_adamw_32bit",),
    ),
    "AdEMAMix8bit": Optimizer(
        "bitsandbytes.optim:AdEMAMix8bit", "AdamW with a second, slow first moment, in 8 bits", _ademamix, "bitsandbytes",
        {**_BNB, "alpha": Argument(5.0, ge=0)}, betas=3, defaults={"optimizer.betas": [0.9, 0.999, 0.9999]}, on_device=True,
        alone=True,
    ),
    "Adam": Optimizer(
        "torch.optim:Adam", "Adam, whose weight decay is part of the gradient", _adam, arguments=_AMSGRAD,
        defaults={"optimizer.weight_decay": 0.0}, alone=True, elementwise=True,
    ),
    "Lion": Optimizer(
        "lion_pytorch:Lion", "steps by the sign of a moment", _moments(1), "lion-pytorch",
        {"decoupled_weight_decay": Argument(False)}, eps=False, defaults=_SIGNS, signs=True, alone=True, elementwise=True,
    ),
    "Lion8bit": Optimizer(
        "bitsandbytes.optim:Lion8bit", "Lion in 8 bits", _eight_bit(1), "bitsandbytes", _BNB, eps=False, defaults=_SIGNS,
        signs=True, on_device=True, alone=True, elsewhere=("lion_8bit",),
    ),
    "PagedLion8bit": Optimizer(
        "bitsandbytes.optim:PagedLion8bit", "Lion8bit whose moment leaves a full GPU", _eight_bit(1), "bitsandbytes", _BNB,
        eps=False, defaults=_SIGNS, signs=True, on_device=True, elsewhere=("paged_lion_8bit",),
    ),
    "SGD": Optimizer(
        "torch.optim:SGD", "gradient descent with momentum", _if("momentum"), arguments={**_SGD, "nesterov": Argument(False)},
        given={"momentum": 0.9}, betas=0, eps=False, defaults={"optimizer.lr": 1e-3}, alone=True, elementwise=True,
    ),
    "SGDNesterov": Optimizer(
        "torch.optim:SGD", "gradient descent with Nesterov's momentum", _moments(1),
        arguments={"momentum": Argument(0.9, gt=0, lt=1)}, given={"nesterov": True, "momentum": 0.9}, betas=0, eps=False,
        defaults={"optimizer.lr": 1e-3}, alone=True, elementwise=True,
    ),
    "SGDNesterov8bit": Optimizer(
        "bitsandbytes.optim:SGD8bit", "SGDNesterov in 8 bits", _eight_bit(1), "bitsandbytes",
        {**_BNB, "momentum": Argument(0.9, gt=0, lt=1)}, given={"nesterov": True, "momentum": 0.9}, betas=0, eps=False,
        defaults={"optimizer.lr": 1e-3}, on_device=True, alone=True,
    ),
    "RMSprop": Optimizer(
        "torch.optim:RMSprop", "divides by the root of the mean square", _rmsprop,
        arguments={"alpha": Argument(0.99, ge=0, lt=1), "momentum": Argument(0.0, ge=0, lt=1), "centered": Argument(False)},
        betas=0, defaults={"optimizer.weight_decay": 0.0}, alone=True, elementwise=True,
    ),
    "Adafactor": Optimizer(
        "transformers.optimization:Adafactor", "second moments of rows and columns only", _adafactor, "transformers",
        {**_CLIPS, "decay_rate": Argument(-0.8, lt=0), "beta1": Argument(None, ge=0, lt=1, kind="a number"),
         "scale_parameter": Argument(False), "relative_step": Argument(False), "warmup_init": Argument(False),
         "eps": Argument([1e-30, 1e-3], kind="list of 2 numbers")},
        given={"scale_parameter": False, "relative_step": False, "warmup_init": False}, betas=0, eps=False, alone=True,
    ),
    "CAME": Optimizer(
        "came_pytorch:CAME", "Adafactor with a first moment and confidence", _came, "came-pytorch",
        {**_CLIPS, "eps": Argument([1e-30, 1e-16], kind="list of 2 numbers")}, betas=3, eps=False,
        defaults={"optimizer.betas": [0.9, 0.999, 0.9999]}, alone=True,
    ),
    "Muon": Optimizer(
        "musubi_tuner.training.muon:MuonWithAdamW", "orthogonalised momentum for matrices, AdamW for the rest", _muon,
        arguments={"momentum": Argument(0.95, ge=0, lt=1), "nesterov": Argument(True), "ns_steps": Argument(5, ge=1, lt=100),
                   "adjust_lr_fn": Argument("match_rms_adamw", choices=("match_rms_adamw", "original"))},
        given={"adjust_lr_fn": "match_rms_adamw"},
    ),
    "Prodigy": Optimizer(
        "prodigyopt:Prodigy", "Adam that estimates its learning rate", _prodigy, "prodigyopt",
        {**_DECOUPLES, "beta3": Argument(None, ge=0, lt=1, kind="a number"), "use_bias_correction": Argument(False),
         "safeguard_warmup": Argument(False), "d_coef": Argument(1.0, gt=0), "slice_p": Argument(1, ge=1)},
        defaults=_FACTOR, remembers=("d", "d_max", "d_numerator", "d_denom", "d_hat", "k"), finds_rate=True,
    ),
    "DAdaptation": Optimizer(
        "dadaptation.experimental:DAdaptAdamPreprint", "Adam that estimates its learning rate, as first published", _moments(3),
        "dadaptation", _DECOUPLES, given={"decouple": True}, defaults=_FACTOR, remembers=_FOUND, finds_rate=True,
        elsewhere=("dadaptadampreprint", "dadapt_adam_preprint"),
    ),
    "DAdaptAdam": Optimizer(
        "dadaptation:DAdaptAdam", "Adam that estimates its learning rate", _moments(3), "dadaptation",
        {**_DECOUPLES, "use_bias_correction": Argument(False)}, given={"decouple": True}, defaults=_FACTOR,
        remembers=("d", "k", "numerator_weighted"), finds_rate=True, elsewhere=("dadapt_adam",),
    ),
    "DAdaptAdaGrad": Optimizer(
        "dadaptation:DAdaptAdaGrad", "AdaGrad that estimates its learning rate", _moments(3), "dadaptation",
        {**_GROWS, "momentum": Argument(0.0, ge=0, lt=1)}, betas=0, defaults={**_FACTOR, "optimizer.eps": 1e-6},
        remembers=("d", "k", "gsq_weighted", "sksq_weighted", "skl1"), finds_rate=True, elsewhere=("dadapt_ada_grad",),
    ),
    "DAdaptAdan": Optimizer(
        "dadaptation:DAdaptAdan", "Adan that estimates its learning rate", _moments(5), "dadaptation",
        {**_GROWS, "no_prox": Argument(False)}, betas=3, defaults=_ADAN, remembers=_FOUND, finds_rate=True,
        elsewhere=("dadapt_adan",),
    ),
    "DAdaptAdanIP": Optimizer(
        "dadaptation.experimental:DAdaptAdanIP", "DAdaptAdan with another estimate", _moments(5), "dadaptation",
        {**_GROWS, "no_prox": Argument(False)}, betas=3, defaults=_ADAN, remembers=("d", "k", "numerator_weighted"),
        finds_rate=True, elsewhere=("dadapt_adan_ip",),
    ),
    "DAdaptLion": Optimizer(
        "dadaptation:DAdaptLion", "Lion that estimates its learning rate", _moments(2), "dadaptation",
        {"d0": Argument(1e-6, gt=0)}, eps=False, defaults={"optimizer.betas": [0.9, 0.99], **_FACTOR},
        remembers=("d", "k", "numerator_weighted"), finds_rate=True, elsewhere=("dadapt_lion",),
    ),
    "DAdaptSGD": Optimizer(
        "dadaptation:DAdaptSGD", "SGD that estimates its learning rate", _moments(3), "dadaptation",
        {**_GROWS, "momentum": Argument(0.0, ge=0, lt=1)}, betas=0, eps=False, defaults=_FACTOR,
        remembers=("d", "k", "numerator_weighted", "g0_norm"), finds_rate=True, elsewhere=("dadapt_sgd",),
    ),
    "AdamWScheduleFree": Optimizer(
        "schedulefree:AdamWScheduleFree", "AdamW that averages instead of lowering the rate", _moments(2), "schedulefree", _WARMS,
        defaults={"optimizer.lr": 2.5e-3, **_CONSTANT}, remembers=_KEEPS, averages=True, elementwise=True,
        elsewhere=("schedule_free_adamw", "adamw_schedule_free"),
    ),
    "SGDScheduleFree": Optimizer(
        "schedulefree:SGDScheduleFree", "SGD that averages instead of lowering the rate", _moments(1), "schedulefree", _WARMS,
        betas="momentum", eps=False, defaults={"optimizer.lr": 0.1, **_CONSTANT}, remembers=_KEEPS, averages=True, elementwise=True,
        elsewhere=("schedule_free_sgd",),
    ),
    "RAdamScheduleFree": Optimizer(
        "schedulefree:RAdamScheduleFree", "RAdam that averages instead of lowering the rate", _moments(2), "schedulefree",
        {**_FREE, "silent_sgd_phase": Argument(True)}, defaults={"optimizer.lr": 2.5e-3, **_CONSTANT}, remembers=_KEEPS,
        averages=True, elementwise=True,
    ),
}  # fmt: skip
assert tuple(OPTIMIZERS) == get_args(Name)
BY_NAME: dict[str, Name] = {
    other: name for name, record in OPTIMIZERS.items() for other in (name.lower(), *record.elsewhere)
}
"""Names of all trainers, in lower case -> ours."""


def named(text: str) -> Name | None:
    """The optimizer of a name in any spelling, also of a dotted class such as ``schedulefree.AdamWScheduleFree``; None if there is none."""
    return BY_NAME.get(text.lower()) or BY_NAME.get(text.rpartition(".")[2].lower() or "?")


def defaults_of(text: str) -> Mapping[str, Any]:
    """Defaults of an optimizer in any spelling; empty for an unknown one."""
    name = named(text) if text else None
    return OPTIMIZERS[name].defaults if name else {}


def having(test: Callable[[Optimizer], bool]) -> tuple[Name, ...]:
    """The optimizers whose record passes a test."""
    return tuple(name for name, record in OPTIMIZERS.items() if test(record))


def state_bytes(name: str, shapes: Mapping[Any, int], args: Mapping[str, Any] | None = None) -> Bytes:
    """What an optimizer will remember of parameters, without its step counters and code tables.

    Args:
        shapes: of the parameters, and how many have each. args: optimizer.args.
    """
    record = OPTIMIZERS[name]  # type: ignore[index]  # a name of the schema
    complete = record.complete(args or {})
    return sum(count * record.state(shape, complete) for shape, count in shapes.items())
