"""FluxFlow's modules beyond the golden numbers: what the fixed forms do that the published ones do not."""

from typing import Any
from zlib import crc32

import pytest
import torch
from torch import Tensor

from musubi_tuner.flow import diffusion
from musubi_tuner.models.fluxflow import (
    BezierActivation,
    Compressor,
    Expander,
    FlowProcessor,
    FluxFlowConfig,
    PatchDiscriminator,
    TextEncoder,
    bezier,
    losses,
)
from musubi_tuner.models.fluxflow.geometry import V2
from musubi_tuner.models.fluxflow.model import Block
from musubi_tuner.models.fluxflow.state_dict import build_part

FLOW: dict[str, Any] = {"d_model": 16, "vae_dim": 8, "embedding_size": 12, "n_head": 2, "n_layers": 2}
TINY_BERT = {"vocab_size": 50, "dim": 16, "n_layers": 1, "n_heads": 2, "hidden_dim": 32, "max_position_embeddings": 16}


@pytest.mark.parametrize("p_pre", bezier.PRE_ACTIVATIONS)
@pytest.mark.parametrize("t_pre", bezier.PRE_ACTIVATIONS)
def test_bezier_gradients(t_pre: str, p_pre: str) -> None:
    torch.manual_seed(0)
    for shape in ((2, 10, 2, 3), (3, 10)):
        x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(BezierActivation(t_pre, p_pre), (x,))


def test_bezier_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    x, grad = torch.randn(2, 35, 4, 6), torch.randn(2, 7, 4, 6)
    found = []
    for chunk in (1 << 16, 8):
        monkeypatch.setattr(bezier, "CHUNK", chunk)
        leaf = x.clone().requires_grad_()
        y = BezierActivation("sigmoid", "silu")(leaf)
        y.backward(grad)
        found.append((y.detach(), leaf.grad))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])


