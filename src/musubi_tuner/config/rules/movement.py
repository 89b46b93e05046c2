"""Rules of how the weights of one role are updated: [optimizer], [scheduler], [ema]. Each is checked for every role."""

import math
from collections.abc import Iterator

from musubi_tuner.config.diagnostics import Diagnostic, error, warning
from musubi_tuner.config.rules.rule import Rules
from musubi_tuner.config.run_config import RunConfig
from musubi_tuner.schedules import SCHEDULES

MOVEMENT = Rules()
rule = MOVEMENT.rule
LEFT_OF_THE_START = 1 / math.e
"""Share of the initial weights left in the average at the end, above which it has hardly moved."""


@rule("V29", "scheduler.warmup_steps train.max_steps")
def _warmup_ends(config: RunConfig) -> Iterator[Diagnostic]:
    scheduler = config.scheduler
    if (
        config.train.max_steps is not None
        and not scheduler.warmup_ratio
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


@rule("U03", "optimizer.betas")
def _betas(config: RunConfig) -> Iterator[Diagnostic]:
    for index, beta in enumerate(config.optimizer.betas):
        if not 0 <= beta < 1:
            yield error("U03", "optimizer.betas", f"value {index} is {beta}, expected at least 0 and below 1")


@rule("V43", "optimizer.lr")
def _learns(config: RunConfig) -> Iterator[Diagnostic]:
    if config.optimizer.lr == 0:
        yield warning(
            "V43", "optimizer.lr", "is 0, so nothing would be learned; 1e-4 is usual", fix=[("optimizer.lr", 1e-4)]
        )


@rule("V36", "optimizer.lr optimizer.type")
def _large_rate(config: RunConfig) -> Iterator[Diagnostic]:
    if config.optimizer.lr >= 0.1:
        yield warning(
            "V36",
            "optimizer.lr",
            f"is {config.optimizer.lr}, and {config.optimizer.type} would destroy the pretrained weights within a few updates; 1e-4 is usual",
            "optimizer.type",
            fix=[("optimizer.lr", 1e-4)],
        )


@rule("V33", "optimizer.type train.max_grad_norm")
def _clipped_twice(config: RunConfig) -> Iterator[Diagnostic]:
    if (
        config.optimizer.type == "Adafactor"
        and config.train.max_grad_norm > 0
        and "train.max_grad_norm" in config.set_keys()
    ):
        yield warning(
            "V33",
            "train.max_grad_norm",
            f"is {config.train.max_grad_norm}, but Adafactor clips updates itself; 0 is usual with it",
            "optimizer.type",
            fix=[("train.max_grad_norm", 0.0)],
        )


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
