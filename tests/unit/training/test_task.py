"""The training step: what is dropped, what is fed, what is paid, and that no draw depends on the batch it falls into."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from musubi_tuner.config.captions import CaptionSettings
from musubi_tuner.config.datasets import DatasetConfig
from musubi_tuner.config.schema.adapter import AdapterSection
from musubi_tuner.config.schema.experts import Sd15Teachers
from musubi_tuner.config.schema.train import TrainSection
from musubi_tuner.data.batch import Batch
from musubi_tuner.data.plan import MicroBatch
from musubi_tuner.flow import MaskSettings, distillation_loss, min_snr_weight
from musubi_tuner.models.flux_dev import FluxConfig
from musubi_tuner.models.flux_dev import family as flux_family
from musubi_tuner.models.flux_dev.process import FluxProcess
from musubi_tuner.models.flux_dev.settings import FluxObjective
from musubi_tuner.models.tinyflux import TinyFluxConfig, TinyFluxDeep, TinyFluxProcess, initialize
from musubi_tuner.models.tinyflux import family as tinyflux_family
from musubi_tuner.models.tinyflux.process import TeacherSettings, scale_sol_map, sol_loss
from musubi_tuner.models.tinyflux.settings import TinyFluxObjective
from musubi_tuner.training.task import Draws, FlowPhase, Position, losses_at, make_draws, stratified_draws
from steps import training_step
from tiny import TINY

CONFIG = replace(TINY, joint_attention_dim=12, pooled_projection_dim=10, lune_expert_dim=6)
SHAPE = (4, 4, 6)
"""Of the latents of one sample."""
GRID = torch.tensor([0.0, 0.5, 1.0])
"""Times of the teacher tables."""
TEACHERS = ("lune_features", "sol_stats", "sol_spatial", "t_buckets")
KEEP = 0.99
"""A draw above every probability of these tests."""


def process(*, lune: bool = True, sol: bool = True, norm: str = "sum", **settings: Any) -> TinyFluxProcess:
    return TinyFluxProcess(TinyFluxObjective(**settings), TeacherSettings(lune, sol, norm))


def make_batch(count: int = 4, without_teacher: tuple[int, ...] = (), dtype: torch.dtype = torch.float32) -> Batch:
    """A micro-batch as the dataset makes it: a sample without a teacher has zero rows and is marked."""
    generator = torch.Generator().manual_seed(3)

    def randn(*shape: int) -> Tensor:
        return torch.randn(count, *shape, generator=generator)

    latents = randn(*SHAPE)
    maps = randn(3, 4, 4).flatten(2).softmax(-1).view(count, 3, 4, 4)
    tensors = {
        "t5_vec": randn(5, 12).to(dtype),
        "t5_mask": torch.ones(count, 5, dtype=torch.int64),
        "clip_l_pooler": randn(10).to(dtype),
        "lune_features": randn(3, 6),
        "sol_stats": randn(3, 3),
        "sol_spatial": maps,
        "t_buckets": GRID.expand(count, -1).clone(),
    }
    valid = {name: torch.ones(count, dtype=torch.bool) for name in tensors}
    for name in TEACHERS:
        for row in without_teacher:
            tensors[name][row] = 0
            valid[name][row] = False
    ids = torch.zeros(count, dtype=torch.int64)
    return Batch(
        {"latents": latents, **tensors},
        {"latents": torch.ones(count, dtype=torch.bool), **valid},
        [f"item {i}" for i in range(count)],
        tuple(range(count)),
        ids,
    )


def part(batch: Batch, rows: slice) -> Batch:
    """Some samples as a micro-batch of their own; a tensor that none of them has is absent."""
    names = [name for name, valid in batch.valid.items() if valid[rows].any()]
    return Batch(
        {name: batch.tensors[name][rows] for name in names},
        {name: batch.valid[name][rows] for name in names},
        batch.items[rows],
        batch.presentations[rows],
        batch.dataset_ids[rows],
    )


def uniforms(count: int = 4, **values: list[float]) -> dict[str, Tensor]:
    """Draws that drop nothing, but where a test says so."""
    names = TinyFluxProcess.uniforms
    return {name: torch.tensor(values.get(name, [KEEP] * count)) for name in names}


def conditioning(
    own: TinyFluxProcess, batch: Batch | None = None, time: float = 0.25, **values: list[float]
) -> dict[str, Any]:
    batch = batch or make_batch()
    count = len(batch.tensors["latents"])
    return own.conditioning(batch, torch.full((count,), time), uniforms(count, **values))


# What a model is called with


class _Listening(torch.nn.Module):
    """Takes what a model is called with; its image tokens come back."""

    def __init__(self, embeds: bool = True, dtype: torch.dtype = torch.float32, device: str = "cpu") -> None:
        super().__init__()
        self.config: Any = replace(TinyFluxConfig(), guidance_embeds=embeds)
        self.dtype, self.device, self.given = dtype, torch.device(device), dict[str, Any]()

    def forward(self, hidden_states: Tensor, **given: Any) -> Any:
        self.given = {"hidden_states": hidden_states, **given}
        return hidden_states, {}


class _ListeningFlux(_Listening):
    """The same in place of a FLUX.1."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.config = FluxConfig()

    def forward(self, img: Tensor, **given: Any) -> Any:
        self.given = {"img": img, **given}
        return img


EXACT = ("timestep", "timesteps", "guidance", "img_ids", "txt_ids")


def assert_brought(given: dict[str, Any], names: set[str]) -> None:
    """All tensors are on the device; floats are bfloat16 but for those that would lose their meaning."""
    tensors = {name: value for name, value in given.items() if isinstance(value, Tensor)}
    assert set(tensors) == names
    for name, tensor in tensors.items():
        kept = torch.bool if name.endswith("_mask") else torch.float32 if name in EXACT else torch.bfloat16
        assert (tensor.device.type, tensor.dtype) == ("meta", kept), name


