"""The one order in which the model of a run is made, for every family.

    build (meta) -> load: merge adapters, store weight by weight -> attach adapters -> compile blocks -> checkpoint -> swap

A weight is stored as it is loaded, so its merge comes first. `memory.compose` does the last three.
"""

from collections import Counter
from dataclasses import replace

import torch
from torch import Tensor, nn

from musubi_tuner.adapters.attach import (
    AdapterSet,
    Placement,
    attach,
    layer_settings,
    make_adapters,
    place_adapters,
    target_paths,
)
from musubi_tuner.adapters.files import fitting, load_adapter, placements_of_file, read_adapter
from musubi_tuner.adapters.merging import RunMerges
from musubi_tuner.config import RunConfig
from musubi_tuner.memory.block_swap import BlockSwap
from musubi_tuner.memory.compose import compose_memory, freeze_of
from musubi_tuner.memory.storage import Storing
from musubi_tuner.models.family import Trainee
from musubi_tuner.units import format_bytes


def storing_of(config: RunConfig, device: torch.device) -> Storing:
    """What happens to the weights of a run while they are loaded: nothing where the model itself trains.

    Raises:
        CheckpointError, ConfigError: if a file of adapter.merge does not fit.
    """
    spec = config.spec
    if config.adapter.type == "none":
        return Storing()
    merges = None
    if config.adapter.merge:
        merges = RunMerges(config, target_paths(spec.family.outline_model(config).model, spec.adapters))
    return Storing(freeze_of(config.memory, spec, device), merges)


def load_trainee(config: RunConfig, device: torch.device) -> Trainee:
    """The model of a run in main memory, before anything is attached to it.

    Raises:
        CheckpointError: if a checkpoint holds another model.
        ConfigError: if the run asks for what the model does not have.
    """
    return config.spec.family.load_for_training(config, storing_of(config, device))


def fit_to_device(
    trainee: Trainee, config: RunConfig, device: torch.device, processes: int = 1
) -> tuple[nn.Module, BlockSwap | None, list[str]]:
    """Attach adapters, compile, checkpoint and swap the blocks, and bring the model to the device.

    Args:
        config: its ``blocks_to_swap`` is a number. processes: that train on this machine.

    Returns:
        The module that trains (the model, or its adapters), the swap of its blocks if there is one, and lines to print.

    Raises:
        CheckpointError, ConfigError: see `attach_adapters` and `memory.compose_memory`.
    """
    model, lines = trainee.model, list(trainee.notes)
    module: nn.Module = model
    if config.adapter.type != "none":
        module, report = attach_adapters(model, config)
        lines += report
        model.eval()
    if config.train.full_half:
        for parameter in module.parameters():
            if parameter.requires_grad and parameter.dtype == torch.float32:
                parameter.data = parameter.data.to(torch.bfloat16)
    swap, report = compose_memory(model, config.memory, config.spec, device)
    lines += report
    if swap is not None:
        lists = Counter(block.name.partition(".")[0] for block in swap.streamed)
        of_lists = ", ".join(f"{count} of {len(getattr(model, name))} {name}" for name, count in lists.items())
        lines.append(
            f"swap: {len(swap.streamed)} blocks stay in main memory ({of_lists}; {format_bytes(swap.host_bytes)}"
            f"{' per process' if processes > 1 else ''}) and pass through {format_bytes(swap.device_bytes)} of device memory"
        )
    module.train()
    for part in module.modules():
        # What is frozen computes as it will when it draws; only what trains drops anything out.
        if not any(parameter.requires_grad for parameter in part.parameters()) and list(part.parameters()):
            part.eval()
    return module, swap, lines


def attach_adapters(model: nn.Module, config: RunConfig) -> tuple[AdapterSet, list[str]]:
    """Make, load and attach the adapters of a run; the model is frozen. Files to merge are in its weights already.

    Returns:
        The adapters, and lines for the person.

    Raises:
        CheckpointError: if a file does not fit. ConfigError: if no layer is left to adapt.
    """
    model.requires_grad_(False)
    adapters, wanted, given, lines = _adapters_of(model, config)
    if given:
        load_adapter(adapters, given, f"adapter.init_from: {config.adapter.init_from}")
        changed = [path for path, layer in adapters.items() if abs(float(layer.alpha) - wanted[path].alpha) > 1e-6]
        if changed:
            lines.append(
                f"note: alpha is that of the file, not of adapter.alpha, for {len(changed)} layers ({changed[0]}, ...)"
            )
    attach(model, adapters)
    count = sum(parameter.numel() for parameter in adapters.parameters())
    ranks = sorted({placement.rank for placement in wanted.values()})
    text = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"
    lines.append(f"adapter: LoRA of {text} on {len(wanted)} layers, {count:,} parameters; the model is frozen")
    return adapters, lines


def check_adapter_file(config: RunConfig) -> None:
    """Compare the file of ``adapter.init_from`` with the layers of the run, before anything is encoded for it.

    Raises:
        CheckpointError: if it does not fit, or holds values that are not finite. ConfigError: see `attach_adapters`.
    """
    if config.adapter.type != "none" and config.adapter.init_from is not None:
        adapters, _, given, _ = _adapters_of(config.spec.family.outline_model(config).model, config)
        fitting(adapters, given, f"adapter.init_from: {config.adapter.init_from}")


def _adapters_of(
    model: nn.Module, config: RunConfig
) -> tuple[AdapterSet, dict[str, Placement], dict[str, Tensor], list[str]]:
    """The adapters of a run with fresh weights, where they lie by path, the tensors to load into them, and lines for the person."""
    settings, spec = config.adapter, config.spec
    lines = []
    paths = target_paths(model, spec.adapters)
    given: dict[str, Tensor] = {}
    if settings.init_from is not None:
        file = read_adapter(config.locate(settings.init_from), spec)
        file.check_padding(config, "adapter.init_from")
        given = file.tensors
        lines.append(f"starting from {file.path.name}{file.remarks}")
    if settings.rank_from_weights:
        placements = [
            replace(placement, lr_scale=own.lr_scale, dropout=own.dropout, weight_decay=own.weight_decay)
            for placement in placements_of_file(given, paths, f"adapter.init_from: {settings.init_from}")
            for own, _ in [layer_settings(placement.path, settings)]
        ]
    else:
        placements = place_adapters(paths, spec.adapters, settings)
    adapters = make_adapters(model, placements, settings, config.run.seed)
    return adapters, {placement.path: placement for placement in placements}, given, lines
