"""Entry point of the benchmarks: python benchmarks/run.py [adapter_types | distillation | flops | fluxflow | fluxflow_demo | full_size | memory | precision] [options]

    adapter_types each type of adapter teaches a FLUX.1-shaped model a new colour: accuracy, sizes, time of an update
    distillation the demo with teachers and without: validation loss and the checker's score
    flops        operations of TinyFlux at several sizes, from its geometry (derivation: models/tinyflux/flops.py)
    fluxflow     one update of FluxFlow's autoencoder and flow, beside the published package: time and peak memory
    fluxflow_demo the demo of FluxFlow with one thing changed at a time: PSNR and the checker's scores
    memory       FLUX.1-dev at full size on a GPU: forms of storage and numbers of swapped blocks, time and peak memory
    precision    what fp8, int8 and nf4 weights cost in precision, on a FLUX.1-shaped model
    full_size    the whole way at full width with random weights: caches and two training steps, time and peak memory

Results that were measured are kept in benchmarks/RESULTS.md, with their conditions.
"""

import sys

import adapter_types
import distillation
import fluxflow_demo
import fluxflow_updates
import full_size
import memory
import precision

from musubi_tuner.models.tinyflux.flops import block_flops, forward_flops, training_flops
from musubi_tuner.models.tinyflux.geometry import TinyFluxConfig


def flops() -> int:
    """Print a table of operations."""
    config = TinyFluxConfig()
    print("TinyFlux-Deep, 245 M parameters, 128 text tokens, one sample; 10^12 operations")
    print(f"{'pixels':>10} {'tokens':>7} {'forward':>9} {'training':>9} {'checkpointed':>13} {'attention share':>16}")
    for side in (256, 512, 768, 1024):
        cells = side // 8
        tokens = cells * cells + 128
        forward = forward_flops(config, 1, cells, cells, 128)
        attention = 4 * tokens * tokens * config.hidden_size * (config.num_double_layers + config.num_single_layers)
        training = training_flops(config, 1, cells, cells, 128)
        checkpointed = training_flops(config, 1, cells, cells, 128, checkpointing=True)
        print(
            f"{side:>5}x{side:<4} {tokens:>7} {forward / 1e12:>9.3f} {training / 1e12:>9.3f} {checkpointed / 1e12:>13.3f} "
            f"{attention / forward:>16.0%}"
        )
    double, single = block_flops(config, 4096, 128)
    print(f"at 512x512 a double block takes {double / 1e9:.1f} and a single block {single / 1e9:.1f} x 10^9 operations")
    return 0


def main() -> int:
    """Run the benchmark named on the command line."""
    commands = {
        "adapter_types": lambda: adapter_types.main(sys.argv[2:]),
        "distillation": lambda: distillation.main(sys.argv[2:]),
        "flops": flops,
        "fluxflow_demo": lambda: fluxflow_demo.main(sys.argv[2:]),
        "fluxflow": lambda: fluxflow_updates.main(sys.argv[2:]),
        "full_size": lambda: full_size.main(sys.argv[2:]),
        "memory": lambda: memory.main(sys.argv[2:]),
        "precision": lambda: precision.main(sys.argv[2:]),
    }
    if len(sys.argv) < 2 or sys.argv[1] not in commands:
        print(__doc__)
        return 0 if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help") else 2
    return commands[sys.argv[1]]()


if __name__ == "__main__":
    sys.exit(main())
