import pytest

from sparseopt_kernels.text_table import aligned


def test_columns_are_as_wide_as_their_longest_cell() -> None:
    assert aligned([("name", "ms"), ("a", "10.25"), ("longer", "1")]) == [
        "name       ms",
        "-------------",
        "a       10.25",
        "longer      1",
    ]


def test_rows_of_different_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match="shorter"):
        aligned([("name", "ms"), ("a",)])
