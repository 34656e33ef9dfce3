"""The hyperparameters are the paper's, and the configuration of every run of a table has them."""

from dataclasses import replace

import pytest
from miniatures import make_cifar100, make_imagenet

from sparseopt_kernels.lab.reproduce import recipes
from sparseopt_kernels.lab.reproduce.experiment import Settings
from sparseopt_kernels.lab.reproduce.paper_figures import PAPER, Cell
from sparseopt_kernels.lab.reproduce.tables import TABLES
from sparseopt_kernels.lab.training import distributed

# Tables 4 and 5 and the schedules of Appendix E.2 of arXiv:2605.27541v1, as the paper prints them.
PAPERS = """
| of the paper                        | CIFAR-100 (Table 4, E.2.2) | ImageNet (Table 5, E.2.1) |
| Batch Size (B)                      | 256                        | 128                       |
| Learning Rate / Base Learning Rate  | 0.1                        | 0.1                       |
| learning rate is for a batch of     | any                        | 256                       |
| Momentum                            | 0.9                        | 0.9                       |
| Weight Decay                        | 5e-4                       | 1e-4                      |
| T_warmup, epochs                    | 5                          | 5                         |
| learning rate warms up from         | 0                          | 1e-5                      |
| learning rate decays to             | 1e-6                       | 1e-5                      |
| Sparsity Distribution               | ERK                        | ERK                       |
| Drop Fraction                       | 0.3                        | 0.3                       |
| Update Frequency, iterations        | 100                        | 100                       |
| HAM Hyperparameter (h_1)            | 80                         | none                      |
"""
FIELDS = (
    "batch_size",
    "base_lr",
    "base_batch_size",
    "momentum",
    "weight_decay",
    "warmup_epochs",
    "start_lr",
    "end_lr",
    "distribution",
    "drop_fraction",
    "update_every",
    "ham_alpha",
)


def printed(column):
    lines = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in PAPERS.strip().splitlines()[1:]
    ]
    values = [line[column] for line in lines]
    words = {"any": None, "none": None, "ERK": "erk"}
    return {
        name: words[value] if value in words else float(value)
        for name, value in zip(FIELDS, values, strict=True)
    }


@pytest.mark.parametrize(
    ("recipe", "column"), [(recipes.CIFAR100, 1), (recipes.IMAGENET, 2)], ids=["cifar", "imagenet"]
)
def test_every_hyperparameter_is_that_of_the_paper(recipe, column):
    assert {name: getattr(recipe, name) for name in FIELDS} == printed(column)


# Table 1 of the paper, and so on: epochs, DST methods, gradient renormalisation (Appendix F), HAM.
SHAPES = {
    "table1": ((90, 180, 270), {"rigl", "set"}, False, False, "imagenet"),
    "table2": ((100, 200, 300, 500), {"rigl"}, False, True, "cifar-100"),
    "table3": ((100, 200, 300, 500), {"set"}, False, True, "cifar-100"),
    "table6": ((90, 270), {"rigl"}, True, False, "imagenet"),
    "table7": ((90, 270), {"set"}, True, False, "imagenet"),
    "table8": ((100, 200, 300, 500), {"rigl"}, True, True, "cifar-100"),
    "table9": ((100, 200, 300, 500), {"set"}, True, True, "cifar-100"),
}


@pytest.mark.parametrize("name", SHAPES)
def test_the_cells_are_those_of_the_paper(name):
    epochs, dst, renormalised, has_ham, data = SHAPES[name]
    table = TABLES[name]
    by_clip: dict[str, set[Cell]] = {}
    for case in table.cases([]):
        by_clip.setdefault(case["clip"], set()).add(Cell(*(case[field] for field in Cell._fields)))
    assert list(by_clip) == (["dense", "active"] if renormalised else ["none"])
    cells = next(iter(by_clip.values()))
    controls = {cell for cell in cells if cell.optimizer in ("unnormalized", "scalar")}
    cells -= controls
    assert cells == set(PAPER[table.number])  # every figure of the paper, and nothing else
    without_ham = {cell for cell in cells if cell.optimizer == "sgd" and not cell.ham}
    beside = {cell._replace(optimizer=name) for cell in without_ham for name in ("unnormalized", "scalar")}
    assert controls == (beside if renormalised else set())
    if renormalised:
        assert by_clip["active"] == {cell for cell in cells if not cell.ham}
    assert {cell[4] for cell in cells} == set(epochs)
    assert {cell[0] for cell in cells} == dst
    assert {cell[1] for cell in cells} == {0.90, 0.95, 0.97}
    assert {cell[3] for cell in cells} == ({True, False} if has_ham else {False})
    assert table.recipe.data == data