def test_every_input_of_tinyflux_is_brought_to_the_model_right_before_the_call() -> None:
    own = TinyFluxProcess(TinyFluxObjective(), TeacherSettings(True, True, "sum"), text_mask=True)
    inputs = conditioning(own)
    model = _Listening(dtype=torch.bfloat16, device="meta")
    velocity, _ = own.predict(model, torch.zeros(4, 4, 2, 2), torch.full((4,), 0.5), inputs)
    names = {"hidden_states", "encoder_hidden_states", "pooled_projections", "timestep", "lune_features", "sol_stats",
             "sol_spatial", "lune_mask", "sol_mask", "text_mask", "guidance", "guidance_mask"}  # fmt: skip
    assert_brought(model.given, names)
    assert velocity.shape == (4, 4, 2, 2)
    assert inputs["t5"].device.type == "cpu" and inputs["t5"].dtype == torch.float32


def test_every_input_of_flux_is_brought_to_the_model_right_before_the_call() -> None:
    own = FluxProcess(FluxObjective(timestep_sampling="uniform"))
    inputs = {"t5": torch.zeros(2, 5, 8), "clip": torch.zeros(2, 8), "guidance": torch.full((2,), 3.5)}
    model = _ListeningFlux(dtype=torch.bfloat16, device="meta")
    own.predict(model, torch.zeros(2, 16, 4, 6), torch.full((2,), 0.5).double(), inputs)
    assert_brought(model.given, {"img", "img_ids", "txt", "txt_ids", "timesteps", "y", "guidance"})


def test_guidance_is_drawn_between_its_limits_and_dropped_on_its_own() -> None:
    own = process(guidance_min=2.0, guidance_max=4.0, guidance_dropout=0.3, text_dropout=0.5)
    inputs = conditioning(own, guidance=[0.0, 0.25, 0.5, 1.0], guidance_dropout=[0.29, 0.3, 0.9, 0.1],
                          text_dropout=[0.1, 0.9, 0.1, 0.9])  # fmt: skip
    assert inputs["guidance"].tolist() == [2.0, 2.5, 3.0, 4.0]
    assert inputs["guidance_mask"].tolist() == [False, True, True, False]
    noisy, time = torch.zeros(4, 4, 2, 2), torch.full((4,), 0.5)
    model = _Listening(embeds=True)
    own.predict(model, noisy, time, inputs)
    assert torch.equal(model.given["guidance"], inputs["guidance"])
    assert torch.equal(model.given["guidance_mask"], inputs["guidance_mask"])
    own.predict(model, noisy, time, {"t5": inputs["t5"], "clip": inputs["clip"]})
    assert model.given["guidance"].tolist() == [3.0] * 4 and model.given["guidance_mask"] is None
    without = _Listening(embeds=False)
    own.predict(without, noisy, time, inputs)
    assert "guidance" not in without.given


def test_model_is_told_which_samples_have_which_features() -> None:
    batch = make_batch(without_teacher=(3,))
    batch.tensors["t5_mask"][0, 3:] = 0
    settings = TinyFluxObjective(lune_teacher_dropout=0.5, sol_teacher_dropout=0.5)
    own = TinyFluxProcess(settings, TeacherSettings(True, True, "sum"), text_mask=True)
    inputs = conditioning(own, batch, lune_dropout=[0.1, 0.9, 0.9, 0.9], sol_dropout=[0.9, 0.1, 0.9, 0.9])
    model, time = _Listening(embeds=False), torch.full((4,), 0.25)
    own.predict(model, torch.zeros(4, *SHAPE), time, inputs)
    assert model.given["lune_mask"].tolist() == [False, True, True, False]
    assert model.given["sol_mask"].tolist() == [True, False, True, False]
    for name, (teacher, key) in {
        "lune_features": ("lune", "features"), "sol_stats": ("sol", "stats"), "sol_spatial": ("sol", "spatial"),
    }.items():  # fmt: skip
        assert torch.equal(model.given[name], inputs[teacher][key]) and model.given[name].any(), name
    assert model.given["text_mask"].tolist() == batch.tensors["t5_mask"].bool().tolist()


# Text dropout


def test_dropped_text_is_zero_in_both_encodings_and_the_rest_is_untouched() -> None:
    batch = make_batch()
    inputs = conditioning(process(text_dropout=0.4), batch, text_dropout=[0.39, 0.4, 0.0, 0.9])
    for key, name in (("t5", "t5_vec"), ("clip", "clip_l_pooler")):
        assert inputs[key][[0, 2]].abs().max().item() == 0.0
        assert torch.equal(inputs[key][[1, 3]], batch.tensors[name][[1, 3]])


@pytest.mark.parametrize(("probability", "kept"), [(0.0, True), (1.0, False)])
def test_text_dropout_of_none_and_of_all(probability: float, kept: bool) -> None:
    inputs = conditioning(process(text_dropout=probability), text_dropout=[0.0, 0.3, 0.6, 0.9999])
    assert [bool(row.any()) for row in inputs["t5"]] == [kept] * 4


def test_text_dropout_keeps_the_precision_of_the_cache() -> None:
    inputs = conditioning(process(), make_batch(dtype=torch.bfloat16), text_dropout=[0.0, KEEP, KEEP, KEEP])
    assert (inputs["t5"].dtype, inputs["clip"].dtype) == (torch.bfloat16, torch.bfloat16)


def test_text_mask_is_passed_on_only_to_models_trained_with_it() -> None:
    batch = make_batch()
    batch.tensors["t5_mask"][0, 3:] = 0
    assert "text_mask" not in conditioning(process(), batch)
    masked = TinyFluxProcess(TinyFluxObjective(), TeacherSettings(False, False, "sum"), text_mask=True)
    assert conditioning(masked, batch)["text_mask"].tolist() == batch.tensors["t5_mask"].bool().tolist()


# Teacher features


