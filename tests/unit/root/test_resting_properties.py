"""Over random devices upon each other: one passes if and only if every way down goes through an opened mapping."""

from __future__ import annotations

import tempfile
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st
from tests.unit.root.sysfs import Kernel

from kagimori_agent import resting

Graph = list[tuple[str, list[int], bool]]
"""Devices in the order in which they come up: kind, the earlier ones that each lies upon, whether the agent opened it."""


@st.composite
def graphs(draw: st.DrawFn) -> Graph:
    """Draw devices; what lies upon others names only earlier ones, as no device is made of later ones."""
    graph: Graph = []
    for index in range(draw(st.integers(1, 9))):
        kind = draw(st.sampled_from(["disk", "partition", "upon"] if index else ["disk"]))
        below: list[int] = []
        if kind != "disk":
            most = 1 if kind == "partition" else 3
            below = draw(
                st.lists(st.integers(0, index - 1), min_size=kind == "partition", max_size=most, unique=True)
            )
        graph.append((kind, below, kind == "upon" and draw(st.booleans())))
    return graph


def ways(graph: Graph, at: int) -> list[list[int]]:
    """List every way from a device down to one that lies upon nothing."""
    below = graph[at][1]
    return [[at, *way] for one in below for way in ways(graph, one)] if below else [[at]]


@given(graphs())
def test_a_device_passes_if_and_only_if_every_way_down_meets_an_opened_mapping(graph: Graph) -> None:
    """The expectation lists all ways; the walk may not."""
    with tempfile.TemporaryDirectory() as directory:
        kernel = Kernel(Path(directory))
        for index, (kind, below, _) in enumerate(graph):
            name = f"d{index}"
            if kind == "disk":
                kernel.disk(name)
            elif kind == "partition":
                # In the tree of sysfs, below the disk that it is of.
                parent = (kernel.root / f"sys/class/block/d{below[0]}").resolve()
                kernel.partition(name, str(parent.relative_to((kernel.root / "sys/devices").resolve())))
            else:
                kernel.upon(name, [f"d{one}" for one in below], name)
        opened = {kernel.number(f"d{index}") for index, one in enumerate(graph) if one[2]}
        for index in range(len(graph)):
            good = all(any(graph[one][2] for one in way) for way in ways(graph, index))
            flaws = resting.flaws(kernel.number(f"d{index}"), opened, kernel.root)
            assert (not flaws) == good, flaws
            assert not good or set(flaws) == set()
