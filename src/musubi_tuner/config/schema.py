"""Every setting of a run file, declared once.

A class is a TOML table, a field is a key. The type, range, default and the one sentence of help written here make
the TOML check, the command line, `--help`, `docs/config.md` and the resolved config; nothing is declared twice.

The tables that say what is trained stand in `model_sections.py`. A field's extra facts (see `fields.param`):
    flat      names accepted on the command line as ``--name``, beside the key's own last part where that is unique
    resume    "fixed": a run that continues must keep the value; "free": it may change between starts
    secret    never printed, stored or logged
    families  applicability and default by family come from ``models/<family>/options.py``, not from here

An absent optional value means off. Torch-free.
"""

from functools import cache
from typing import Literal, get_args

from pydantic import ConfigDict
from pydantic.fields import FieldInfo

from musubi_tuner.config.fields import AutoDtype, Dtype, Parameter, Section, param
from musubi_tuner.config.model_sections import (
    AdapterSection,
    ExpertsSection,
    ModelSection,
    ObjectiveSection,
    RolesSection,
)
from musubi_tuner.models.registry import MODELS
from musubi_tuner.models.spec import ModelSpec

SCHEMA_VERSION = 1


class RunSection(Section):
    """What the run is called, where it writes, and what makes it repeatable."""

    name: str = param(
        ..., "Name of the run; every output file begins with it.", flat=("output_name",), pattern=r"^[\w.\- ]+$"
    )
    output_dir: str = param(..., "Folder for checkpoints, states, samples and logs.", path=True, resume="free")
    seed: int = param(42, "Seed of order, noise, times and dropout.", flat=("seed",), ge=0, lt=2**32)
    device: Literal["auto", "cpu", "cuda", "mps"] = param(
        "auto", "Where to compute; auto takes a GPU if there is one.", resume="free"
    )
    threads: int | None = param(
        None, "CPU threads per process; absent = cores divided by processes.", ge=1, le=1024, resume="free"
    )
    allow_tf32: bool = param(
        True, "On NVIDIA GPUs, in training and drawing: multiply float32 matrices with inputs rounded to 10 mantissa bits, much "
        "faster. Not used for caches.",
        flat=("cuda_allow_tf32",), resume="free",
    )  # fmt: skip
    cudnn_benchmark: bool = param(
        True, "On GPUs: try convolution kernels and keep the fastest; only where all pictures have one size.",
        flat=("cuda_cudnn_benchmark",), resume="free",
    )  # fmt: skip
    deterministic: bool = param(
        False,
        "Use repeatable kernels only: slower, and an error where there is none; turns the two above off.",
        resume="free",
    )
    strict: bool = param(
        False, "Refuse to resume when library versions, CPU type, threads or processes changed.", resume="free"
    )


class CacheSection(Section):
    """The separate jobs that encode images and captions once."""

    run: Literal["auto", "always", "never"] = param(
        "auto",
        "auto = encode what is missing or stale, always = encode everything, never = only report.",
        resume="free",
    )
    skip_existing: Literal["fingerprint", "name"] = param(
        "fingerprint",
        "What counts as up to date: a matching fingerprint, or (unsafe) any file of the right name.",
        flat=("skip_existing",),
        resume="free",
    )
    verify: Literal["quick", "full"] = param(
        "quick",
        "quick trusts a picture, mask or encoder whose size, times and inode are unchanged since it was hashed; full hashes all "
        "at each start.",
        resume="free",
    )
    dtype: AutoDtype = param(
        "auto",
        "Storage precision; auto = latents float32, text bfloat16, experts float32. overflow in float16 is an error.",
    )
    latent_mode: Literal["sample", "mean"] = param(
        "sample", "Take a seeded sample of the autoencoder's posterior, or its mean."
    )
    seed: int = param(0, "Seed of the posterior sample.", ge=0, lt=2**32)
    latents_batch_size: int = param(1, "Images encoded together.", ge=1, le=1024)
    text_batch_size: int = param(16, "Captions encoded together.", ge=1, le=4096)
    workers: int = param(2, "Threads that read and resize images.", ge=0, le=64, resume="free")
    vae_tiling: bool = param(
        False, "Encode and decode large images in overlapping tiles (less memory, seams possible)."
    )
    nan_policy: Literal["error", "zero"] = param("error", "What to do with values that are not finite.")


