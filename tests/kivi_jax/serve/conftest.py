"""One engine for all tests of the room: what it compiles is what they cost."""

import contextlib
import threading
import time

import pytest
import uvicorn
from starlette.testclient import TestClient

from kivi_jax.generation.engine import Engine
from kivi_jax.serve.app import create_app
from kivi_jax.serve.listening import configure, listen
from kivi_jax.serve.service import Service
from tests.models import config, random_llama
from tests.tokenizers import VOCAB, build

CACHE = "kivi2:group_size=8:residual_length=8"
CONTEXT = 128


@pytest.fixture(scope="package")
def engine():
    model = random_llama(config(vocab_size=VOCAB, num_layers=1, max_position_embeddings=512))
    with Engine(
        model, build("bytes", "chatml"), cache=CACHE, slots=4, context=CONTEXT, queue=16, chunk_tokens=32
    ) as engine:
        yield engine


@pytest.fixture
def service(engine):
    return Service(engine, name="tiny", fingerprint="fp_0", timeout=60.0)


@pytest.fixture
def http(service):
    """The application in this process; what it raises instead of answering is raised here."""
    with TestClient(create_app(service, most_bytes=4096), base_url="http://testserver/v1") as client:
        yield client


@pytest.fixture(scope="session")
def openai():
    """OpenAI's package: it takes three seconds to import, of workers that need it."""
    import openai

    return openai


@pytest.fixture
def client(openai, http):
    return openai.OpenAI(api_key="none", base_url="http://testserver/v1", http_client=http, max_retries=0)


@pytest.fixture
def serving():
    """Serve an application on a port of this machine, in a thread: its server, and where it listens."""
    with contextlib.ExitStack() as stack:

        def start(app):
            listening = stack.enter_context(listen("127.0.0.1", 0))
            server = uvicorn.Server(configure(app, drain=10))
            thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
            thread.start()

            def stop():
                server.should_exit = True
                thread.join()

            stack.callback(stop)
            while thread.is_alive() and not server.started:  # before that, connections are refused
                time.sleep(0.01)
            return server, f"http://127.0.0.1:{listening.getsockname()[1]}"

        yield start
