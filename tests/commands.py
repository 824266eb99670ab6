"""Commands and scripts, called in this process: importing torch takes longer than a short run."""

import importlib.util
import io
import logging
import subprocess
import sys
from contextlib import chdir, redirect_stderr, redirect_stdout
from pathlib import Path
from unittest import mock

from gdtrain import cli

SCRIPTS = Path(__file__).resolve().parent.parent / "scripts"


def process(folder, script, *words, timeout=300):
    """Start a script, as a user does."""
    return subprocess.run(
        [sys.executable, str(SCRIPTS / f"{script}.py"), *map(str, words)],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def command(folder, script, *words):
    """Call a command's main; answers as `process` does, but a warning is an error here."""
    return called(getattr(cli, f"{script}_main"), folder, *words)


def called(main, folder, *words):
    """Call any main in a folder, as if a process of its own had been started."""
    words = [*map(str, words)]
    out, err = io.StringIO(), io.StringIO()
    log = logging.getLogger("gdtrain")
    before = log.handlers[:], log.level, log.propagate
    code = 0
    try:
        with (
            chdir(folder),
            mock.patch.object(sys, "argv", ["script", *words]),
            redirect_stdout(out),
            redirect_stderr(err),
        ):
            main()
    except SystemExit as end:
        code = end.code or 0
    finally:
        log.handlers[:], log.level, log.propagate = before
    return subprocess.CompletedProcess(words, code, out.getvalue(), err.getvalue())


def loaded(name):
    """The module of a script."""
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module
