"""`unitok serve`: one model over HTTP."""

import argparse
import logging
import os
from functools import partial
from pathlib import Path

from unitok.core.errors import UserError
from unitok.core.heap import frozen_heap
from unitok.core.signals import interrupt_ends

KEY_VARIABLE = "UNITOK_API_KEY"
_LOGGER = logging.getLogger(__name__)


def add_serve_arguments(serve: argparse.ArgumentParser) -> None:
    """Where to listen, who may ask, and how much."""
    serve.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s, this machine)")
    serve.add_argument("--port", type=int, default=8000, help="default: %(default)s")
    serve.add_argument("--name", metavar="NAME", help="the model's name in the API (default: its folder's name)")
    serve.add_argument(
        "--api-key-file", metavar="FILE", help=f"clients must send the key in FILE (default: that of ${KEY_VARIABLE})"
    )
    serve.add_argument("--max-batch", type=int, default=16, help="requests in the model at once (default: %(default)s)")
    serve.add_argument("--max-queue", type=int, default=64, help="requests that may wait (default: %(default)s)")
    serve.add_argument(
        "--max-wait-ms", type=float, default=10.0, help="how long a request waits for company (default: %(default)s)"
    )
    serve.add_argument(
        "--workers",
        type=int,
        default=1,
        metavar="N",
        help="copies of the model, over all GPUs (default: %(default)s)",
    )
    serve.add_argument(
        "--threads", type=int, metavar="N", help="CPU threads of a worker (default: their share of all cores but one)"
    )
    serve.add_argument(
        "--timeout", type=float, default=120.0, metavar="S", help="seconds for one request (default: %(default)s)"
    )
    serve.add_argument(
        "--grace", type=float, default=30.0, metavar="S", help="seconds to finish when stopped (default: %(default)s)"
    )
    serve.add_argument(
        "--max-new-tokens", type=int, default=1024, help="longest answer that may be asked for (default: %(default)s)"
    )
    serve.set_defaults(run=("serve", "serve"))


def serve(arguments: argparse.Namespace) -> int:
    """Answer requests until a signal ends it."""
    with interrupt_ends():
        import torch

        from unitok.commands.use import load_pipeline
        from unitok.mllm.pipeline import check_export
        from unitok.serve.app import create_app
        from unitok.serve.process import RemoteModels
        from unitok.serve.server import Server
        from unitok.serve.settings import LOOPBACK, ServeSettings

    if arguments.workers < 1:
        raise UserError(f"--workers {arguments.workers}: expected at least 1")
    if not 0 <= arguments.port <= 65535:
        raise UserError(f"--port {arguments.port}: expected 0 (any that is free) to 65535")
    settings = ServeSettings(
        name=arguments.name or Path(arguments.model).resolve().name,
        api_key=read_key(arguments.api_key_file),
        allowed_hosts=LOOPBACK if arguments.host in LOOPBACK else None,
        max_batch=arguments.max_batch,
        max_queue=arguments.max_queue,
        max_wait_ms=arguments.max_wait_ms,
        threads=arguments.threads,
        request_seconds=arguments.timeout,
        grace_seconds=arguments.grace,
        max_new_tokens=arguments.max_new_tokens,
    )
    check_address(arguments.host, arguments.port)
    check_export(Path(arguments.model))
    if arguments.host not in LOOPBACK and settings.api_key is None:
        _LOGGER.warning("--host %s without an API key: everybody who reaches this machine can ask", arguments.host)
    # of the cores, of which the requests need one, its share for each copy of the model
    threads = settings.threads or max(1, (torch.get_num_threads() - 1) // arguments.workers)
    torch.set_num_threads(1)  # here nothing is computed but the sizes of pictures
    load = partial(load_pipeline, arguments.model, arguments.precision, arguments.weights)
    model = RemoteModels(load, settings.max_batch, threads, arguments.workers)
    try:
        server = Server(create_app(model, settings), arguments.host, arguments.port)
        with frozen_heap():  # a collection would hold up every answer
            server.run()
    finally:
        model.close()
    return int(server.lost_model)


def read_key(file: str | None) -> str | None:
    """The key of a file or of the environment. It is no argument: other users of the machine see those."""
    if file is None:
        return os.environ.get(KEY_VARIABLE, "").strip() or None
    try:
        return Path(file).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--api-key-file {file}: cannot be read ({error}); give a text file with the key") from error


def check_address(host: str, port: int) -> None:
    """UserError for an address that cannot be listened on, before the model is loaded."""
    import socket

    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"--host {host} --port {port}: cannot listen there ({reason}); give another") from error
