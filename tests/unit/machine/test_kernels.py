"""Machine code: made once, kept, found again, and made on the spot where neither is possible."""

import subprocess

import pytest

pytest.importorskip("llvmlite", reason="machine code is made by llvmlite, which is not installed")
from corolla.machine import kernels

WHAT = ("float32", "products", "plain", "1")


@pytest.fixture
def kept(monkeypatch, tmp_path):
    monkeypatch.setattr(kernels, "_CODE", tmp_path / "code")
    return tmp_path / "code"


def refuse(*args, **kwargs):
    raise PermissionError("no processes here")


def test_code_is_made_once(kept, monkeypatch):
    made = kernels._find_or_make(*WHAT)
    assert set(made[0]) == {"multiply_1", "multiply_2", "multiply_4", "multiply_8"}
    (file,) = kept.iterdir()
    monkeypatch.setattr(subprocess, "run", refuse)
    monkeypatch.setattr(kernels, "make_code", refuse)
    assert kernels._find_or_make(*WHAT) == made
    assert file.name.startswith("float32.products.plain.1.")


def test_where_no_process_may_be_started_the_same_code_is_made(kept, monkeypatch):
    made = kernels._find_or_make(*WHAT)
    (file,) = kept.iterdir()
    file.unlink()
    monkeypatch.setattr(subprocess, "run", refuse)
    assert kernels._find_or_make(*WHAT) == made


def test_where_nothing_may_be_written_code_is_made_all_the_same(kept):
    kept.write_text("a file where a directory should be")
    counts, code = kernels._find_or_make(*WHAT)
    assert counts["multiply_1"] == 9
    assert code
