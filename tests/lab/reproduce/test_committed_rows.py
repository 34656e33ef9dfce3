"""Committed results of experiments that train no network are those of today's code: one case is measured
again. (Of the others, the first steps are: ``test_first_steps.py``.)"""

import pytest
from result_rows import committed

from sparseopt_kernels.lab.reproduce.catalogue import EXPERIMENTS
from sparseopt_kernels.lab.reproduce.experiment import PaperSized, Settings, Trained
from sparseopt_kernels.lab.threads import pytorch_threads
from sparseopt_kernels.lab.training.errors import TrainingError

MEASURED = [name for name, e in EXPERIMENTS.items() if not isinstance(e, (PaperSized, Trained))]


def test_these_are_all():
    assert set(MEASURED) == {"figure2", "figure6", "figure7", "figure8", "figure9", "layernorm"}


@pytest.mark.parametrize("name", MEASURED)
@pytest.mark.filterwarnings("ignore")
def test_a_case_measured_again(name):
    experiment = EXPERIMENTS[name]
    try:
        experiment.check(Settings())
    except TrainingError as error:
        pytest.skip(str(error))
    # Batch norm in figure2; HAM, factors and layer norm in the others.
    case = experiment.cases([])[9 if name == "figure2" else -1]
    kept = [row for row in committed(experiment) if case.items() <= row.items()]
    with pytorch_threads(1):
        again = experiment.measure(case, Settings())
    assert len(kept) == len(again) > 0
    for row, expected in zip(again, kept, strict=True):
        assert row.keys() == expected.keys()
        for column, value in row.items():
            if isinstance(value, float):
                # Other processors round otherwise.
                value = pytest.approx(value, rel=1e-3, abs=1e-5, nan_ok=True)
            assert expected[column] == value, column
