"""Average the adapter files of one run after the training (post-hoc EMA).

    python -m musubi_tuner.lora_post_hoc_ema cat-000001.safetensors cat-000002.safetensors cat.safetensors --output_file cat_ema.safetensors
    python -m musubi_tuner.lora_post_hoc_ema run/cat-*.safetensors --output_file cat_ema.safetensors --sigma_rel 0.2

The files are taken in the order of their training steps (ss_steps; without them, of their modification times):

    average <- beta * average + (1 - beta) * file

beta is constant, goes evenly from --beta to --beta2, or follows the power function of relative width --sigma_rel (Karras et
al. 2023, arXiv:2312.02696).
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from musubi_tuner.config.command_line import Parser, weights_to_write
from musubi_tuner.errors import EXIT_OK, CheckpointError, ConfigError, run_command
from musubi_tuner.stopping import exit_on_terminate


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return run_command(lambda: _main(sys.argv[1:] if arguments is None else list(arguments)))


def power_gamma(sigma_rel: float) -> float:
    """Exponent of the power function whose relative width is ``sigma_rel``.

    The positive root of ``x^3 + 7 x^2 + (16 - s^-2) x + (12 - s^-2)``, arXiv:2312.02696, equation 123.
    """
    import numpy as np

    inverse = sigma_rel**-2
    roots = np.roots([1, 7, 16 - inverse, 12 - inverse])
    return float(max(root.real for root in roots if abs(root.imag) < 1e-9))


def betas(count: int, beta: float, beta2: float | None, sigma_rel: float | None) -> list[float]:
    """Share of the old average at each of the ``count`` files after the first."""
    if sigma_rel is not None:
        gamma = power_gamma(sigma_rel)
        return [(1 - 1 / t) ** (gamma + 1) for t in range(1, count + 1)]
    if beta2 is not None:
        return [beta + (beta2 - beta) * (t / max(count - 1, 1)) for t in range(count)]
    return [beta] * count


def _main(arguments: Sequence[str]) -> int:
    parser = Parser(prog="lora_post_hoc_ema", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", help="adapter files of one run")
    parser.add_argument("--output_file", required=True, help="file to write")
    parser.add_argument("--beta", type=float, default=0.95, help="share of the old average (default 0.95)")
    parser.add_argument("--beta2", type=float, help="share at the last file; between, evenly")
    parser.add_argument("--sigma_rel", type=float, help="relative width of the power function, instead of beta")
    parser.add_argument("--no_sort", action="store_true", help="take the files in the order given")
    parser.add_argument("--overwrite", action="store_true", help="replace the file if it exists")
    options = parser.parse_args(arguments)
    for name in ("beta", "beta2"):
        value = getattr(options, name)
        if value is not None and not 0 <= value < 1:
            raise ConfigError(f"--{name} {value:g}: expected at least 0 and below 1")
    if options.sigma_rel is not None and not 0 < options.sigma_rel <= 0.28:
        raise ConfigError(f"--sigma_rel {options.sigma_rel:g}: expected above 0 and at most 0.28")
    if len(options.files) < 2:
        raise ConfigError("an average needs at least two files")
    output = weights_to_write("--output_file ", options.output_file, options.overwrite)
    exit_on_terminate()
    from musubi_tuner.adapters.files import save_adapter
    from musubi_tuner.weights.checkpoints import read_weights

    for name in options.files:
        if not Path(name).is_file():
            raise ConfigError(f"{name}: no such file")
    found = [read_weights(Path(name)) for name in options.files]
    alphas = {file.path: _alphas(file) for file in found}
    if not options.no_sort:
        by_step = all("ss_steps" in file.metadata for file in found)
        found.sort(key=lambda file: int(file.metadata["ss_steps"]) if by_step else file.path.stat().st_mtime_ns)
    first, *others = found
    average = {key: tensor.float() for key, tensor in first.tensors.items()}
    for file, beta in zip(others, betas(len(others), options.beta, options.beta2, options.sigma_rel), strict=True):
        _check_same(first, file)
        if alphas[file.path].tensors != alphas[first.path].tensors:
            raise CheckpointError(f"{file.path}: other alphas are stated for it than for {first.path.name}")
        for key, tensor in file.tensors.items():
            if not key.endswith(".alpha") and tensor.is_floating_point():
                average[key].mul_(beta).add_(tensor.float(), alpha=1 - beta)
        print(f"{file.path}: share {1 - beta:.4g}")
    tensors = {key: tensor.to(first.tensors[key].dtype) for key, tensor in average.items()}
    if alphas[first.path].beside:
        tensors |= alphas[first.path].tensors  # no file that states them lies beside the average
    save_adapter(output, tensors, found[-1].metadata)
    print(f"{output}: average of {len(found)} files")
    return EXIT_OK


def _alphas(file: Any) -> Any:
    """Alphas that are no tensors of a file; what is no sound adapter is refused."""
    from musubi_tuner.adapters.files import check_finite, why_skipped
    from musubi_tuner.adapters.kinds import refuse_other_kinds
    from musubi_tuner.adapters.stated import stated_alphas

    own = {key: tensor for key, tensor in file.tensors.items() if not why_skipped(key)}
    try:
        refuse_other_kinds(own)
        check_finite(own)
        alphas = stated_alphas(own, file.path, file.metadata)
    except CheckpointError as error:
        raise CheckpointError(f"{file.path}: {error}") from error
    if alphas.remark:
        print(f"{file.path}: {alphas.remark}")
    return alphas


def _check_same(first: Any, other: Any) -> None:
    if set(first.tensors) != set(other.tensors):
        odd = sorted(set(first.tensors) ^ set(other.tensors))
        raise CheckpointError(f"{other.path}: has other keys than {first.path.name} ({', '.join(odd[:4])})")
    for key, tensor in other.tensors.items():
        if tensor.shape != first.tensors[key].shape:
            raise CheckpointError(
                f"{other.path}: {key} is {list(tensor.shape)}, in {first.path.name} {list(first.tensors[key].shape)}"
            )
        if key.endswith(".alpha") and float(tensor) != float(first.tensors[key]):
            raise CheckpointError(
                f"{other.path}: {key} is {float(tensor):g}, in {first.path.name} {float(first.tensors[key]):g}"
            )


if __name__ == "__main__":
    sys.exit(main())