def test_bezier_keeps_its_input_only() -> None:
    kept: list[int] = []
    x = torch.randn(2, 20, 4, 4, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
        BezierActivation("sigmoid", "silu")(x)
    assert kept == [x.data_ptr()]


def test_bezier_refuses_other_widths() -> None:
    with pytest.raises(ValueError, match="multiple of 5"):
        BezierActivation()(torch.randn(2, 12))
    with pytest.raises(ValueError, match="p_pre"):
        BezierActivation(p_pre="relu")


def flow_inputs(height: int = 3, width: int = 4) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(2, height * width, 8), torch.randn(2, 12)


@torch.no_grad()
def test_every_time_counts_when_fixed() -> None:
    model, (tokens, text) = FlowProcessor(**FLOW), flow_inputs()
    found = [model.predict(tokens, (3, 4), text, torch.tensor([t, t])) for t in (0, 1, 7, 640, 999)]
    assert all(not torch.equal(a, b) for i, a in enumerate(found) for b in found[:i])
    packed = torch.cat((tokens, torch.zeros(2, 1, 8)), dim=1)
    packed[:, -1, 0], packed[:, -1, 1] = 3 / 1024, 4 / 1024
    collapsed = [model(packed, text, torch.tensor([t, t]), "reference") for t in (1, 640)]
    assert torch.equal(*collapsed)
    assert not torch.equal(*(model(packed, text, torch.tensor([t, t])) for t in (1, 640)))
    with pytest.raises(ValueError, match="between 0 and 1"):
        model(packed, text, torch.tensor([1.0, 640.0]))


def test_text_sequence_trains_its_attention() -> None:
    tokens, text = flow_inputs()
    model = FlowProcessor(**FLOW, rotary="axial", controls="interleaved", flow_head="all", text_width=6)
    states, mask = torch.randn(2, 5, 6), torch.ones(2, 5)
    mask[:, 3:] = 0
    v = model.predict(tokens, (3, 4), text, torch.tensor([5, 9]), states, mask)
    v.square().sum().backward()
    block: Any = model.transformer_blocks[0]
    assert block.cross_attn.q_proj.weight.grad.abs().max() > 1e-6
    hidden = states.clone()
    hidden[:, 3:] += 1
    with torch.no_grad():
        assert torch.equal(v, model.predict(tokens, (3, 4), text, torch.tensor([5, 9]), hidden, mask))
        hidden[:, 0] += 1
        assert not torch.equal(v, model.predict(tokens, (3, 4), text, torch.tensor([5, 9]), hidden, mask))
    pooled = FlowProcessor(**FLOW)
    pooled.predict(tokens, (3, 4), text, torch.tensor([5, 9])).square().sum().backward()
    published: Any = pooled.transformer_blocks[0]
    assert published.cross_attn.q_proj.weight.grad.abs().max() < 1e-7


def test_axial_rotary_is_a_rotation_and_knows_offsets() -> None:
    model = FlowProcessor(**FLOW, rotary="axial")
    cos, sin = model.rotary(3, 5)
    torch.testing.assert_close(cos.square() + sin.square(), torch.ones_like(cos))
    angles = torch.atan2(sin, cos).unflatten(0, (3, 5))
    step = torch.remainder(angles[1:, 2] - angles[:-1, 2] + 3, 6.2831855) - 3
    torch.testing.assert_close(step[0], step[1])


def test_a_block_mixes_its_parts_when_interleaved() -> None:
    for interleaved in (False, True):
        torch.manual_seed(0)
        block = Block(20, 2, interleaved=interleaved, axial=False)
        x, text = torch.randn(1, 3, 20), torch.randn(1, 1, 20)
        y, _ = block(x, text, None, (torch.ones(3, 10), torch.zeros(3, 10)))
        y[..., :4].sum().backward()
        # The first fifth of the published form is made of x alone.
        trained: Any = block.p1[2][0]  # type: ignore[index]
        assert (trained.weight.grad is not None and bool(trained.weight.grad.any())) == interleaved


def test_the_convolutions_reach_all_tokens() -> None:
    tokens, text = flow_inputs()
    for head, reached in (("first", 4), ("all", 12)):
        torch.manual_seed(0)
        model = FlowProcessor(**FLOW, flow_head=head)
        v = model.predict(tokens, (3, 4), text, torch.tensor([5, 9]))
        weight: Any = model.flow_predictor[0].weight
        gradients = [
            torch.autograd.grad(v[:, i].sum(), weight, retain_graph=True, allow_unused=True)[0] for i in range(12)
        ]
        assert [g is not None and bool(g.any()) for g in gradients] == [i < reached for i in range(12)]


@torch.no_grad()
def test_without_the_skip_all_content_passes_the_bottleneck() -> None:
    images = torch.randn(2, 3, 16, 16)
    for skip in (True, False):
        torch.manual_seed(0)
        model = Compressor(d_model=8, downscales=2, attn_layers=1, attn_heads=4, latent_skip=skip)
        _, _, latent = model.encode(images)
        latent = latent + torch.randn_like(latent)
        tokens = model.tokens(torch.zeros_like(latent), latent)
        assert torch.equal(tokens[0], tokens[1]) != skip


def test_geometry_says_what_does_not_fit() -> None:
    for values, message in (
        ({"vae_dim": 48}, "multiple of 32"),
        ({"vae_dim": 30}, "attn_heads"),
        ({"feature_maps_dim": 12}, "flow_heads"),
        ({"compat": "new"}, "compat"),
        ({"mix_kernel": 4}, "mix_kernel"),
        ({"downscales": 0}, "downscales"),
        ({"head_widths": [30, 16]}, "head_widths"),
    ):
        with pytest.raises(ValueError, match=message):
            FluxFlowConfig(**values)
    config = FluxFlowConfig(**V2)
    assert FluxFlowConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize(
    "loss",
    [losses.histogram, losses.color_stats, losses.contrast, losses.frequency_l1, losses.mse, losses.reconstruction],
)
def test_every_loss_of_an_image_has_a_gradient_and_is_per_sample(loss: Any) -> None:
    torch.manual_seed(0)
    target, pred = torch.rand(3, 3, 16, 16) * 2 - 1, torch.rand(3, 3, 16, 16) * 1.6 - 0.9
    pred.requires_grad_()
    together = loss(pred, target)
    assert together.shape == (3,)
    torch.testing.assert_close(together, torch.cat([loss(pred[i : i + 1], target[i : i + 1]) for i in range(3)]))
    (gradient,) = torch.autograd.grad(together.sum(), pred)
    assert gradient.flatten(1).abs().max(dim=1).values.min() > 0


def test_soft_histogram_is_near_the_hard_one() -> None:
    torch.manual_seed(0)
    target, pred = torch.rand(2, 3, 64, 64) * 2 - 1, torch.rand(2, 3, 64, 64) * 1.5 - 0.9
    hard = losses.histogram(pred, target, soft=False)
    torch.testing.assert_close(losses.histogram(pred, target), hard, rtol=0.02, atol=1e-4)


def test_spectral_norm_moves_only_when_told() -> None:
    torch.manual_seed(0)
    model = PatchDiscriminator(base_ch=4, depth=1, ctx_dim=8).train()
    images, ctx = torch.randn(2, 3, 8, 8), torch.randn(2, 8)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    first = model(images, ctx)[0]
    assert torch.equal(first, model(images, ctx)[0])
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())
    for _ in range(50):
        model.advance()
    layer: Any = model.head
    weight = layer.weight_orig / torch.dot(layer.weight_u, layer.weight_orig.flatten(1) @ layer.weight_v)
    assert torch.linalg.matrix_norm(weight.flatten(1), 2).item() == pytest.approx(1, abs=1e-3)


