"""The name of this machine, as a person would give it."""

from __future__ import annotations

import os
import platform
import re
from pathlib import Path

# By "vendor_id", "cpu family" and "model", from Linux (arch/x86/include/asm/intel-family.h) and AMD's
# revision guides. The name alone is not enough: on virtual machines it is seldom more than "AMD EPYC".
_MICROARCHITECTURES = {
    ("AuthenticAMD", 23, 49): "Zen 2",
    ("AuthenticAMD", 25, 1): "Zen 3",
    ("AuthenticAMD", 25, 17): "Zen 4",
    ("AuthenticAMD", 26, 2): "Zen 5",
    ("GenuineIntel", 6, 85): "Skylake or Cascade Lake",
    ("GenuineIntel", 6, 106): "Ice Lake",
    ("GenuineIntel", 6, 143): "Sapphire Rapids",
    ("GenuineIntel", 6, 207): "Emerald Rapids",
    ("GenuineIntel", 6, 173): "Granite Rapids",
}
# The first processors that had these instructions, the newest first, for virtual machines that hide family
# and model. Later processors have the instructions, too.
_FIRST_WITH = (
    ({"amx_fp16"}, "Granite Rapids"),
    ({"amx_tile", "avx512_fp16"}, "Sapphire Rapids"),
)
_DECORATION = re.compile(r"\((?:r|tm)\)|\bprocessor\b|\bcpu\b|@.*$", re.IGNORECASE)


def machine() -> str:
    """Return the processor's name, its microarchitecture and the number of cores, as in ``AMD EPYC (Zen 5), 2
    cores``. The microarchitecture is left out on systems other than Linux."""
    try:
        return machine_of(Path("/proc/cpuinfo").read_text())
    except (OSError, ValueError):
        return f"{platform.processor() or platform.machine()}, {_counted(os.cpu_count() or 1)}"


def machine_of(cpuinfo: str) -> str:
    """Return :func:`machine` for the text of a ``/proc/cpuinfo``. An unknown microarchitecture is given by
    its family and model numbers, on ARM by its implementer and part numbers.

    Raises:
        ValueError: the text names no processor.
    """
    lines = [line.partition(":") for line in cpuinfo.splitlines()]
    fields = [(key.strip(), value.strip()) for key, _, value in lines]
    core = dict(fields)  # the last core's; all cores are assumed to be alike
    cores = sum(key == "processor" and value.isdigit() for key, value in fields)
    if {"vendor_id", "cpu family", "model", "model name"} <= core.keys():
        name, microarchitecture = _plain(core["model name"]), _x86(core)
    elif "CPU part" in core:
        name = "ARM"
        microarchitecture = f"implementer {core.get('CPU implementer', '?')} part {core['CPU part']}"
    else:
        raise ValueError("no processor is named")
    return f"{name} ({microarchitecture}), {_counted(cores)}"


def _plain(name: str) -> str:
    """Shorten a name: ``Intel(R) Xeon(R) Processor @ 2.60GHz`` to ``Intel Xeon``."""
    return " ".join(_DECORATION.sub(" ", name).split())


def _x86(core: dict[str, str]) -> str:
    family, model = int(core["cpu family"]), int(core["model"])
    known = _MICROARCHITECTURES.get((core["vendor_id"], family, model))
    if known is None and core["vendor_id"] == "GenuineIntel":
        flags = set(core.get("flags", "").split())
        known = next((f"{first} or later" for needed, first in _FIRST_WITH if needed <= flags), None)
    return known or f"family {family} model {model}"


def _counted(cores: int) -> str:
    return "1 core" if cores == 1 else f"{cores} cores"
