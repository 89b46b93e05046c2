"""Rules of how the weights of one role are updated: [optimizer], [scheduler], [ema]. Each is checked for every role."""

import importlib.util
import math
from collections.abc import Iterator
from typing import Any

from musubi_tuner.config.diagnostics import Diagnostic, did_you_mean, error, warning
from musubi_tuner.config.rules.rule import Rules
from musubi_tuner.config.run_config import RunConfig
from musubi_tuner.config.when import describe
from musubi_tuner.optimizers import OPTIMIZERS, Optimizer, having
from musubi_tuner.schedules import SCHEDULES

MOVEMENT = Rules()
rule = MOVEMENT.rule
LEFT_OF_THE_START = 1 / math.e
"""Share of the initial weights left in the average at the end, above which it has hardly moved."""


@rule("V29", "scheduler.type scheduler.warmup_steps train.max_steps")
def _warmup_ends(config: RunConfig) -> Iterator[Diagnostic]:
    scheduler = config.scheduler
    if (
        config.train.max_steps is not None
        and not scheduler.warmup_ratio
        and SCHEDULES[scheduler.type].warms
        and scheduler.warmup_steps > config.train.max_steps
    ):
        yield error(
            "V29",
            "scheduler.warmup_steps",
            f"is {config.scheduler.warmup_steps}, longer than train.max_steps = {config.train.max_steps}; the learning rate would "
            "never be reached; make it shorter",
            "train.max_steps",
        )


@rule("V29", "scheduler.type scheduler.total_steps scheduler.warmup_steps")
def _more_than_warmup(config: RunConfig) -> Iterator[Diagnostic]:
    length, ends = config.scheduler.total_steps, SCHEDULES[config.scheduler.type].ends
    if length is not None and ends and length <= config.scheduler.warmup_updates(length):
        yield error(
            "V29",
            "scheduler.total_steps",
            f"is {length}, not longer than scheduler.warmup_steps = {config.scheduler.warmup_steps}; make it longer",
            "scheduler.warmup_steps",
        )


@rule("V29", "scheduler.type scheduler.decay_steps scheduler.total_steps scheduler.warmup_steps train.max_steps")
def _room_to_decay(config: RunConfig) -> Iterator[Diagnostic]:
    scheduler, length = config.scheduler, config.scheduler.total_steps or config.train.max_steps
    if scheduler.type == "warmup_stable_decay" and scheduler.decay_steps and length:
        warmup, decay = scheduler.warmup_updates(length), scheduler.decay_steps
        if warmup + (decay * length if decay < 1 else decay) > length:
            text = f"is {decay:g}, but after {warmup} updates of warm-up only {length - warmup} of {length} are left"
            yield error("V29", "scheduler.decay_steps", text, "scheduler.warmup_steps")


@rule("U07", "scheduler.type scheduler.rules")
def _pieces(config: RunConfig) -> Iterator[Diagnostic]:
    if config.scheduler.type == "piecewise_constant" and config.scheduler.rules is None:
        yield error(
            "U07",
            "scheduler.rules",
            'is required by type "piecewise_constant", such as "1:1000,0.1:2000,0.01"',
            "scheduler.type",
        )


@rule("V31", "scheduler.type optimizer.type")
def _rate_of_the_optimizer(config: RunConfig) -> Iterator[Diagnostic]:
    if config.scheduler.type == "adafactor" and config.optimizer.type != "Adafactor":
        text = f'is "adafactor", which leaves the rate to Adafactor; {config.optimizer.type} needs another type, such as "constant"'
        yield error("V31", "scheduler.type", text, "optimizer.type", fix=[("scheduler.type", "constant")])


