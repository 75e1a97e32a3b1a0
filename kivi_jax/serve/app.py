"""The application: which path answers what, who may ask, what mistakes look like."""

import asyncio
import secrets
from collections.abc import Awaitable, Callable, Sequence
from importlib.resources import files

from prometheus_client.exposition import choose_encoder
from pydantic import BaseModel
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from kivi_jax.serve.answers import dump
from kivi_jax.serve.errors import Refused, as_error
from kivi_jax.serve.rows import cancel
from kivi_jax.serve.schema import ChatRequest, TextRequest, read
from kivi_jax.serve.schema import Request as Asked
from kivi_jax.serve.service import Pending, Service

PAGE_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'"
Endpoint = Callable[[Request], Awaitable[Response]]


class Events(StreamingResponse):
    """Server-sent events of a request, whose rows are cancelled when the client leaves."""

    media_type = "text/event-stream"

    def __init__(self, service: Service, pending: Pending):
        """Begin once the response is sent."""
        self.pending = pending
        chunks = (f"data: {data}\n\n" async for data in service.chunks(pending))
        super().__init__(chunks, headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See `StreamingResponse`."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            cancel(self.pending.handles)


def create_app(
    service: Service, *, key: str | None = None, origins: Sequence[str] = (), most_bytes: int = 2**20
) -> Starlette:
    """The application around a service.

    Args:
        service: what answers.
        key: what clients must know, if anything; `/` and `/health` are open to all.
        origins: the origins of pages that browsers let ask, besides our own.
        most_bytes: of a request's body.
    """

    def guarded(endpoint: Endpoint) -> Endpoint:
        async def answer(request: Request) -> Response:
            if key is not None and not _knows(request, key):
                raise Refused(
                    "the API key is missing or wrong: send it as Authorization: Bearer KEY",
                    status=401,
                    code="invalid_api_key",
                )
            return await endpoint(request)

        return answer

    def posted(kind: type[Asked]) -> Endpoint:
        async def answer(request: Request) -> Response:
            asked = read(kind, await _body(request, most_bytes))
            pending = await service.start(asked)
            if asked.stream:
                return Events(service, pending)
            found = await _while_connected(request, service.whole(pending))
            return Response(dump(found), media_type="application/json")

        return answer

    async def page(request: Request) -> Response:
        text = files("kivi_jax.serve").joinpath("page.html").read_text("utf-8")
        return HTMLResponse(text, headers={"Content-Security-Policy": PAGE_POLICY})

    async def models(request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [service.model.model_dump()]})

    async def model(request: Request) -> Response:
        if (name := request.path_params["name"]) != service.name:
            raise Refused(
                f"there is no model {name!r:.60}, but {service.name!r}", status=404, code="model_not_found"
            )
        return JSONResponse(service.model.model_dump())

    async def health(request: Request) -> Response:
        healthy = service.engine.stats().healthy
        return JSONResponse({"status": "ok" if healthy else "broken"}, status_code=200 if healthy else 503)

    async def metrics(request: Request) -> Response:
        encode, kind = choose_encoder(request.headers.get("accept", ""))
        return Response(encode(service.metrics.registry), media_type=kind)

    async def refuse(request: Request, error: Exception) -> Response:
        assert isinstance(error, Refused)
        service.metrics.refusals.labels(error.status).inc()
        more = {"Retry-After": "1"} if error.status in (429, 503) else None
        return JSONResponse(as_error(error), status_code=error.status, headers=more)

    async def other(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        found = Refused(f"{request.method} {request.url.path:.60}: {error.detail}", status=error.status_code)
        return JSONResponse(as_error(found), status_code=error.status_code, headers=error.headers)

    async def broken(request: Request, error: Exception) -> Response:
        found = Refused(f"the server failed: {type(error).__name__}", status=500)
        return JSONResponse(as_error(found), status_code=500)

    async def left(request: Request, error: Exception) -> Response:
        return Response(status_code=499)  # nobody reads it

    cors = Middleware(
        CORSMiddleware,
        allow_origins=list(origins),
        allow_methods=["GET", "POST"],
        allow_headers=["Authorization", "Content-Type"],
    )
    return Starlette(
        routes=[
            Route("/", page),
            Route("/health", health),
            Route("/metrics", guarded(metrics)),
            Route("/v1/models", guarded(models)),
            Route("/v1/models/{name:path}", guarded(model)),
            Route("/v1/chat/completions", guarded(posted(ChatRequest)), methods=["POST"]),
            Route("/v1/completions", guarded(posted(TextRequest)), methods=["POST"]),
        ],
        middleware=[cors] if origins else [],
        exception_handlers={
            Refused: refuse,
            HTTPException: other,
            ClientDisconnect: left,
            Exception: broken,
        },
    )


def _knows(request: Request, key: str) -> bool:
    scheme, _, sent = request.headers.get("authorization", "").partition(" ")
    return scheme.lower() == "bearer" and secrets.compare_digest(sent.strip().encode(), key.encode())


async def _body(request: Request, most: int) -> bytes:
    """The body of a request, of which no more is read than may be.

    Raises:
        Refused: it is none of JSON, by what it says of itself, or it is too large.
    """
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise Refused("send JSON, with Content-Type: application/json", status=415)
    found = bytearray()
    async for part in request.stream():
        found += part
        if len(found) > most:
            raise Refused(f"the body has more than {most:,} bytes (--max-body)", status=413, code="too_large")
    return bytes(found)


async def _while_connected(request: Request, work: Awaitable[BaseModel]) -> BaseModel:
    """What `work` gives; it is cancelled when the client leaves.

    Raises:
        ClientDisconnect: it left.
    """
    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(_left(request))
    try:
        await asyncio.wait([working, leaving], return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        working.cancel()
        leaving.cancel()


async def _left(request: Request) -> None:
    """Ends when the client has left."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
