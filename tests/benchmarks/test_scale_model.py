"""What the model of the scale computes is what processes send and hold."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import scale_model
from old_pytorch import needs_fsdp2
from scale_model import Network, computed_memory, computed_traffic, measured_on

pytestmark = needs_fsdp2


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/net/dev").exists(), reason="no /proc")
def test_what_is_computed_is_what_is_counted() -> None:
    network, ranks = Network(5, 128), 4
    own = measured_on(ranks, network, "sparse")
    traffic, memory = computed_traffic(network, ranks, "fsdp"), computed_memory(network, ranks, "fsdp")
    assert own.counted.by_torch == traffic.by_torch
    assert own.counted.by_step == traffic.by_step
    # Small numbers are not computed: flags, hashes, and what the update has done.
    assert 0 <= own.counted.by_update - traffic.by_update < 200 * network.layers + 300
    assert (own.state, own.masks, own.explored) == memory[:3]


def test_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    found = subprocess.run(
        [sys.executable, scale_model.__file__], capture_output=True, text=True, check=True
    ).stdout
    lines = found.splitlines()
    assert lines[0].startswith("computed, not measured")
    assert len([line for line in lines if line.split()[-1:] and " M " in line]) == 3 * (1 + 2 * 3)
