"""Flow arithmetic against identities, plain loops and edge values."""

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from musubi_tuner.flow import (
    MIN_SNR_FORMS,
    SOLVERS,
    distillation_loss,
    drop_conditioning,
    euler,
    flux_shift,
    flux_unshift,
    guide,
    huber_loss,
    interpolate,
    linear_lookup,
    mask_weight,
    min_snr_weight,
    noise_from_v,
    noise_from_velocity,
    pack_pixels,
    ramp,
    sample_timesteps,
    solve,
    spatial_weight,
    stratify,
    uniform_between,
    unpack_pixels,
    v_from_noise,
    v_target,
    vp_interpolate,
    x0_from_noise,
    x0_from_v,
    x0_from_velocity,
)
from musubi_tuner.flow.timesteps import TIME_MARGIN

quick = settings(max_examples=60, deadline=None)
"""No deadline: the first call pays for torch's start."""
times = st.floats(0, 1)
shifts = st.floats(0.05, 20)


def scalar(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float32)


def pair(*shape: int) -> tuple[Tensor, Tensor]:
    """Two fixed normal tensors."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(*shape, generator=generator), torch.randn(*shape, generator=generator)


@given(x=times, shift=shifts)
@quick
def test_unshift_inverts_shift(x: float, shift: float) -> None:
    back = flux_unshift(flux_shift(scalar(x), shift), shift)
    # The slope of the inverse is at most the shift factor, so float32 rounding grows to 20 x 6e-8.
    assert abs(back.item() - x) <= 1e-5


@given(x=times, shift=shifts)
@quick
def test_shift_of_the_complement_is_the_reciprocal_shift(x: float, shift: float) -> None:
    direct = 1 - flux_shift(1 - scalar(x), shift)
    assert abs(direct.item() - flux_shift(scalar(x), 1 / shift).item()) <= 1e-5


@given(x=st.floats(0.01, 0.99), shift=st.floats(1.1, 20))
@quick
def test_shift_above_one_pushes_towards_one_and_keeps_the_ends(x: float, shift: float) -> None:
    assert flux_shift(scalar(x), shift).item() > x
    assert flux_shift(torch.tensor([0.0, 1.0]), shift).tolist() == pytest.approx([0.0, 1.0], abs=1e-6)


def test_shift_of_one_changes_nothing() -> None:
    x = torch.linspace(0, 1, 11)
    assert torch.equal(flux_shift(x, 1.0), x)


@given(draws=st.lists(st.floats(0, 1, exclude_max=True, width=32), min_size=1, max_size=16))
@quick
def test_stratified_draw_stays_in_its_slice(draws: list[float]) -> None:
    placed = stratify(torch.tensor(draws))
    low = torch.arange(len(draws)) / len(draws)
    # A draw just below 1 may round up to the border of the slice.
    assert bool((placed >= low - 1e-6).all()) and bool((placed <= low + 1 / len(draws) + 1e-6).all())


def test_stratified_times_are_ascending_before_the_caller_permutes_them() -> None:
    u = torch.rand(64, generator=torch.Generator().manual_seed(1))
    placed = sample_timesteps(u, "stratified", shift=3.0)
    assert torch.equal(placed, placed.sort().values)


@pytest.mark.parametrize("method", ["logit_normal", "uniform", "stratified"])
def test_training_times_keep_their_margin_from_both_ends(method: str) -> None:
    draws = torch.tensor([-60.0, 60.0]) if method == "logit_normal" else torch.tensor([0.0, 1.0])
    for shift in (0.01, 1.0, 100.0):
        drawn = sample_timesteps(draws, method, shift=shift)
        assert drawn.dtype == torch.float32
        assert drawn.min().item() >= TIME_MARGIN - 1e-9
        assert drawn.max().item() <= 1 - TIME_MARGIN + 1e-7


def test_logit_normal_is_the_sigmoid_of_a_shifted_normal() -> None:
    drawn = sample_timesteps(torch.tensor([0.5]), logit_mean=0.2, logit_std=2.0)
    assert drawn.item() == pytest.approx(1 / (1 + math.exp(-1.2)), abs=1e-6)


def test_bfloat16_draws_give_float32_times() -> None:
    assert sample_timesteps(torch.zeros(2, dtype=torch.bfloat16)).dtype == torch.float32


def test_unknown_timestep_method_is_named() -> None:
    with pytest.raises(
        ValueError, match=r"^unknown timestep method 'sigmoidal'; known: logit_normal, uniform, stratified$"
    ):
        sample_timesteps(torch.zeros(2), "sigmoidal")


def test_uniform_between_covers_the_interval() -> None:
    assert uniform_between(torch.tensor([0.0, 0.5, 1.0]), 0.2, 0.6).tolist() == pytest.approx([0.2, 0.4, 0.6])


@given(sigma=times)
@quick
def test_velocity_recovers_image_and_noise(sigma: float) -> None:
    x0, noise = pair(2, 3, 4, 4)
    level = torch.tensor([sigma, 1 - sigma])
    noisy = interpolate(x0, noise, level)
    torch.testing.assert_close(x0_from_velocity(noisy, noise - x0, level), x0, atol=1e-5, rtol=0)
    torch.testing.assert_close(noise_from_velocity(noisy, noise - x0, level), noise, atol=1e-5, rtol=0)


def test_interpolation_ends_are_image_and_noise() -> None:
    x0, noise = pair(2, 3, 4, 4)
    noisy = interpolate(x0, noise, torch.tensor([0.0, 1.0]))
    assert torch.equal(noisy[0], x0[0]) and torch.equal(noisy[1], noise[1])


def test_interpolation_mixes_bfloat16_latents_in_float32() -> None:
    x0, noise = (tensor.bfloat16() for tensor in pair(1, 16))
    sigma = torch.tensor([0.999])
    mixed = interpolate(x0, noise, sigma)
    assert mixed.dtype == torch.bfloat16
    expected = ((1 - sigma.double()) * x0.double() + sigma.double() * noise.double()).bfloat16()
    assert torch.equal(mixed, expected)
    assert not torch.equal(mixed, noise)


@given(alpha=st.floats(0.01, 0.99))
@quick
def test_v_prediction_conversions_agree(alpha: float) -> None:
    x0, noise = pair(2, 5)
    level = torch.full((2,), alpha)
    noisy, v = vp_interpolate(x0, noise, level), v_target(x0, noise, level)
    # Dividing by sqrt(alpha) >= 0.1 grows float32 rounding by ten.
    torch.testing.assert_close(x0_from_v(noisy, v, level), x0, atol=1e-5, rtol=0)
    torch.testing.assert_close(noise_from_v(noisy, v, level), noise, atol=1e-5, rtol=0)
    torch.testing.assert_close(x0_from_noise(noisy, noise, level), x0, atol=1e-4, rtol=0)
    torch.testing.assert_close(v_from_noise(noisy, noise, level), v, atol=1e-4, rtol=0)


Conversion = Callable[[Tensor, Tensor, Tensor], Tensor]


@pytest.mark.parametrize(
    "function",
    [
        interpolate,
        x0_from_velocity,
        noise_from_velocity,
        vp_interpolate,
        v_target,
        x0_from_v,
        noise_from_v,
        x0_from_noise,
        v_from_noise,
    ],
)
@pytest.mark.parametrize("shape", [(3,), (1,), (2, 1), ()])
def test_one_level_per_sample_is_required(function: Conversion, shape: tuple[int, ...]) -> None:
    x0, noise = pair(2, 3, 4, 4)
    with pytest.raises(ValueError) as caught:
        function(x0, noise, torch.ones(shape))
    assert str(caught.value) == f"got {shape} values, expected (2,): one value per sample"


def test_packing_is_row_by_row_and_reversible() -> None:
    latents, _ = pair(2, 3, 4, 6)
    tokens = pack_pixels(latents)
    assert tokens.shape == (2, 24, 3)
    assert torch.equal(tokens[:, 2 * 6 + 5], latents[:, :, 2, 5])
    assert torch.equal(unpack_pixels(tokens, 4, 6), latents)


@pytest.mark.parametrize("form", MIN_SNR_FORMS)
@pytest.mark.parametrize("gamma", [0.5, 5.0, 1000.0])
def test_min_snr_is_finite_and_between_zero_and_one_at_the_ends(form: str, gamma: float) -> None:
    edges = torch.tensor([0.0, 1e-30, 1e-4, 0.5, 1 - 1e-4, 1 - 6e-8, 1.0])
    weights = min_snr_weight(edges, gamma, form)
    assert weights.dtype == torch.float32
    assert bool(torch.isfinite(weights).all())
    assert bool((weights >= 0).all()) and bool((weights <= 1 + 1e-6).all())


def test_min_snr_forms_are_their_formulas() -> None:
    t, gamma = torch.tensor([0.3, 0.9], dtype=torch.float64), 5.0
    snr = (t / (1 - t)).square()
    capped = snr.clamp(max=gamma)
    for form, expected in (
        ("published", capped / snr),
        ("x0", capped / snr),
        ("vpred", capped / (snr + 1)),
        ("none", torch.ones_like(snr)),
    ):
        torch.testing.assert_close(min_snr_weight(t, gamma, form).double(), expected, atol=0, rtol=1e-5)


def test_published_min_snr_vanishes_near_noise_where_the_x0_form_stays_one() -> None:
    t = torch.tensor([1e-4])
    assert min_snr_weight(t, form="published").item() == pytest.approx(1e-3, rel=1e-3)
    assert min_snr_weight(t, form="x0").item() == 1.0


def test_unknown_min_snr_form_is_named() -> None:
    with pytest.raises(ValueError, match=r"^unknown min-SNR form 'snr'; known: published, x0, vpred, none$"):
        min_snr_weight(torch.tensor([0.5]), form="snr")


def test_ramp_is_linear_and_then_constant() -> None:
    assert [ramp(step, 4, 0.2) for step in (0, 1, 3, 4, 5)] == pytest.approx([0.0, 0.05, 0.15, 0.2, 0.2])


def test_ramp_without_warmup_is_at_its_target_at_once() -> None:
    assert ramp(0, 0, 0.2) == 0.2


def test_huber_is_square_within_delta_and_linear_beyond() -> None:
    zero = torch.zeros(4)
    loss = huber_loss(torch.tensor([0.05, -0.05, 1.0, -2.0]), zero, 0.1)
    assert loss.tolist() == pytest.approx([0.00125, 0.00125, 0.1 * (1.0 - 0.05), 0.1 * (2.0 - 0.05)])


def test_huber_equals_torch() -> None:
    prediction, target = pair(3, 7)
    torch.testing.assert_close(
        huber_loss(prediction, target, 0.3),
        torch.nn.functional.huber_loss(prediction, target, reduction="none", delta=0.3),
    )


def test_spatial_weight_has_mean_one_per_sample() -> None:
    maps = torch.rand(3, 4, 4, generator=torch.Generator().manual_seed(0))
    weights = spatial_weight(maps, 6, 10)
    assert weights.shape == (3, 6, 10)
    # The divisor is the mean plus 1e-6.
    torch.testing.assert_close(weights.mean(dim=(1, 2)), torch.ones(3), atol=1e-5, rtol=0)


def test_spatial_weight_of_an_empty_map_is_zero_and_not_nan() -> None:
    assert spatial_weight(torch.zeros(1, 4, 4), 6, 6).abs().max().item() == 0.0


def test_mask_weight_blends_foreground_and_background() -> None:
    assert mask_weight(torch.tensor([[[0.0, 0.5, 1.0]]]), 3.0, 0.25).flatten().tolist() == [0.25, 1.625, 3.0]


def test_distillation_modes_are_their_formulas() -> None:
    prediction, target = pair(4, 9)
    square = (prediction - target).square().mean(1)
    cosine = 1 - torch.nn.functional.cosine_similarity(prediction, target, dim=1)
    for mode, expected in (("cosine", cosine), ("hard", square), ("mse", square), ("soft", square / 100)):
        torch.testing.assert_close(distillation_loss(prediction, target, mode), expected)


def test_cosine_distillation_of_zero_features_is_finite() -> None:
    assert distillation_loss(torch.zeros(1, 4), torch.ones(1, 4)).tolist() == [1.0]


def test_unknown_distillation_mode_is_named() -> None:
    with pytest.raises(ValueError, match=r"^unknown distillation mode 'l2'; known: cosine, huber, soft, hard, mse$"):
        distillation_loss(torch.zeros(1, 4), torch.ones(1, 4), "l2")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropped_conditioning_is_zero_even_where_it_was_not_finite(dtype: torch.dtype) -> None:
    states = torch.tensor([[1.0, 2.0], [math.inf, math.nan]], dtype=dtype)
    dropped = drop_conditioning(states, torch.tensor([True, False]))
    assert dropped.dtype == dtype
    assert dropped.tolist() == [[1.0, 2.0], [0.0, 0.0]]


def test_lookup_on_an_uneven_grid_equals_a_plain_loop() -> None:
    grid = torch.tensor([0.0, 0.1, 0.15, 0.6, 1.0])
    table = torch.randn(20, 5, 3, generator=torch.Generator().manual_seed(0))
    t = torch.rand(20, generator=torch.Generator().manual_seed(1))
    found = linear_lookup(table, grid, t)
    for row, time in enumerate(t.tolist()):
        low = max(index for index in range(4) if grid[index].item() <= time)
        a = (time - grid[low].item()) / (grid[low + 1].item() - grid[low].item())
        expected = (1 - a) * table[row, low] + a * table[row, low + 1]
        torch.testing.assert_close(found[row], expected, atol=1e-5, rtol=0)


def test_lookup_at_a_grid_point_is_exact() -> None:
    grid = torch.tensor([0.05, 0.3, 0.95])
    table = torch.randn(3, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(linear_lookup(table, grid, grid), table[torch.arange(3), torch.arange(3)])


def test_lookup_outside_the_grid_takes_the_end_value() -> None:
    table = torch.tensor([[[1.0], [2.0], [5.0]]]).repeat(2, 1, 1)
    found = linear_lookup(table, torch.tensor([0.2, 0.4, 0.8]), torch.tensor([0.0, 1.0]))
    assert found.flatten().tolist() == [1.0, 5.0]


def test_lookup_with_a_single_bucket_is_that_bucket() -> None:
    table = torch.randn(3, 1, 2, generator=torch.Generator().manual_seed(0))
    assert torch.equal(linear_lookup(table, torch.tensor([0.5]), torch.tensor([0.0, 0.5, 1.0])), table[:, 0])


def test_lookup_in_a_half_precision_table_is_interpolated_in_float32() -> None:
    table = torch.tensor([[[1.0], [1.0009765625]]], dtype=torch.float16)
    found = linear_lookup(table, torch.tensor([0.0, 1.0]), torch.tensor([0.5]))
    assert found.dtype == torch.float32
    assert found.item() == 1.00048828125


def test_lookup_on_grids_of_several_kinds_equals_one_by_one() -> None:
    generator = torch.Generator().manual_seed(0)
    grids = [torch.tensor(times) for times in ([0.05, 0.3, 0.7, 0.95], [0.25, 0.75], [0.5], [0.1, 0.2, 0.9, 1.0])]
    tables = [torch.randn(len(grid), 3, generator=generator) for grid in grids]
    stacked = torch.full((4, 4, 3), math.nan)
    times = torch.full((4, 4), math.inf)
    for row, (grid, table) in enumerate(zip(grids, tables)):
        stacked[row, : len(grid)], times[row, : len(grid)] = table, grid
    for t in (*torch.linspace(0, 1, 41).tolist(), 0.3, 0.7):
        found = linear_lookup(stacked, times, torch.full((4,), t))
        for row, (grid, table) in enumerate(zip(grids, tables)):
            assert torch.equal(found[row], linear_lookup(table[None], grid, torch.tensor([t]))[0]), (row, t)


def test_lookup_of_a_sample_without_a_table_is_finite_and_leaves_the_others_alone() -> None:
    tables = torch.tensor([[[0.0], [0.0], [0.0]], [[1.0], [2.0], [4.0]]])
    grids = torch.tensor([[0.0, 0.0, 0.0], [0.0, 0.5, 1.0]])
    assert linear_lookup(tables, grids, torch.tensor([0.3, 0.75])).flatten().tolist() == [0.0, 3.0]


def test_lookup_needs_one_time_per_sample() -> None:
    with pytest.raises(ValueError, match="one value per sample"):
        linear_lookup(torch.zeros(3, 4, 2), torch.linspace(0, 1, 4), torch.zeros(2))


def test_lookup_needs_one_grid_time_per_table_entry() -> None:
    with pytest.raises(ValueError, match="grid"):
        linear_lookup(torch.zeros(3, 5, 2), torch.linspace(0, 1, 4), torch.zeros(3))


def decay(x: Tensor, tau: float) -> Tensor:
    """dx/dtau = -x, solved by exp(-tau)."""
    return -x


def grid(steps: int) -> list[float]:
    return [index / steps for index in range(steps + 1)]


def test_euler_is_exact_on_a_straight_line() -> None:
    x0, noise = pair(1, 8)
    sampled = euler(lambda x, tau: x0 - noise, noise, grid(7))
    torch.testing.assert_close(sampled, x0, atol=1e-5, rtol=0)


def test_euler_follows_a_list_of_falling_times() -> None:
    x0, noise = pair(1, 8)
    sampled = euler(lambda x, tau: noise - x0, noise, grid(7)[::-1])
    torch.testing.assert_close(sampled, x0, atol=1e-5, rtol=0)


@pytest.mark.parametrize("steps", [4, 16])
def test_heun_is_more_exact_than_euler(steps: int) -> None:
    start, exact = torch.ones(1), math.exp(-1)
    errors = {name: abs(solve(name, decay, start, grid(steps)).item() - exact) for name in SOLVERS}
    assert errors["heun"] < errors["euler"] / 2


def test_halving_the_step_halves_the_error_of_euler() -> None:
    exact = math.exp(-1)
    coarse, fine = (abs(euler(decay, torch.ones(1), grid(steps)).item() - exact) for steps in (20, 40))
    assert coarse / fine == pytest.approx(2.0, rel=0.1)


def test_solvers_call_the_model_as_often_as_they_say() -> None:
    for name, calls in (("euler", 5), ("heun", 9)):
        seen: list[float] = []

        def velocity(x: Tensor, tau: float, seen: list[float] = seen) -> Tensor:
            seen.append(tau)
            return -x

        solve(name, velocity, torch.ones(1), grid(5))
        assert len(seen) == calls


def test_solver_state_stays_float32_whatever_the_model_computes_in() -> None:
    seen: list[torch.dtype] = []

    def velocity(x: Tensor, tau: float) -> Tensor:
        seen.append(x.dtype)
        return x.bfloat16()

    for name in SOLVERS:
        assert solve(name, velocity, torch.ones(2, dtype=torch.bfloat16), grid(3)).dtype == torch.float32
    assert set(seen) == {torch.float32}


def test_unknown_solver_is_named() -> None:
    with pytest.raises(ValueError, match=r"^unknown solver 'dpm'; known: euler, heun$"):
        solve("dpm", decay, torch.ones(1), grid(2))


def test_guidance_of_one_is_the_positive_branch_and_zero_the_negative() -> None:
    positive, negative = torch.tensor([2.0, 4.0]), torch.tensor([1.0, 8.0])
    assert torch.equal(guide(positive, negative, 1.0), positive)
    assert torch.equal(guide(positive, negative, 0.0), negative)
    assert guide(positive, negative, 3.0).tolist() == [4.0, -4.0]
