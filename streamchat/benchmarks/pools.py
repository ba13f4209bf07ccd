"""Workers for the cells of a sweep: local processes, or a Ray cluster."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from typing import Any

from streamchat.base import child_processes, ray_cluster
from streamchat.base.errors import StreamchatError
from streamchat.base.paths import user_path
from streamchat.base.processors import usable_processors
from streamchat.benchmarks.cell import Cell, run_cell
from streamchat.benchmarks.texts import Document

Work = Sequence[tuple[Cell, Document]]
Result = tuple[Cell, dict[str, Any]]


def default_workers() -> int:
    """Return half of the processors that this process may use; each worker loads a copy of the model."""
    return max(1, usable_processors() // 2)


def run_in_processes(work: Work, workers: int) -> Iterator[Result]:
    """Run the cells in `workers` new processes and yield each result when it is ready. Their threads share the cores.

    Raises:
        StreamchatError: A process died, most often for lack of memory.
    """
    workers = min(workers, len(work))
    threads = max(1, usable_processors() // max(workers, 1))
    # spawned, because torch's threads do not survive a fork
    with child_processes.safe_environment():
        context = multiprocessing.get_context("spawn")
        pool = ProcessPoolExecutor(workers, context, initializer=child_processes.end_with_parent)
    try:
        yield from _results(pool, work, workers, threads)
    except BrokenProcessPool:
        raise StreamchatError(
            "a worker process died, most often for lack of memory; finished cells are saved: run the command again "
            "with fewer --workers"
        ) from None
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        for process in list((getattr(pool, "_processes", None) or {}).values()):
            process.terminate()


def _results(pool: ProcessPoolExecutor, work: Work, workers: int, threads: int) -> Iterator[Result]:
    waiting = iter(work)
    running: dict[Future[dict[str, Any]], Cell] = {}
    while True:
        # submit few at a time, because texts are sent along, and so that an interruption leaves little behind
        while len(running) < workers + 1 and (following := next(waiting, None)) is not None:
            cell, document = following
            with child_processes.safe_environment():  # a worker may be started here
                running[pool.submit(run_cell, cell, document, threads)] = cell
        if not running:
            return
        for done in wait(running, return_when=FIRST_COMPLETED).done:
            yield running.pop(done), done.result()


def run_on_ray(work: Work, address: str) -> Iterator[Result]:
    """Run the cells as tasks of a Ray cluster, one CPU each.

    Each machine finds or fetches the models itself and must have streamchat installed.

    Args:
        work: Cells and their texts.
        address: See `ray_cluster.connected`.

    Raises:
        ClusterLostError: The cluster no longer answers.
        ConfigError: Ray is not installed, or the cluster cannot be reached.
    """
    with ray_cluster.connected(address) as cluster:
        import ray

        task = ray.remote(run_cell)
        texts = {document.name: ray.put(document) for _, document in work}
        running = {task.remote(_with_absolute_path(cell), texts[document.name], 1): cell for cell, document in work}
        while running:
            done, _ = ray.wait(list(running), num_returns=1, timeout=ray_cluster.CHECK_S)
            if not done:
                cluster.check()
            for reference in done:
                cell = running.pop(reference)
                try:
                    yield cell, ray.get(reference)
                except ray.exceptions.RayError as error:
                    yield cell, {"error": f"a Ray worker failed ({' '.join(str(error).split())[:200]})"}


def _with_absolute_path(cell: Cell) -> Cell:
    """Return `cell` with a relative model path made absolute."""
    path = user_path(cell.model.name)
    return replace(cell, model=replace(cell.model, name=str(path.absolute()))) if os.path.exists(path) else cell