@rule("V27", "scheduler.warmup_steps scheduler.warmup_ratio scheduler.total_steps train.max_steps")
def _one_warmup(config: RunConfig) -> Iterator[Diagnostic]:
    scheduler = config.scheduler
    length = scheduler.total_steps or config.train.max_steps
    if not (scheduler.warmup_ratio and scheduler.warmup_steps and "scheduler.warmup_steps" in config.set_keys()):
        return
    count = scheduler.warmup_updates(length) if length else None
    if count != scheduler.warmup_steps:
        means = "" if count is None else f" is {count} updates"
        text = f"is {scheduler.warmup_steps}, but warmup_ratio = {scheduler.warmup_ratio:g}{means}; keep one"
        fix = [("scheduler.warmup_steps", 0)]
        yield error("V27", "scheduler.warmup_steps", text, "scheduler.warmup_ratio", fix=fix)


@rule("V80", "scheduler.min_lr optimizer.lr")
def _least_rate(config: RunConfig) -> Iterator[Diagnostic]:
    if config.scheduler.min_lr > config.optimizer.lr:
        yield error(
            "V80",
            "scheduler.min_lr",
            f"is {config.scheduler.min_lr}, above optimizer.lr = {config.optimizer.lr}; lower it",
            "optimizer.lr",
        )


def _record(config: RunConfig) -> Optimizer:
    return OPTIMIZERS[config.optimizer.type]


@rule("U03", "optimizer.type optimizer.betas")
def _betas(config: RunConfig) -> Iterator[Diagnostic]:
    betas, wanted = config.optimizer.betas, _record(config).betas
    for index, beta in enumerate(betas):
        if not 0 <= beta < 1:
            yield error("U03", "optimizer.betas", f"value {index} is {beta}, expected at least 0 and below 1")
    if _record(config).averages and betas[0] == 0:
        text = f"value 0 is 0, expected above 0, since {config.optimizer.type} divides by it; 0.9 is usual"
        yield error("U03", "optimizer.betas", text, "optimizer.type")
    if isinstance(wanted, int) and wanted and len(betas) != wanted:
        text = f"has {len(betas)} values, {config.optimizer.type} has {wanted}"
        usual = _record(config).defaults.get("optimizer.betas", [0.9, 0.999])
        yield error("U03", "optimizer.betas", text, "optimizer.type", fix=[("optimizer.betas", usual)])


@rule("V43", "optimizer.lr")
def _learns(config: RunConfig) -> Iterator[Diagnostic]:
    if config.optimizer.lr == 0:
        yield warning(
            "V43", "optimizer.lr", "is 0, so nothing would be learned; 1e-4 is usual", fix=[("optimizer.lr", 1e-4)]
        )


@rule("U03 V43", "optimizer.lr optimizer.group_lr")
def _rates_of_patterns(config: RunConfig) -> Iterator[Diagnostic]:
    rates = config.optimizer.group_lr
    for pattern, rate in rates.items():
        if not 0 <= rate <= 10:
            text = f"{describe(pattern)} is {rate}, expected a number at least 0 and at most 10"
            yield error("U03", "optimizer.group_lr", text)
    if rates and config.optimizer.lr == 0:
        text = 'gives rates that follow optimizer.lr, which is 0; set that, and end with the pattern "*" = 0 to keep all others'
        yield error("V43", "optimizer.group_lr", text, "optimizer.lr")


@rule("V36 V34 V40", "optimizer.lr optimizer.type optimizer.args")
def _unusual_rate(config: RunConfig) -> Iterator[Diagnostic]:
    lr, name, record = config.optimizer.lr, config.optimizer.type, _record(config)
    usual = record.defaults.get("optimizer.lr", 1e-4)
    if config.optimizer.args.get("relative_step") is True:
        return
    if record.finds_rate:
        if 0 < lr <= 0.1:
            text = f"is {lr}, but {name} finds the learning rate itself and multiplies it by this; 1 is usual"
            yield warning("V34", "optimizer.lr", text, "optimizer.type", fix=[("optimizer.lr", 1.0)])
    elif record.signs and lr > 1e-3:
        text = f"is {lr}; the usual rate of {name} is a tenth to a third of AdamW's, such as 3e-5"
        yield warning("V40", "optimizer.lr", text, "optimizer.type", fix=[("optimizer.lr", usual)])
    elif lr >= 0.1 and usual < 0.1 and "SGD" not in name:
        text = f"is {lr}, and {name} would destroy the pretrained weights within a few updates; {usual:g} is usual"
        yield warning("V36", "optimizer.lr", text, "optimizer.type", fix=[("optimizer.lr", usual)])


