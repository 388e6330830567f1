"""The application: what is answered under which path."""

import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, Response

from unitok import __version__
from unitok.serve.chat import add_chat
from unitok.serve.errors import add_error_handlers
from unitok.serve.guard import Guard, path_of
from unitok.serve.metrics import Metrics
from unitok.serve.model import ServedModel
from unitok.serve.pictures import add_pictures
from unitok.serve.process import RemoteModels
from unitok.serve.scheduler import Scheduler
from unitok.serve.schemas import Health, ModelInfo, ModelList
from unitok.serve.service import ERRORS, Service
from unitok.serve.settings import ServeSettings

if TYPE_CHECKING:
    from unitok.mllm.pipeline import UniTokPipeline

WEB = Path(__file__).parent / "web"
_PAGES = {"/": ("index.html", "text/html"), "/style.css": ("style.css", "text/css")} | {
    f"/{name}": (name, "text/javascript") for name in ("app.js", "chat.js", "pictures.js", "tokens.js")
}


def create_app(
    pipeline: "UniTokPipeline | ServedModel | RemoteModels", settings: ServeSettings | None = None
) -> FastAPI:
    """The service of one model, in this process or another. `app.state.service` has its parts."""
    settings = settings or ServeSettings()
    metrics = Metrics()
    is_ready = isinstance(pipeline, ServedModel | RemoteModels)
    model = pipeline if is_ready else ServedModel(pipeline, settings.max_batch)
    scheduler = Scheduler(model, settings, metrics)
    service = Service(model, scheduler, metrics, settings, created=int(time.time()))

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        scheduler.start()
        yield
        service.close()
        await scheduler.stop()

    # The pages of /docs load scripts from elsewhere: the description alone is served.
    app = FastAPI(title="unitok", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None)
    app.state.service = service
    add_error_handlers(app)
    add_chat(app, service)
    add_pictures(app, service)
    _add_facts(app, service)
    _add_pages(app)
    _describe(app, settings.name)
    paths = frozenset(path for route in app.routes if (path := path_of(route)))
    app.add_middleware(Guard, settings=settings, scheduler=scheduler, metrics=metrics, paths=paths)
    return app


def _describe(app: FastAPI, name: str) -> None:
    """In the description `model` can only be the one that is served, and limits are what they are: FastAPI's own are
    floats, of which 2^63 is written as 9.223372036854776e+18, which is more."""
    # the app keeps it, and serves it
    description = app.openapi_schema = _with_whole_limits(app.openapi())
    for schema in ("ChatRequest", "ImageRequest"):
        model = description["components"]["schemas"][schema]["properties"]["model"]
        text = next(one for one in model.get("anyOf", [model]) if one["type"] == "string")
        text["enum"] = [name]
    for parameter in description["paths"]["/v1/models/{model}"]["get"]["parameters"]:
        parameter["schema"]["enum"] = [name]


def _with_whole_limits(part: Any) -> Any:
    """Whole numbers that became floats, as far as those hold them, are whole numbers again."""
    if isinstance(part, dict):
        return {name: _with_whole_limits(inner) for name, inner in part.items()}
    if isinstance(part, list):
        return [_with_whole_limits(inner) for inner in part]
    return int(part) if isinstance(part, float) and part.is_integer() else part


def _add_facts(app: FastAPI, service: Service) -> None:
    """Models, health, figures."""
    info = ModelInfo(id=service.settings.name, created=service.created, unitok=service.facts)

    @app.get("/v1/models", responses=ERRORS)
    async def models() -> ModelList:
        """The one model that is served."""
        return ModelList(data=[info])

    @app.get("/v1/models/{model:path}", responses=ERRORS)
    async def model(model: str) -> ModelInfo:
        """Its description."""
        service.check_model(model)
        return info

    @app.get("/health", responses={503: {"model": Health}})
    async def health(response: Response) -> Health:
        """200 while requests are taken, 503 when the server is stopping."""
        scheduler = service.scheduler
        stopping = scheduler.draining or not service.model.alive
        response.status_code = 503 if stopping else 200
        return Health(
            status="stopping" if stopping else "ok",
            model=service.settings.name,
            waiting=scheduler.queued,
            running=len(scheduler.running),
        )

    @app.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
    async def metrics() -> Response:
        """Figures for Prometheus."""
        service.metrics.waiting.set(service.scheduler.queued)
        service.metrics.running.set(len(service.scheduler.running))
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4")


def _add_pages(app: FastAPI) -> None:
    """The web page's files, read once."""
    for path, (name, kind) in _PAGES.items():
        app.add_api_route(path, _page((WEB / name).read_text(encoding="utf-8"), kind), include_in_schema=False)


def _page(text: str, kind: str) -> Callable[[], Awaitable[Response]]:
    async def page() -> Response:
        return Response(text, media_type=kind, headers={"Cache-Control": "no-cache"})

    return page
