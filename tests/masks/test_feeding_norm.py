"""Which weights feed a batch norm."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from refusals import words
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from sparseopt_kernels.lab.training.models import build_model
from sparseopt_kernels.masks.feeding_norm import layers_feeding_norm
from sparseopt_kernels.masks.mapping import Masks
from sparseopt_kernels.optimizer import SparseOpt
from sparseopt_kernels.topology.sparsify import sparsify

IMAGES = torch.zeros(2, 3, 8, 8)
ROWS = torch.zeros(4, 6)


def found(model: nn.Module, example_input: Any) -> list[str]:
    return list(layers_feeding_norm(model, example_input))


class Net(nn.Module):
    """Layers under the names of keywords, and a forward of one's own."""

    def __init__(self, run: Callable[..., Any], **layers: nn.Module) -> None:
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)
        self.run = run

    def forward(self, *inputs: Tensor) -> Any:
        return self.run(self, *inputs)


class Lambda(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


@pytest.mark.parametrize("name", ["mlp", "convnet", "resnet8", "resnet20"])
def test_networks(name: str) -> None:
    """All but the classifier; residual blocks add after their batch norm."""
    model = build_model(name, (3, 8, 8), 10)
    layers = [k for k, p in model.named_parameters() if p.ndim > 1 and not k.startswith("classifier")]
    weights = layers_feeding_norm(model, IMAGES)
    assert list(weights) == layers
    assert all(weights[k] is model.get_parameter(k) for k in layers)


FC, CONV = (lambda: nn.Linear(6, 5)), (lambda: nn.Conv2d(3, 5, 3))
BETWEEN: dict[str, tuple[Callable[[], list[nn.Module]], Tensor]] = {
    "nothing": (lambda: [FC(), nn.BatchNorm1d(5)], ROWS),
    "no-affine-no-running": (
        lambda: [FC(), nn.BatchNorm1d(5, affine=False, track_running_stats=False)],
        ROWS,
    ),
    "identity": (lambda: [FC(), nn.Identity(), nn.BatchNorm1d(5)], ROWS),
    "dropout": (lambda: [FC(), nn.Dropout(), nn.BatchNorm1d(5)], ROWS),
    "dropout-in-place": (lambda: [FC(), nn.Dropout(inplace=True), nn.BatchNorm1d(5)], ROWS),
    "dropout2d": (lambda: [CONV(), nn.Dropout2d(), nn.BatchNorm2d(5)], IMAGES),
    "max-pool": (lambda: [CONV(), nn.MaxPool2d(2), nn.BatchNorm2d(5)], IMAGES),
    "avg-pool": (lambda: [CONV(), nn.AvgPool2d(2), nn.BatchNorm2d(5)], IMAGES),
    "adaptive-avg-pool": (
        lambda: [CONV(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.BatchNorm1d(5)],
        IMAGES,
    ),
    "adaptive-max-pool": (lambda: [CONV(), nn.AdaptiveMaxPool2d(2), nn.BatchNorm2d(5)], IMAGES),
    "mean": (lambda: [CONV(), Lambda(lambda x: x.mean((2, 3))), nn.BatchNorm1d(5)], IMAGES),
    "mean-keepdim": (lambda: [CONV(), Lambda(lambda x: x.mean(3, keepdim=True)), nn.BatchNorm2d(5)], IMAGES),
    "flatten": (lambda: [CONV(), nn.Flatten(), nn.BatchNorm1d(5 * 36)], IMAGES),
    "reshape": (lambda: [CONV(), nn.Flatten(2), nn.BatchNorm1d(5)], IMAGES),
    "transpose": (
        lambda: [FC(), Lambda(lambda x: x.transpose(1, 2)), nn.BatchNorm1d(5)],
        torch.zeros(2, 7, 6),
    ),
    "rows-as-examples": (lambda: [FC(), nn.Flatten(0, 1), nn.BatchNorm1d(5)], torch.zeros(2, 7, 6)),
    "dtype": (lambda: [FC(), Lambda(lambda x: x.bfloat16().to(x.dtype)), nn.BatchNorm1d(5)], ROWS),
    "memory-format": (
        lambda: [
            CONV(),
            Lambda(lambda x: x.contiguous(memory_format=torch.channels_last)),
            nn.BatchNorm2d(5),
        ],
        IMAGES,
    ),
    "half-of-the-images": (lambda: [CONV(), Lambda(lambda x: x[..., ::2]), nn.BatchNorm2d(5)], IMAGES),
    "same-padding": (lambda: [nn.Conv2d(3, 5, 3, padding="same"), nn.BatchNorm2d(5)], IMAGES),
    "grouped": (lambda: [nn.Conv2d(3, 6, 3, groups=3), nn.BatchNorm2d(6)], IMAGES),
    "1d": (lambda: [nn.Conv1d(3, 5, 3), nn.BatchNorm1d(5)], torch.zeros(2, 3, 8)),
    "3d": (lambda: [nn.Conv3d(3, 5, 3), nn.BatchNorm3d(5)], torch.zeros(2, 3, 4, 4, 4)),
    "transposed": (lambda: [nn.ConvTranspose2d(3, 5, 3), nn.BatchNorm2d(5)], IMAGES),
    "transposed-grouped": (lambda: [nn.ConvTranspose2d(3, 6, 3, groups=3), nn.BatchNorm2d(6)], IMAGES),
    "functional": (lambda: [FC(), Lambda(lambda x: F.batch_norm(x, None, None, training=True))], ROWS),
}
NOT_BETWEEN: dict[str, tuple[Callable[[], list[nn.Module]], Tensor]] = {
    "no-norm": (lambda: [FC()], ROWS),
    "relu": (lambda: [FC(), nn.ReLU(), nn.BatchNorm1d(5)], ROWS),
    "relu-in-place": (lambda: [FC(), nn.ReLU(inplace=True), nn.BatchNorm1d(5)], ROWS),
    "layer-norm": (lambda: [FC(), nn.LayerNorm(5)], ROWS),
    "layer-norm-then-batch-norm": (lambda: [FC(), nn.LayerNorm(5), nn.BatchNorm1d(5)], ROWS),
    "group-norm": (lambda: [CONV(), nn.GroupNorm(5, 5)], IMAGES),
    "instance-norm": (lambda: [CONV(), nn.InstanceNorm2d(5)], IMAGES),
    "frozen-batch-norm": (lambda: [FC(), nn.BatchNorm1d(5).eval()], ROWS),
    "functional-without-statistics": (
        lambda: [FC(), Lambda(lambda x: F.batch_norm(x, torch.zeros(5), torch.ones(5)))],
        ROWS,
    ),
    "norm-over-another-dimension": (lambda: [FC(), nn.BatchNorm1d(7)], torch.zeros(2, 7, 6)),
    "pool-over-neurons": (lambda: [FC(), nn.MaxPool1d(2), nn.BatchNorm1d(7)], torch.zeros(2, 7, 6)),
    "pool-over-neurons-of-another-layout": (
        lambda: [CONV(), Lambda(lambda x: x.transpose(1, 3)), nn.MaxPool2d((1, 5)), nn.BatchNorm2d(6)],
        IMAGES,
    ),
    "a-mean-over-neurons": (
        lambda: [CONV(), Lambda(lambda x: x.mean(1, keepdim=True)), nn.BatchNorm2d(1)],
        IMAGES,
    ),
    "half-of-the-neurons": (lambda: [FC(), Lambda(lambda x: x[:, :3]), nn.BatchNorm1d(3)], ROWS),
}


@pytest.mark.parametrize(("layers", "example"), BETWEEN.values(), ids=BETWEEN)
def test_what_may_be_between(layers: Callable[[], list[nn.Module]], example: Tensor) -> None:
    assert found(nn.Sequential(*layers()), example) == ["0.weight"]


@pytest.mark.parametrize(("layers", "example"), NOT_BETWEEN.values(), ids=NOT_BETWEEN)
def test_what_may_not_be_between(layers: Callable[[], list[nn.Module]], example: Tensor) -> None:
    assert found(nn.Sequential(*layers()), example) == []


@pytest.mark.parametrize(("layers", "example"), BETWEEN.values(), ids=BETWEEN)
def test_what_is_found_does_not_depend_on_the_scale_of_a_neuron(
    layers: Callable[[], list[nn.Module]], example: Tensor
) -> None:
    """The reason for what may be between, in numbers. There is no bias, for dropout sets that to 0, too."""
    torch.manual_seed(0)
    model: Any = nn.Sequential(*layers()).double()
    x = 1e4 * torch.randn(example.shape, dtype=torch.float64)  # so large that eps of batch norm is nothing
    dim = 1 if isinstance(model[0], nn.ConvTranspose2d) else 0
    outputs = []
    for scale in (1.0, 4.0):  # powers of two: bfloat16 rounds both alike
        with torch.no_grad():
            model[0].bias.zero_()
            model[0].weight.select(dim, 1).mul_(scale)
        torch.manual_seed(1)  # of dropout
        outputs.append(model(x))
    assert torch.allclose(outputs[0], outputs[1], rtol=1e-6, atol=1e-6)


def bn(features: int = 5) -> nn.BatchNorm1d:
    return nn.BatchNorm1d(features)


def square() -> nn.Linear:
    return nn.Linear(6, 6)


USES: dict[str, tuple[Callable[[], Net], list[str]]] = {
    "norm-and-elsewhere": (lambda: Net(lambda m, x: (y := m.a(x)) + m.n(y), a=FC(), n=bn()), []),
    "two-norms": (lambda: Net(lambda m, x: m.n(y := m.a(x)) + m.k(y), a=FC(), n=bn(), k=bn()), ["a.weight"]),
    "norm-and-output": (lambda: Net(lambda m, x: (y := m.a(x), m.n(y)), a=FC(), n=bn()), []),
    "sum-before-the-norm": (lambda: Net(lambda m, x: m.n(m.a(x) + m.b(x)), a=FC(), b=FC(), n=bn()), []),
    "residual": (lambda: Net(lambda m, x: x + m.n(m.a(x)), a=square(), n=bn(6)), ["a.weight"]),
    "residual-before-the-norm": (lambda: Net(lambda m, x: m.n(x + m.a(x)), a=square(), n=bn(6)), []),
    "gate": (lambda: Net(lambda m, x: m.n(m.a(x)) * m.b(x).sigmoid(), a=FC(), b=FC(), n=bn()), ["a.weight"]),
    "concatenated": (
        lambda: Net(lambda m, x: m.n(torch.cat([m.a(x), x, m.b(x)], 1)), a=FC(), b=FC(), n=bn(16)),
        ["a.weight", "b.weight"],
    ),
    "stacked-over-each-other": (
        lambda: Net(lambda m, x: m.n(torch.cat([m.a(x), m.b(x)])), a=FC(), b=FC(), n=bn()),
        [],
    ),
    "a-cat-that-has-been-normalised": (
        lambda: Net(lambda m, x: m.k(torch.cat([m.n(m.a(x)), m.b(x)], 1)), a=FC(), b=FC(), n=bn(), k=bn(10)),
        ["a.weight", "b.weight"],
    ),
    "split-into-two-norms": (
        lambda: Net(
            lambda m, x: [n(y) for n, y in zip((m.n, m.k), m.a(x).chunk(2, 1), strict=True)],
            a=square(),
            n=bn(3),
            k=bn(3),
        ),
        ["a.weight"],
    ),
    "one-half-into-a-norm": (
        lambda: Net(lambda m, x: (y := m.a(x).chunk(2, 1))[1] * m.n(y[0]), a=square(), n=bn(3)),
        [],
    ),
    "called-twice-into-norms": (
        lambda: Net(lambda m, x: m.n(m.a(x)) + m.k(m.a(2 * x)), a=FC(), n=bn(), k=bn()),
        ["a.weight"],
    ),
    "called-twice-once-elsewhere": (lambda: Net(lambda m, x: m.n(m.a(x)) + m.a(2 * x), a=FC(), n=bn()), []),
    "chained": (
        lambda: Net(lambda m, x: m.n(m.b(m.a(x))), a=square(), b=square(), n=bn(6)),
        ["b.weight"],
    ),
    "in-the-loss-too": (lambda: Net(lambda m, x: (m.n(m.a(x)), m.a.weight.abs().sum()), a=FC(), n=bn()), []),
    "functional-layer": (
        lambda: Net(lambda m, x: m.n(F.linear(x, m.a.weight)), a=FC(), n=bn()),
        ["a.weight"],
    ),
    "a-weight-made-of-another": (
        lambda: Net(lambda m, x: m.n(F.linear(x, m.a.weight * 2)), a=FC(), n=bn()),
        [],
    ),
    "not-called": (lambda: Net(lambda m, x: m.n(m.a(x)), a=FC(), b=FC(), n=bn()), ["a.weight"]),
}


@pytest.mark.parametrize(("make", "want"), USES.values(), ids=USES)
def test_where_an_output_goes(make: Callable[[], Net], want: list[str]) -> None:
    assert found(make(), ROWS) == want


def test_a_bias_that_is_added() -> None:
    """One number per neuron is taken away by the norm; other numbers are not."""
    for shape, want in (((5, 1, 1), ["a.weight"]), ((1,), ["a.weight"]), ((5, 6, 6), []), ((6,), [])):
        for flipped in (False, True):
            run = (lambda m, x: m.n(m.bias + m.a(x))) if flipped else (lambda m, x: m.n(m.a(x) + m.bias))
            model = Net(run, a=nn.Conv2d(3, 5, 3, bias=False), n=nn.BatchNorm2d(5))
            model.register_parameter("bias", nn.Parameter(torch.zeros(shape)))
            assert found(model, IMAGES) == want, shape


def test_shared_weights() -> None:
    """Under their first name, if all layers that have them feed a norm."""
    for second_norm, want in ((True, ["a.weight"]), (False, [])):
        model: Any = Net(
            lambda m, x, second=second_norm: m.n(m.a(x)) + (m.k(m.b(x)) if second else m.b(x)),
            a=FC(),
            b=FC(),
            n=bn(),
            k=bn(),
        )
        model.b.weight = model.a.weight
        assert found(model, ROWS) == want


def test_a_weight_whose_neurons_are_rows_here_and_columns_there() -> None:
    model: Any = Net(
        lambda m, x: m.k(m.b(m.n(m.a(x)))),
        a=nn.Conv2d(3, 5, 3),
        b=nn.ConvTranspose2d(5, 3, 3),
        n=nn.BatchNorm2d(5),
        k=nn.BatchNorm2d(3),
    )
    assert found(model, IMAGES) == ["a.weight", "b.weight"]
    model.b.weight = model.a.weight
    assert found(model, IMAGES) == []


def test_several_arguments_and_control_flow_by_shape() -> None:
    def run(m: Any, x: Tensor, y: Tensor) -> Tensor:
        return m.n(m.a(x)) if len(x) == len(y) else m.a(x)

    model = Net(run, a=FC(), n=bn())
    assert found(model, (ROWS, ROWS)) == ["a.weight"]
    assert found(model, (ROWS, ROWS[1:])) == []


def test_nothing_changes() -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.Dropout(), nn.BatchNorm1d(5))
    before, random_state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    assert found(model, torch.ones(4, 6)) == ["0.weight"]
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert torch.equal(torch.get_rng_state(), random_state)
    assert model[0].weight.grad is None
    assert model.training


def test_masked_and_used() -> None:
    """The way from a model to an optimizer."""
    torch.manual_seed(0)
    model = build_model("convnet", (3, 8, 8), 10)
    masks = sparsify(model, 0.5)
    feeding_norm = layers_feeding_norm(model, IMAGES)
    assert "classifier.weight" in masks.named()
    SparseOpt(model.parameters(), masks=Masks(model), correction="auto", feeding_norm=feeding_norm)


def _under_autocast(model: Any, x: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return model.n(model.a(x))


@pytest.mark.parametrize(
    ("run", "example", "reason"),
    [
        (lambda m, x: m.n(m.a(x)) if x.sum() > 0 else m.a(x), ROWS, "data-dependent"),
        (_under_autocast, ROWS, "a batch norm is under an autocast"),
        (lambda m, x: m.n(m.a(x)), torch.zeros(4, 7), "torch.export says"),
        (lambda m, x: m.n(m.a(x)), torch.zeros(1, 6), "Expected more than 1 value per channel"),
        (lambda m, x: m.missing(x), ROWS, "missing"),
    ],
    ids=["control-flow", "autocast", "wrong-input", "one-example", "error-in-forward"],
)
def test_what_cannot_be_traced(run: Callable[..., Any], example: Tensor, reason: str) -> None:
    message = words("Net cannot be traced with this example_input", reason)
    with pytest.raises(RuntimeError, match=message) as refusal:
        layers_feeding_norm(Net(run, a=FC(), n=bn()), example)
    assert "correction='layer'" in str(refusal.value)
    assert "correction='none'" in str(refusal.value)


def test_in_evaluation_mode() -> None:
    with pytest.raises(ValueError, match=words("evaluation mode", r"call model.train() first")):
        layers_feeding_norm(nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5)).eval(), ROWS)