@rule("V35", "optimizer.type optimizer.group_lr adapter.loraplus_lr_ratio adapter.targets adapter.type")
def _one_rate(config: RunConfig) -> Iterator[Diagnostic]:
    if not _record(config).finds_rate:
        return
    rates = {rate for rate in config.optimizer.group_lr.values() if rate not in (0, config.optimizer.lr)}
    own = [("optimizer.group_lr", bool(rates))]
    if config.adapter.type != "none":
        own.append(("adapter.loraplus_lr_ratio", config.adapter.loraplus_lr_ratio not in (None, 1)))
        own.append(("adapter.targets", any(each.lr_scale not in (None, 0, 1) for each in config.adapter.targets)))
    for key, differs in own:
        if differs:
            text = f"gives parameters different rates, but {config.optimizer.type} finds one for all; remove it, or use another optimizer"
            yield error("V35", key, text, "optimizer.type")


@rule("V38", "optimizer.type")
def _installed(config: RunConfig) -> Iterator[Diagnostic]:
    record = _record(config)
    if importlib.util.find_spec(record.module) is None:
        text = f'is "{config.optimizer.type}", whose package {record.package} is not installed: {record.way_out}'
        yield error("V38", "optimizer.type", text, fix=[("optimizer.type", "AdamW")])


@rule("V42", "optimizer.type optimizer.args")
def _arguments(config: RunConfig) -> Iterator[Diagnostic]:
    record, name = _record(config), config.optimizer.type
    for key, value in config.optimizer.args.items():
        where, argument = f"optimizer.args.{key}", record.arguments.get(key)
        if argument is not None:
            if not argument.accepts(value):
                yield error("V42", where, f"is {describe(value)}, expected {argument.expected}", "optimizer.type")
            continue
        if key in type(config.optimizer).model_fields:
            text = f"is a setting of its own: write optimizer.{key}"
        elif key in record.given:
            text = f"is always {describe(record.given[key])} with {name}"
        else:
            known = f"it has {', '.join(record.arguments)}" if record.arguments else "it has none"
            text = f"{name} has no such argument; {known}.{did_you_mean(key, record.arguments)}"
        yield error("V42", where, text, "optimizer.type")
    args = record.complete(config.optimizer.args)
    if name == "SGD" and args["nesterov"] is True and (args["momentum"] == 0 or args["dampening"] != 0):
        text = "is true, which needs a momentum above 0 and a dampening of 0"
        yield error("V42", "optimizer.args.nesterov", text, "optimizer.args")


@rule("V31 V32", "optimizer.type optimizer.args optimizer.lr optimizer.group_lr scheduler.type")
def _relative_step(config: RunConfig) -> Iterator[Diagnostic]:
    args = config.optimizer.args
    if config.optimizer.type != "Adafactor":
        return
    relative = args.get("relative_step") is True
    if args.get("warmup_init") is True and not relative:
        text = "is the start of relative_step, which is off; set optimizer.args.relative_step = true too"
        yield error("V31", "optimizer.args.warmup_init", text, "optimizer.args")
    if relative:
        if "scheduler.type" in config.set_keys() and config.scheduler.type not in ("adafactor", "constant"):
            text = f'is "{config.scheduler.type}", but Adafactor with relative_step has a rate of its own; write "adafactor"'
            yield error("V31", "scheduler.type", text, "optimizer.args", fix=[("scheduler.type", "adafactor")])
        for key, is_idle in (("optimizer.lr", True), ("optimizer.group_lr", any(config.optimizer.group_lr.values()))):
            if is_idle and key in config.set_keys():
                yield warning(
                    "V32",
                    key,
                    "has no effect because Adafactor with relative_step has a rate of its own",
                    "optimizer.args",
                )


