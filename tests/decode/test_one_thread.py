"""Operations on the logits of one token: the results are PyTorch's, and no other thread wakes for them."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from streamchat.base import child_processes
from streamchat.decode import one_thread

SIZES = (1, 63, 64, 1000, 16_384, 49_152, 50_001)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def scores_of(size: int, seed: int = 0) -> Tensor:
    return 3 * torch.randn(size, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_the_results_are_those_of_pytorch(size: int, dtype: torch.dtype) -> None:
    logits = scores_of(size).to(dtype)
    assert one_thread.maximum(logits) == float(logits.max())
    assert one_thread.argmax(logits) == int(logits.float().argmax())
    for target in (torch.float32, torch.float64):
        copied = one_thread.copy(logits, target)
        assert copied.dtype == target
        assert torch.equal(copied, logits.to(target))
        assert copied.data_ptr() != logits.data_ptr()
    scores = logits.float()
    torch.testing.assert_close(one_thread.logsumexp(scores), scores.logsumexp(-1))
    expected = scores / 0.7
    one_thread.divide(scores, 0.7)
    assert torch.equal(scores, expected)


def test_a_copy_keeps_the_shape_and_is_contiguous() -> None:
    rows = scores_of(30_000).view(3, 10_000)
    for values in (rows, rows.t(), rows[:, ::2].bfloat16(), rows.half().t()):
        copied = one_thread.copy(values)
        assert copied.is_contiguous()
        assert torch.equal(copied, values.float())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_the_maximum_shows_numbers_that_are_not_finite(value: float) -> None:
    logits = scores_of(50_000)
    logits[40_000] = value
    assert one_thread.maximum(logits) == pytest.approx(value, nan_ok=True)


@pytest.mark.parametrize(
    "change", [Tensor.clone, Tensor.round, torch.zeros_like, Tensor.sort], ids=lambda f: f.__name__
)
@pytest.mark.parametrize("count", [1, 64, 512, 40_000])
@pytest.mark.parametrize("size", [1000, 49_152, 50_001])
def test_the_top_scores_are_those_of_topk(size: int, count: int, change: Callable[[Tensor], Tensor]) -> None:
    """Also their order: equal scores must give the same tokens as before."""
    found = change(scores_of(size))
    scores = found if isinstance(found, Tensor) else found.values
    count = min(count, size)
    values, ids = one_thread.top_scores(scores, count)
    expected = scores.topk(count)
    assert torch.equal(values, expected.values)
    assert torch.equal(ids, expected.indices)


def test_minus_infinity_is_a_score() -> None:
    scores = torch.full((49_152,), float("-inf"))
    scores[7] = 1.0
    assert one_thread.logsumexp(scores).item() == 1.0
    values, ids = one_thread.top_scores(scores, 2)
    assert (values[0].item(), ids[0].item()) == (1.0, 7)


SAMPLE = """
import os, time
from pathlib import Path

import torch

from streamchat.config.settings import Settings
from streamchat.conversation.generation import _require_finite
from streamchat.conversation.sampling import Sampler, new_generator
from streamchat.decode import one_thread


def wake_ups():
    time.sleep(0.1)  # what has been woken sleeps again
    others = [task for task in Path("/proc/self/task").iterdir() if task.name != str(os.getpid())]
    lines = [line for task in others for line in (task / "status").read_text().splitlines()]
    return sum(int(line.split()[1]) for line in lines if "ctxt_switches" in line)


logits = 4 * torch.randn(100_000, generator=torch.Generator().manual_seed(0))
before = wake_ups()
for _ in range(20):
    logits.max()
print("one operation of PyTorch:", wake_ups() > before)
for changed in {"temperature": 0.0}, {}, {"top_p": 1.0}, {"top_k": 40, "min_p": 0.01}:
    for given in logits, logits.bfloat16():
        sample = Sampler(Settings(**changed), torch.device("cpu"), new_generator(0, torch.device("cpu")))
        before = wake_ups()
        for _ in range(20):
            sample(_require_finite(one_thread.copy(given)), range(64))
            sample(_require_finite(given), range(64))
        print(changed, given.dtype, wake_ups() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_no_other_thread_wakes_when_a_token_is_sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")  # each use of a thread is a wake-up
    first, *counts = child_processes.run(child_processes.python("-c", SAMPLE), timeout=120).stdout.splitlines()
    assert first.endswith("True")
    assert len(counts) == 8
    assert all(line.endswith(" 0") for line in counts), counts


@pytest.mark.parametrize("value", [float("inf"), float("-inf")])
def test_infinite_scores_give_what_pytorch_gives_and_no_warning(value: float) -> None:
    scores = torch.full((100,), value)
    assert one_thread.logsumexp(scores).item() == scores.logsumexp(-1).item() == value
    scores = torch.tensor([3e38, -3e38, 1.0])
    assert one_thread.logsumexp(scores).item() == scores.logsumexp(-1).item()
    one_thread.divide(scores, 1e-40)
    assert scores.tolist() == [float("inf"), float("-inf"), float("inf")]


def test_logits_with_gradients_are_read() -> None:
    logits = scores_of(100).requires_grad_(True)
    assert one_thread.argmax(logits) == int(logits.argmax())
    assert one_thread.maximum(logits) == logits.max().item()
    assert torch.equal(one_thread.copy(logits), logits.detach())


@pytest.mark.parametrize("info", [None, "ATen parallel backend: native thread pool"], ids=["OpenMP", "others"])
def test_a_block_on_the_calling_thread_only(info: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The number of threads is the earlier one afterwards, also after an error."""
    if info is not None:
        monkeypatch.setattr(torch.__config__, "parallel_info", lambda: info)
    elif "backend: OpenMP" not in torch.__config__.parallel_info():
        pytest.skip("this PyTorch has another backend")
    one_thread._has_openmp.cache_clear()
    before, seen = torch.get_num_threads(), list[int]()

    def fail() -> None:
        with one_thread.calling_thread_only():
            seen.append(torch.get_num_threads())
            raise KeyError

    torch.set_num_threads(2)
    try:
        with pytest.raises(KeyError):
            fail()
        assert seen == [1 if info is None else 2]
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
        one_thread._has_openmp.cache_clear()
