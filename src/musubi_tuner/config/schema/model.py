"""[model], and the parts from which families build theirs."""

from typing import Any, Literal

from musubi_tuner.config.fields import AutoDtype, Section, param
from musubi_tuner.config.when import is_, off


class ModelSection(Section):
    """Which model is trained, and the frozen networks around it."""

    tab = "setup"

    arch: str = param(..., "Code or full name of the model family.", flat=("architecture",))
    init: Literal["checkpoint", "scratch"] = param(
        "checkpoint", "Start from `path`, or from random weights of the shape in [model.geometry]."
    )
    path: str | None = param(
        None,
        "Checkpoint: a file, a folder, `folder:name` (final, best, latest, step_N, epoch_N), or on the hub "
        "`owner/repo[:subfolder or file]`; `hub` stands for the published repository.",
        flat=("dit",),
        path=True,
    )
    revision: str | None = param(
        None, "Branch, tag or commit of a hub id in model.path; absent = main.", when=is_("model.init", "checkpoint")
    )
    vae_path: str | None = param(None, "Autoencoder: a file, a folder or a hub id.", flat=("vae", "ae"), path=True)
    vae_dtype: AutoDtype = param("auto", "Precision of the autoencoder; auto = float32.")
    text_dtype: AutoDtype = param(
        "auto", "Precision of the text encoders; auto = bfloat16 on a GPU, float32 on a CPU.", expert=True
    )


class ClipAndT5(Section):
    """Text encoders of the FLUX kind."""

    clip_path: str | None = param(
        None,
        "CLIP-L text model: a file, a folder or a hub id.",
        flat=("clip_l_path", "text_encoder", "clip_l", "text_encoder_clip"),
        path=True,
    )
    t5_path: str | None = param(
        None,
        "T5 encoder: a file, a folder or a hub id.",
        flat=("text_encoder2", "t5xxl", "text_encoder_t5"),
        path=True,
    )
    clip_tokenizer: str | None = param(
        None, "CLIP tokenizer folder or hub id; absent = next to the encoder, else its published id.",
        flat=("tokenizer_clip",), path=True,
    )  # fmt: skip
    t5_tokenizer: str | None = param(
        None, "T5 tokenizer folder or hub id; absent = next to the encoder, else its published id.",
        flat=("tokenizer_t5",), path=True,
    )  # fmt: skip
    t5_max_tokens: int = param(
        128, "Text is padded or cut to this many T5 tokens.", flat=("t5_max_length",), ge=1, le=512, unit="tokens"
    )
    fp8_t5: bool = param(False, "Hold the Linear weights of T5 in float8 while encoding: half the memory, small error.")
    clip_act: Literal["quick_gelu", "gelu"] = param(
        "quick_gelu", "Activation of a CLIP-L file without config; gelu reproduces caches of musubi-tuner.", expert=True
    )


class NewModel(Section):
    """The shape of a model that starts from random weights."""

    geometry: dict[str, Any] = param({}, "Shape of a new model: the fields of its config.json.")


class AveragedCheckpoint(Section):
    """Which weights of a checkpoint that holds an average too."""

    weights: Literal["model", "ema"] = param(
        "model",
        "Which weights of the checkpoint to start from.",
        when=is_("model.init", "checkpoint") & (off("model.ema_file") | is_("ema.init", "checkpoint")),
    )
    ema_file: str | None = param(
        None,
        "Exact name of the averaged weights, beside the checkpoint or in its repository, or a whole path: the run starts "
        'from them, or its average does with ema.init = "checkpoint"; absent = the usual names.',
        when=is_("model.init", "checkpoint"),
        expert=True,
    )


class HiddenPadding(Section):
    """Whether the model sees the padding of its text."""

    t5_attn_mask: bool = param(False, "Hide padding tokens from pooling and attention; the published model does not.")