@rule("V33", "optimizer.type train.max_grad_norm optimizer.args")
def _clipped_twice(config: RunConfig) -> Iterator[Diagnostic]:
    if (
        "clip_threshold" in _record(config).arguments
        and config.train.max_grad_norm > 0
        and "train.max_grad_norm" in config.set_keys()
    ):
        yield warning(
            "V33",
            "train.max_grad_norm",
            f"is {config.train.max_grad_norm}, but {config.optimizer.type} clips updates itself; 0 is usual with it",
            "optimizer.type",
            fix=[("train.max_grad_norm", 0.0)],
        )


@rule(
    "V37",
    "optimizer.type scheduler.type scheduler.warmup_steps scheduler.warmup_ratio ema.enabled adapter.max_norm adapter.type",
)
def _averages_itself(config: RunConfig) -> Iterator[Diagnostic]:
    if not _record(config).averages:
        return
    for key, is_idle in (
        ("scheduler.type", config.scheduler.type != "constant"),
        ("scheduler.warmup_steps", config.scheduler.warmup_steps > 0),
        ("scheduler.warmup_ratio", bool(config.scheduler.warmup_ratio)),
    ):
        if is_idle and key in config.set_keys():
            text = f"has no effect because {config.optimizer.type} averages instead; optimizer.args.warmup_steps is its own warm-up"
            yield warning("V37", key, text, "optimizer.type")
    if config.ema.enabled:
        text = f"is true, but {config.optimizer.type} keeps an average of its own, which is drawn, validated and saved"
        yield error("V37", "ema.enabled", text, "optimizer.type", fix=[("ema.enabled", False)])
    if config.adapter.type != "none" and config.adapter.max_norm is not None:
        text = f"scales weights after a step, which {config.optimizer.type} does not see; remove it"
        yield error("V37", "adapter.max_norm", text, "optimizer.type")


@rule(
    "V93",
    "optimizer.fused_backward optimizer.type train.max_grad_norm train.grad_accum_steps train.on_nonfinite train.mixed_precision "
    "memory.blocks_to_swap adapter.type",
)
def _fused_backward(config: RunConfig) -> Iterator[Diagnostic]:
    train = config.train
    if not config.optimizer.fused_backward or not _record(config).alone:
        return
    wanted: list[tuple[str, bool, Any, str]] = [
        ("train.max_grad_norm", train.max_grad_norm > 0, 0.0, "needs all gradients at once"),
        ("train.grad_accum_steps", train.grad_accum_steps > 1, 1, "adds up gradients"),
        ("train.on_nonfinite", train.on_nonfinite == "skip", "stop", "cannot take back what has moved"),
        ("train.mixed_precision", train.mixed_precision == "fp16", "bf16", "skips updates that overflow"),
        ("memory.blocks_to_swap", config.adapter.type == "none" and bool(config.memory.blocks_to_swap), 0, "collects gradients by block"),
    ]  # fmt: skip
    for key, is_wrong, value, why in wanted:
        if is_wrong:
            text = f"{why}, but optimizer.fused_backward steps each parameter at once; set it to {describe(value)}"
            yield error("V93", key, text, "optimizer.fused_backward", fix=[(key, value)])
    if len(config.spec.task(config).roles) > 1:
        yield error("V93", "optimizer.fused_backward", "is for models with one role; set it to false")


@rule(
    "V19",
    "train.full_half train.stochastic_rounding train.mixed_precision optimizer.type memory.blocks_to_swap adapter.type",
)
def _half_weights(config: RunConfig) -> Iterator[Diagnostic]:
    train = config.train
    if not train.full_half:
        return
    if train.mixed_precision != "bf16":
        text = f'needs train.mixed_precision = "bf16", which is "{train.mixed_precision}"; float16 weights would lose small steps'
        yield error("V19", "train.full_half", text, "train.mixed_precision", fix=[("train.mixed_precision", "bf16")])
    if train.stochastic_rounding and not _record(config).alone:
        able = ", ".join(having(lambda record: record.alone))
        text = f"is for optimizers that look at one parameter at a time ({able}), not {config.optimizer.type}; set it to false, or change that"
        yield error(
            "V19", "train.stochastic_rounding", text, "optimizer.type", fix=[("train.stochastic_rounding", False)]
        )
    if config.adapter.type == "none" and config.memory.blocks_to_swap:
        text = "is not supported with blocks that train in main memory; set memory.blocks_to_swap = 0"
        yield error("V19", "train.full_half", text, "memory.blocks_to_swap", fix=[("memory.blocks_to_swap", 0)])