class OptimizerSection(Section):
    """The update rule."""

    type: Literal["AdamW", "AdamW8bit", "Adafactor"] = param(
        "AdamW", "AdamW of torch, 8-bit AdamW of bitsandbytes, or Adafactor of transformers.", flat=("optimizer_type",)
    )
    lr: float = param(1e-4, "Learning rate after warm-up.", flat=("learning_rate",), ge=0, le=10)
    weight_decay: float = param(0.01, "Decoupled weight decay.", ge=0, le=10)
    betas: list[float] = param([0.9, 0.999], "Decay of the first and second moment.", min_length=2, max_length=2)
    eps: float = param(1e-8, "Added to the denominator.", gt=0, le=1)
    decay_all: bool = param(
        False, "Decay every parameter as published; otherwise norms, biases, gates and scalars are left alone."
    )


class SchedulerSection(Section):
    """The learning rate over updates."""

    type: Literal["cosine", "linear", "constant"] = param("cosine", "Shape after warm-up.", flat=("lr_scheduler",))
    warmup_steps: int = param(0, "Updates of warm-up from zero.", flat=("lr_warmup_steps",), ge=0)
    warmup_type: Literal["linear", "cosine"] = param("linear", "Shape of the warm-up.")
    min_lr: float = param(0.0, "Learning rate at the end of cosine and linear.", ge=0, le=10, resume="free")
    total_steps: int | None = param(
        None, "Updates until cosine and linear reach their end, where they stay; absent = the length of the run, so an extended run "
        "continues at a higher rate, unless its previous length is set here.", ge=1, resume="free",
    )  # fmt: skip


class TrainSection(Section):
    """Length, precision and batching."""

    max_steps: int | None = param(
        None, "Updates to train; or give max_epochs.", flat=("max_train_steps",), ge=1, resume="free"
    )
    max_epochs: int | None = param(
        None, "Passes over the data; with max_steps too, whichever ends first.", flat=("max_train_epochs",), ge=1,
        resume="free",
    )  # fmt: skip
    grad_accum_steps: int = param(
        1, "Micro-batches per update and process.", flat=("gradient_accumulation_steps",), ge=1, le=65536, resume="free"
    )
    masked_loss: bool = param(
        False, "Weight the loss of each position by the image's mask; the datasets say where masks are."
    )
    mask_foreground: float = param(1.0, "Weight of the loss where the mask is white.", ge=0, le=100)
    mask_background: float = param(0.0, "Weight of the loss where the mask is black.", ge=0, le=100)
    mask_normalize: bool = param(
        False, "Divide the weights of a masked image by their mean, so that its loss keeps its scale."
    )
    max_grad_norm: float = param(1.0, "Gradients are scaled down to this norm; 0 = no clipping.", ge=0)
    mixed_precision: Literal["auto", "no", "bf16", "fp16"] = param(
        "bf16", "Precision of the computation; weights, losses and optimizer stay float32. auto = bf16 where the device has it, "
        "else no.",
    )  # fmt: skip
    on_nonfinite: Literal["stop", "skip"] = param(
        "stop",
        "A loss or gradient that is not finite stops the run, or skips the update; fp16 always skips.",
        resume="free",
    )
    max_skipped_updates: int = param(
        20, "Where updates are skipped: stop after this many in a row.", ge=1, resume="free"
    )
    loader_workers: int = param(
        0, "Processes that read cache files.", flat=("max_data_loader_n_workers",), ge=0, le=64, resume="free"
    )


