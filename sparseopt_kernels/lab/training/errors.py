"""What the command line prints and ends with, in place of a traceback."""

from __future__ import annotations

from importlib.util import find_spec

_EXTRA = ("numpy", "scipy", "sklearn", "matplotlib", "tqdm", "PIL")


class TrainingError(Exception):
    """Something the user can put right: the message says what to do, ``exit_code`` is the process's.

    2 is for what stops a run before it starts (options, data, packages), 1 for what stops it later.
    """

    def __init__(self, message: str, exit_code: int = 2) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def check_packages(command: str) -> None:
    """Raise ``TrainingError`` unless the packages of the extra ``train`` are installed."""
    missing = [name for name in _EXTRA if find_spec(name) is None]
    if missing:
        raise TrainingError(
            f"{command} needs packages that are not installed ({', '.join(missing)}): "
            "in a checkout of sparseopt_kernels run pip install '.[train]', "
            "then `sparseopt doctor` lists their versions"
        )
