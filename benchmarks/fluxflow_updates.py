"""One update of FluxFlow's autoencoder and of its flow: this program and the published package, in one run.

    python -m venv published && published/bin/pip install "torch==2.13.0" "fluxflow==0.5.0" && published/bin/pip uninstall -y torchvision
    python benchmarks/run.py fluxflow --published published/bin/python

Each case is a process of its own: the published layout, AdamW, the losses of the reconstruction and of KL or v, two threads. Time is the median
of the updates after the first, memory the largest resident size less that before the model is made.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

WIDTHS = (32, 128)
DTYPES = ("float32", "bfloat16")


def models(which, width):
    """Compressor, expander and flow processor, with the same arguments."""
    if which == "ours":
        sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))
        from musubi_tuner.models.fluxflow import Compressor, Expander, FlowProcessor

        return Compressor(d_model=width), Expander(width), FlowProcessor(width, width)
    from fluxflow.models.flow import FluxFlowProcessor
    from fluxflow.models.vae import FluxCompressor, FluxExpander

    return FluxCompressor(d_model=width), FluxExpander(d_model=width), FluxFlowProcessor(d_model=width, vae_dim=width)


def child(which, part, width, dtype, side, batch, updates, recompute):
    """Measure one case and print it."""
    import torch
    import torch.nn.functional as F

    torch.set_num_threads(2)
    torch.manual_seed(0)
    compressor, expander, flow = models(which, width)
    before = resident()
    if recompute and which == "ours":
        from musubi_tuner.models.fluxflow.autoencoder import recomputing

        for module in (compressor, *expander.upscale.layers, flow):
            module.call = recomputing
    moving = [compressor, expander] if part == "vae" else [flow]
    optimizer = torch.optim.AdamW([p for module in moving for p in module.parameters()], lr=1e-4)
    pixels = torch.rand(batch, 3, side, side) * 2 - 1
    cells = side // 16
    packed = torch.randn(batch, cells * cells + 1, width)
    packed[:, -1] = 0
    packed[:, -1, :2] = cells / 1024
    text = torch.randn(batch, 1024)
    for module in moving:
        module.train()
    times = []
    for _ in range(updates):
        started = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
            if part == "vae":
                found = (
                    compressor(pixels, torch.randn(batch, width, cells, cells))
                    if which == "ours"
                    else compressor(pixels, training=True)
                )
                tokens, mu, logvar = found
                image = expander(tokens)
            else:
                image = flow(packed, text, torch.tensor([500] * batch))
        image = image.float()
        if part == "vae":
            low = F.avg_pool2d(image - pixels, 3, 1, 1)
            loss = low.abs().mean() + (image - pixels - low).abs().mean() + 0.1 * F.mse_loss(image, pixels)
            loss = loss - 1e-4 * 0.5 * (1 + logvar - mu**2 - logvar.exp()).float().mean()
        else:
            loss = F.mse_loss(image[:, :-1], packed[:, :-1])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        times.append(time.perf_counter() - started)
    print(json.dumps({"seconds": statistics.median(times[1:]), "mib": (resident() - before) / 2**20}))


def resident():
    """Largest resident size so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure(python, which, case, options):
    """One case in a process of its own."""
    words = [python, __file__, "--child", which, *map(str, case), "--side", str(options.side), "--batch", str(options.batch),
             "--updates", str(options.updates), *(["--recompute"] if options.recompute else [])]  # fmt: skip
    done = subprocess.run(words, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": ""})
    if done.returncode:
        raise SystemExit(f"{which} {case}: {done.stderr[-800:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main(arguments):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--published", metavar="PYTHON", help="interpreter of an environment with fluxflow==0.5.0; absent = ours alone"
    )
    parser.add_argument("--side", type=int, default=256, help="of the pictures, in pixels")
    parser.add_argument("--parts", nargs="+", default=("vae", "flow"), choices=("vae", "flow"))
    parser.add_argument("--widths", type=int, nargs="+", default=WIDTHS, help="D of the latents, and width of the flow")
    parser.add_argument("--dtypes", nargs="+", default=DTYPES, choices=DTYPES)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--updates", type=int, default=4)
    parser.add_argument(
        "--rounds", type=int, default=1, help="how often all cases run, in turn; the lowest time counts"
    )
    parser.add_argument("--recompute", action="store_true", help="ours with memory.gradient_checkpointing")
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.child:
        which, part, width, dtype = options.child
        child(which, part, int(width), dtype, options.side, options.batch, options.updates, options.recompute)
        return 0
    print(f"{'case':<22} {'ours s':>8} {'MiB':>7} {'published s':>12} {'MiB':>7} {'time':>6} {'memory':>7}")
    for case in [
        (part, width, dtype) for part in options.parts for width in options.widths for dtype in options.dtypes
    ]:
        found = {"ours": [], "published": []}
        for _ in range(options.rounds):
            found["ours"].append(measure(sys.executable, "ours", case, options))
            if options.published:
                found["published"].append(measure(options.published, "published", case, options))
        best = {
            which: {key: min(each[key] for each in runs) for key in ("seconds", "mib")}
            for which, runs in found.items()
            if runs
        }
        ours, other = best["ours"], best.get("published")
        line = f"{' '.join(map(str, case)):<22} {ours['seconds']:>8.3f} {ours['mib']:>7.0f}"
        if other:
            line += f" {other['seconds']:>12.3f} {other['mib']:>7.0f} {ours['seconds'] / other['seconds']:>6.2f} {ours['mib'] / other['mib']:>7.2f}"
        print(line, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
