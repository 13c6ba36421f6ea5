"""The plan for everything: its document has what its script prints; its formulas make sense."""

from __future__ import annotations

from dataclasses import replace

import pytest

from benchmarks import _measure, scale_plan
from benchmarks.scale_plan import Inputs, limits, pair_hours, tables


def test_the_document_has_every_table_as_it_is_printed() -> None:
    text = (_measure.ROOT / "docs" / "scale.md").read_text()
    for number, table in enumerate(tables(Inputs())):
        assert table in text, f"table {number}: python -m benchmarks.scale_plan"


def test_twice_the_nodes_need_half_the_time() -> None:
    one = Inputs(nodes=1)
    assert pair_hours(replace(one, nodes=2), 0.2) == pytest.approx(pair_hours(one, 0.2) / 2)


def test_dead_urls_cost_threads_and_spare_the_cpu() -> None:
    few, many = limits(Inputs(), 0.1), limits(Inputs(), 0.5)
    assert many["threads"] < few["threads"] and many["CPU"] > few["CPU"]
    assert many["DNS"] == few["DNS"]


def test_bad_inputs_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        scale_plan.main(["--nodes", "0"])
    assert "above 0" in capsys.readouterr().err
