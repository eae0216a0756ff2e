"""Handlers of signals that last as long as a context."""

import signal

import pytest

from data_pipeline.commands.stops import signals_handled


def test_handlers_are_called_within_and_then_those_before_are_back_whatever_was_raised() -> None:
    heard: list[int] = []

    def raise_within() -> None:
        with signals_handled([signal.SIGUSR1, signal.SIGUSR2], lambda s, _: heard.append(s)):
            for signum in (signal.SIGUSR2, signal.SIGUSR1):
                signal.raise_signal(signum)
            raise RuntimeError

    before = signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    earlier = signal.getsignal(signal.SIGUSR1)
    try:
        with pytest.raises(RuntimeError):
            raise_within()
        assert heard == [signal.SIGUSR2, signal.SIGUSR1]
        assert signal.getsignal(signal.SIGUSR2) is signal.SIG_IGN
        assert signal.getsignal(signal.SIGUSR1) is earlier
    finally:
        signal.signal(signal.SIGUSR2, before)
