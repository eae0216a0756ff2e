"""Warnings that a cloud takes a node away, from servers that answer as theirs do."""

import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

import launch.on_ray.node_agent
from launch.on_ray.node_agent import NodeAgent, aws_warning, gcp_warning


class Metadata(BaseHTTPRequestHandler):
    """EC2's instance metadata (version 2, which wants a token) and Compute Engine's."""

    taken = False

    def do_PUT(self) -> None:
        asked = self.headers.get("X-aws-ec2-metadata-token-ttl-seconds")
        self._answer(200 if asked and self.path == "/latest/api/token" else 400, "t0ken")

    def do_GET(self) -> None:
        taken = type(self).taken
        if self.path == "/latest/meta-data/spot/instance-action":
            if self.headers.get("X-aws-ec2-metadata-token") != "t0ken":
                return self._answer(401, "")
            return self._answer(200 if taken else 404, '{"action": "terminate"}' if taken else "")
        known = self.path == "/computeMetadata/v1/instance/preempted"
        ours = self.headers.get("Metadata-Flavor") == "Google"
        return self._answer(200 if known and ours else 403, str(taken).upper())

    def _answer(self, code: int, text: str) -> None:
        self.send_response(code)
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Metadata]]:
    class Handler(Metadata):
        pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    at = f"127.0.0.1:{server.server_port}"
    monkeypatch.setenv("AWS_EC2_METADATA_SERVICE_ENDPOINT", f"http://{at}/")
    monkeypatch.setenv("GCE_METADATA_HOST", at)
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    yield Handler
    server.shutdown()
    server.server_close()


def test_a_spot_instance_is_warned(server: type[Metadata]) -> None:
    assert aws_warning() is None
    assert gcp_warning() is None
    server.taken = True
    assert "terminate" in str(aws_warning())
    assert "Compute Engine" in str(gcp_warning())


def test_an_agent_passes_the_warning_on(
    server: type[Metadata], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch.on_ray.node_agent, "WARNING_LOOK_SECONDS", 0.05)
    agent = NodeAgent("aws")
    time.sleep(0.3)
    assert agent.ping() is None
    server.taken = True
    deadline = time.monotonic() + 10
    while agent.ping() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    assert "EC2" in str(agent.ping())


def test_where_there_is_no_metadata_service_there_is_no_warning(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(launch.on_ray.node_agent, "WARNING_LOOK_SECONDS", 0.01)
    monkeypatch.setenv("GCE_METADATA_HOST", "127.0.0.1:9")
    agent = NodeAgent("gcp")
    time.sleep(0.2)
    assert agent.ping() is None
