"""Who is timed: contestants whose weights are right, warmed up by turns, as they are timed."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from sparseopt_kernels.lab.bench.checks import References, admitted
from sparseopt_kernels.lab.bench.contestants import WARMUP_STEPS, Contestant, sgd, sparseopt
from sparseopt_kernels.lab.bench.network import Network

Maker = Callable[[Network], Contestant]


def noted(name: str, make: Maker, steps: list[str], wrong: bool = False) -> Maker:
    """The contestant, which writes its name whenever it makes a step."""

    def made(network: Network) -> Contestant:
        contestant = make(network)
        contestant.name, step = name, contestant.step

        def noted_step() -> None:
            steps.append(name)
            step()
            if wrong:
                network.parameters[0].detach().add_(1.0)

        contestant.step = noted_step
        return contestant

    return made


def test_first_steps_are_made_by_turns_and_a_substitute_takes_the_place() -> None:
    network, steps = Network.of_shapes([(16, 8)], 0.5, dtype=torch.float32), list[str]()
    unmasked: Maker = partial(sgd, implementation="foreach")
    found = admitted(
        network,
        [
            [noted("ours", sparseopt, steps)],
            [noted("broken", unmasked, steps, wrong=True), noted("substitute", unmasked, steps)],
            [noted("last", unmasked, steps)],
        ],
        References(network),
    )
    assert [contestant.name for contestant in found.right] == ["ours", "substitute", "last"]
    assert found.wrong == ["broken"]
    assert steps == ["ours", "broken", "last"] * WARMUP_STEPS + ["substitute"] * WARMUP_STEPS


def test_a_rival_without_a_right_alternative_is_left_out() -> None:
    network, steps = Network.of_shapes([(16, 8)], 0.5, dtype=torch.float32), list[str]()
    wrong: Maker = noted("wrong", partial(sgd, implementation="foreach"), steps, wrong=True)
    found = admitted(network, [[sparseopt], [wrong, wrong]], References(network))
    assert [contestant.name for contestant in found.right] == ["sparseopt"]
    assert found.wrong == ["wrong", "wrong"]


def test_steps_that_were_made_before_count() -> None:
    """A CUDA graph makes some when it is captured."""
    network, steps = Network.of_shapes([(16, 8)], 0.5, dtype=torch.float32), list[str]()

    def half_warm(network: Network) -> Contestant:
        contestant = noted("warm", sparseopt, steps)(network)
        for _ in range(2):
            contestant.warm_up_step()
        return contestant

    found = admitted(network, [[half_warm]], References(network))
    assert [contestant.name for contestant in found.right] == ["warm"]
    assert steps == ["warm"] * WARMUP_STEPS
