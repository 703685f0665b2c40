import os
import subprocess
import sys

import pytest

from corolla import errors
from corolla.cli.failures import report_failure


def below(cls):
    return [cls, *(found for child in cls.__subclasses__() for found in below(child))]


@pytest.mark.parametrize("cls", below(errors.Error), ids=lambda cls: cls.__name__)
def test_each_error_has_an_exit_code(cls, capsys):
    code = report_failure(cls("7 of 8 are missing"), debug=False)
    in_vain = errors.UsageError, errors.ModelNotFound, errors.UnsupportedModel
    assert code == (2 if issubclass(cls, in_vain) else 1)
    is_bug = cls in (errors.InternalError, errors.LocalProtocolError)
    said = capsys.readouterr().err
    assert ("Please report it" in said) is is_bug
    if not is_bug:
        assert said == "error: 7 of 8 are missing\n"


def test_an_unexpected_exception_is_a_bug_with_its_traceback(capsys):
    with pytest.raises(ZeroDivisionError) as raised:
        raise ZeroDivisionError("no such thing")
    assert report_failure(raised.value, debug=False) == 1
    said = capsys.readouterr().err
    assert "Traceback" in said
    assert "bug: ZeroDivisionError: no such thing" in said
    assert "corolla version --json" in said


def test_an_interruption_is_exit_code_130_however_deep_it_lies(capsys):
    assert report_failure(KeyboardInterrupt(), debug=False) == 130
    group = BaseExceptionGroup("", [errors.PeerLost("gone"), BaseExceptionGroup("", [KeyboardInterrupt()])])
    assert report_failure(group, debug=False) == 130
    assert capsys.readouterr().err == "interrupted\n" * 2


def test_of_a_group_the_error_is_shown(capsys):
    assert report_failure(ExceptionGroup("tasks", [errors.ConfigError("no port")]), debug=False) == 2
    assert capsys.readouterr().err == "error: no port\n"


def test_a_missing_package_is_answered_with_the_command_that_installs_it(capsys):
    assert report_failure(ModuleNotFoundError("No module named 'torch'", name="torch"), debug=False) == 1
    assert "pip install 'corolla[torch]'" in capsys.readouterr().err


def test_what_a_peer_says_cannot_command_the_terminal(capsys):
    report_failure(errors.PeerFailed("\x1b[2Jfull\x07 [red]"), debug=False)
    assert capsys.readouterr().err == "error: full [red]\n"


def test_a_reader_that_has_gone_is_no_bug():
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "corolla", "version", "--json"]
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writing)
    assert (done.returncode, done.stderr) == (1, "error: whoever read the output has closed it\n")