@torch.no_grad()
def test_padding_does_not_change_the_pooled_text() -> None:
    torch.manual_seed(0)
    model = TextEncoder(TINY_BERT, 12).eval()
    ids, mask = torch.tensor([[3, 4, 5, 0, 0]]), torch.tensor([[1, 1, 1, 0, 0]])
    torch.testing.assert_close(model(ids, mask), model(ids[:, :3], mask[:, :3]))
    assert not torch.allclose(model(ids, mask, "reference"), model(ids[:, :3], mask[:, :3], "reference"))


def test_solvers_find_the_image_of_a_perfect_model() -> None:
    torch.manual_seed(0)
    image = torch.randn(2, 5, 7)
    for alphas in (diffusion.linear_alphas(), diffusion.linear_alphas(zero_terminal=True)):

        def predict(x: Tensor, t: int, alphas: Tensor = alphas) -> Tensor:
            signal, noise = alphas[t].sqrt(), (1 - alphas[t]).sqrt()
            eps = (x - signal * image) / noise
            return signal * eps - noise * image

        for solver in (diffusion.ddim, diffusion.dpm_solver):
            found = solver(predict, torch.randn(2, 5, 7), diffusion.trailing_times(10), alphas)
            torch.testing.assert_close(found, image, atol=1e-4, rtol=1e-4)
    assert float(diffusion.linear_alphas(zero_terminal=True)[-1]) == 0


def test_times_follow_their_prior() -> None:
    prior = diffusion.cosine_time_prior()
    u = (torch.arange(100_000) + 0.5) / 100_000
    counts = torch.bincount(diffusion.times_from(u, prior), minlength=1000) / 100_000
    assert (counts - prior).abs().max() < 2e-5
    assert torch.bincount(diffusion.times_from(u), minlength=1000).unique().tolist() == [100]


def test_an_image_of_another_size_is_named() -> None:
    with pytest.raises(ValueError, match="multiples of 4"):
        Compressor(d_model=8, downscales=2, attn_layers=0, attn_heads=4)(torch.zeros(1, 3, 16, 18))
    packed = torch.zeros(2, 7, 8)
    packed[0, -1, :2], packed[1, -1, :2] = torch.tensor([2, 3]) / 1024, torch.tensor([3, 2]) / 1024
    with pytest.raises(ValueError, match="one by one"):
        Expander(8, 1)(packed)


@pytest.mark.parametrize(
    "flag", ["latent_skip", "down_shortcut", "pair_residual", "up_skip", "p_pre", "rgb_norm", "logvar_points"]
)
@torch.no_grad()
def test_every_flag_of_the_autoencoder_changes_what_it_computes(flag: str) -> None:
    found = []
    for flags in ({}, {flag: V2[flag]}):
        config = FluxFlowConfig(vae_dim=8, downscales=1, attn_layers=1, attn_heads=4, head_widths=(8, 8), **flags)
        compressor: Any = build_part("compressor", config)
        expander: Any = build_part("expander", config)
        set_by_name(compressor)
        set_by_name(expander)
        torch.manual_seed(1)
        images = torch.randn(2, 3, 8, 8)
        packed, mu, logvar = compressor(images, torch.ones(2, 8, 4, 4))
        found.append([packed, mu, logvar, expander(packed)])
    assert any(not torch.equal(a, b) for a, b in zip(*found, strict=True))


def set_by_name(model: Any) -> None:
    """Give weights values that depend on their names alone, whatever else there is; control points stay."""
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            continue
        generator = torch.Generator().manual_seed(crc32(name.encode()))
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)


@pytest.mark.parametrize("flag", ["rotary", "controls", "flow_head", "text_mode"])
@torch.no_grad()
def test_every_flag_of_the_flow_changes_what_it_computes(flag: str) -> None:
    tokens, text = flow_inputs()
    states, found = torch.randn(2, 3, 6), []
    for flags in ({}, {flag: V2[flag]}):
        shape = {
            "vae_dim": 8,
            "feature_maps_dim": 16,
            "flow_heads": 2,
            "flow_layers": 1,
            "text_embedding_dim": 12,
            "attn_heads": 4,
        }
        torch.manual_seed(0)
        model: Any = build_part("flow", FluxFlowConfig(**shape, **flags, text_width=6, text_heads=1))
        set_by_name(model)
        found.append(model.predict(tokens, (3, 4), text, torch.tensor([5, 9]), states))
    assert not torch.equal(*found)
