"""FluxFlow equals the published library 0.3.1 and the losses of its trainer 0.5.1 in float32."""

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

from musubi_tuner.flow import diffusion, v_target, vp_interpolate
from musubi_tuner.models.fluxflow import (
    BezierActivation,
    Compressor,
    Expander,
    FlowProcessor,
    PatchDiscriminator,
    TextEncoder,
    TrainableBezier,
    losses,
)
from musubi_tuner.models.fluxflow.autoencoder import Mixer, Spade, UpBlock, positions
from musubi_tuner.models.fluxflow.model import Attention, Block, ContextInjection, RotaryEmbedding, turn_halves

DATA = Path(__file__).parent / "data"
TOLERANCE = 1e-4


@cache
def golden(name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    with safe_open(str(DATA / f"fluxflow_{name}.safetensors"), "pt") as file:
        metadata = {key: json.loads(value) if value[:1] in "{[" else value for key, value in file.metadata().items()}
        return {key: file.get_tensor(key) for key in file.keys()}, metadata  # noqa: SIM118 (not a mapping)


def below(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}


def loaded(module: nn.Module, tensors: dict[str, Tensor], prefix: str = "w.") -> Any:
    module.load_state_dict(below(tensors, prefix))
    return module.eval()


def assert_close(found: Tensor, expected: Tensor, tolerance: float = TOLERANCE) -> None:
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= tolerance * expected.abs().max()


BEZIER, _ = golden("bezier")


@pytest.mark.parametrize(
    "case", sorted({key.split(".")[1] for key in BEZIER if key.startswith("in.") and ".tb_" not in key})
)
def test_bezier_activation(case: str) -> None:
    pre = case.split("_")[1:] or ["sigmoid", "none"]
    x = BEZIER[f"in.{case}.x"].requires_grad_()
    y = BezierActivation(*pre)(x)
    assert_close(y, BEZIER[f"out.{case}.y"])
    if f"in.{case}.grad_out" in BEZIER:
        y.backward(BEZIER[f"in.{case}.grad_out"])
        assert_close(x.grad, BEZIER[f"out.{case}.grad_x"])


@pytest.mark.parametrize("case", ["tb_full", "tb_chan", "tb_c11"])
def test_trainable_bezier(case: str) -> None:
    shape = tuple(BEZIER[f"w.{case}.p0"].shape)
    module = loaded(TrainableBezier(shape, channel_only=case == "tb_chan"), BEZIER, f"w.{case}.")
    x = BEZIER[f"in.{case}.x"].requires_grad_()
    y = module(x)
    assert_close(y, BEZIER[f"out.{case}.y"])
    y.backward(BEZIER[f"in.{case}.grad_out"])
    assert_close(x.grad, BEZIER[f"out.{case}.grad_x"])
    for name, parameter in module.named_parameters():
        assert_close(parameter.grad, BEZIER[f"out.{case}.grad_{name}"])


def test_blocks() -> None:
    tensors, config = golden("blocks")
    inputs, expected = below(tensors, "in."), below(tensors, "out.")
    with torch.no_grad():
        spade = loaded(Spade(**config["spade"]), tensors, "w.spade.")
        assert_close(spade(inputs["spade.x"], inputs["spade.context"]), expected["spade.y"])
        assert_close(spade(inputs["spade.x"], inputs["spade.context_same"]), expected["spade.y_same"])
        pooled, tokens = loaded(Mixer(**config["mixer"]), tensors, "w.mixer.")(inputs["mixer.x"])
        assert_close(pooled, expected["mixer.pooled"])
        assert_close(tokens, expected["mixer.tokens"])
        inject = loaded(ContextInjection(16), tensors, "w.inject.")
        assert_close(inject(inputs["inject.x"], inputs["inject.context"]), expected["inject.y"])
        rotary = RotaryEmbedding(8)
        rope = rotary.raster(9)
        assert_close(rotary.inv_freq, expected["rope.inv_freq"])
        assert_close(rope[0], expected["rope.cos"])
        assert_close(rope[1], expected["rope.sin"])
        assert_close(turn_halves(inputs["rope.x"], rope), expected["rope.y"])
        attn = loaded(Attention(**config["attn"]), tensors, "w.attn.")
        assert_close(attn(inputs["attn.x_q"], inputs["attn.x_kv"], rope, rope), expected["attn.y"])
        block, x, points = loaded(Block(**config["block"]), tensors, "w.block."), inputs["block.img"], None
        for call in ("first", "second"):
            x, points = block(x, inputs["block.text"], points, rope)
            assert_close(x, expected[f"block.{call}_img"])
            for index, point in enumerate(points):
                assert_close(point, expected[f"block.{call}_p{index}"])


@torch.no_grad()
def test_autoencoder() -> None:
    tensors, _ = golden("upblock")
    block = loaded(UpBlock(8, 8), tensors)
    assert_close(block(tensors["in.x"], tensors["in.context"]), tensors["out.y_ctx"])
    assert_close(block(tensors["in.x"]), tensors["out.y_noctx"])
    tensors, config = golden("compressor")
    compressor = loaded(Compressor(**config["config"]), tensors)
    found = compressor(tensors["in.img"], tensors["in.eps"])
    for name, value in zip(("packed", "mu", "logvar"), found, strict=True):
        assert_close(value, tensors[f"out.{name}"], 1e-3)
    assert_close(positions(8, 12, 8), tensors["out.pos_embed"])
    tensors, config = golden("expander")
    expander = loaded(Expander(**config["config"]), tensors)
    assert_close(expander(tensors["in.packed"]), tensors["out.img_ctx"])
    assert_close(expander(tensors["in.packed"], use_context=False), tensors["out.img_noctx"])


@torch.no_grad()
def test_flow_processor() -> None:
    tensors, config = golden("flow")
    model = loaded(FlowProcessor(**config["config"]), tensors)
    packed, text = tensors["in.packed"], tensors["in.text"]
    for name in ("t_int", "t_int01"):
        t = tensors[f"in.{name}"].long()
        assert_close(model(packed, text, t, compat="reference"), tensors[f"out.packed_{name}"])
        assert not torch.allclose(model(packed, text, t)[:, :-1], tensors[f"out.packed_{name}"][:, :-1], rtol=1e-3)
    t = tensors["in.t_float"]
    for times, compat in ((t, "reference"), (t, "fixed"), ((t * 999).long(), "fixed")):
        assert_close(model(packed, text, times, compat=compat), tensors["out.packed_t_float"])
        assert_close(
            model(tensors["in.packed_mixed_hw"], text, times, compat=compat), tensors["out.packed_mixed_hw_t_float"]
        )
    assert_close(model(packed[:1], text[:1], t[:1]), tensors["out.packed_single_t_float"])


def test_discriminator() -> None:
    tensors, config = golden("discriminator")
    model = loaded(PatchDiscriminator(**config["config"]), tensors)
    real, ctx = tensors["in.real"].requires_grad_(), tensors["in.ctx"]
    logits, features = model(real, ctx)
    assert_close(logits, tensors["out.logits_ctx"])
    assert_close(features, tensors["out.feats"])
    assert_close(model(real)[0], tensors["out.logits_noctx"])
    fake = model(tensors["in.fake"], ctx)[0]
    assert_close(fake, tensors["out.logits_fake_ctx"])
    assert_close(losses.r1_penalty(logits, real).mean(), tensors["out.r1"])
    assert_close(losses.hinge_loss(logits, fake).mean(), tensors["out.d_hinge"])
    assert_close(losses.generator_loss(fake).mean(), tensors["out.g_hinge"])


@torch.no_grad()
def test_text_encoder() -> None:
    tensors, config = golden("text_encoder")
    model = loaded(TextEncoder(config["distilbert"], int(config["embed_dim"])), tensors)
    ids, mask = tensors["in.input_ids"].long(), tensors["in.attention_mask"].long()
    assert_close(model.states(ids, mask), tensors["out.hidden"])
    assert_close(model(ids, mask, compat="reference"), tensors["out.embed"])
    assert_close(model(ids, mask), tensors["out.embed_masked"])


def test_losses() -> None:
    tensors, _ = golden("losses")
    target = tensors["in.target"]
    with_gradient: dict[str, Callable[[Tensor], Tensor]] = {
        "freq_a1": lambda pred: losses.frequency_l1(pred, target, 1.0).mean(),
        "freq_a05": lambda pred: losses.frequency_l1(pred, target).mean(),
        "mse": lambda pred: losses.mse(pred, target).mean(),
        "color": lambda pred: losses.color_stats(pred, target, "batch"),
        "contrast": lambda pred: losses.contrast(pred, target, "batch"),
    }
    for name, loss in with_gradient.items():
        pred = tensors["in.pred"].clone().requires_grad_()
        found = loss(pred)
        found.backward()
        assert_close(found, tensors[f"out.{name}"])
        assert_close(pred.grad, tensors[f"out.{name}_grad_pred"])
    pred, mu, logvar = tensors["in.pred"], tensors["in.mu"], tensors["in.logvar"]
    assert_close(losses.histogram(pred, target, "batch", soft=False), tensors["out.hist"])
    for bits in (0.0, 0.5):
        assert_close(losses.kl(mu, logvar, bits).mean(), tensors[f"out.kl_fb{bits}_norm"])
        assert_close(losses.kl(mu, logvar, bits, normalize=False).mean(), tensors[f"out.kl_fb{bits}_sum"])
    recon = losses.reconstruction(pred, target).mean()
    assert_close(recon, tensors["out.recon_no_lpips"])
    extra = 0.05 * tensors["out.color"] + 0.02 * tensors["out.hist"] + 0.1 * tensors["out.contrast"]
    total = recon + 0.001 * losses.kl(mu, logvar).mean() + extra
    assert_close(total, tensors["out.total_noadaptive_beta0.001_adv0"])
    real, fake = tensors["in.real_logits"], tensors["in.fake_logits"]
    assert_close(losses.hinge_loss(real, fake).mean(), tensors["out.d_hinge"])
    assert_close(losses.generator_loss(fake).mean(), tensors["out.g_hinge"])
    betas = [losses.kl_beta(int(step), 5000, 0.001) for step in tensors["in.beta_steps"]]
    assert_close(torch.tensor(betas), tensors["out.beta_warm5000_max0.001"])
    assert_close(losses.mmd(tensors["in.mmd_z"], tensors["in.mmd_prior"]), tensors["out.mmd"])
    assert_close(diffusion.cosine_time_prior(), tensors["out.t_sampling_prob"])


def test_diffusion() -> None:
    tensors, _ = golden("diffusion")
    alphas = diffusion.linear_alphas()
    assert_close(alphas, tensors["out.alphas_cumprod"])
    x0, noise, alpha = tensors["in.x0"], tensors["in.noise"], alphas[tensors["in.t"].long()]
    assert_close(vp_interpolate(x0, noise, alpha), tensors["out.noised_closed_form"])
    assert_close(v_target(x0, noise, alpha), tensors["out.v_target"])
    a, b, c = tensors["in.toy"].tolist()
    for steps in (8, 20):
        times = diffusion.trailing_times(steps)
        assert times == tensors[f"out.timesteps_{steps}"].long().tolist()
        found = diffusion.dpm_solver(lambda x, t: a * x + b * t / 1000 + c, tensors["in.sample_start"], times, alphas)
        assert_close(found, tensors[f"out.sample_{steps}"])


COUNTS = {
    32: (846_449, 6_273_391, 4_384, 419_552, 45_007_169),
    64: (3_221_305, 24_022_159, 16_960, 1_454_528, 45_039_937),
    128: (12_580_553, 94_073_551, 66_688, 5_373_824, 45_105_473),
    256: (49_737_193, 372_391_759, 264_448, 20_609_792, 45_236_545),
}


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize("width", COUNTS)
def test_parameter_counts(width: int) -> None:
    with torch.device("meta"):
        expander = Expander(width)
        found = (
            count(Compressor(d_model=width)),
            count(expander),
            count(expander.context_mixer),
            count(FlowProcessor(width, width)),
            count(PatchDiscriminator(ctx_dim=width)),
        )
    assert found == COUNTS[width]


def test_other_parameter_counts() -> None:
    with torch.device("meta"):
        text = TextEncoder()
        assert count(text.language_model) == 66_362_880
        assert count(text.ouput_layer) == 4_610_560
        assert count(FlowProcessor(512, 128)) == 80_277_632
        assert [count(PatchDiscriminator(base_ch=base)) for base in (8, 16)] == [721_385, 2_847_569]
