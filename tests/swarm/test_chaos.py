"""Servers are killed, frozen and told to leave while clients speak: no word is wrong, and nothing is left behind."""

import pytest

from corolla.testing import Chaos, ChaosPlan

pytestmark = pytest.mark.timeout(280)


def test_no_disaster_changes_a_word(tmp_path):
    with Chaos(ChaosPlan(run_s=5.0, every_s=0.5), tmp_path) as chaos:
        report = chaos.run()
    assert not report.wrong
    assert not report.failures
    assert report.generations > 5
    assert min(report.disasters[kind] for kind in ("kill", "leave", "freeze")) >= 1
