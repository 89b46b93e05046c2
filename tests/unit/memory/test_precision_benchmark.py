"""The benchmark of precision on a small model: its rows, and their order."""

from dataclasses import replace

import pytest

from benchmark_programs import load_benchmark


def test_every_form_of_storage_has_its_errors(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    benchmark = load_benchmark("precision")
    small = replace(
        benchmark.SHAPE, hidden_size=128, num_heads=2, axes_dim=(16, 24, 24), depth=1, depth_single_blocks=1
    )
    monkeypatch.setattr(benchmark, "SHAPE", small)
    assert benchmark.main(["--seeds", "1"]) == 0
    rows = [line.strip("|").split("|") for line in capsys.readouterr().out.splitlines() if line.endswith("% |")]
    errors = {row[0].strip(): [float(cell.strip(" %")) for cell in row[1:]] for row in rows}
    assert list(errors) == list(benchmark.STORAGES)
    for column in (0, 1):
        int8, scaled, plain, nf4 = (
            errors[name][column] for name in ("int8 (rows)", "fp8_scaled (64 columns)", "fp8", "nf4")
        )
        assert 0 < int8 < scaled < plain < nf4


def test_a_mean_of_no_models_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        load_benchmark("precision").main(["--seeds", "0"])
    assert "--seeds: found 0, expected at least 1" in capsys.readouterr().err
