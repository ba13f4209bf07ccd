"""The number of threads adapts to how busy the machine is. Simulated: the times are given."""

from __future__ import annotations

import random
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from streamchat.kernels import build

Machine = Sequence[tuple[float, float]]
"""(ms per run, share of it spent waiting) for all threads, a half of them, ... one."""
QUIET: Machine = [(10, 0.05), (18, 0.0)]
BUSY: Machine = [(100, 0.7), (40, 0.0)]
Simulate = Callable[..., list[int]]


@pytest.fixture(scope="module")
def simulate(tmp_path_factory: pytest.TempPathFactory) -> Simulate:
    """Returns the number of threads of each run; after `same` runs of one program, two others alternate."""
    try:
        compiler = build.find_compiler()
    except build.KernelsUnavailableError as error:
        pytest.skip(str(error))
    program = tmp_path_factory.mktemp("pace") / "simulation"
    source = Path(__file__).parent / "pace_simulation.c"
    subprocess.run([*compiler, f"-I{build.SOURCES}", str(source), "-o", str(program)], check=True)
    noise = random.Random(1)

    def run(machines: Sequence[Machine], same: int = 1 << 30) -> list[int]:
        lines = [
            " ".join(f"{ms * 1e6 * noise.uniform(0.8, 1.3)} {share}" for ms, share in machine) for machine in machines
        ]
        threads = 1 << (len(machines[0]) - 1)
        done = subprocess.run(
            [str(program), str(threads), str(same)], input="\n".join(lines), text=True, capture_output=True, check=True
        )
        return [int(line) for line in done.stdout.split()]

    return run


def test_a_quiet_machine_keeps_all_threads(simulate: Simulate) -> None:
    assert simulate([QUIET] * 2000) == [2] * 2000


def test_a_busy_machine_is_noticed_within_some_runs_and_rarely_tried_again(simulate: Simulate) -> None:
    found = simulate([BUSY] * 2000)
    assert set(found[40:60]) == {1}
    assert found[60:].count(2) <= 2000 * 0.03
    assert 2 in found[60:]  # the load may have ended


def test_all_threads_come_back_when_the_load_ends(simulate: Simulate) -> None:
    found = simulate([BUSY] * 600 + [QUIET] * 1000)
    assert found[-600:] == [2] * 600


def test_waiting_alone_does_not_cost_threads(simulate: Simulate) -> None:
    uneven: Machine = [(10, 0.4), (18, 0.0)]
    found = simulate([uneven] * 2000)
    assert found.count(1) <= 2000 * 0.05


def test_a_trial_that_another_program_interrupts_decides_nothing(simulate: Simulate) -> None:
    uneven: Machine = [(10, 0.4), (18, 0.0)]
    for same in range(4, 16):
        assert simulate([uneven] * 60, same)[same + 1 :] == [2] * (59 - same), same


def test_it_goes_down_as_far_as_it_helps(simulate: Simulate) -> None:
    many: Machine = [(90, 0.8), (50, 0.6), (30, 0.4), (45, 0.1)]  # of 8, 4, 2, 1
    found = simulate([many] * 3000)
    assert max(set(found[200:]), key=found[200:].count) == 2
