"""Worker processes that take jobs and give results over a pipe each, and end in bounded time whatever happens.

``concurrent.futures`` gives all its workers one pipe for results, and keeps that pipe's other end open in the process
that reads it. A worker that is killed while it writes then leaves a reader that waits for ever for the rest, and the
interpreter waits for the reader when it ends. Here a pipe has one process at each end: when either of the two is gone,
however it went, the other one reads the end of the stream.
"""

import multiprocessing
import os
import queue
import signal
import threading
import traceback
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from typing import Any

from megatron_dynmoe.data.errors import DataError
from megatron_dynmoe.data.signals import signals_held_back

# A worker that was told to end does so at once, unless a library holds it in a call; then it is killed.
GRACE_SECONDS = 2.0
_KILLED_SECONDS = 5.0


class _Worker:
    """A process and this end of its pipe. outstanding: jobs that it was given and has not answered."""

    def __init__(self, context: Any, start: Callable[[Any], Callable], argument: Any) -> None:
        self.pipe, theirs = context.Pipe()
        self.outstanding = 0
        self.process = context.Process(target=_work, args=(theirs, start, argument), daemon=True)
        try:
            self.process.start()
        except BaseException:
            self.pipe.close()
            raise
        finally:
            theirs.close()  # the worker's alone from here on, so that the pipe ends when the worker does

    def give(self, number: int, job: Any) -> None:
        try:
            self.pipe.send((number, job))
        except OSError:
            raise self.dead() from None
        self.outstanding += 1

    def take(self) -> tuple[int, Any]:
        try:
            number, result = self.pipe.recv()
        except (EOFError, OSError):
            raise self.dead() from None
        self.outstanding -= 1
        if isinstance(result, BaseException):
            raise result
        return number, result

    def dead(self) -> DataError:
        self.process.join(_KILLED_SECONDS)
        how = f"exit code {self.process.exitcode}; killed, or out of memory"
        return DataError(f"a preprocessing worker died ({how}); use fewer workers.")


def map_in_order(
    start: Callable[[Any], Callable], argument: Any, jobs: Iterable, *, workers: int, in_flight: int
) -> Generator:
    """``start(argument)(job)`` of every job, by ``workers`` spawned processes, in the order of the jobs.

    At most ``in_flight`` jobs are given out and not yet collected. Close the generator to stop early: the workers are
    gone when ``close`` returns, within a few seconds whatever they do.

    Raises DataError when a worker dies, and what a job raised.
    """
    context = multiprocessing.get_context("spawn")  # this process may hold torch's threads, which a fork would break
    team: list[_Worker] = []
    results: dict[int, Any] = {}
    given = collected = 0
    try:
        with _signals_wait():
            team.extend(_Worker(context, start, argument) for _ in range(workers))
        for job in jobs:
            min(team, key=lambda worker: worker.outstanding).give(given, job)
            given += 1
            while given - collected >= in_flight:
                yield _next_result(team, results, collected)
                collected += 1
        while collected < given:
            yield _next_result(team, results, collected)
            collected += 1
    finally:
        _end(team)


@contextmanager
def _signals_wait() -> Iterator[None]:
    """No interruption falls between a process and its place in the team, and none reaches a process that is starting.

    Ctrl-C goes to the whole process group. The workers inherit the mask and never see it: their parent ends them.
    """
    resource_tracker.ensure_running()  # which each start of a process does, and unblocks the signals after it
    with signals_held_back():
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            yield
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _next_result(team: list[_Worker], results: dict[int, Any], number: int) -> Any:
    pipes = {worker.pipe: worker for worker in team if worker.outstanding}
    while number not in results:
        for pipe in wait(list(pipes)):
            answered, result = pipes[pipe].take()
            results[answered] = result
    return results.pop(number)


def _end(team: list[_Worker]) -> None:
    for worker in team:
        worker.pipe.close()
    for worker in team:
        worker.process.join(GRACE_SECONDS)
        if worker.process.is_alive():
            worker.process.kill()
            worker.process.join(_KILLED_SECONDS)


def _work(pipe: Connection, start: Callable[[Any], Callable], argument: Any) -> None:
    """One thread takes jobs, one gives results, and this one computes, so that none waits for another."""
    jobs: queue.SimpleQueue = queue.SimpleQueue()
    results: queue.SimpleQueue = queue.SimpleQueue()
    threading.Thread(target=_receive, args=(pipe, jobs), daemon=True).start()
    threading.Thread(target=_send, args=(pipe, results), daemon=True).start()
    run = None
    while True:
        number, job = jobs.get()
        try:
            run = run or start(argument)
            results.put((number, run(job)))
        except Exception as error:
            error.add_note("".join(traceback.format_exception(error)))
            results.put((number, error))


def _receive(pipe: Connection, jobs: queue.SimpleQueue) -> None:
    try:
        while True:
            jobs.put(pipe.recv())
    except (EOFError, OSError):
        os._exit(0)  # the parent is done with this worker, or was killed: nothing is left to do or to say


def _send(pipe: Connection, results: queue.SimpleQueue) -> None:
    try:
        while True:
            pipe.send(results.get())
    except OSError:
        os._exit(0)
