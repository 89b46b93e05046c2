"""[run]."""

from typing import Literal

from musubi_tuner.config.fields import Section, param
from musubi_tuner.config.when import is_not, off


class RunSection(Section):
    """What the run is called, where it writes, and what makes it repeatable."""

    tab = "setup"

    name: str = param(
        ...,
        "Name of the run; names of output files begin with it.",
        flat=("output_name",),
        pattern=r"^[\w.\- ]*[\w\-][\w.\- ]*$",
        max_length=100,
        accepts="at most 100 letters, digits, dots, spaces, - and _, not of dots alone",
    )
    output_dir: str = param(..., "Folder for checkpoints, states, samples and logs.", path=True, resume="free")
    seed: int = param(
        42, "Seed of initial weights, order, noise, noise levels and dropout.", flat=("seed",), ge=0, lt=2**32
    )
    device: Literal["auto", "cpu", "cuda", "mps"] = param(
        "auto", "Device to compute on; auto = a GPU if there is one.", resume="free", tab="advanced", expert=True
    )
    threads: int | None = param(
        None,
        "CPU threads per process; absent = cores divided by processes.",
        ge=1,
        le=1024,
        resume="free",
        unit="threads",
        tab="advanced",
        expert=True,
    )
    allow_tf32: bool = param(
        True, "On NVIDIA GPUs, in training and drawing: multiply float32 matrices with inputs rounded to 10 mantissa bits, much "
        "faster. Not used for caches.",
        flat=("cuda_allow_tf32",), resume="free", when=is_not("run.device", "cpu", "mps") & off("run.deterministic"), tab="advanced", expert=True
    )  # fmt: skip
    cudnn_benchmark: bool = param(
        True, "On GPUs: try convolution kernels and keep the fastest; used only if all pictures have the same size.",
        flat=("cuda_cudnn_benchmark",), resume="free", when=is_not("run.device", "cpu", "mps") & off("run.deterministic"), tab="advanced", expert=True
    )  # fmt: skip
    deterministic: bool = param(
        False,
        "Use deterministic kernels only: slower, and an error if there is none; turns allow_tf32 and cudnn_benchmark off.",
        resume="free",
        tab="advanced",
        expert=True,
    )
    strict: bool = param(
        False,
        "Treat warnings about settings and data as errors, and refuse to resume with another torch version, device, number of threads or number of processes.",
        resume="free",
        tab="advanced",
        expert=True,
    )