# Cells of the corners of each table, as the paper prints them.
@pytest.mark.parametrize(
    ("number", "cell", "figure"),
    [
        (1, Cell("rigl", 0.90, "sparseopt", False, 90), (74.41, None)),
        (1, Cell("set", 0.97, "sgd", False, 270), (72.65, None)),
        (2, Cell("rigl", 0.90, "sparseopt", True, 100), (61.64, 0.24)),
        (2, Cell("rigl", 0.97, "sgd", False, 500), (57.32, 0.16)),
        (3, Cell("set", 0.97, "sgd", True, 300), (56.80, 0.63)),
        (6, Cell("rigl", 0.95, "sgd", False, 270), (66.37, None)),
        (7, Cell("set", 0.97, "sparseopt", False, 90), (63.28, None)),
        (8, Cell("rigl", 0.90, "sgd", False, 100), (54.35, 1.08)),
        (9, Cell("set", 0.97, "sgd", False, 500), (46.65, 0.54)),
    ],
)
def test_the_figures_are_those_of_the_paper(number, cell, figure):
    assert PAPER[number][cell] == figure


def test_a_run_has_what_the_recipe_says(tmp_path):
    settings = Settings(str(make_cifar100(tmp_path)), amp="bfloat16", channels_last=True)
    cell = Cell("set", 0.95, "sgd", True, 200)
    config = recipes.CIFAR100.config(cell, 3, "dense", settings)
    assert (config.method, config.sparsity, config.epochs, config.seeds) == ("set", 0.95, 200, (3,))
    assert (config.optimizer, config.ham_alpha, config.max_grad_norm) == (("sgd",), 80, 1)
    assert (config.max_grad_norm_over, config.skip_step) == ("dense", True)
    assert (config.batch_size, config.lr, config.start_lr, config.end_lr) == (256, 0.1, 0, 1e-6)
    assert (config.momentum, config.weight_decay, config.warmup_epochs) == (0.9, 5e-4, 5)
    assert (config.drop_fraction, config.update_every, config.distribution) == (0.3, 100, "erk")
    assert (config.amp, config.channels_last, config.model) == ("bfloat16", True, "resnet20")
    without = recipes.CIFAR100.config(cell._replace(ham=False), 3, "none", settings)
    assert (without.ham_alpha, without.max_grad_norm, without.max_grad_norm_over) == (0, None, "active")
    active = recipes.CIFAR100.config(cell, 3, "active", settings)
    assert (active.max_grad_norm, active.max_grad_norm_over) == (1, "active")


@pytest.mark.parametrize(("ranks", "batch", "peak"), [(1, 128, 0.05), (8, 1024, 0.4)])
def test_imagenet_scales_batch_and_learning_rate_with_the_ranks(tmp_path, monkeypatch, ranks, batch, peak):
    monkeypatch.setattr(distributed, "ranks", lambda: ranks)
    settings = Settings(str(make_imagenet(tmp_path, train=1, val=1)))
    config = recipes.IMAGENET.config(Cell("rigl", 0.9, "sparseopt", False, 90), 0, "none", settings)
    assert config.batch_size == batch
    assert config.lr == pytest.approx(peak)
    assert (config.start_lr, config.end_lr, config.weight_decay) == (1e-5, 1e-5, 1e-4)
    assert replace(recipes.IMAGENET, base_batch_size=None).peak_lr == 0.1