@rule(
    "V95",
    "distributed.fsdp optimizer.type optimizer.fused_backward train.mixed_precision train.full_half memory.blocks_to_swap "
    "memory.compile adapter.type",
)
def _sharded(config: RunConfig) -> Iterator[Diagnostic]:
    if not config.distributed.fsdp:
        return
    elementwise = having(lambda record: record.elementwise)
    wanted: list[tuple[str, bool, Any, str]] = [
        ("adapter.type", config.adapter.type != "none", "none", "trains beside a frozen model"),
        ("optimizer.type", not _record(config).elementwise, "AdamW", "looks at whole weights or at all of them together"),
        ("optimizer.fused_backward", config.optimizer.fused_backward, False, "steps before gradients are reduced"),
        ("train.mixed_precision", config.train.mixed_precision == "fp16", "bf16", "scales losses by what it finds in one process"),
        ("train.full_half", config.train.full_half, False, "rounds whole weights"),
        ("memory.blocks_to_swap", bool(config.memory.blocks_to_swap), 0, "moves whole blocks"),
        ("memory.compile", config.memory.compile, False, "compiles whole blocks"),
    ]  # fmt: skip
    for key, is_wrong, value, why in wanted:
        if is_wrong:
            able = f" (or {', '.join(elementwise[1:])})" if key == "optimizer.type" else ""
            text = f"{why}, but distributed.fsdp shards every weight across the processes; set it to {describe(value)}{able}, or fsdp to false"
            yield error("V95", key, text, "distributed.fsdp", fix=[(key, value)])
    roles = config.spec.task(config).roles
    if not config.spec.task(config).denoises:
        text = f"is for models with one role, not for {', '.join(roles)} of {config.spec.full_name}; set it to false"
        yield error("V95", "distributed.fsdp", text, fix=[("distributed.fsdp", False)])


@rule("V81", "ema.enabled ema.init model.init adapter.type ema.warmup")
def _average_of_the_checkpoint(config: RunConfig) -> Iterator[Diagnostic]:
    if not config.ema.enabled or config.ema.init != "checkpoint":
        return
    plain = [("ema.init", "model")]
    if config.model.init == "scratch":
        text = 'is "checkpoint", but model.init is "scratch"; write ema.init = "model"'
        yield error("V81", "ema.init", text, "model.init", fix=plain)
    if config.adapter.type != "none":
        text = 'is "checkpoint", but the average of an adapter starts with it; write ema.init = "model"'
        yield error("V81", "ema.init", text, "adapter.type", fix=plain)
    if config.ema.warmup is True:
        text = 'would soon overwrite the average that ema.init = "checkpoint" starts from; write ema.warmup = false'
        yield error("V81", "ema.warmup", text, "ema.init", fix=[("ema.warmup", False)])


@rule("V74", "ema.enabled ema.decay ema.warmup ema.init train.max_steps")
def _average_moves(config: RunConfig) -> Iterator[Diagnostic]:
    steps, decay = config.train.max_steps, config.ema.decay
    if not config.ema.enabled or config.warms_average or steps is None:
        return
    left = decay**steps
    if left > LEFT_OF_THE_START:
        yield warning(
            "V74",
            "ema.decay",
            f"is {decay}; after {steps} updates {left:.0%} of the average is still the initial weights. Set ema.warmup = true, or a "
            "smaller decay",
            "train.max_steps",
            fix=[("ema.warmup", True)],
        )
