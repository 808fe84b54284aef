"""A Python program in a process of its own, which has its modules from this one: nothing is imported
anew, which costs more than many a program."""
import logging
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path


def forked(command, cwd, environment=None, timeout=300):
    """`subprocess.CompletedProcess` of `python *command`, a module after '-m' or a script, in folder
    `cwd`, with its output as text.

    Raises `subprocess.TimeoutExpired` after `timeout` seconds; the process is killed."""
    environment = dict(os.environ if environment is None else environment)
    if not hasattr(os, 'fork'):
        return subprocess.run([sys.executable, *command], cwd=cwd, env=environment, text=True,
                              capture_output=True, timeout=timeout)
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        child = os.fork()
        if child == 0: _become(command, cwd, environment, out.fileno(), err.fileno())
        status = _ended(child, time.monotonic() + timeout)
        if status is None: raise subprocess.TimeoutExpired(command, timeout)
        for file in (out, err): file.seek(0)
        said = [file.read().decode(errors='replace') for file in (out, err)]
    return subprocess.CompletedProcess(command, os.waitstatus_to_exitcode(status), *said)


def _ended(child, end):
    "The status with which process `child` ends; None if it had to be killed, `end` having come."
    while time.monotonic() < end:
        known, status = os.waitpid(child, os.WNOHANG)
        if known: return status
        time.sleep(.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def _become(command, cwd, environment, out, err):
    "This process runs `command` as a new interpreter would, and ends."
    code = 1
    try:
        for number in (signal.SIGTERM, signal.SIGUSR1): signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        with open(os.devnull) as nothing: os.dup2(nothing.fileno(), 0)
        os.dup2(out, 1)
        os.dup2(err, 2)
        sys.stdin, sys.stdout, sys.stderr = open(0), open(1, 'w'), open(2, 'w', buffering=1)
        logging.getLogger().handlers.clear()  # pytest's
        warnings.resetwarnings()
        os.environ.clear()
        os.environ.update(environment)
        os.chdir(cwd)
        if command[0] == '-m':
            sys.argv = list(command[1:])
            runpy.run_module(command[1], run_name='__main__', alter_sys=True)
        else:
            sys.argv = list(command)
            sys.path.insert(0, str(Path(command[0]).parent))
            runpy.run_path(command[0], run_name='__main__')
        code = 0
    except SystemExit as end:
        if isinstance(end.code, int | None): code = end.code or 0
        else: print(end.code, file=sys.stderr)
    except BaseException: traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr): stream.flush()
        os._exit(code)