def test_teacher_features_are_looked_up_at_the_time_of_the_sample() -> None:
    batch = make_batch()
    time = torch.tensor([0.0, 0.25, 0.5, 0.875])
    inputs = process().conditioning(batch, time, uniforms())
    for found, name in (
        (inputs["lune"]["features"], "lune_features"),
        (inputs["sol"]["stats"], "sol_stats"),
        (inputs["sol"]["spatial"], "sol_spatial"),
    ):
        table = batch.tensors[name]
        torch.testing.assert_close(found[0], table[0, 0])
        torch.testing.assert_close(found[1], (table[1, 0] + table[1, 1]) / 2)
        torch.testing.assert_close(found[2], table[2, 1])
        torch.testing.assert_close(found[3], 0.25 * table[3, 1] + 0.75 * table[3, 2])


@pytest.mark.parametrize(("lune", "sol"), [(True, False), (False, True), (False, False)])
def test_teachers_that_are_switched_off_are_not_asked(lune: bool, sol: bool) -> None:
    inputs = conditioning(process(lune=lune, sol=sol))
    assert ("lune" in inputs, "sol" in inputs) == (lune, sol)


def test_batch_without_teacher_caches_has_no_teacher_inputs() -> None:
    batch = make_batch()
    for name in TEACHERS:
        del batch.tensors[name], batch.valid[name]
    assert set(conditioning(process(), batch)) == {"t5", "clip", "guidance", "guidance_mask"}


def test_teachers_are_dropped_sample_by_sample_and_apart_from_each_other() -> None:
    own = process(lune_teacher_dropout=0.5, sol_teacher_dropout=0.2)
    inputs = conditioning(own, lune_dropout=[0.1, 0.5, 0.4, 0.9], sol_dropout=[0.3, 0.1, 0.2, 0.19])
    assert inputs["lune"]["feed"].tolist() == [False, True, False, True]
    assert inputs["sol"]["feed"].tolist() == [True, False, True, False]


@pytest.mark.parametrize(("coin", "fed"), [(0.1, False), (0.9, True)])
def test_batch_mode_decides_for_all_samples_by_the_first_coin(coin: float, fed: bool) -> None:
    own = process(lune_teacher_dropout=0.5, sol_teacher_dropout=0.5, teacher_dropout_mode="batch")
    coins = [coin, 0.9, 0.1, 0.9]
    inputs = conditioning(own, lune_dropout=coins, sol_dropout=coins)
    assert inputs["lune"]["feed"].tolist() == [fed] * 4
    assert inputs["sol"]["feed"].tolist() == [fed] * 4


@pytest.mark.parametrize("still_pays", [True, False])
@pytest.mark.parametrize("mode", ["sample", "batch"])
def test_samples_whose_teacher_is_dropped_pay_if_asked(still_pays: bool, mode: str) -> None:
    own = process(
        lune_teacher_dropout=0.5, sol_teacher_dropout=0.5, distill_on_dropped=still_pays, teacher_dropout_mode=mode
    )
    coins = [0.1, 0.9, 0.1, 0.9]
    inputs = conditioning(own, lune_dropout=coins, sol_dropout=coins)
    for teacher in ("lune", "sol"):
        assert not inputs[teacher]["feed"][0]
        expected = [True] * 4 if still_pays else inputs[teacher]["feed"].tolist()
        assert inputs[teacher]["distil"].tolist() == expected


@pytest.mark.parametrize("drop", [True, False])
def test_samples_without_text_lose_the_teachers_if_asked(drop: bool) -> None:
    own = process(text_dropout=0.5, drop_experts_with_text=drop)
    inputs = conditioning(own, text_dropout=[0.1, 0.9, 0.1, 0.9])
    for teacher in ("lune", "sol"):
        expected = [False, True, False, True] if drop else [True] * 4
        assert inputs[teacher]["feed"].tolist() == expected
        assert inputs[teacher]["distil"].tolist() == expected


@pytest.mark.parametrize("missing", [(0,), (2,), (0, 1, 3)])
def test_samples_without_teacher_features_are_neither_fed_nor_pay(missing: tuple[int, ...]) -> None:
    inputs = conditioning(process(), make_batch(without_teacher=missing))
    expected = [row not in missing for row in range(4)]
    for teacher in ("lune", "sol"):
        assert inputs[teacher]["feed"].tolist() == expected
        assert inputs[teacher]["distil"].tolist() == expected


@pytest.mark.parametrize("missing", [(0,), (2,), (0, 1, 3)])
def test_samples_without_teacher_features_do_not_spoil_those_of_the_others(missing: tuple[int, ...]) -> None:
    whole, partly = conditioning(process()), conditioning(process(), make_batch(without_teacher=missing))
    present = [row for row in range(4) if row not in missing]
    for teacher, name in (("lune", "features"), ("sol", "stats"), ("sol", "spatial")):
        assert torch.equal(partly[teacher][name][present], whole[teacher][name][present]), name
        assert partly[teacher][name].isfinite().all(), name


# Scale of the Sol map


def test_sum_leaves_the_map_as_it_is() -> None:
    maps = make_batch().tensors["sol_spatial"][:, 0]
    assert torch.equal(scale_sol_map(maps, "sum"), maps)
    torch.testing.assert_close(maps.sum((1, 2)), torch.ones(4))


def test_mean_norm_makes_the_mean_one_and_caps_peaks_at_four() -> None:
    flat = torch.full((1, 4, 4), 1 / 16)
    assert scale_sol_map(flat, "mean").tolist() == torch.ones(1, 4, 4).tolist()
    peak = torch.zeros(1, 4, 4)
    peak[0, 1, 2] = 1.0
    scaled = scale_sol_map(peak, "mean")
    assert scaled[0, 1, 2].item() == 4.0
    assert scaled.sum().item() == 4.0


def test_max_norm_makes_the_maximum_of_every_map_one() -> None:
    maps = make_batch().tensors["sol_spatial"][:, 0]
    scaled = scale_sol_map(maps, "max")
    torch.testing.assert_close(scaled.amax((1, 2)), torch.ones(4))
    torch.testing.assert_close(scaled / scaled.sum((1, 2), keepdim=True), maps)


