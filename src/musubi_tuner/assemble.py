"""The one order in which the model of a run is made, for every family.

    build (meta) -> load: merge adapters, store weight by weight -> attach adapters -> compile blocks -> checkpoint -> swap

A weight is stored as it is loaded, so its merge comes first. `memory.compose` does the last three.
"""

from collections import Counter
from dataclasses import replace

import torch
from torch import Tensor, nn

from musubi_tuner.adapter_types import ADAPTERS, NORM
from musubi_tuner.adapters.attach import (
    AdapterSet,
    Placement,
    attach,
    layer_settings,
    make_adapters,
    own_arguments,
    placements_of,
    target_paths,
)
from musubi_tuner.adapters.files import (
    fitting,
    load_adapter,
    parts_by_module,
    placements_of_file,
    read_adapter,
    type_of_parts,
)
from musubi_tuner.adapters.merging import RunMerges
from musubi_tuner.adapters.oft import DiagOFT
from musubi_tuner.config import RunConfig
from musubi_tuner.config.schema.adapter import AdapterSection
from musubi_tuner.errors import CheckpointError
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
        changed = [
            path
            for path, layer in adapters.items()
            if "alpha" in ADAPTERS[wanted[path].type].uses and abs(layer.scale * layer.rank - wanted[path].alpha) > 1e-6
        ]
        if changed:
            lines.append(
                f"note: alpha is that of the file, not of adapter.alpha, for {len(changed)} layers ({changed[0]}, ...)"
            )
    attach(model, adapters)
    count = sum(parameter.numel() for parameter in adapters.parameters())
    kind, norms = config.adapter.type, sum(placement.type == NORM for placement in wanted.values())
    ranks = sorted({placement.rank for placement in wanted.values() if placement.type != NORM})
    text = f" of rank {ranks[0]}" if len(ranks) == 1 else f" of ranks {ranks[0]} to {ranks[-1]}"
    name = "LoRA" if kind in ("lora", "locon") else kind
    also = f" and {norms} norms" if norms else ""
    lines.append(
        f"adapter: {name}{text if 'rank' in ADAPTERS[kind].uses else ''} on {len(wanted) - norms} layers{also}, {count:,} parameters; "
        "the model is frozen"
    )
    lines += [f"note: {text}" for text in _other_sizes(adapters)]
    return adapters, lines


def _other_sizes(adapters: AdapterSet) -> list[str]:
    """Sizes of blocks of outputs other than the one that was asked for, which does not divide every layer."""
    sizes: dict[int, list[str]] = {}
    for path, adapter in adapters.items():
        if isinstance(adapter, DiagOFT) and adapter.oft_blocks.shape[-1] != adapter.rank:
            sizes.setdefault(adapter.oft_blocks.shape[-1], []).append(path)
    return [
        f"blocks of {size} outputs on {len(paths)} layers ({paths[0]}, ...), the nearest that fits"
        for size, paths in sizes.items()
    ]


def _type_of_run(found: str, wanted: str) -> str:
    """The type of a layer of a file in a run; DyLoRA and LoCon have files of LoRA.

    Raises:
        CheckpointError: if the run is of another.
    """
    if found in (wanted, NORM):
        return found
    if ADAPTERS[wanted].written_as == found:
        return wanted
    raise CheckpointError(
        f'adapter.init_from: is a file of type "{found}", adapter.type is "{wanted}"; write adapter.type = "{found}"'
    )


def _check_types(given: dict[str, Tensor], settings: AdapterSection) -> None:
    """Refuse a file of another type than the run's; see `_type_of_run`."""
    for parts in parts_by_module(given).values():
        kind = type_of_parts(parts)
        if kind is not None:
            _type_of_run(kind, settings.type)


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
    given: dict[str, Tensor] = {}
    if settings.init_from is not None:
        file = read_adapter(config.locate(settings.init_from), spec)
        file.check_padding(config, "adapter.init_from")
        given = file.tensors
        lines.append(f"starting from {file.path.name}{file.remarks}")
    if settings.rank_from_weights:
        placements = [
            replace(
                placement,
                lr_scale=own.lr_scale,
                dropout=own.dropout,
                weight_decay=own.weight_decay,
                type=kind,
                own={**own_arguments(kind, settings), **placement.own},
            )
            for placement in placements_of_file(given, model, spec.adapters, f"adapter.init_from: {settings.init_from}")
            for own, _ in [layer_settings(placement.path, settings)]
            for kind in [_type_of_run(placement.type, settings.type)]
        ]
    else:
        placements = placements_of(model, spec.adapters, settings)
        _check_types(given, settings)
    adapters = make_adapters(model, placements, settings, config.run.seed)
    return adapters, {placement.path: placement for placement in placements}, given, lines