class MemorySection(Section):
    """Trading time for memory."""

    gradient_checkpointing: bool = param(False, "Recompute each block in the backward pass.", resume="free")
    base_storage: Literal["none", "fp8", "fp8_scaled", "int8", "nf4"] = param(
        "none", "How the weights of a frozen model are stored; none = in the precision of the computation."
    )
    fp8_scale: Literal["tensor", "row", "block"] = param(
        "block", "What shares a scale in fp8_scaled: the tensor, a row, or 64 columns of a row."
    )
    fp8_modulation: bool = param(False, "Quantise the modulation layers of the blocks too: less memory, more error.")
    fp8_compute: bool = param(
        False, "Multiply in fp8 too, with base_storage fp8 or fp8_scaled and a scale per row; needs a GPU that can."
    )
    fp8_compute_backward: Literal["bf16", "fp8"] = param(
        "bf16", "With fp8_compute: precision in which the gradients of the inputs are multiplied."
    )
    blocks_to_swap: int | Literal["auto"] = param(
        0, "Blocks whose weights stay in main memory and are streamed to the device, with gradients and optimizer state where "
        "they train; 0 = none, auto = as few as the free memory asks for.", resume="free",
    )  # fmt: skip
    checkpoint_every: int = param(
        1, "With gradient_checkpointing: recompute every n-th block only; larger is faster and takes more memory.", ge=1,
        le=100, resume="free",
    )  # fmt: skip
    swap_policy: Literal["single_first", "balanced"] = param(
        "single_first",
        "Which blocks are swapped: as many single ones as possible first, or both kinds alike.",
        resume="free",
    )
    swap_ring: int = param(
        2, "Device buffers for streamed blocks, each as large as a block.", ge=1, le=16, resume="free"
    )
    swap_pinned: bool = param(
        True, "Pin the main memory of swapped blocks; false = copy through two small pinned buffers, which is slower.",
        resume="free",
    )  # fmt: skip
    checkpoint_offload: bool = param(
        False, "Checkpoint, and keep the inputs of the blocks in main memory.",
        flat=("gradient_checkpointing_cpu_offload",), resume="free",
    )  # fmt: skip
    attention: Literal["sdpa", "flash", "xformers"] = param(
        "sdpa",
        "Kernel of attention: torch's own, or that of the package flash-attn or xformers, on a GPU.",
        resume="free",
    )
    compile: bool = param(
        False, "Compile the blocks with torch.compile: minutes at the start, faster steps.", resume="free"
    )
    compile_backend: str = param("inductor", "Compiler; torch lists those it knows.", resume="free")
    compile_mode: Literal["default", "max-autotune-no-cudagraphs"] = param(
        "default",
        "Effort of the compiler. Modes with CUDA graphs do not go with blocks that are compiled one by one.",
        resume="free",
    )
    compile_dynamic: Literal["auto", "true", "false"] = param(
        "auto", "Sizes in compiled code: auto = fixed at first and symbolic from the second bucket on.", resume="free"
    )
    compile_limit: int = param(
        32, "How often one kind of block may be compiled; more is an error.", flat=("compile_cache_size_limit",), ge=1,
        resume="free",
    )  # fmt: skip

    @property
    def checkpoints(self) -> bool:
        """Whether blocks are recomputed; keeping their inputs elsewhere implies it."""
        return self.gradient_checkpointing or self.checkpoint_offload

    @property
    def scale(self) -> Literal["tensor", "row", "block"]:
        """What shares a scale; products in fp8 take none by block."""
        return "row" if self.fp8_compute and self.fp8_scale == "block" else self.fp8_scale


class DistributedSection(Section):
    """How many processes train; also written [accelerate]."""

    num_processes: int = param(1, "Processes on this machine, one per GPU.", ge=1, le=1024, resume="free")
    main_process_port: int | None = param(None, "Port of the main process; absent = a free one.", ge=1, le=65535,
                                          resume="free")  # fmt: skip
    timeout_minutes: int = param(
        30, "How long a process waits for the others' gradients; while the main one draws or saves, they wait as long as it takes.",
        ge=1, resume="free",
    )  # fmt: skip


class EmaSection(Section):
    """A moving average of the weights, saved beside them and used for samples."""

    enabled: bool = param(True, "Keep the average.")
    decay: float = param(0.9999, "Share of the old average kept at every update.", ge=0, lt=1)
    warmup: bool | Literal["auto"] = param(
        "auto", "Start with a smaller decay: min(decay, (1 + n) / (10 + n)) after n updates. auto = true with a checkpoint and for "
        'adapters, false for a new model and with init = "checkpoint"; a run that continues keeps what it began with.',
    )  # fmt: skip
    on_cpu: bool = param(
        False, "Keep the average in main memory: less memory on the device, one more copy of the weights per update.",
    )  # fmt: skip
    init: Literal["model", "checkpoint"] = param(
        "model", "Start the average as a copy of the model, or from the averaged weights of the checkpoint."
    )


