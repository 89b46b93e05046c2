"""One config that breaks each rule, and the nearest one that does not."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import musubi_tuner
from musubi_tuner.config import RunConfig, load_config
from musubi_tuner.config.diagnostics import InvalidConfig
from musubi_tuner.config.rules import GROUPS
from musubi_tuner.models.registry import MODELS

Changes = dict[str, Any]
SOURCE = Path(musubi_tuner.__file__).parent

LORA = 'type = "lora"'
NEW = {"without": ("model.path",), "experts": 'vae = "vae.safetensors"', "ema": "warmup = true"}
FD: Changes = {"model": 'arch = "fd"', "without": ("experts.unet",)}
DRAWN = 'prompts = ["a cat"]\nevery_steps = 5\n'
HUB = 'repo_id = "me/cat"\n'
EPOCHS: Changes = {"without": ("train.max_steps",), "train": "max_epochs = 1"}
SHORTER = "warmup_ratio = 0.05\ntotal_steps = 1000"
MORE = '[[datasets]]\nimage_directory = "more"'


def new(**changes: Any) -> Changes:
    """A model from random weights."""
    return {**NEW, "model": 'init = "scratch"', **changes}


def ff(objective: str = "train_vae = true", model: str = "", **changes: Any) -> Changes:
    """A run of FluxFlow, which starts from random weights unless its model says otherwise."""
    keys = ("clip_path", "t5_path", "vae_path", *(("path",) if "path" not in model else ()))
    start = "" if "path" in model else '\ninit = "scratch"'
    return {"model": f'arch = "ff"{start}\n{model}', "objective": objective, "ema": "enabled = false", **changes,
            "without": ("experts.unet", *(f"model.{key}" for key in keys))}  # fmt: skip


FLOW = {"objective": "train_diff = true", "model": 'path = "model.safetensors"'}
STREAM: Changes = {"data": '[[datasets]]\nshards = "a.tar"'}


def images(lines: str, more: str = "") -> Changes:
    return {"data": f'[[datasets]]\nimage_directory = "images"\n{lines}\n{more}'}


RULES: dict[str, list[tuple[Changes, Changes]]] = {
    "D01": [({**FD, "model": 'arch = "fd"\ninit = "scratch"', "without": ("experts.unet", "model.path")}, FD)],
    "D02": [({**FD, "adapter": 'type = "none"'}, {**FD, "adapter": LORA})],
    "D03": [({**FD, "objective": 'timestep_sampling = "uniform"\npreserve_distribution_shape = true'},
             {**FD, "objective": 'timestep_sampling = "sigmoid"\npreserve_distribution_shape = true'})],
    "F01": [(ff("train_vae = false"), ff())],
    "F02": [(ff("train_vae = true\ntrain_reconstruction = false"),
             ff("train_vae = true\ntrain_reconstruction = false\ngan_training = true"))],
    "F03": [(ff(**FLOW, adapter=LORA), ff(**FLOW))],
    "F04": [(ff("train_diff = true"), ff(**FLOW))],
    "F05": [(ff("train_vae = true\nuse_lpips = true"), ff("train_vae = true\nuse_lpips = true", 'vgg_path = "me/vgg"'))],
    "F06": [(ff("train_diff = true\nbeta_end = 1e-5", FLOW["model"]), ff("train_diff = true\nbeta_end = 1e-2", FLOW["model"]))],
    "F11": [(ff(model="geometry = {vae_dim = 48}"), ff(model="geometry = {vae_dim = 64}")),
            (ff(model="geometry = {downscales = 5}"), ff(model="geometry = {downscales = 4}"))],
    "F07": [(ff(**FLOW, memory="blocks_to_swap = 2"), ff(**FLOW, memory="blocks_to_swap = 0"))],
    "F09": [(ff(sample=DRAWN), ff(**FLOW, sample=DRAWN))],
    "F10": [(ff(**{**FLOW, "ema": 'init = "checkpoint"'}), ff(**FLOW))],
    "F08": [(ff(**FLOW, cache="vae_tiling = true"), ff(**FLOW, cache="vae_tiling = false"))],
    "V16b": [(ff('train_diff = true\nzero_terminal_snr = true\ntimestep_sampling = "cosine_weighted"', FLOW["model"]),
              ff("train_diff = true\nzero_terminal_snr = true", FLOW["model"]))],
    "NA02": [({"sample": 'prompts = ["a cat --l 3"]\nevery_steps = 5'}, {"sample": 'prompts = ["a cat --g 3"]\nevery_steps = 5'})],
    "NA03": [({"model": 'revision = "v2"'}, {"model": 'path = "me/model"\nrevision = "v2"'}),
             ({"optimizer": 'type = "Adafactor"\neps = 1e-6'}, {"optimizer": "eps = 1e-6"}),
             ({**images("caption_dropout_rate = 0.1"), "objective": "text_dropout = 0.2"},
              {**images("caption_dropout_rate = 0.1", MORE), "objective": "text_dropout = 0.2"})],
    "P01": [({"model": 'path = "gone.safetensors"'}, {}), ({"sample": 'prompts = "gone.txt"\nevery_steps = 5'}, {"sample": DRAWN})],
    "P02": [({"run": 'output_dir = "model.safetensors/x"'}, {"run": 'output_dir = "new/x"'})],
    "P07": [({"run": 'device = "cpu"', "train": 'mixed_precision = "fp16"'}, {"run": 'device = "cpu"', "train": 'mixed_precision = "bf16"'}),
            ({"run": 'device = "mps"', "distributed": "num_processes = 2"}, {"run": 'device = "mps"'})],
    "P08": [({"model": 'path = "page.safetensors"'}, {"model": 'path = "model.safetensors"'})],
    "T02": [({"objective": "guidance_min = 6"}, {"objective": "guidance_min = 5"})],
    "T03": [({"sample": f"{DRAWN}guidance = 0.5"}, {"sample": f"{DRAWN}guidance = 1"})],
    "T04": [({"without": ("experts.unet",)}, {"without": ("experts.unet",), "cache": 'run = "never"'}),
            ({"experts": 'expert_input = "noised_image"'}, {"experts": 'expert_input = "random"'})],
    "T05": [(new(adapter=LORA), {"adapter": LORA, "ema": "enabled = false"})],
    "T06": [(new(model='init = "scratch"\ngeometry = {hidden_size = 3}'), new())],
    "T07": [({"experts": "enable_sol = false", "objective": "spatial_weighting = true"}, {"objective": "spatial_weighting = true"})],
    "T08": [({"experts": 'sol_source = "geometric"'}, {"experts": 'sol_source = "extracted"'})],
    "T09": [(images("experts = false"), images("", '[[datasets]]\nimage_directory = "more"\nexperts = false'))],
    "T10": [({**images("flip_aug = true"), "experts": 'expert_input = "noised_image"\nvae = "vae.safetensors"'},
             {**images("flip_aug = true"), "experts": 'expert_input = "random"'})],
    "U01": [({"resume": 'allow = ["objective.lsos"]'}, {"resume": 'allow = ["objective.loss"]'}),
            (new(model='init = "scratch"\ngeometry = {hiden_size = 512}'), new())],
    "U03": [({"optimizer": "betas = [0.9, 1.0]"}, {"optimizer": "betas = [0.9, 0.99]"}),
            ({"optimizer": 'type = "AdamWScheduleFree"\nbetas = [0, 0.9]'}, {"optimizer": 'type = "AdamW"\nbetas = [0, 0.9]'}),
            *[({"optimizer": f'group_lr = {{"*" = {rate}}}'}, {"optimizer": 'group_lr = {"*" = 10}'}) for rate in ("-1e-9", "10.1", "nan")],
            ({"adapter": f'{LORA}\nonly = ["["]'}, {"adapter": f'{LORA}\nonly = ["a"]'})],
    "U04": [({"adapter": f'{LORA}\nkinds = ["single"]'}, {"adapter": f'{LORA}\nkinds = ["single_attn"]'})],
    "U07": [({"without": ("train.max_steps",)}, EPOCHS),
            ({"scheduler": 'type = "piecewise_constant"'}, {"scheduler": 'type = "piecewise_constant"\nrules = "1:10,0.1"'}),
            ({"without": ("model.path",)}, {})],
    "V01": [(images("shuffle_caption = true"), {**images("shuffle_caption = true"), "cache": "text_variants = 2"})],
    "V03": [(images("random_crop = true"), {**images("random_crop = true"), "cache": "latent_variants = 2"})],
    "V04": [(images("color_aug = true"), {**images("color_aug = true"), "cache": "latent_variants = 2"})],
    "V05": [(images("enable_wildcard = true"), {**images("enable_wildcard = false")})],
    "V07": [({"objective": "adaptive_noise_scale = 0.1"}, {"objective": "adaptive_noise_scale = 0.1\nnoise_offset = 0.1"})],
    "V09": [({"objective": "noise_offset = 0.1\nmultires_noise_iterations = 4"}, {"objective": "noise_offset = 0.1"})],
    "V12": [({"objective": "noise_offset = 0.1"}, {"objective": "noise_offset = 0.0"})],
    "V15": [({"objective": 'weighting_scheme = "cosmap"'}, {"objective": 'weighting_scheme = "cosmap"\nmin_snr_gamma = 0'})],
    "V16": [({**FD, "objective": 'min_snr_gamma = 5\nmin_snr_form = "published"'}, {**FD, "objective": "min_snr_gamma = 5"})],
    "V17": [({"objective": "min_timestep = 600\nmax_timestep = 600"}, {"objective": "min_timestep = 599\nmax_timestep = 600"})],
    "V18": [({**FD, "objective": 'weighting_scheme = "mode"'}, {**FD, "objective": 'weighting_scheme = "mode"\ntimestep_sampling = "sigma"'})],
    "V21": [({"memory": 'base_storage = "int8"'}, {"memory": 'base_storage = "int8"', "adapter": LORA, "ema": "enabled = false"})],
    "V22": [({"memory": "checkpoint_offload = true\nblocks_to_swap = 2"}, {"memory": "checkpoint_offload = true"})],
    "V23": [({**FD, "memory": "blocks_to_swap = 54"}, {**FD, "memory": "blocks_to_swap = 53"}),
            ({"memory": "blocks_to_swap = -1"}, {"memory": "blocks_to_swap = 0"})],
    "V24": [({"memory": "checkpoint_offload = true\ngradient_checkpointing = false"}, {"memory": "checkpoint_offload = true"})],
    "V25": [({"memory": 'attention = "flash"', "run": 'device = "cpu"'}, {"memory": 'attention = "flash"'})],
    "V27": [({"scheduler": "warmup_steps = 99\nwarmup_ratio = 0.05"}, {"scheduler": "warmup_steps = 100\nwarmup_ratio = 0.05"}),
            ({"scheduler": 'warmup_steps = "4%"\nwarmup_ratio = 0.05'}, {"scheduler": 'warmup_steps = "5%"\nwarmup_ratio = 0.05'}),
            ({"scheduler": f"warmup_steps = 100\n{SHORTER}"}, {"scheduler": f"warmup_steps = 50\n{SHORTER}"}),
            ({**EPOCHS, "scheduler": "warmup_steps = 50\nwarmup_ratio = 0.05"}, {**EPOCHS, "scheduler": f"warmup_steps = 50\n{SHORTER}"})],
    "V29": [({"scheduler": "warmup_steps = 2001"}, {"scheduler": "warmup_steps = 2000"}),
            ({"scheduler": 'type = "warmup_stable_decay"\nwarmup_steps = 1000\ndecay_steps = 1001'},
             {"scheduler": 'type = "warmup_stable_decay"\nwarmup_steps = 1000\ndecay_steps = 0.5'}),
            ({"scheduler": "warmup_steps = 9\ntotal_steps = 9"}, {"scheduler": "warmup_steps = 9\ntotal_steps = 10"})],
    "V19": [({"train": 'full_half = true\nmixed_precision = "no"'}, {"train": 'full_half = true\nmixed_precision = "bf16"'}),
            ({"train": "full_half = true", "optimizer": 'type = "Prodigy"'},
             {"train": "full_half = true\nstochastic_rounding = false", "optimizer": 'type = "Prodigy"'}),
            ({"train": "full_half = true", "memory": "blocks_to_swap = 2"},
             {"train": "full_half = true", "memory": "blocks_to_swap = 2", "adapter": LORA})],
    "V31": [({"optimizer": 'type = "Adafactor"\nargs = {warmup_init = true}'},
             {"optimizer": 'type = "Adafactor"\nargs = {warmup_init = true, relative_step = true}'}),
            ({"scheduler": 'type = "adafactor"'}, {"scheduler": 'type = "adafactor"', "optimizer": 'type = "Adafactor"'})],
    "V32": [({"optimizer": 'type = "Adafactor"\nlr = 1e-3\nargs = {relative_step = true}'},
             {"optimizer": 'type = "Adafactor"\nlr = 1e-3\nargs = {relative_step = false}'}),
            ({"optimizer": 'type = "Adafactor"\ngroup_lr = {"*" = 1}\nargs = {relative_step = true}'},
             {"optimizer": 'type = "Adafactor"\ngroup_lr = {"*" = 0}\nargs = {relative_step = true}'})],
    "V34": [({"optimizer": 'type = "Prodigy"\nlr = 0.1'}, {"optimizer": 'type = "Prodigy"\nlr = 0.2'})],
    "V35": [({"optimizer": 'type = "Prodigy"\ngroup_lr = {"*" = 0.5}'}, {"optimizer": 'type = "Prodigy"\ngroup_lr = {"*" = 0}'}),
            ({"optimizer": 'type = "DAdaptAdam"', "adapter": f"{LORA}\nloraplus_lr_ratio = 4"},
             {"optimizer": 'type = "DAdaptAdam"', "adapter": f"{LORA}\nloraplus_lr_ratio = 1"}),
            ({"optimizer": 'type = "DAdaptAdam"', "adapter": f"{LORA}\ntargets = [{{pattern = '**', lr_scale = 2}}]"},
             {"optimizer": 'type = "AdamW"', "adapter": f"{LORA}\ntargets = [{{pattern = '**', lr_scale = 2}}]"})],
    "V37": [({"optimizer": 'type = "AdamWScheduleFree"', "ema": "enabled = true"}, {"optimizer": 'type = "AdamWScheduleFree"'}),
            ({"optimizer": 'type = "AdamWScheduleFree"', "adapter": f"{LORA}\nmax_norm = 1"},
             {"adapter": f"{LORA}\nmax_norm = 1"})],
    "V40": [({"optimizer": 'type = "Lion"\nlr = 2e-3'}, {"optimizer": 'type = "Lion"\nlr = 1e-3'})],
    "V42": [({"optimizer": 'type = "Prodigy"\nargs = {d_coeff = 2}'}, {"optimizer": 'type = "Prodigy"\nargs = {d_coef = 2}'}),
            ({"optimizer": 'type = "SGD"\nargs = {momentum = 1}'}, {"optimizer": 'type = "SGD"\nargs = {momentum = 0.99}'}),
            *[({"optimizer": f'type = "SGD"\nargs = {{nesterov = true, {arg}}}'}, {"optimizer": f'type = "SGD"\nargs = {{{arg}}}'})
              for arg in ("momentum = 0", "dampening = 0.1")]],
    "V93": [({"optimizer": "fused_backward = true"}, {"optimizer": "fused_backward = true", "train": "max_grad_norm = 0"}),
            *[({"optimizer": "fused_backward = true", "train": f"max_grad_norm = 0\n{line}"}, {"train": line})
              for line in ("grad_accum_steps = 2", 'on_nonfinite = "skip"', 'mixed_precision = "fp16"')]],
    "V95": [*[({"distributed": "fsdp = true", **wrong}, {"distributed": "fsdp = true"})
              for wrong in ({"optimizer": 'type = "Adafactor"'}, {"adapter": LORA}, {"memory": "blocks_to_swap = 2"},
                            {"memory": "compile = true"}, {"train": 'mixed_precision = "fp16"'})],
            (ff(distributed="fsdp = true"), ff())],
    "V33": [({"optimizer": 'type = "Adafactor"', "train": "max_grad_norm = 1.0"}, {"optimizer": 'type = "Adafactor"', "train": "max_grad_norm = 0"})],
    "V36": [({"optimizer": "lr = 0.5"}, {"optimizer": "lr = 0.09"})],
    "V43": [({"optimizer": "lr = 0"}, {"optimizer": "lr = 1e-9"}),
            ({"adapter": f"{LORA}\nkinds = []"}, {"adapter": f'{LORA}\nkinds = []\ninclude = [".*"]'})],
    "V44": [({"adapter": f"{LORA}\nrank_from_weights = true"},
             {"adapter": f'{LORA}\nrank_from_weights = true\ninit_from = "model.safetensors"'})],
    "V45": [({"adapter": f"{LORA}\nblock_rank = [4, 4]"}, {"adapter": f"{LORA}\nblock_rank = {[4] * 40}"})],
    "V46": [({"adapter": 'type = "dylora"\nrank = 10\nblock_size = 4'}, {"adapter": 'type = "dylora"\nrank = 12\nblock_size = 4'})],
    "V47": [({"adapter": 'type = "lokr"\ndropout = 0.1'}, {"adapter": 'type = "lokr"\nmodule_dropout = 0.1'}),
            ({"adapter": 'type = "ia3"\nrank_dropout = 0.1'}, {"adapter": 'type = "loha"\nrank_dropout = 0.1'}),
            *(({"adapter": f'type = "lokr"\ntargets = [{{pattern = "**.qkv", {on} = 0.1}}]'},
               {"adapter": f'type = "lokr"\ntargets = [{{pattern = "**.qkv", {off} = 0.1}}]'}) for on, off in [("dropout", "lr_scale")]),
            ({"adapter": 'type = "boft"\nloraplus_lr_ratio = 4'}, {"adapter": 'type = "dora"\nloraplus_lr_ratio = 4'})],
    "V49": [({"adapter": 'type = "locon"\nconv_rank = 8'}, {"adapter": 'type = "locon"'}),
            ({"adapter": 'type = "locon"\nconv_alpha = 8'}, {"adapter": 'type = "locon"\nconv_alpha = 0'})],
    "V50": [({"adapter": f"{LORA}\nrank = 4\nalpha = 17"}, {"adapter": f"{LORA}\nrank = 4\nalpha = 16"})],
    "V56": [({"train": "max_epochs = 3"}, {})],
    "V58": [(images("keep_tokens = 1"), {**images("keep_tokens = 1\nshuffle_caption = true"), "cache": "text_variants = 2"}),
            *((images('caption_separator = "|"'), images(f'caption_separator = "|"\n{key} = "x"'))
              for key in ("trigger_word", "secondary_separator"))],
    "V59": [(images("caption_dropout_rate = 1.0"), images("caption_dropout_rate = 0.9")),
            ({"objective": "text_dropout = 1.0"}, {"objective": "text_dropout = 0.9"})],
    "V63": [({"sample": 'prompts = ["a cat"]\nevery_steps = 0'}, {"sample": DRAWN})],
    "V65": [({"save": "every_steps = 0\nevery_epochs = 0"}, {"save": "every_steps = 0\nevery_epochs = 1"})],
    "V66": [({"adapter": f'{LORA}\ninit_from = "model.safetensors"', "resume": 'from = "x"'},
             {"adapter": f'{LORA}\ninit_from = "model.safetensors"'})],
    "V74": [(new(ema=""), new(ema="decay = 0.99"))],
    "V61": [({"log": "wandb = true"}, {"log": 'wandb = true\nwandb_api_key = "k"'})],
    "V62": [({"log": 'wandb = true\nwandb_api_key = "k"\nconfig = true'}, {"log": 'wandb = true\nwandb_api_key = "k"'})],
    "V80": [({"scheduler": "min_lr = 1e-3"}, {"scheduler": "min_lr = 1e-4"})],
    "V81": [({"ema": 'init = "checkpoint"', "adapter": LORA}, {"ema": 'init = "checkpoint"'})],
    "V82": [({"objective": "ip_noise_gamma = 0.6"}, {"objective": "ip_noise_gamma = 0.5"})],
    "V83": [({"cache": 'dtype = "float16"', "train": 'mixed_precision = "no"'}, {"cache": 'dtype = "float16"'})],
    "V84": [({"train": "masked_loss = true\nmask_foreground = 0\nmask_background = 0"},
             {"train": "masked_loss = true\nmask_foreground = 1\nmask_background = 0"})],
    "V85": [({"hub": f'{HUB}release = "best"'}, {"hub": f'{HUB}release = "best"', "save": "best = true"}),
            ({"hub": 'repo_id = "cat"'}, {"hub": HUB})],
    "V86": [({"adapter": f'{LORA}\nmerge = ["model.safetensors"]\nmerge_multipliers = [1, 2]'},
             {"adapter": f'{LORA}\nmerge = ["model.safetensors"]\nmerge_multipliers = [1]'})],
    "V87": [({"memory": "compile = true\nblocks_to_swap = 2"}, {"memory": "compile = true"}),
            ({"memory": 'compile = true\ncompile_backend = "eager"\ncompile_mode = "max-autotune-no-cudagraphs"'},
             {"memory": 'compile = true\ncompile_mode = "max-autotune-no-cudagraphs"'})],
    "V88": [({"memory": "blocks_to_swap = 2", "optimizer": f'type = "{name}"'}, {"memory": "blocks_to_swap = 2"})
            for name in ("AdamW8bit", "PagedAdamW", "Lion8bit")],
    "V94": [({**ff(), **STREAM, "data": f'{STREAM["data"]}\n{MORE}'}, {**ff(), **STREAM}), ({**ff(**FLOW), **STREAM}, {**ff(), **STREAM}),
            ({**ff(), "data": f'{STREAM["data"]}\ncache_directory = "caches"'}, {**ff(), **STREAM}),
            (STREAM, {"data": f'{STREAM["data"]}\ncache_directory = "caches"'})],
    "V92": [(images("is_reg = true"), images("is_reg = true", MORE))],
}  # fmt: skip
"""Code -> pairs of changes of a good file: those that break the rule, and the nearest that do not."""
CASES = [(code, *pair) for code, pairs in RULES.items() for pair in pairs]


@pytest.fixture
def codes(write: Callable[..., Path], project: Path) -> Callable[..., set[str]]:
    """Write a run file and return the codes of everything that is found."""
    (project / "more").mkdir(exist_ok=True)
    (project / "x").mkdir()
    (project / "page.safetensors").write_text("<!DOCTYPE html><title>Sign in</title>", encoding="utf-8")

    def collect(changes: Changes) -> set[str]:
        try:
            return {found.code for found in load_config(write(**changes)).findings}
        except InvalidConfig as problem:
            return {found.code for found in problem.findings}

    return collect


@pytest.mark.parametrize(
    ("code", "breaks", "keeps"), CASES, ids=[f"{code}-{n}" for n, (code, _, _) in enumerate(CASES)]
)
def test_a_rule_speaks_where_it_is_broken_and_nowhere_near(
    code: str, breaks: Changes, keeps: Changes, codes: Callable[..., set[str]]
) -> None:
    assert code in codes(breaks)
    assert code not in codes(keeps)


def test_every_rule_has_a_case() -> None:
    groups = [*GROUPS, *(rules for name in MODELS if (rules := MODELS[name].rules) is not None)]
    assert {code for group in groups for rule in group.all for code in rule.codes} == {*RULES, "V38"}


def test_a_missing_package_is_named_with_the_extra_that_has_it(
    codes: Callable[..., set[str]], write: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name, package=None: None)
    with pytest.raises(InvalidConfig, match=r'prodigyopt is not installed: pip install "\.\[optim\]"'):
        load_config(write(optimizer='type = "Prodigy"'))


def test_findings_carry_the_code_of_their_rule() -> None:
    """Each code that a rule's function yields is among those that it declares."""
    pattern = re.compile(r'@rule\(\s*"([^"]*)"(.*?)(?=\n@rule|\Z)', re.DOTALL)
    for path in [*(SOURCE / "config" / "rules").glob("*.py"), *SOURCE.glob("models/*/rules.py")]:
        for declared, body in pattern.findall(path.read_text(encoding="utf-8")):
            used = set(re.findall(r'(?:error|warning|info)\(\s*"([A-Z]+\d+)"', body))
            assert used <= {*declared.split(), "NA01", "NA03", "V55", "U03", "P07", "T09"}, (path.name, declared, used)


