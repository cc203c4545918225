"""SIGINT and SIGTERM: one line, the promised exit code, in seconds, whatever a library does with signals."""

from __future__ import annotations

import signal
import subprocess
import sys
import time

import pytest

from pipelines.runtime.progress import console, for_terminal
from tests.support import ROOT

COMMAND = """
import signal, sys, threading, time
from pipelines.runtime.cli import exit_codes
from pipelines.runtime.signals import in_thread, keep_handlers

def takes_the_handlers():  # as ray.init and Ray Train do
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, lambda *_: sys.exit(0))

def waits():
    print("ready", flush=True)
    time.sleep(600)

def swallows():
    try:
        waits()
    except KeyboardInterrupt:
        pass

def another_thread_gets_it():
    def gets_it():
        time.sleep(1)
        signal.pthread_kill(threading.get_ident(), signal.SIGTERM)

    threading.Thread(target=gets_it, daemon=True).start()

def a_library_whose_threads_go_on():
    threading.Thread(target=time.sleep, args=[600]).start()
    waits()

with exit_codes():
    {work}
print("the command went on")
"""


def interrupt(work, signum, times=1):
    """(exit code, stderr, seconds) of a command that gets a signal while it waits."""
    process = subprocess.Popen(
        [sys.executable, "-c", COMMAND.format(work=work)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "ready\n"
    begun = time.monotonic()
    for _ in range(times):
        process.send_signal(signum)
    out, err = process.communicate(timeout=60)
    assert out == ""
    return process.returncode, err, time.monotonic() - begun


def ended(work):
    """(exit code, stderr) of a command that gets no signal from outside."""
    command = [sys.executable, "-c", COMMAND.format(work=work)]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    return process.returncode, process.stderr


@pytest.mark.parametrize(
    ("signum", "code", "line"),
    [
        (signal.SIGINT, 130, "interrupted: the same command resumes here\n"),
        (signal.SIGTERM, 143, "terminated: the same command resumes here\n"),
    ],
)
@pytest.mark.parametrize("times", [1, 3])
@pytest.mark.parametrize(
    "work",
    [
        "waits()",
        "swallows()",
        "a_library_whose_threads_go_on()",
        "keep_handlers(takes_the_handlers); waits()",
        "in_thread(waits)",
    ],
)
def test_a_signal_ends_a_command_in_one_line(work, signum, code, line, times):
    *result, seconds = interrupt(work, signum, times)
    assert result == [code, line]
    assert seconds < 10


@pytest.mark.parametrize(
    "work",
    [
        "another_thread_gets_it(); waits()",  # so waits a call that began when the signal had just come
        # As a call that runs no handlers.
        "another_thread_gets_it(); signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM]); waits()",
    ],
)
def test_a_signal_that_ends_no_call_of_the_main_thread_ends_the_command(work):
    assert ended(work) == (143, "terminated: the same command resumes here\n")


def test_a_lost_lease_ends_a_command_with_its_own_line():
    work = """
    import _thread
    from bdpo.storage.lease import LOST
    print("error: it is lost", file=sys.stderr)
    LOST.set()
    _thread.interrupt_main()
    waits()"""
    assert ended(work) == (2, "error: it is lost\n")


def test_handlers_are_put_back(capsys):
    from pipelines.runtime.cli import exit_codes

    before = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    with exit_codes():
        assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] != before
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == before


def test_no_control_character_reaches_the_terminal(capsys):
    assert for_terminal("a\x1b[31mb\x07\u202e\ud800\tc\n") == "a\\x1b[31mb\\x07\\u202e\\ud800\tc\n"
    with console.capture() as shown:
        console.print("name \x1b[2Jgone [bold]x[/]")
    assert shown.get() == "name \\x1b[2Jgone x\n"