def test_max_norm_of_an_empty_map_is_empty() -> None:
    assert scale_sol_map(torch.zeros(1, 4, 4), "max").abs().max().item() == 0.0


def test_unknown_norm_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"unknown sol_spatial_norm 'softmax'; known: sum, mean, max"):
        scale_sol_map(torch.zeros(1, 4, 4), "softmax")


@pytest.mark.parametrize("norm", ["sum", "mean", "max"])
def test_norm_acts_on_the_map_that_is_fed_and_paid_for(norm: str) -> None:
    raw = conditioning(process(norm="sum"))["sol"]["spatial"]
    assert torch.equal(conditioning(process(norm=norm))["sol"]["spatial"], scale_sol_map(raw, norm))


# Losses


def losses(own: TinyFluxProcess, inputs: dict[str, Any], update: int = 0, time: float = 0.25) -> dict[str, Any]:
    """Losses of fixed predictions against fixed targets."""
    return own.losses(*predictions(), torch.full((4,), time), inputs, guesses(), update)


def predictions() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(11)
    prediction, target = torch.randn(2, 4, *SHAPE, generator=generator)
    return prediction, target


def guesses() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(12)
    return {
        "lune_pred": torch.randn(4, 6, generator=generator),
        "sol_stats_pred": torch.randn(4, 3, generator=generator),
        "sol_spatial_pred": torch.rand(4, 4, 4, generator=generator),
    }


def test_main_loss_is_the_mean_squared_error_of_each_sample() -> None:
    terms = losses(process(lune=False, sol=False, min_snr_gamma=0.0), {})
    prediction, target = predictions()
    assert set(terms) == {"main"}
    assert terms["main"].weight == 1.0
    torch.testing.assert_close(terms["main"].per_sample_B, (prediction - target).square().mean((1, 2, 3)))


def test_huber_loss_is_square_below_delta_and_linear_above() -> None:
    terms = losses(process(min_snr_gamma=0.0, loss="huber", huber_delta=0.5), {})
    prediction, target = predictions()
    distance = (prediction - target).abs()
    element = torch.where(distance <= 0.5, distance.square() / 2, 0.5 * (distance - 0.25))
    torch.testing.assert_close(terms["main"].per_sample_B, element.mean((1, 2, 3)))


@pytest.mark.parametrize("off", [{"min_snr_gamma": 0.0}, {"min_snr_gamma": None}, {"min_snr_form": "none"}])
def test_min_snr_weight_is_off(off: dict[str, Any]) -> None:
    prediction, target = predictions()
    main = losses(process(**off), {}, time=0.9)["main"].per_sample_B
    torch.testing.assert_close(main, (prediction - target).square().mean((1, 2, 3)))


def test_min_snr_weight_multiplies_the_main_loss_by_the_time_of_the_sample() -> None:
    own, plain = process(min_snr_gamma=2.0, min_snr_form="vpred"), process(min_snr_gamma=0.0)
    time = torch.tensor([0.1, 0.4, 0.7, 0.95])
    arguments = (*predictions(), time, {}, {}, 0)
    weighted = own.losses(*arguments)["main"].per_sample_B
    expected = plain.losses(*arguments)["main"].per_sample_B * min_snr_weight(time, 2.0, "vpred")
    torch.testing.assert_close(weighted, expected)
    assert not torch.allclose(weighted, plain.losses(*arguments)["main"].per_sample_B)


def test_spatial_weighting_multiplies_every_place_by_its_importance() -> None:
    own = process(min_snr_gamma=0.0, spatial_weighting=True)
    inputs = conditioning(own)
    # A map that is the same in every column, so that resizing 4 columns to 6 does not change it.
    rows = torch.tensor([1.0, 2.0, 3.0, 6.0])
    inputs["sol"]["spatial"] = rows.view(1, 4, 1).expand(4, 4, 4)
    prediction, target = predictions()
    error = (prediction - target).square()
    expected = (error * (rows / rows.mean()).view(1, 1, 4, 1)).mean((1, 2, 3))
    # The mean in the denominator has 1e-6 added.
    torch.testing.assert_close(losses(own, inputs)["main"].per_sample_B, expected, rtol=1e-5, atol=1e-6)


def test_spatial_weighting_leaves_samples_without_a_map_alone() -> None:
    own = process(min_snr_gamma=0.0, spatial_weighting=True)
    inputs = conditioning(own, make_batch(without_teacher=(1,)))
    main = losses(own, inputs)["main"].per_sample_B
    prediction, target = predictions()
    plain = (prediction - target).square().mean((1, 2, 3))
    torch.testing.assert_close(main[1], plain[1])
    assert not torch.isclose(main, plain)[[0, 2, 3]].any()


def test_spatial_weighting_is_off_unless_asked() -> None:
    own = process(min_snr_gamma=0.0)
    prediction, target = predictions()
    main = losses(own, conditioning(own))["main"].per_sample_B
    torch.testing.assert_close(main, (prediction - target).square().mean((1, 2, 3)))


@pytest.mark.parametrize("mode", ["cosine", "huber", "soft", "hard"])
def test_lune_term_is_the_distance_of_the_guess_from_the_teacher(mode: str) -> None:
    own = process(lune_mode=mode, huber_delta=0.3)
    inputs = conditioning(own)
    found = losses(own, inputs)["lune"].per_sample_B
    expected = distillation_loss(guesses()["lune_pred"], inputs["lune"]["features"], mode, 0.3)
    torch.testing.assert_close(found, expected)
    other = distillation_loss(guesses()["lune_pred"], inputs["lune"]["features"], mode, 0.1)
    assert torch.equal(expected, other) == (mode != "huber")