def test_rules_that_read_a_wrong_value_keep_silent_and_the_others_speak(codes: Callable[..., set[str]]) -> None:
    found = codes(
        {
            "optimizer": 'lr = "fast"',
            "scheduler": "min_lr = 5",
            "train": "max_steps = 0",
            "ema": 'init = "checkpoint"\nwarmup = true',
        }
    )
    assert "V80" not in found and {"U02", "U03", "V81"} <= found


MISTAKES = {
    "run": 'seed = -1\ndevice = "gpu"', "optimizer": 'lr = "x"\nbetas = [1, 2]\nweigth_decay = 1', "scheduler": 'type = "cosin"\ntotal_steps = 0',
    "train": "masked_loss = true\nmask_foreground = 0\nmask_background = 0\nmax_grad_norm = -1",
    "memory": 'blocks_to_swap = -1\nattention = "sage"\nswap_ring = 0', "ema": 'decay = 2\ninit = "checkpoint"\nwarmup = true',
    "objective": "min_timestep = 700\nmax_timestep = 600\nguidance_min = 6\nadaptive_noise_scale = 0.5\nlune_mode = 3",
    "sample": 'prompts = ["x --l 3"]\nwidth = 500\nguidance = 0.1', "hub": 'repo_id = "x"\nrelease = "best"',
    "validation": "split = 0.9\ntimes = 0", "save": 'dtype = "int4"', "log": "every_steps = 0",
    "cache": 'run = "sometimes"\ntext_variants = 99',
}  # fmt: skip


def test_thirty_mistakes_come_in_one_answer(write: Callable[..., Path]) -> None:
    data = '[general]\nresolution = 0\nbatch_size = 0\n[[datasets]]\nimage_directory = "images"\nis_reg = 3\n'
    with pytest.raises(InvalidConfig) as caught:
        load_config(write(**MISTAKES, data=data))
    errors = [found for found in caught.value.findings if found.level == "error"]
    assert len(errors) >= 30 and len({found.key for found in errors}) >= 30


def test_strict_runs_take_no_warnings(load: Callable[..., RunConfig]) -> None:
    assert load(optimizer="lr = 0.5").findings
    with pytest.raises(InvalidConfig, match=r"optimizer\.lr: is 0\.5"):
        load(optimizer="lr = 0.5", run="strict = true")
