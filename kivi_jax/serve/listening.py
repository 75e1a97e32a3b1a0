"""A socket, and the server that answers on it until a signal ends it."""

import contextlib
import socket

import uvicorn
from starlette.applications import Starlette


def listen(host: str, port: int) -> socket.socket:
    """A socket that is bound already: a port that is taken shows before a model is loaded.

    Raises:
        ValueError: it cannot be had.
    """
    with contextlib.ExitStack() as failing:
        try:
            family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
            bound = failing.enter_context(socket.socket(family, kind, protocol))
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            bound.bind(address)
        except OSError as error:
            raise ValueError(
                f"{host}:{port} cannot be listened on ({error.strerror}): choose another --host or --port"
            ) from error
        failing.pop_all()
    return bound


def run(app: Starlette, listening: socket.socket, *, drain: int) -> None:
    """Serve until SIGTERM or Ctrl-C, then finish within `drain` seconds what has begun."""
    uvicorn.Server(configure(app, drain=drain)).run(sockets=[listening])


def configure(app: Starlette, *, drain: int) -> uvicorn.Config:
    """How the application is served."""
    return uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        lifespan="off",
        server_header=False,
        timeout_graceful_shutdown=drain,
    )
