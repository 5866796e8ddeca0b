"""The electricity of a run, and the CO2 that it stands for, as CodeCarbon estimates them."""

from __future__ import annotations

from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

ANY_COUNTRY = "FRA"  # CodeCarbon asks for one; the energy does not depend on it


def energy_problems(measure_energy: bool, country: str | None) -> list[str]:
    """What is wrong with the settings `measure_energy` and `emissions_country`."""
    if not measure_energy:
        return []
    if find_spec("codecarbon") is None:
        return ['measure_energy needs the Python package codecarbon: pip install "granalign-hf[energy]"']
    import pycountry  # which codecarbon brings

    if country is not None and pycountry.countries.get(alpha_3=country) is None:
        return [f"emissions_country must be the three letters of a country, such as FRA, got {country!r}"]
    return []


class EnergyMeter:
    """Counts what this machine takes: processors, memory and GPUs, also what other processes have of them.

    CodeCarbon reads the counters of the hardware where it may, and otherwise estimates from its kind and load.

    Args:
        country: three letters (ISO 3166-1), for the CO2 of a kilowatt-hour there. `None`: energy alone.
    """

    def __init__(self, country: str | None):
        from codecarbon import OfflineEmissionsTracker  # an extra, which the settings have asked for

        self.country = country
        options: dict[str, Any] = {"output_methods": [], "log_level": "error", "allow_multiple_runs": True}
        self.tracker = OfflineEmissionsTracker(country_iso_code=country or ANY_COUNTRY, **options)
        self.tracker.start_task()

    def add_to(self, energy: dict | None) -> dict:
        """What was used before and since: `kwh`, `co2_kg` or `None`, the `hours` of both, `country` and `source`."""
        used = self.tracker.stop_task()
        self.tracker.start_task()
        before = energy or {"kwh": 0.0, "co2_kg": 0.0, "hours": 0.0}
        return {
            "kwh": before["kwh"] + used.energy_consumed,
            "co2_kg": None if None in (self.country, before["co2_kg"]) else before["co2_kg"] + used.emissions,
            "hours": before["hours"] + used.duration / 3600,
            "country": self.country,
            "source": f"CodeCarbon {version('codecarbon')}",
        }
