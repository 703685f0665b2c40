import signal

from corolla.cli.signals import catch_signals


def test_a_caught_signal_calls_and_the_handler_before_comes_back():
    calls = []
    before = signal.getsignal(signal.SIGINT)
    with catch_signals(lambda: calls.append(1), signal.SIGINT):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
    assert calls == [1, 1]
    assert signal.getsignal(signal.SIGINT) is before
