"""A server of S3 on this machine, by moto, with a hook before each request."""

import io
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest


@dataclass(frozen=True)
class Request:
    """What a client asks for; `body` has come whole."""

    method: str
    path: str
    """Bucket and key."""
    query: str
    body: bytes
    exclusive: bool
    """Whether it may only create, and not replace."""

    @property
    def writes(self) -> bool:
        """Whether it may change what is stored."""
        return self.method in ("PUT", "POST", "DELETE")


class S3Server:
    """Moto's objects over HTTP.

    `hook` sees each request before it takes effect, one at a time, and may answer with a status
    in its place, or a status and S3's code for an error. As on S3, an object whose body was cut off
    isn't there.
    """

    def __init__(self) -> None:
        from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
        from werkzeug.serving import WSGIRequestHandler, make_server

        class Quiet(WSGIRequestHandler):
            def log(self, type: str, message: str, *args: Any) -> None:
                pass

        self.hook: Callable[[Request], int | tuple[int, str] | None] | None = None
        self.requests: list[Request] = []
        self._lock = threading.Lock()
        self._moto = DomainDispatcherApplication(create_backend_app)
        self._http = make_server("127.0.0.1", 0, self._answer, threaded=True, request_handler=Quiet)
        self.address = f"http://127.0.0.1:{self._http.server_port}"
        self._thread = threading.Thread(target=self._http.serve_forever, daemon=True)
        self._thread.start()

    def _answer(self, environment: dict[str, Any], start: Callable[..., Any]) -> Any:
        length = int(environment.get("CONTENT_LENGTH") or 0)
        body = environment["wsgi.input"].read(length)
        if len(body) != length:
            start("400 Bad Request", [])
            return []
        environment["wsgi.input"] = io.BytesIO(body)
        request = Request(
            environment["REQUEST_METHOD"],
            environment["PATH_INFO"].lstrip("/"),
            environment.get("QUERY_STRING", ""),
            body,
            environment.get("HTTP_IF_NONE_MATCH") == "*",
        )
        with self._lock:
            self.requests.append(request)
            answer = self.hook(request) if self.hook is not None else None
            if answer is None:
                # One at a time: moto's look before an exclusive creation isn't atomic.
                return self._moto(environment, start)
        status, code = answer if isinstance(answer, tuple) else (answer, None)
        text = "" if code is None else f"<Error><Code>{code}</Code><Message>no</Message></Error>"
        start(f"{status} Fault", [("Content-Length", str(len(text)))])
        return [text.encode()]

    def client(self) -> Any:
        """A client of the S3 library of others."""
        import boto3

        return boto3.client("s3", endpoint_url=self.address)

    def close(self) -> None:
        """Ends the server."""
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()


@contextmanager
def s3_server() -> Iterator[S3Server]:
    """A server, which the environment names to every client, with the bucket `bucket`."""
    pytest.importorskip("s3fs", reason="needs the packages of moetrain[remote]")
    pytest.importorskip("moto.server", reason="needs moto and flask")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ACCESS_KEY_ID", "key")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        # Botocore tries by itself too, with pauses; what is tested is what we try.
        patch.setenv("AWS_MAX_ATTEMPTS", "1")
        server = S3Server()
        patch.setenv("AWS_ENDPOINT_URL", server.address)
        try:
            server.client().create_bucket(Bucket="bucket")
            yield server
        finally:
            server.close()