class ValidationSection(Section):
    """The loss on images that are never trained on, with the same noise and noise levels every time."""

    split: float = param(
        0.0, "Share of the pictures held out for validation, with their copies in all data sets; 0 = off.",
        flat=("validation_split",), ge=0, le=0.5,
    )  # fmt: skip
    seed: int = param(
        42, "Seed of the choice of these images and of their noise.", flat=("validation_seed",), ge=0, lt=2**32
    )
    every_steps: int | None = param(
        None, "Validate every so many updates, and always at the end; 0 = off.", flat=("validate_every_n_steps",), ge=0,
        resume="free",
    )  # fmt: skip
    every_epochs: int | None = param(
        1, "Validate every so many epochs, and always at the end; 0 = off.", flat=("validate_every_n_epochs",), ge=0,
        resume="free",
    )  # fmt: skip
    times: int = param(8, "Noise levels at which each image is measured, evenly spread over [0, 1].", ge=1, le=100)
    max_images: int | None = param(None, "Validate on at most so many of the held-out images; absent = all.", ge=1)
    weights: Literal["ema", "model"] = param(
        "ema", "Validate the averaged weights, if ema.enabled keeps them, or the trained ones."
    )


class SaveSection(Section):
    """Checkpoints during training; the final one is always written."""

    every_steps: int | None = param(
        5000, "Save every so many updates; 0 = off.", flat=("save_every_n_steps",), ge=0, resume="free"
    )
    every_epochs: int | None = param(
        None, "Save every so many epochs; 0 = off.", flat=("save_every_n_epochs",), ge=0, resume="free"
    )
    keep_last_steps: int | None = param(3, "Newest step checkpoints kept; 0 = all.", ge=0, resume="free")
    keep_last_epochs: int | None = param(3, "Newest epoch checkpoints kept; 0 = all.", ge=0, resume="free")
    dtype: Dtype = param("float32", "Precision of saved weights; states always hold float32.",
                         flat=("save_precision",), resume="free")  # fmt: skip
    keep_last_states: int | None = param(
        2, "Newest states kept, across all checkpoints; older ones keep their weights only; 0 = as long as their weights.", ge=0,
        resume="free",
    )  # fmt: skip
    state: bool = param(True, "Write a resumable state with every checkpoint.", flat=("save_state",), resume="free")
    best: bool | None = param(
        None, "Keep the weights of the lowest validation loss (without validation: of the lowest mean training loss of an epoch) "
        "as `best`; absent = with validation only.", resume="free",
    )  # fmt: skip
    release: bool = param(True, "Write a folder that from_pretrained loads at the end.", resume="free")
    comment: str | None = param(None, "Remark stored in the metadata of adapter files.", flat=("training_comment",),
                                resume="free")  # fmt: skip


class SampleSection(Section):
    """Pictures drawn while training."""

    prompts: list[str] | str | None = param(
        None,
        "Prompts, or a prompt file (.txt, .toml, .json); absent = no samples.",
        flat=("sample_prompts",),
        resume="free",
    )
    every_steps: int | None = param(
        None, "Draw every so many updates; 0 = off.", flat=("sample_every_n_steps",), ge=0, resume="free"
    )
    every_epochs: int | None = param(
        None, "Draw every so many epochs; 0 = off.", flat=("sample_every_n_epochs",), ge=0, resume="free"
    )
    at_first: bool = param(False, "Draw once before the first update.", flat=("sample_at_first",), resume="free")
    width: int | None = param(None, "Pixels; absent = the family's default.", ge=16, le=8192, resume="free")
    height: int | None = param(None, "Pixels; absent = the family's default.", ge=16, le=8192, resume="free")
    steps: int = param(28, "Solver steps.", flat=("sample_steps",), ge=1, le=1000, resume="free")
    guidance: float = param(
        5.0, "Guidance: the embedded number where a model takes one, else classifier-free (1 = off).", ge=0, le=100,
        resume="free",
    )  # fmt: skip
    negative_prompt: str | None = param(
        None, "What to avoid; absent = the trained null condition, which differs from an empty text.", resume="free"
    )
    solver: Literal["euler", "heun"] = param("euler", "Solver of the sampling equation.", resume="free")
    seed: int = param(42, "Image i is drawn from seed + i.", flat=("sample_seed",), ge=0, lt=2**32, resume="free")
    use_ema: bool = param(True, "Draw with the averaged weights.", resume="free")


