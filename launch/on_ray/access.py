"""Access to Ray clusters: what is required of a cluster, and how one is started here.

Whoever may talk to a Ray cluster can run any code on it (CVE-2023-48022). So a cluster that other
machines can reach must require a token. That is tested by asking without one, because a client that
sends a token can't see whether it is checked. A cluster that is started here listens on loopback
only, and requires its own token, because the machine may have other users.
"""

import ipaddress
import os
import secrets
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc

from launch.on_ray.private import (
    AuthenticationTokenLoader,
    Config,
    canonicalize_bootstrap_address,
    find_bootstrap_address,
    get_ray_address_from_environment,
    on_loopback,
)
from moetrain.checks import ConfigError

ANSWER_TIMEOUT_SECONDS = 10.0
CLIENT = "ray://"
# Harmless requests: an empty message is a complete one.
_GCS_QUESTION = "/ray.rpc.NodeInfoGcsService/CheckAlive"
_CLIENT_QUESTION = "/ray.rpc.RayletDriver/ClusterInfo"

START_WITH_TOKEN = (
    "`ray get-auth-token --generate` once, ~/.ray/auth_token copied to every node and to this "
    "machine (or RAY_AUTH_TOKEN set there), and RAY_AUTH_MODE=token before every `ray start`"
)


def running_cluster() -> str | None:
    """Returns the address of the cluster that `ray start` made this machine a node of, if any.

    Ray's own `auto` also finds the private Ray of any other program on the machine, and a cluster
    that ended without `ray stop`.
    """
    address: str | None = find_bootstrap_address(None)
    if not address:
        return None
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), ANSWER_TIMEOUT_SECONDS).close()
    except (OSError, ValueError):
        return None
    return address


def require_access(address: str, *, allow_unauthenticated: bool) -> str:
    """Returns a cluster's real address, once the cluster is known to be usable.

    Takes what Ray takes: host:port, ray://host:port, or `auto` for RAY_ADDRESS or a cluster on this
    machine. Raises ConfigError if the cluster requires no token and other machines can reach it, or
    rejects this machine's token; OSError if none answers.
    """
    given = address
    if address == "auto":
        address = get_ray_address_from_environment("auto", None)
        if address == "auto":
            raise ConnectionError("no Ray cluster runs on this machine, and RAY_ADDRESS is not set")
    address = real_address(address, named=_named(given, address))
    question = _CLIENT_QUESTION if address.startswith(CLIENT) else _GCS_QUESTION
    target = address.removeprefix(CLIENT)
    if _accepts(target, question, token=None):
        # A loopback ray:// is a tunnel, or the port of a cluster that also listens elsewhere.
        alone = is_loopback(target) and not address.startswith(CLIENT)
        if not alone and not allow_unauthenticated:
            raise ConfigError(
                "launch.address",
                _named(given, address),
                "this Ray cluster accepts commands from anybody who reaches that port and runs any "
                f"code for them (CVE-2023-48022): start it with a token ({START_WITH_TOKEN}), or "
                "insist with launch.allow_unauthenticated=true",
            )
        return address
    tokens = AuthenticationTokenLoader.instance()
    tokens.reset_cache()
    if not tokens.has_token(ignore_auth_mode=True):
        raise ConfigError(
            "launch.address",
            _named(given, address),
            "this Ray cluster requires a token, and none is set here: set RAY_AUTH_TOKEN or "
            "RAY_AUTH_TOKEN_PATH, or copy the cluster's ~/.ray/auth_token here",
        )
    if not _accepts(target, question, token=tokens.get_raw_token(ignore_auth_mode=True)):
        raise ConfigError(
            "launch.address",
            _named(given, address),
            "this Ray cluster rejects the token that is set here (RAY_AUTH_TOKEN, else "
            "the file of RAY_AUTH_TOKEN_PATH, else ~/.ray/auth_token): use the cluster's own",
        )
    send_tokens()
    return address


@contextmanager
def only_this_user() -> Iterator[None]:
    """Within the context, a Ray that is started here listens on loopback and requires its own
    token.

    The token is in a file that only this user can read, not in the environment, which every rank
    copies. Ray's own file, ~/.ray/auth_token, can be read by other users.
    """
    names = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")
    before = {name: os.environ.pop(name, None) for name in names}
    with (
        on_loopback(),
        tempfile.TemporaryDirectory(prefix="moetrain-", ignore_cleanup_errors=True) as folder,
    ):
        path = Path(folder, "auth_token")
        path.touch(mode=0o600)
        path.write_text(secrets.token_hex(32))
        os.environ["RAY_AUTH_TOKEN_PATH"] = str(path)
        send_tokens()
        try:
            yield
        finally:
            os.environ.pop("RAY_AUTH_MODE", None)
            os.environ.pop("RAY_AUTH_TOKEN_PATH", None)
            os.environ |= {name: value for name, value in before.items() if value is not None}
            _read_again()


def _accepts(target: str, question: str, *, token: str | None) -> bool:
    """Returns whether a cluster answers, with or without a token; raises OSError if nothing
    answers."""
    metadata = [("authorization", f"Bearer {token}")] if token else []
    with grpc.insecure_channel(target, options=[("grpc.enable_http_proxy", 0)]) as channel:
        ask = channel.unary_unary(question)
        try:
            ask(b"", timeout=ANSWER_TIMEOUT_SECONDS, metadata=metadata)
        except grpc.RpcError as error:
            if error.code() == grpc.StatusCode.UNAUTHENTICATED:
                return False
            if error.code() == grpc.StatusCode.NOT_FOUND:  # the empty request was authorised
                return True
            raise ConnectionError(
                f"{target} doesn't answer as Ray does ({error.code().name}: {error.details()})"
            ) from None
    return True


def is_loopback(target: str) -> bool:
    """Returns whether host:port is reachable from this machine only."""
    host = target.rpartition(":")[0].strip("[]")
    try:
        found = {str(info[4][0]) for info in socket.getaddrinfo(host, None)}
    except OSError:
        return False
    return bool(found) and all(ipaddress.ip_address(a.split("%")[0]).is_loopback for a in found)


def real_address(address: str, *, named: str) -> str:
    """Returns the address on which a given cluster really listens.

    Raises ConfigError for what can't be a cluster's address, OSError if nothing listens.
    """
    host, _, port = address.removeprefix(CLIENT).rpartition(":")
    if not host or "/" in host or not port.isdecimal():
        job_server = address.startswith(("http://", "https://"))
        raise ConfigError(
            "launch.address",
            named,
            "the address of a Ray cluster (launch.address, else RAY_ADDRESS) is host:port, such as "
            "10.0.0.1:6379, or ray://host:10001"
            + ("; to a job server jobs go by `python -m launch.submit`" if job_server else ""),
        )
    if not address.startswith(CLIENT):
        # Ray treats a loopback address as this machine's network address; so must we.
        address = canonicalize_bootstrap_address(address) or address
        host, _, port = address.rpartition(":")
    # Otherwise gRPC keeps retrying unresolvable names and ports that drop packets.
    socket.create_connection((host.strip("[]"), int(port)), ANSWER_TIMEOUT_SECONDS).close()
    return address


def _named(given: str, address: str) -> str:
    return given if given == address else f"{given} ({address})"


def send_tokens() -> None:
    """Makes Ray in this process, and in its children, send the token with every call."""
    os.environ["RAY_AUTH_MODE"] = "token"
    _read_again()


def _read_again() -> None:
    Config.initialize("")  # Ray read the mode when it was imported
    AuthenticationTokenLoader.instance().reset_cache()
