"""Runs pytest again and again, in forks of a process that has imported PyTorch already: a program, and the
class that starts it.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path


class PytestServer:
    """The process, as long as the ``with`` block runs."""

    def __enter__(self) -> PytestServer:
        env = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
        env["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
        self._process = subprocess.Popen(
            [sys.executable, __file__], env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        return self

    def __exit__(self, *of_error: object) -> None:
        with self._process:
            assert self._process.stdin is not None
            self._process.stdin.close()

    def run(
        self, folder: Path, arguments: Sequence[str], *, imports_from: Path | None = None, **environment: str
    ) -> tuple[int, str]:
        """Return the exit code, and all that was printed.

        Args:
            folder: where pytest runs.
            arguments: pytest's.
            imports_from: where modules are looked for first; None: in ``folder``.
            environment: variables, besides those of the server.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with tempfile.NamedTemporaryFile("r") as printed:
            request = [str(folder), str(imports_from or folder), printed.name, environment, *arguments]
            print(json.dumps(request), file=self._process.stdin, flush=True)
            line = self._process.stdout.readline()
            if not line:
                raise RuntimeError(f"the server has ended with code {self._process.wait()}")
            return int(line), printed.read()


_FAILED = 99
"""The exit code where pytest did not run: it is none of pytest's."""


def _serve() -> None:
    """Answer each line of the standard input, the arguments of ``_run`` as JSON, by a line with the exit
    code."""
    import hypothesis  # noqa: F401
    import torch._dynamo  # noqa: F401, which the first optimizer imports

    with suppress(ImportError):  # it need not be installed
        import triton.language  # noqa: F401
    gc.freeze()  # pytest collects garbage again and again
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            code = _FAILED
            with suppress(BaseException):
                code = _run(*json.loads(line))
            os._exit(code)
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


def _run(folder: str, imports_from: str, output: str, environment: dict[str, str], *arguments: str) -> int:
    import pytest

    printed = os.open(output, os.O_WRONLY)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for source, target in ((nothing, 0), (printed, 1), (printed, 2)):
        os.dup2(source, target)
    os.chdir(folder)
    sys.path.insert(0, imports_from)
    os.environ.update(environment)
    # For the processes that tests start.
    os.environ["PYTHONPATH"] = os.pathsep.join([imports_from, os.environ.get("PYTHONPATH", "")])
    code = int(pytest.main([*arguments]))
    sys.stdout.flush()
    sys.stderr.flush()
    return code


if __name__ == "__main__":
    _serve()