class LogSection(Section):
    """What is written down while training."""

    every_steps: int = param(10, "Updates between log lines.", flat=("log_every",), ge=1, resume="free")
    tensorboard: bool = param(True, "Write TensorBoard events to `logs/`.", resume="free")
    noise_bins: int = param(
        8, "Equal slices of the noise level, for each of which the training loss is logged; 0 = off.", ge=0, le=100,
        resume="free",
    )  # fmt: skip


class HubSection(Section):
    """Upload of a run to a repository on the hub; never stops the training."""

    repo_id: str | None = param(None, "Repository `owner/name`; absent = no upload.", flat=("huggingface_repo_id",),
                                resume="free")  # fmt: skip
    run_name: str | None = param(None, "Folder below checkpoint_runs/; absent = the run's name.", resume="free")
    private: bool = param(True, "Visibility of a repository that has to be created.", resume="free")
    token: str | None = param(None, "Access token; better left to the HF_TOKEN variable.", flat=("huggingface_token",),
                              secret=True, resume="free")  # fmt: skip
    every_steps: int = param(
        0, "Upload the newest checkpoint every so many updates; 0 here and below = every checkpoint when it is saved. The final "
        "one is always uploaded.", flat=("upload_every_steps",), ge=0, resume="free",
    )  # fmt: skip
    every_epochs: int = param(
        0, "Upload the newest checkpoint every so many epochs.", flat=("upload_every_epochs",), ge=0, resume="free"
    )
    release: Literal["final", "best", "none"] = param(
        "final", "Checkpoint that `owner/name` loads, at the root of the repository: the final one, or the best so far whenever "
        "there is a better one.", resume="free",
    )  # fmt: skip
    upload_samples: bool = param(True, "Upload the pictures that are drawn, to samples/.", resume="free")
    upload_logs: bool = param(
        True,
        "Upload TensorBoard events and metrics.jsonl to logs/, with each checkpoint and at the end.",
        resume="free",
    )
    upload_state: bool = param(
        False,
        "Upload states with the checkpoints, to continue elsewhere: several times as much data.",
        flat=("save_state_to_huggingface",),
        resume="free",
    )
    timeout_seconds: int = param(
        600, "Time limit of an upload, for its three attempts together; then it is given up.", ge=1, resume="free"
    )
    retry_seconds: float = param(
        5.0, "Pause before the second attempt; four times as long before the third.", ge=0, le=3600, resume="free"
    )
    finish_seconds: int = param(
        1800, "How long a run waits at its end for remaining uploads; then they are given up and listed.", ge=0, resume="free"
    )  # fmt: skip


class ResumeSection(Section):
    """How a run continues."""

    from_: str = param(
        "auto",
        "auto = the newest good state of this run, or a new start; none = a new start; or the path of a state. The last two need an "
        "output_dir without later checkpoints.",
        flat=("resume",),
        alias="from",
        resume="free",
    )


class DemoSection(Section):
    """The built-in demo: makes its own pictures and encoders, and scores what the model draws."""

    folder: str = param(..., "Where the demo's pictures, captions and encoders are made.", path=True)
    pictures: int = param(1536, "Training pictures to draw.", ge=1, le=1_000_000)
    size: int = param(64, "Side of a picture in pixels.", ge=32, le=1024, multiple_of=16)
    held_out: int = param(24, "Combinations of shape, colour, place and background never trained on.", ge=0, le=100)
    seed: int = param(0, "Seed of the pictures.", ge=0, lt=2**32)
    score_prompts: int = param(120, "Prompts scored at the end; half are held-out combinations.", ge=1, le=100_000,
                               resume="free")  # fmt: skip
    score_seed: int = param(1234, "Seed of the noise used for scoring.", ge=0, lt=2**32, resume="free")