def test_sol_term_is_the_error_of_statistics_and_map() -> None:
    own = process()
    inputs = conditioning(own)
    guess = guesses()
    stats = (guess["sol_stats_pred"] - inputs["sol"]["stats"]).square().mean(1)
    spatial = (guess["sol_spatial_pred"] - inputs["sol"]["spatial"]).square().mean((1, 2))
    torch.testing.assert_close(losses(own, inputs)["sol"].per_sample_B, stats + spatial)
    arguments = (guess["sol_stats_pred"], inputs["sol"]["stats"], guess["sol_spatial_pred"], inputs["sol"]["spatial"])
    torch.testing.assert_close(sol_loss(*arguments, 2.0, 0.5), 2 * stats + spatial / 2)
    weighed = losses(process(sol_stats_weight=2.0, sol_spatial_weight=0.5), inputs)
    torch.testing.assert_close(weighed["sol"].per_sample_B, 2 * stats + spatial / 2)


# Precision


def test_times_reach_one_only_where_they_are_rounded_to_bfloat16() -> None:
    draws = torch.tensor([-1.0, 0.0, 6.0, 20.0])
    exact = process().time(draws, (4, 6), {})
    rounded = process(precision="bfloat16").time(draws, (4, 6), {})
    assert exact.max().item() < 1
    assert rounded.dtype == torch.float32
    assert rounded[2:].tolist() == [1.0, 1.0]
    assert torch.equal(rounded, exact.bfloat16().float())


def test_everything_that_the_step_mixes_is_rounded_if_asked() -> None:
    own, rounded = process(), process(precision="bfloat16")
    generator = torch.Generator().manual_seed(4)
    x0, noise = torch.randn(2, 4, *SHAPE, generator=generator)
    time = torch.full((4,), 0.3)
    for exact, found in (
        (own.add_noise(x0, noise, time), rounded.add_noise(x0, noise, time)),
        (own.target(x0, noise, time), rounded.target(x0, noise, time)),
    ):
        assert found.dtype == torch.float32
        assert torch.equal(found, found.bfloat16().float()) and not torch.equal(found, exact)
        # Half a unit in the last of 8 bits, once for each of two inputs and once for the result, of values below 8.
        torch.testing.assert_close(found, exact, rtol=0, atol=3 * 8 * 2**-9)
    inputs = conditioning(own)
    before, after = losses(own, inputs), losses(rounded, inputs)
    for name in ("main", "lune", "sol"):
        found = after[name].per_sample_B
        assert torch.equal(found, found.bfloat16().float()) and not torch.equal(found, before[name].per_sample_B)
        torch.testing.assert_close(found, before[name].per_sample_B, rtol=0.02, atol=0)


def test_samples_that_do_not_distil_have_a_zero_term() -> None:
    own = process()
    terms = losses(own, conditioning(own, make_batch(without_teacher=(0, 2))))
    for name in ("lune", "sol"):
        assert (terms[name].per_sample_B != 0).tolist() == [False, True, False, True]


def test_below_an_adapter_teachers_are_fed_and_not_distilled() -> None:
    own = TinyFluxProcess(TinyFluxObjective(), TeacherSettings(True, True, "sum", distil=False))
    inputs = conditioning(own)
    assert list(losses(own, inputs, update=5000)) == ["main"]
    assert inputs["lune"]["feed"].all() and inputs["sol"]["feed"].all()


def test_teachers_of_a_run_have_their_terms_even_in_batches_without_features() -> None:
    # Processes add up their terms by position: those of a batch from a dataset without teachers must be the same ones.
    own, batch = process(), make_batch(without_teacher=(0, 1, 2, 3))
    terms = losses(own, conditioning(own, part(batch, slice(0, 4))), update=5000)
    assert list(terms) == ["main", "lune", "sol"]
    for name in ("lune", "sol"):
        assert terms[name].per_sample_B.tolist() == [0.0] * 4
        assert terms[name].weight == losses(own, conditioning(own), update=5000)[name].weight > 0


@pytest.mark.parametrize(
    ("update", "lune", "sol"), [(0, 0.0, 0.0), (50, 0.1, 0.05), (100, 0.2, 0.1), (200, 0.2, 0.2), (10_000, 0.2, 0.2)]
)
def test_distillation_warms_up_with_the_updates(update: int, lune: float, sol: float) -> None:
    own = process(lune_weight=0.2, lune_warmup_steps=100, sol_weight=0.2, sol_warmup_steps=200)
    terms = losses(own, conditioning(own), update)
    assert (terms["lune"].weight, terms["sol"].weight) == (pytest.approx(lune), pytest.approx(sol))


# The step


def random_model() -> TinyFluxDeep:
    """A model in which every path acts, without dropout of its own."""
    generator = torch.Generator().manual_seed(0)
    model = TinyFluxDeep(replace(CONFIG, lune_dropout=0.0))
    initialize(model, "reference", generator)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.abs().max() == 0:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


EVERYTHING = {
    "text_dropout": 0.3,
    "lune_teacher_dropout": 0.3,
    "sol_teacher_dropout": 0.3,
    "lune_warmup_steps": 0,
    "sol_warmup_steps": 0,
    "spatial_weighting": True,
}


def planned(*presentations: int) -> MicroBatch:
    return MicroBatch(presentations, presentations)


