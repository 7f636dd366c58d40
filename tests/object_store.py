"""An S3 server in a thread of the test process. Tests can make its requests fail."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import boto3
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import WSGIRequestHandler, make_server

BUCKET = "bucket"


class Quiet(WSGIRequestHandler):
    def log(self, type: str, message: str, *args: Any) -> None:
        pass


class ObjectStore:
    """An S3 server.

    `fails(method, path)` returns whether a request fails before the server carries it out, and `fails_after` whether it
    fails afterwards."""

    def __init__(self) -> None:
        self.served = DomainDispatcherApplication(create_backend_app)
        self.fails: Callable[[str, str], bool] = lambda method, path: False
        self.fails_after: Callable[[str, str], bool] = lambda method, path: False
        self.requests: list[tuple[str, str]] = []
        self.server = make_server("127.0.0.1", 0, self._answer, threaded=True, request_handler=Quiet)
        self.thread = threading.Thread(target=self.server.serve_forever)
        self.environment = {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.server.server_port}",
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": "us-east-1",
        }

    def _answer(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Any:
        method, path = environ["REQUEST_METHOD"], environ["PATH_INFO"]
        self.requests.append((method, path))
        if self.fails(method, path):
            start_response("503 Slow Down", [("Content-Length", "0")])
            return [b""]
        if self.fails_after(method, path):
            b"".join(self.served(environ, lambda *_: None))
            start_response("503 Slow Down", [("Content-Length", "0")])
            return [b""]
        return self.served(environ, start_response)

    def client(self) -> Any:
        """Return an S3 client that reads and writes the store independently of the code under test."""
        return boto3.client("s3")

    def names(self, prefix: str = "") -> list[str]:
        found = self.client().list_objects_v2(Bucket=BUCKET, Prefix=prefix).get("Contents", [])
        return [item["Key"].removeprefix(prefix) for item in found]

    def content(self, name: str) -> bytes:
        return bytes(self.client().get_object(Bucket=BUCKET, Key=name)["Body"].read())


@contextmanager
def object_store() -> Iterator[ObjectStore]:
    """Start a server with an empty bucket, and set the environment variables that make this process use it."""
    store = ObjectStore()
    store.thread.start()
    with patch.dict(os.environ, store.environment):
        store.client().create_bucket(Bucket=BUCKET)
        try:
            yield store
        finally:
            store.server.shutdown()
            store.thread.join()
            store.server.server_close()
