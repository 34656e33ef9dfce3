"""Runs pytest again and again, in forks of a process that has imported PyTorch already.

Each line of the standard input is a JSON list: a folder, which the tests run in and import from first; a file
for what is printed; and pytest's arguments. The answer is a line with the exit code.
"""

from __future__ import annotations

import json
import os
import sys

import hypothesis  # noqa: F401
import pytest
import torch._dynamo  # noqa: F401, which the first optimizer imports


def main() -> None:
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            os._exit(run(*json.loads(line)))
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


def run(folder: str, output: str, *arguments: str) -> int:
    """Run pytest in this process, and return its exit code."""
    printed = os.open(output, os.O_WRONLY | os.O_CREAT)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for source, target in ((nothing, 0), (printed, 1), (printed, 2)):
        os.dup2(source, target)
    os.chdir(folder)
    sys.path.insert(0, folder)
    # For the processes that tests start.
    os.environ["PYTHONPATH"] = os.pathsep.join([folder, os.environ.get("PYTHONPATH", "")])
    code = int(pytest.main([*arguments]))
    sys.stdout.flush()
    sys.stderr.flush()
    return code


if __name__ == "__main__":
    main()
