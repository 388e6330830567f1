"""Whose turn it is: the kind of which most wait, and nobody for ever after the others."""

import asyncio
import threading
from dataclasses import dataclass

from unitok.serve.jobs import Job
from unitok.serve.metrics import Metrics
from unitok.serve.scheduler import Scheduler
from unitok.serve.settings import ServeSettings


@dataclass(eq=False)
class Named(Job):
    kind: str
    number: int = 0
    size: int = 1

    @property
    def key(self):
        return self.kind

    @property
    def weight(self):
        return self.size

    def __str__(self) -> str:
        return f"{self.kind}{self.number}"


class Idle:
    """A model that is never asked."""

    workers, alive = 1, True


def turns(waiting, then=lambda _taken: [], max_batch=4, most=20):
    """The batches in which `waiting` (kind, number, weight) is taken; after each batch those of `then` arrive."""

    async def take():
        scheduler = Scheduler(Idle(), ServeSettings(max_batch=max_batch), Metrics())
        scheduler.waiting.extend(Named(*one) for one in waiting)
        taken = []
        while len(taken) < most and (batch := scheduler._take()):
            taken.append([str(job) for job in batch])
            scheduler.waiting.extend(Named(*one) for one in then(taken))
        assert most <= len(taken) or not scheduler.waiting
        return taken

    return asyncio.run(take())


def test_the_fuller_batch_goes_first_and_of_equal_ones_the_older():
    assert turns([("picture", 0), ("chat", 0), ("chat", 1)]) == [["chat0", "chat1"], ["picture0"]]
    assert turns([("picture", 0), ("chat", 0)]) == [["picture0"], ["chat0"]]
    # more than a batch is no fuller than a batch
    assert turns([("picture", n) for n in range(4)] + [("chat", n) for n in range(6)]) == [
        ["picture0", "picture1", "picture2", "picture3"], ["chat0", "chat1", "chat2", "chat3"], ["chat4", "chat5"],
    ]  # fmt: skip


def test_weights_count_and_no_job_is_too_large_to_go():
    assert turns([("chat", 0), ("chat", 1), ("picture", 0, 3)]) == [["picture0"], ["chat0", "chat1"]]
    assert turns([("chat", 0, 9), ("chat", 1)]) == [["chat0"], ["chat1"]]
    # a smaller one that still fits may go before a larger one, which is then the oldest
    assert turns([("chat", 0, 3), ("chat", 1, 2), ("chat", 2)]) == [["chat0", "chat2"], ["chat1"]]


def test_a_job_lets_four_batches_go_before_it():
    def two_more(taken):
        return [("chat", 2 * len(taken)), ("chat", 2 * len(taken) + 1)]

    taken = turns([("picture", 0), ("chat", 0), ("chat", 1)], two_more)
    assert taken[4] == ["picture0"] and all(name.startswith("chat") for batch in taken[:4] for name in batch)
    assert taken[5] == ["chat8", "chat9", "chat10", "chat11"]  # nothing is lost, and order is kept


class Meeting:
    """A model of which two copies must work at the same time."""

    workers, alive = 2, True

    def __init__(self):
        self.barrier = threading.Barrier(2, timeout=10)

    def run(self, jobs):
        self.barrier.wait()
        for job in jobs:
            job.emit("done", str(job))


def test_each_copy_of_the_model_has_a_batch_of_its_own():
    async def ask():
        scheduler = Scheduler(Meeting(), ServeSettings(max_wait_ms=0), Metrics())
        scheduler.start()

        async def job(number):
            return Named("chat" if number % 2 else "picture", number)

        async def result(number):
            async for kind, value in scheduler.events(await scheduler.prepare(lambda: job(number))):
                return kind, value

        found = await asyncio.gather(*(result(number) for number in range(2)))
        while not scheduler.idle:
            await asyncio.sleep(0.01)
        await scheduler.stop()
        return found

    assert asyncio.run(ask()) == [("done", "picture0"), ("done", "chat1")]
