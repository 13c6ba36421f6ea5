"""The published sizes."""

from __future__ import annotations

from dataclasses import replace

import pytest

from beit3 import parameters
from beit3.config import PRESETS
from beit3.objectives import MaskedDataModelling


def test_giant_has_the_sizes_of_the_paper_s_table_2() -> None:
    parts = parameters.count(PRESETS["giant"])
    published = {"V-FFN": 692, "L-FFN": 692, "VL-FFN": 52, "attention": 317}
    assert {name: round(parts[name] / 1e6) for name in published} == published
    assert round(sum(parts.values()) / 1e9, 1) == 1.9


@pytest.mark.parametrize(
    ("preset", "without_heads", "with_heads"), [("base", 220, 276), ("large", 672, 746)]
)
def test_base_and_large_have_the_released_sizes(
    preset: str, without_heads: int, with_heads: int
) -> None:
    """The released README cuts to whole millions."""
    parts = parameters.count(PRESETS[preset])
    total = sum(parts.values())
    assert total // 10**6 == with_heads
    assert (total - parts["MLM head"] - parts["MIM head"]) // 10**6 == without_heads


@pytest.mark.parametrize(
    "config",
    [PRESETS["tiny"], replace(PRESETS["tiny"], vl_layers=0, multiway=False)],
    ids=["multiway", "standard"],
)
def test_the_parts_are_all_of_an_allocated_model(config) -> None:
    expected = sum(parameter.numel() for parameter in MaskedDataModelling(config).parameters())
    assert sum(parameters.count(config).values()) == expected


def test_counting_allocates_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    built = []

    class Recorded(MaskedDataModelling):
        def __init__(self, config) -> None:
            super().__init__(config)
            built.append(self)

    monkeypatch.setattr(parameters, "MaskedDataModelling", Recorded)
    parameters.count(PRESETS["tiny"])
    assert {tensor.device.type for tensor in built[0].state_dict().values()} == {"meta"}


def test_the_command_prints_the_parts_and_their_sum(capsys: pytest.CaptureFixture[str]) -> None:
    parameters.main(["--preset", "giant"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["V-FFN", "692.36M"]
    assert lines[-1].split() == ["total", "1948.77M"]
    parameters.main(["--preset", "base"])
    assert "VL-FFN" not in capsys.readouterr().out  # parts that a preset lacks are left out