class RunFile(Section):
    """A whole run file. `[general]` and `[[datasets]]` are checked by config/datasets.py."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, populate_by_name=True)

    schema_version: Literal[1] = param(SCHEMA_VERSION, "Version of this format.")
    dataset_config: str | None = param(
        None, "TOML file with [general] and [[datasets]]; or write these tables here.", path=True
    )
    run: RunSection
    model: ModelSection
    experts: ExpertsSection = ExpertsSection()
    cache: CacheSection = CacheSection()
    adapter: AdapterSection = AdapterSection()
    optimizer: OptimizerSection = OptimizerSection()
    scheduler: SchedulerSection = SchedulerSection()
    objective: ObjectiveSection = ObjectiveSection()
    train: TrainSection = TrainSection()
    memory: MemorySection = MemorySection()
    distributed: DistributedSection = DistributedSection()
    ema: EmaSection = EmaSection()
    roles: RolesSection = RolesSection()
    validation: ValidationSection = ValidationSection()
    save: SaveSection = SaveSection()
    sample: SampleSection = SampleSection()
    log: LogSection = LogSection()
    hub: HubSection = HubSection()
    resume: ResumeSection = ResumeSection()
    demo: DemoSection | None = None


AMBIGUOUS = {
    "resolution", "size", "width", "height", "steps", "warmup", "enabled", "run", "path", "weights", "unet", "release",
    "state", "private", "token", "folder", "pictures", "guidance", "loss", "workers", "geometry", "lune", "sol", "solver",
    "rank", "alpha", "include", "exclude", "split", "times", "best", "only", "merge", "comment", "shift", "dropout", "max_norm",
    "preset", "kinds", "depth", "targets", "lr_scale",
}  # fmt: skip
"""Last parts of keys that are no option names of their own: alone they would say too little, or mean something else."""

SECTION_ALIASES = {"accelerate": "distributed"}


def section_classes(spec: ModelSpec | None = None) -> dict[str, type[Section]]:
    """TOML table name -> its class, in order; of a family, or as far as all families share it."""
    tables: dict[str, type[Section]] = {}
    for name, field in RunFile.model_fields.items():
        classes = [c for c in (field.annotation, *get_args(field.annotation)) if isinstance(c, type)]
        for candidate in classes:
            if issubclass(candidate, Section):
                tables[name] = spec.sections.get(name, candidate) if spec else candidate
    return tables


def parameters(spec: ModelSpec | None = None) -> tuple[Parameter, ...]:
    """All settings of a family in the order of the file; or those that some family has, as the first one has them."""
    return _parameters(spec.code if spec else None)


@cache
def _parameters(code: str | None) -> tuple[Parameter, ...]:
    tables = section_classes()
    found = [Parameter("", name, field) for name, field in RunFile.model_fields.items() if name not in tables]
    for section, shared in tables.items():
        families = [MODELS[code]] if code else [MODELS[each] for each in MODELS]
        fields: dict[str, FieldInfo] = {}
        for cls in [spec.sections.get(section, shared) for spec in families]:
            for name, field in cls.model_fields.items():
                fields.setdefault(field.alias or name, field)
        found += [Parameter(section, name, field) for name, field in fields.items()]
    return tuple(found)


def flat_names() -> dict[str, Parameter]:
    """Command-line names -> settings: the flat aliases, and the last part of every key where it is unique."""
    everything = parameters()
    names: dict[str, Parameter] = {}
    for parameter in everything:
        for alias in parameter.extra("flat"):
            assert alias not in names, alias
            names[alias] = parameter
    counts: dict[str, int] = {}
    for parameter in everything:
        counts[parameter.name] = counts.get(parameter.name, 0) + 1
    for parameter in everything:
        if counts[parameter.name] == 1 and parameter.name not in AMBIGUOUS:
            names.setdefault(parameter.name, parameter)
    return names