def test_step_returns_sums_over_samples_so_that_any_split_gives_the_same_update() -> None:
    own, batch = process(**EVERYTHING), make_batch(6, without_teacher=(4,))

    def gradients(sizes: tuple[int, ...]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        model, begun = random_model(), 0
        sums: dict[str, Tensor] = {}
        for size in sizes:
            rows = slice(begun, begun + size)
            draws = make_draws(own, SHAPE, planned(*range(begun, begun + size)), seed=1, epoch=0)
            output = training_step(model, own, part(batch, rows), draws, update=5)
            (output.loss / 6).backward()
            for name, value in output.terms.items():
                sums[name] = sums.get(name, torch.zeros(())) + value
            begun += size
        return sums, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    whole, expected = gradients((6,))
    assert set(whole) == {"main", "lune", "sol", "total"}
    scale = max(gradient.abs().max().item() for gradient in expected.values())
    for sizes in ((1,) * 6, (4, 2)):
        sums, found = gradients(sizes)
        for name, value in whole.items():
            torch.testing.assert_close(sums[name], value, rtol=1e-5, atol=1e-6)
        for name, gradient in expected.items():
            # The promise of the design, in float32.
            assert (found[name] - gradient).abs().max().item() <= 1e-6 * scale, name


def test_loss_is_the_weighted_sum_of_its_terms() -> None:
    own = process(**{**EVERYTHING, "lune_weight": 0.3, "sol_weight": 0.7})
    output = training_step(random_model(), own, make_batch(), make_draws(own, SHAPE, planned(0, 1, 2, 3), 1, 0), 5)
    terms = output.terms
    expected = terms["main"] + 0.3 * terms["lune"] + 0.7 * terms["sol"]
    torch.testing.assert_close(output.loss.detach(), expected)
    assert torch.equal(terms["total"], output.loss.detach())
    assert terms["lune"] > 0 and terms["sol"] > 0
    assert not any(term.requires_grad for term in terms.values())


def test_step_without_teachers_has_the_main_term_only() -> None:
    own = process(lune=False, sol=False)
    output = training_step(random_model(), own, make_batch(), make_draws(own, SHAPE, planned(0, 1, 2, 3), 1, 0), 5)
    assert set(output.terms) == {"main", "total"}
    assert torch.equal(output.terms["main"], output.terms["total"])


def test_step_equals_the_sentence_of_the_paper() -> None:
    own = process(lune=False, sol=False, text_dropout=0.0, min_snr_gamma=0.0, shift=3.0)
    model, batch = random_model(), make_batch()
    draws = make_draws(own, SHAPE, planned(0, 1, 2, 3), seed=1, epoch=0)
    output = training_step(model, own, batch, draws, update=0)
    raw = torch.sigmoid(draws.time)
    time = 3 * raw / (1 + 2 * raw)
    torch.testing.assert_close(1 - output.sigma, time)
    t = time.view(-1, 1, 1, 1)
    noisy = (1 - t) * draws.noise + t * batch.tensors["latents"]
    tokens = noisy.flatten(2).transpose(1, 2)
    with torch.no_grad():
        velocity = model(
            tokens, batch.tensors["t5_vec"], batch.tensors["clip_l_pooler"], time, height=SHAPE[1], width=SHAPE[2]
        )
    target = (batch.tensors["latents"] - draws.noise).flatten(2).transpose(1, 2)
    torch.testing.assert_close(output.loss.detach(), (velocity - target).square().mean((1, 2)).sum())


def test_losses_are_float32_under_autocast() -> None:
    own, model = process(**EVERYTHING), random_model()
    draws = make_draws(own, SHAPE, planned(0, 1, 2, 3), seed=1, epoch=0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = training_step(model, own, make_batch(dtype=torch.bfloat16), draws, update=5)
    assert {value.dtype for value in (output.loss, output.sigma, *output.terms.values())} == {torch.float32}
    exact = training_step(model, own, make_batch(), draws, update=5)
    # bfloat16 keeps 8 bits; the parts of the model average many of its roundings.
    torch.testing.assert_close(output.loss, exact.loss, rtol=2e-2, atol=0.0)


# Draws


def joined(parts: list[Draws]) -> Draws:
    return Draws(
        torch.cat([draws.noise for draws in parts]),
        torch.cat([draws.time for draws in parts]),
        {name: torch.cat([draws.uniforms[name] for draws in parts]) for name in parts[0].uniforms},
    )


def assert_equal_draws(found: Draws, expected: Draws) -> None:
    assert torch.equal(found.noise, expected.noise)
    assert torch.equal(found.time, expected.time)
    assert found.uniforms.keys() == expected.uniforms.keys()
    assert all(torch.equal(found.uniforms[name], expected.uniforms[name]) for name in expected.uniforms)


@pytest.mark.parametrize("sampling", ["logit_normal", "uniform"])
def test_draws_do_not_depend_on_the_micro_batch_they_fall_into(sampling: str) -> None:
    own = process(timestep_sampling=sampling)
    whole = make_draws(own, SHAPE, planned(*range(6)), seed=1, epoch=2)
    for sizes in ((1,) * 6, (4, 2), (2, 3, 1)):
        begins = [sum(sizes[:i]) for i in range(len(sizes))]
        parts = [
            make_draws(own, SHAPE, planned(*range(begin, begin + size)), seed=1, epoch=2)
            for begin, size in zip(begins, sizes)
        ]
        assert_equal_draws(joined(parts), whole)


def test_draws_belong_to_the_presentation_and_not_to_the_item() -> None:
    own = process()
    first = make_draws(own, SHAPE, MicroBatch((7, 7), (0, 1)), seed=1, epoch=0)
    assert not torch.equal(first.noise[0], first.noise[1])
    again = make_draws(own, SHAPE, MicroBatch((3,), (1,)), seed=1, epoch=0)
    assert torch.equal(again.noise[0], first.noise[1])


def test_draws_ignore_and_leave_the_global_generator() -> None:
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first = make_draws(process(), SHAPE, planned(0, 1), seed=1, epoch=0)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(1)
    assert_equal_draws(make_draws(process(), SHAPE, planned(0, 1), seed=1, epoch=0), first)


@pytest.mark.parametrize("change", [{"seed": 2}, {"epoch": 1}])
def test_another_seed_or_epoch_draws_anew(change: dict[str, int]) -> None:
    key = {"seed": 1, "epoch": 0}
    first = make_draws(process(), SHAPE, planned(0, 1), **key)
    other = make_draws(process(), SHAPE, planned(0, 1), **{**key, **change})
    assert (first.noise == other.noise).float().mean().item() < 0.01
    assert not (first.time == other.time).any()
    assert not any((first.uniforms[name] == other.uniforms[name]).any() for name in first.uniforms)


def test_purposes_draw_apart() -> None:
    draws = make_draws(process(timestep_sampling="uniform"), SHAPE, planned(0, 1, 2), seed=1, epoch=0)
    columns = [draws.time, *draws.uniforms.values()]
    assert len(columns) == 6
    assert len({tuple(column.tolist()) for column in columns}) == 6


def test_draws_have_their_distributions() -> None:
    many = planned(*range(2000))
    normal = make_draws(process(), (1, 1, 1), many, seed=1, epoch=0)
    # Standard errors with 2000 draws: 0.022 of a normal mean, 0.016 of its deviation, 0.0065 of a uniform mean.
    assert normal.noise.mean().item() == pytest.approx(0.0, abs=0.09)
    assert normal.time.mean().item() == pytest.approx(0.0, abs=0.09)
    assert normal.time.std().item() == pytest.approx(1.0, abs=0.07)
    for column in normal.uniforms.values():
        assert column.mean().item() == pytest.approx(0.5, abs=0.03)
        assert 0.0 <= column.min().item() < 0.01 and 0.99 < column.max().item() <= 1.0
    uniform = make_draws(process(timestep_sampling="uniform"), (1, 1, 1), many, seed=1, epoch=0)
    assert uniform.time.mean().item() == pytest.approx(0.5, abs=0.03)


def test_strata_replace_the_time_draws_only() -> None:
    own = process(timestep_sampling="uniform")
    plain = make_draws(own, SHAPE, planned(0, 1), seed=1, epoch=0)
    strata = torch.tensor([0.125, 0.75])
    assert_equal_draws(
        make_draws(own, SHAPE, planned(0, 1), seed=1, epoch=0, strata=strata),
        Draws(plain.noise, strata, plain.uniforms),
    )


def test_stratified_draws_fill_every_slice_of_the_update_once() -> None:
    batches = (planned(*range(5)), planned(5, 6), planned(*range(7, 16)))
    for update in range(20):
        values = torch.cat(stratified_draws(batches, seed=1, epoch=0, update=update))
        assert (values.sort().values * 16).floor().tolist() == list(range(16))


def test_stratified_draws_come_in_the_micro_batches_of_the_update() -> None:
    batches = (planned(*range(5)), planned(5, 6))
    assert [len(values) for values in stratified_draws(batches, seed=1, epoch=0, update=3)] == [5, 2]


def test_stratified_draws_are_dealt_at_random_and_anew_in_every_update() -> None:
    batches = (planned(*range(16)),)
    orders = [
        tuple((stratified_draws(batches, seed=1, epoch=0, update=update)[0] * 16).floor().int().tolist())
        for update in range(20)
    ]
    assert len(set(orders)) == 20
    assert tuple(range(16)) not in orders


def test_stratified_draws_do_not_depend_on_how_the_update_is_cut() -> None:
    whole = torch.cat(stratified_draws((planned(*range(8)),), seed=1, epoch=0, update=3))
    split = (planned(0, 1, 2), planned(3), planned(*range(4, 8)))
    assert torch.equal(torch.cat(stratified_draws(split, seed=1, epoch=0, update=3)), whole)


# Masks


def masked_batch(masks: Tensor, valid: list[bool]) -> Batch:
    batch = make_batch(len(masks))
    batch.tensors["mask_weights"], batch.valid["mask_weights"] = masks, torch.tensor(valid)
    return batch


def flux_process(masks: MaskSettings | None) -> Any:
    return FluxProcess(FluxObjective(timestep_sampling="uniform", min_snr_gamma=0.0), masks)


def tiny_process(masks: MaskSettings | None) -> Any:
    objective = TinyFluxObjective(min_snr_gamma=0.0)
    return TinyFluxProcess(objective, TeacherSettings(False, False, "sum"), masks=masks)


def main_losses(own: Any, batch: Batch, error: Tensor) -> Tensor:
    """The main loss of each sample where the squared error of every element is given."""
    time = torch.full((len(error),), 0.3)
    draws = {name: torch.ones(len(error)) for name in TinyFluxProcess.uniforms}
    inputs = own.conditioning(batch, time, draws)
    return own.losses(error.sqrt(), torch.zeros_like(error), time, inputs, {}, 0)["main"].per_sample_B


@pytest.mark.parametrize("make", [tiny_process, flux_process])
def test_each_position_weighs_by_its_mask_and_a_missing_mask_weighs_1(make: Any) -> None:
    masks = torch.zeros(3, 4, 6)
    masks[0, :2] = 1.0
    masks[0, 2] = 0.25
    batch = masked_batch(masks, [True, True, False])
    error = torch.rand(3, *SHAPE, generator=torch.Generator().manual_seed(0))
    found = main_losses(make(MaskSettings(2.0, 0.5)), batch, error)
    rows = error.mean(dim=(1, 3))  # [B, rows of the latent]
    expected = torch.stack(
        [
            (2 * rows[0, 0] + 2 * rows[0, 1] + 0.875 * rows[0, 2] + 0.5 * rows[0, 3]) / 4,
            0.5 * rows[1].mean(),
            rows[2].mean(),
        ]
    )
    assert (found - expected).abs().max().item() <= 1e-6
    plain = main_losses(make(None), batch, error)
    assert (plain - rows.mean(1)).abs().max().item() <= 1e-6


@pytest.mark.parametrize("make", [tiny_process, flux_process])
def test_normalised_masks_keep_the_scale_of_each_sample(make: Any) -> None:
    masks = torch.rand(3, 4, 6, generator=torch.Generator().manual_seed(1))
    batch = masked_batch(masks, [True, True, False])
    found = main_losses(make(MaskSettings(1.0, 0.0, normalize=True)), batch, torch.full((3, *SHAPE), 0.5))
    assert (found - 0.5).abs().max().item() <= 1e-5
    error = torch.rand(3, *SHAPE, generator=torch.Generator().manual_seed(0))
    found = main_losses(make(MaskSettings(1.0, 0.0, normalize=True)), batch, error)
    expected = (error * masks[:, None]).mean((1, 2, 3)) / (masks.mean((1, 2)) + 1e-6)
    assert (found - expected)[:2].abs().max().item() <= 1e-6


def test_an_empty_mask_gives_a_loss_of_zero_and_no_nan() -> None:
    batch = masked_batch(torch.zeros(1, 4, 6), [True])
    for normalize in (False, True):
        own = tiny_process(MaskSettings(1.0, 0.0, normalize))
        assert main_losses(own, batch, torch.ones(1, *SHAPE)).tolist() == [0.0]


@pytest.mark.parametrize("family", [tinyflux_family, flux_family])
def test_settings_of_masks_reach_the_process(family: Any) -> None:
    objective = FluxObjective() if family is flux_family else TinyFluxObjective()
    experts = Sd15Teachers(enable_lune=False, enable_sol=False)
    options = {"sol_spatial_norm": "sum", "t5_attn_mask": False}

    def masks(**settings: Any) -> MaskSettings | None:
        train = TrainSection(mask_foreground=3.0, mask_background=0.25, mask_normalize=True, **settings)
        config = SimpleNamespace(
            objective=objective, experts=experts, sd15=experts, train=train, adapter=AdapterSection()
        )
        return family.make_process(config, options).masks

    assert masks(masked_loss=True) == MaskSettings(3.0, 0.25, normalize=True)
    assert masks() is None


# Noise recipes of a run


def recipe_draws(*keys: int, update: int = 0, **settings: Any) -> Draws:
    return make_draws(
        process(), (4, 16, 16), planned(*keys), 1, 0, objective=TinyFluxObjective(**settings), update=update
    )


def test_a_noise_recipe_is_keyed_by_presentation_and_changes_what_is_seen_and_predicted() -> None:
    plain = recipe_draws(0, 1)
    found = recipe_draws(0, 1, multires_noise_iterations=4, noise_offset=0.1, ip_noise_gamma=0.2)
    assert not torch.allclose(plain.noise, found.noise) and found.input_noise is not None and found.offset is not None
    again = recipe_draws(1, multires_noise_iterations=4, noise_offset=0.1, ip_noise_gamma=0.2)
    assert torch.equal(again.noise[0], found.noise[1]) and again.offset is not None
    assert torch.equal(again.offset.normals[0], found.offset.normals[1])
    batch = make_batch()
    x0 = batch.tensors["latents"]
    seen: list[torch.Tensor] = []
    own = process()
    real = own.add_noise
    own.add_noise = lambda x0, noise, time: seen.append(noise) or real(x0, noise, time)  # type: ignore[method-assign, func-returns-value]
    draws = make_draws(own, SHAPE, planned(0, 1, 2, 3), 1, 0, objective=TinyFluxObjective(noise_offset=0.5))
    losses_at(random_model(), own, batch, draws, torch.full((4,), 0.5), 0)
    assert draws.offset is not None and torch.equal(seen[0], draws.noise + draws.offset.on(x0))


def test_a_random_strength_is_drawn_once_per_update() -> None:
    found = [recipe_draws(0, update=n, noise_offset=0.2, noise_offset_random_strength=True).offset for n in (0, 0, 1)]
    strengths = [each.strength for each in found if each is not None]
    assert strengths[0] == strengths[1] != strengths[2] and all(0 <= value < 0.2 for value in strengths)


def test_strata_of_normal_draws_are_one_per_slice_of_the_density() -> None:
    (draws,) = stratified_draws((planned(*range(8)),), 1, 0, 0, normal_times=True)
    slices = sorted((torch.special.ndtr(draws) * 8).long().tolist())
    assert slices == list(range(8))


# What data sets say of text and of the weight of their images


def dataset(number: int, **settings: Any) -> DatasetConfig:
    is_reg = settings.pop("is_reg", False)
    folder = Path(f"set{number}")
    return DatasetConfig(
        f"datasets[{number}]", folder, None, folder, (64, 64), True, False, ".txt", 1, 1, "error", False,
        text=CaptionSettings(**settings), is_reg=is_reg,
    )  # fmt: skip


def phase_losses(datasets: list[DatasetConfig], at: Position, **settings: Any) -> tuple[Tensor, list[Tensor]]:
    own = process(**settings)
    kept: list[Tensor] = []
    real = own.conditioning

    def conditioning(batch: Batch, time: Tensor, uniforms: dict[str, Tensor]) -> Any:
        kept.append(uniforms["text_dropout"] >= own.objective.text_dropout)
        return real(batch, time, uniforms)

    own.conditioning = conditioning  # type: ignore[method-assign]
    batch = replace(make_batch(), dataset_ids=torch.tensor([0, 1, 0, 1]))
    draws = make_draws(own, SHAPE, planned(0, 1, 2, 3), 1, 0)
    phase = FlowPhase(random_model(), own, "model", datasets, 0.25)
    return phase.losses(batch, draws, at)["main"].per_sample_B.detach(), kept


def test_a_data_set_decides_the_dropout_of_its_own_captions() -> None:
    plain, always = dataset(0), dataset(1, caption_dropout_rate=1.0)
    assert phase_losses([plain, always], Position(), text_dropout=0.0)[1][0].tolist() == [True, False, True, False]
    never = dataset(1, caption_dropout_rate=0.0)
    assert phase_losses([plain, never], Position(), text_dropout=1.0)[1][0].tolist() == [False, True, False, True]


def test_every_nth_epoch_drops_the_captions_of_a_data_set() -> None:
    datasets = [dataset(0), dataset(1, caption_dropout_every_n_epochs=2)]
    first, second = (phase_losses(datasets, Position(epoch=n), text_dropout=0.0)[1][0].tolist() for n in (0, 1))
    assert first == [True] * 4 and second == [True, False, True, False]


def test_losses_of_regularisation_images_are_multiplied_by_their_weight() -> None:
    plain, _ = phase_losses([dataset(0), dataset(1)], Position())
    weighted, _ = phase_losses([dataset(0), dataset(1, is_reg=True)], Position())
    assert torch.equal(weighted, plain * torch.tensor([1, 0.25, 1, 0.25]))
