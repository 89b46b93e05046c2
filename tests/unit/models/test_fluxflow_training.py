"""What FluxFlow's phases train: which losses reach which parts, the start of a new autoencoder, texts, LPIPS."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from musubi_tuner.flow import MaskSettings, diffusion
from musubi_tuner.models.fluxflow import FluxFlowConfig
from musubi_tuner.models.fluxflow.calibration import calibrate, check, initialize
from musubi_tuner.models.fluxflow.geometry import V2
from musubi_tuner.models.fluxflow.lpips import BLOCKS, Lpips
from musubi_tuner.models.fluxflow.process import FluxFlowProcess
from musubi_tuner.models.fluxflow.settings import FluxFlowObjective
from musubi_tuner.models.fluxflow.state_dict import PARTS, build_part
from musubi_tuner.models.fluxflow.system import FluxFlowSystem, no_text
from musubi_tuner.models.fluxflow.task import Draws, FluxFlowTask
from musubi_tuner.training.task import weighted_sum

SHAPE: dict[str, Any] = {
    "vae_dim": 8, "downscales": 2, "attn_layers": 1, "attn_heads": 4, "down_kernel": 4, "up_kernel": 4, "mix_kernel": 3,
    "head_widths": (16, 8), "feature_maps_dim": 16, "flow_layers": 1, "flow_heads": 2, "text_embedding_dim": 12,
    "feature_maps_dim_disc": 4, "disc_depth": 1, "text_width": 16, "text_layers": 1, "text_heads": 2, "text_ff": 16,
    "text_vocab": 40, "text_positions": 8,
}  # fmt: skip
AT: Any = SimpleNamespace(step=0, epoch=0)


def make_task(
    roles: tuple[str, ...], objective: FluxFlowObjective, layout: dict[str, Any] = V2
) -> tuple[FluxFlowTask, Any]:
    torch.manual_seed(0)
    config = FluxFlowConfig(**{**layout, **SHAPE})
    parts = {part: build_part(part, config) for part in PARTS}
    for part in parts.values():
        initialize(part)
    model: Any = FluxFlowSystem(config, parts)
    calibrate(model.vae["compressor"], model.vae["expander"], pictures(8), config.down_shortcut)
    make_role: Any = lambda name, module: SimpleNamespace(name=name, module=module)  # noqa: E731
    return FluxFlowTask(model, roles, make_role, objective, FluxFlowProcess(objective), 7), model


def pictures(count: int) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return F.interpolate(torch.rand(count, 3, 4, 4, generator=generator) * 2 - 1, size=16, mode="bilinear")


def batch_of(count: int = 2, **more: Tensor) -> Any:
    return SimpleNamespace(tensors={"pixels": pictures(count), **more})


def draws_of(task: FluxFlowTask, batch: Any, step: int = 0) -> Draws:
    count = len(next(iter(batch.tensors.values())))
    update: Any = SimpleNamespace(micro_batches=[SimpleNamespace(presentations=tuple(range(count)))])
    return task.draws(batch, update, 0, SimpleNamespace(step=step, epoch=0))  # type: ignore[arg-type]


def reached(module: nn.Module) -> set[str]:
    """Parts of a module with a gradient."""
    return {name.split(".")[0] for name, p in module.named_parameters() if p.grad is not None and bool(p.grad.any())}


GAN = {"train_vae": True, "gan_training": True, "train_spade": True}


def test_every_loss_of_the_autoencoder_has_a_gradient() -> None:
    task, model = make_task(("vae", "discriminator"), FluxFlowObjective(**GAN, kl_warmup_steps=0))
    batch = batch_of()
    phase = task.phases[1]
    for name, term in phase.losses(batch, draws_of(task, batch), AT).items():
        assert term.weight > 0 and term.per_sample_B.shape == (2,)
        gradients = torch.autograd.grad(
            term.per_sample_B.sum(), list(model.vae.parameters()), allow_unused=True, retain_graph=True
        )
        assert max(float(g.abs().max()) for g in gradients if g is not None) > 1e-8, name


@pytest.mark.parametrize(("reconstructs", "parts"), [(True, {"expander"}), (False, {"compressor", "expander"})])
def test_the_adversarial_loss_reaches_the_expander_and_alone_the_compressor_too(
    reconstructs: bool, parts: set[str]
) -> None:
    task, model = make_task(("vae", "discriminator"), FluxFlowObjective(**GAN, train_reconstruction=reconstructs))
    batch = batch_of()
    terms = task.phases[1].losses(batch, draws_of(task, batch), AT)
    assert ("recon" in terms) == reconstructs and terms["gen"].weight == 0.5
    terms["gen"].per_sample_B.sum().backward()
    assert reached(model.vae) == parts


def test_the_discriminator_sees_noise_and_r1_comes_every_so_often() -> None:
    objective = FluxFlowObjective(**GAN, r1_interval=2, instance_noise_std=0.5)
    task, model = make_task(("vae", "discriminator"), objective)
    batch, critic = batch_of(), task.phases[0]
    seen: list[Tensor] = []
    model.discriminator.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].detach()))
    assert set(critic.losses(batch, draws_of(task, batch), AT)) == {"disc", "r1"}
    before = model.discriminator.backbone[0][0].weight_u.clone()
    critic.begin(AT)
    assert not torch.equal(before, model.discriminator.backbone[0][0].weight_u)
    assert 0.4 < float((seen[0] - batch.tensors["pixels"]).std()) < 0.6
    later: Any = SimpleNamespace(step=1, epoch=0)
    assert set(critic.losses(batch, draws_of(task, batch, 1), later)) == {"disc"}
    quiet, model = make_task(("vae", "discriminator"), FluxFlowObjective(**GAN, instance_noise_std=0.0))
    assert draws_of(quiet, batch).pictures is None


def test_a_gan_that_starts_later_begins_without() -> None:
    task, _ = make_task(("vae", "discriminator"), FluxFlowObjective(**GAN, gan_start=5))
    batch = batch_of()
    assert not task.phases[0].due(AT)
    assert "gen" not in task.phases[1].losses(batch, draws_of(task, batch), AT)


def test_the_weight_of_the_adversarial_loss_is_a_ratio_of_gradients() -> None:
    task, model = make_task(("vae", "discriminator"), FluxFlowObjective(**GAN, gan_balance="gradient"))
    phase, last, batches = task.phases[1], model.vae["expander"].to_rgb_conv[-1].weight, [batch_of(2), batch_of(3)]
    assert task.remembered == {"gan_weight": 1.0}
    wanted = {"gen": torch.zeros_like(last), "rest": torch.zeros_like(last)}
    for batch in batches:
        terms = phase.losses(batch, draws_of(task, batch), AT)
        for name, term in terms.items():
            if name == "kl":
                continue
            loss = term.per_sample_B.sum() * (1.0 if name == "gen" else term.weight)
            wanted["gen" if name == "gen" else "rest"] += torch.autograd.grad(loss, last, retain_graph=True)[0]
        phase.end(lambda values: None)  # forgets what these gradients have left
        task.remembered["gan_weight"] = 1.0
    for batch in batches:
        weighted_sum(phase.losses(batch, draws_of(task, batch), AT)).backward()
    phase.end(lambda values: None)
    ratio = float(wanted["rest"].norm() / wanted["gen"].norm())
    assert task.remembered["gan_weight"] == pytest.approx(ratio, rel=1e-4) and ratio != pytest.approx(1.0, rel=0.1)
    assert phase.losses(batches[0], draws_of(task, batches[0]), AT)["gen"].weight == pytest.approx(0.5 * ratio)
    model.zero_grad()
    for batch in batches:
        weighted_sum(phase.losses(batch, draws_of(task, batch), AT)).backward()
    phase.end(lambda values: None)
    assert task.remembered["gan_weight"] == pytest.approx(
        ratio, rel=1e-4
    )  # of the loss itself, whatever its weight was


def test_a_new_autoencoder_is_dead_until_it_is_calibrated() -> None:
    torch.manual_seed(0)
    config = FluxFlowConfig(vae_dim=16, attn_layers=0, down_kernel=4, up_kernel=4, mix_kernel=3)
    compressor: Any = build_part("compressor", config)
    expander: Any = build_part("expander", config)
    images = F.interpolate(pictures(8), size=64, mode="bilinear")
    dead = check(compressor, expander, images, False)
    count = calibrate(compressor, expander, images, per_channel=False)
    alive = check(compressor, expander, images, False)
    assert count == 4 * 2 + 3 * 2 + 4 * 2
    assert dead.spread < 1e-4 < 0.1 < alive.spread
    assert alive.gradient > 100 * dead.gradient


def test_the_flow_learns_from_pixels_or_caches_and_drops_texts() -> None:
    objective = FluxFlowObjective(train_vae=True, train_diff_full=True, text_dropout=0.5)
    task, model = make_task(("vae", "flow", "text_encoder"), objective)
    texts = {
        "bert_ids": torch.tensor([[2, 5, 3, 0], [2, 6, 7, 3]]),
        "bert_mask": torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]]).bool(),
    }
    batch = batch_of(**texts)
    phase = task.phases[-1]
    assert phase.roles == ("flow", "text_encoder")
    draws = draws_of(task, batch)
    draws.dropout = torch.tensor([0.9, 0.9])
    phase.losses(batch, draws, AT)["flow"].per_sample_B.sum().backward()
    assert reached(model) == {"flow", "text_encoder"}
    inputs = {**texts, "keep": torch.tensor([True, False])}
    pooled, _, mask = model.text(inputs)
    null, _, empty = model.text(no_text(inputs))
    assert bool(pooled[0].any()) and torch.equal(pooled[1], null[1]) and not null.any()
    assert bool(mask[0].any()) and not mask[1].any() and not empty.any()


def test_recomputing_changes_no_bit() -> None:
    objective = FluxFlowObjective(**GAN, train_diff_full=True)
    texts = {"bert_ids": torch.tensor([[2, 5, 3, 0], [2, 6, 7, 3]]), "bert_mask": torch.ones(2, 4).bool()}
    found: list[dict[str, Tensor]] = []
    for recomputes in (False, True):
        task, model = make_task(("vae", "discriminator", "flow", "text_encoder"), objective)
        if recomputes:
            model.recompute()
        batch = batch_of(**texts)
        for phase in task.phases:
            weighted_sum(phase.losses(batch, draws_of(task, batch), AT)).backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    plain, again = found
    assert plain.keys() == again.keys() and len(plain) > 100
    assert all(torch.equal(tensor, again[name]) for name, tensor in plain.items())


def test_latents_are_normalised_on_the_way_in_and_back_on_the_way_out() -> None:
    mean, spread = [1.0, -2.0], [0.5, 3.0]
    process = FluxFlowProcess(FluxFlowObjective(), mean, spread)
    x0 = torch.randn(4, 2, 3, 3) * torch.tensor(spread).view(-1, 1, 1) + torch.tensor(mean).view(-1, 1, 1)
    noise, time = torch.randn_like(x0), torch.tensor([0.0005, 0.3, 0.6, 0.9995])
    noisy, v = process.add_noise(x0, noise, time), process.target(x0, noise, time)
    alpha = diffusion.linear_alphas()[process.index(time)].view(-1, 1, 1, 1)
    torch.testing.assert_close(
        process.normalise(x0), alpha.sqrt() * noisy - (1 - alpha).sqrt() * v, atol=1e-5, rtol=1e-5
    )

    def perfect(x: Tensor, now: float) -> Tensor:
        a = diffusion.linear_alphas()[int(now * 1000)]
        eps = (x - a.sqrt() * process.normalise(x0)) / (1 - a).sqrt()
        return a.sqrt() * eps - (1 - a).sqrt() * process.normalise(x0)

    for solver in ("dpm++", "ddim"):
        drawn = process.solve(solver, perfect, torch.randn_like(x0), process.sampling_times(8, ()))
        torch.testing.assert_close(drawn, x0, atol=1e-3, rtol=1e-3)
    assert process.sigma(time).diff().min() > 0


def test_masks_weigh_the_loss() -> None:
    process = FluxFlowProcess(FluxFlowObjective(), masks=MaskSettings(1.0, 0.0))
    weights = torch.zeros(2, 3, 4)
    weights[:, 0] = 1
    tensors = {"mask_weights": weights, "bert_mean": torch.zeros(2, 3)}
    batch: Any = SimpleNamespace(tensors=tensors, valid={"mask_weights": torch.ones(2, dtype=torch.bool)})
    inputs = process.conditioning(batch, torch.rand(2), {"text_dropout": torch.ones(2)})
    error = torch.randn(2, 5, 3, 4)
    loss = process.losses(error, torch.zeros_like(error), torch.rand(2), inputs, {}, 0)["main"].per_sample_B
    torch.testing.assert_close(loss, error[:, :, 0].square().flatten(1).mean(dim=1) / 3)


def test_lpips_is_its_definition() -> None:
    torch.manual_seed(0)
    model = Lpips()
    first, second = pictures(2), pictures(2).flip(0).requires_grad_()
    shift, scale = model.shift, model.scale
    expected = torch.zeros(2)
    for weights, last in zip(model.linear, model.taken, strict=True):
        maps = [model.features[: last + 1]((x - shift) / scale) for x in (first, second.detach())]
        units = [each / (each.square().sum(dim=1, keepdim=True).sqrt() + 1e-10) for each in maps]
        expected += ((units[0] - units[1]).square() * weights.view(1, -1, 1, 1)).sum(dim=1).mean(dim=(1, 2))
    first.requires_grad_()
    found = model(first, second)
    torch.testing.assert_close(found, expected)
    found.sum().backward()
    assert bool(first.grad.any()) and second.grad is None  # type: ignore[union-attr]
    assert len(model.taken) == len(BLOCKS) == 5
    assert [name for name, p in model.named_parameters() if p.requires_grad] == []
    assert {f"features.{n}.weight" for n in (0, 5, 10, 17, 28)} <= set(model.state_dict())
    torch.testing.assert_close(model(first, first), torch.zeros(2))
