"""Energy by the real CodeCarbon: counted through states and resumed runs, and told by the card."""

import json

import pytest
from huggingface_hub import ModelCard
from test_train import TINY

from granalign_hf.training import train

pytest.importorskip("codecarbon", reason="the extra `energy` is not installed")


def energy_of(folder):
    return json.loads((folder / "metrics.json").read_text())["energy"]


def test_energy_adds_up_over_a_resumed_run_and_stands_in_the_card(tmp_path):
    arguments = [*TINY, "--measure_energy", "true", "--emissions_country", "FRA", "--output_dir", str(tmp_path)]
    train.main([*arguments, "--epochs", "1"])
    first = energy_of(tmp_path)
    assert first["kwh"] > 0 and first["co2_kg"] > 0
    assert first["country"] == "FRA" and first["source"].startswith("CodeCarbon ")
    train.main([*arguments, "--epochs", "2", "--resume"])
    state = json.loads(max((tmp_path / "state").glob("*/progress.json")).read_text())
    assert state["energy"]["kwh"] > first["kwh"] and state["energy"]["co2_kg"] > first["co2_kg"]
    kwh = energy_of(tmp_path)["kwh"]
    assert first["kwh"] <= kwh <= state["energy"]["kwh"]
    card = (tmp_path / "README.md").read_text()
    assert f"| energy (kWh) | {kwh:.4g} |" in card and f"| energy measured | by {first['source']} in " in card
    told = ModelCard(card).data.co2_eq_emissions
    assert told["emissions"] == pytest.approx(1000 * energy_of(tmp_path)["co2_kg"], abs=6e-4)  # grams
    assert told["geographical_location"] == "FRA"


def test_nothing_is_measured_unless_it_is_asked_for(tmp_path):
    train.main([*TINY, "--epochs", "1", "--output_dir", str(tmp_path)])
    assert energy_of(tmp_path) is None
    assert "co2_eq_emissions" not in (tmp_path / "README.md").read_text()


def test_without_a_country_there_is_energy_and_no_co2(tmp_path):
    train.main([*TINY, "--epochs", "1", "--measure_energy", "true", "--output_dir", str(tmp_path)])
    assert energy_of(tmp_path)["kwh"] > 0 and energy_of(tmp_path)["co2_kg"] is None
    card = (tmp_path / "README.md").read_text()
    assert f"| energy (kWh) | {energy_of(tmp_path)['kwh']:.4g} |" in card and "co2_eq_emissions" not in card


def test_a_country_that_is_none_is_refused_before_anything_loads(tmp_path, capsys):
    with pytest.raises(SystemExit):
        train.main([*TINY, "--measure_energy", "true", "--emissions_country", "XYZ", "--output_dir", str(tmp_path)])
    assert "emissions_country must be the three letters of a country, such as FRA, got 'XYZ'" in capsys.readouterr().err
