"""What each choice of FluxFlow's demo contributes: its autoencoder with one thing changed at a time, and its flow.

    python benchmarks/run.py fluxflow_demo
    python benchmarks/run.py fluxflow_demo --only vae --updates 1800

Each case is toml/demo_fluxflow.toml with other settings, trained and scored by the usual command. Reconstructions are of combinations that were never trained.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RUN_FILE = "demo_fluxflow.toml"
NAMES = ("colour", "background", "position", "shape")
PLAIN = {
    "latent_skip": "true", "down_shortcut": "false", "pair_residual": "false", "up_skip": 0.1, "p_pre": "silu", "rgb_norm": "group",
    "logvar_points": "[-3.0,-1.0,1.0,3.0]", "latent_space": "tokens",
}  # fmt: skip
"""The published layout of the autoencoder, at the demo's sizes."""


def geometry(**changes):
    """Settings of [model.geometry]."""
    return {f"model.geometry.{name}": value for name, value in changes.items()}


VAE = {
    "as the demo": {},
    "published layout, as it is initialised": {**geometry(**PLAIN), "model.calibrate": "false"},
    "published layout, calibrated": geometry(**PLAIN),
    "without calibration": {"model.calibrate": "false"},
    "without the compressor's shortcut": geometry(down_shortcut="false"),
    "without the residuals": geometry(pair_residual="false"),
    "up-block's shortcut 0.1": geometry(up_skip=0.1),
    "control points through SiLU": geometry(p_pre="silu"),
    "GroupNorm before RGB": geometry(rgb_norm="group"),
    "log-variance from -3 to 3": geometry(logvar_points="[-3.0,-1.0,1.0,3.0]"),
    "SPADE": {"steps.vae.objective.train_spade": "true"},
    "published weights of detail and squares": {"steps.vae.objective.frequency_alpha": 0.5, "steps.vae.objective.mse_weight": 0.1},
    "vae_dim 8": geometry(vae_dim=8),
    "vae_dim 32": geometry(vae_dim=32),
}  # fmt: skip
GAN = {
    "a third longer, without a discriminator": {
        "steps.gan.objective.gan_training": "false",
        "steps.gan.objective.lambda_adv": 0.5,
    },
    "a third longer, lambda_adv 0.05": {},
    "a third longer, lambda_adv 0.05 by gradients": {"steps.gan.objective.gan_balance": "gradient"},
}


def train(folder, options, steps, number):
    """Train steps in a new folder; what accuracy.json says of the last, and seconds of training."""
    words = [sys.executable, str(ROOT / "train.py"), f"toml/{RUN_FILE}", "--set", f"run.output_dir=out{number}"]
    words += [word for key, value in options.items() for word in ("--set", f"{key}={value}")]
    began, seconds = time.perf_counter(), 0.0
    for step in steps:
        began = time.perf_counter()
        done = subprocess.run([*words, "--step", step], cwd=folder, capture_output=True, text=True)
        seconds = time.perf_counter() - began
        if done.returncode:
            return None, (done.stderr.strip() or done.stdout.strip()).splitlines()[-1][:90]
    out = next((folder / f"out{number}").glob(f"*-{steps[-1]}/accuracy.json"))
    return json.loads(out.read_text(encoding="utf-8")), seconds


def main(arguments):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--updates", type=int, default=900, help="of the autoencoder")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", choices=("vae", "gan"))
    parser.add_argument("--cases", nargs="+", help="names of some cases")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        (folder / "toml").mkdir()
        (folder / "toml" / RUN_FILE).write_text(
            (ROOT / "toml" / RUN_FILE).read_text(encoding="utf-8"), encoding="utf-8"
        )
        print(f"{'case':<46} {'seconds':>8} {'PSNR':>6} {'swapped':>8} " + " ".join(f"{name:>10}" for name in NAMES))
        common = {"run.threads": options.threads, "steps.vae.train.max_steps": options.updates, "sample.every_steps": 0}
        longer = {"steps.gan.train.max_steps": options.updates // 3, "steps.gan.optimizer.lr": 5e-4}
        for kind, cases, steps, more in (("vae", VAE, ["vae"], {}), ("gan", GAN, ["vae", "gan"], longer)):
            for name, changes in cases.items():
                if options.only in (None, kind) and (not options.cases or name in options.cases):
                    found, seconds = train(folder, {**common, **more, **changes}, steps, name.replace(" ", "_"))
                    if found is None:
                        print(f"{name:<46} {seconds}", flush=True)
                        continue
                    own = found["reconstruction"]
                    scores = " ".join(f"{own[key]:>10.0%}" for key in NAMES)
                    line = f"{name:<46} {seconds:>8.0f} {own['psnr']:>6.1f} {own['swapped'] / own['difference']:>7.1f}x {scores}"
                    print(line, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
