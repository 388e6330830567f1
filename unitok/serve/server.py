"""uvicorn, and how it stops: what was accepted is finished, what comes then is refused, a second signal ends it."""

import logging
import signal
import time
from types import FrameType

import uvicorn
from fastapi import FastAPI

from unitok.serve.service import Service

FLUSH_SECONDS = 5  # for answers that are made, but not yet read
_LOGGER = logging.getLogger("uvicorn.error")


class Server(uvicorn.Server):
    """A uvicorn server that goes on listening while it finishes, so that late requests hear 503."""

    def __init__(self, app: FastAPI, host: str, port: int, log_level: str = "info") -> None:
        service: Service = app.state.service
        super().__init__(
            uvicorn.Config(
                app,
                host=host,
                port=port,
                log_level=log_level,
                server_header=False,
                timeout_graceful_shutdown=FLUSH_SECONDS,
            )
        )
        self.service, self._stop_by = service, 0.0
        self.lost_model = False

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal begins the end; a second one is the end."""
        if self.service.scheduler.draining:
            self.should_exit = True
            self.service.model.kill()
            self.force_exit = sig == signal.SIGINT
            return
        self.drain()

    def drain(self) -> None:
        """Refuse what is new, finish what was accepted, then stop."""
        _LOGGER.info("Finishing %s (at most %g s)", "what runs", self.service.settings.grace_seconds)
        self._stop_by = time.monotonic() + self.service.settings.grace_seconds
        self.service.scheduler.draining = True

    async def on_tick(self, counter: int) -> bool:
        """uvicorn asks ten times a second whether to stop."""
        scheduler = self.service.scheduler
        if not (self.service.model.alive or scheduler.draining):
            if not self.lost_model:
                _LOGGER.critical("The model's process has ended: nothing can be answered any more")
            self.lost_model = self.should_exit = True
            scheduler.give_up()
        if scheduler.draining and (scheduler.idle or time.monotonic() > self._stop_by):
            scheduler.give_up()
            self.should_exit = True
        return await super().on_tick(counter)
