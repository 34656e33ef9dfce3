"""Errors that the command line prints in place of a traceback."""

from __future__ import annotations

from importlib.util import find_spec

_EXTRA = ("numpy", "scipy", "sklearn", "matplotlib", "tqdm", "PIL")


class TrainingError(Exception):
    """An error that the user can mend: the message says how.

    ``exit_code`` of the process is 2 for errors before a run starts (options, data, packages), 1 for later
    ones.
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
