"""Messages between rank 0 and the agents: a JSON object and, for files, bytes, each with its length in front.

    4 bytes   length of the object, big-endian
    8 bytes   length of the bytes, big-endian
    object, bytes

A connection begins with both sides proving that they know the launch's token, without sending it:

    rank 0   {"type": "challenge", "protocol": 1, "nonce": A}
    agent    {"type": "hello", "nonce": B, "proof": HMAC(token, "agent" A B), ...}
    rank 0   {"type": "welcome", "proof": HMAC(token, "rank 0" B A), ...}   or   {"type": "refused", "reason": ...}

Nothing is pickled: results and lessons are NumPy's npz and raw bytes. The connection is not encrypted.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import hmac
import json
import platform
import secrets
import socket
import struct
import threading
import time
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PROTOCOL = 1
HEAD = struct.Struct(">IQ")
GREETING_BYTES = 1 << 16
"""What a stranger may send."""
OBJECT_BYTES = 1 << 24
BLOB_BYTES = 1 << 34
PIECE_BYTES = 1 << 24
BEAT_SECONDS = 2.0
SILENT_SECONDS = 60.0
"""Without a word for this long, the other end is gone: a host that lost power sends none."""
PACKAGES = ("moe-parity", "numpy", "jax", "jaxlib", "torch")


class WireError(Exception):
    """The connection ended or carried nonsense; the message says which."""


class RefusedError(Exception):
    """The other end does not want this one; the message says why."""


class Wire:
    """One connection. Any thread may send; one reads."""

    def __init__(self, sock: socket.socket) -> None:
        self.socket = sock
        self._lock = threading.Lock()
        with contextlib.suppress(OSError):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def send(self, kind: str, blob: bytes | memoryview = b"", **values: object) -> None:
        """Send one message.

        Raises:
          WireError: the connection is gone.
        """
        data = json.dumps({"type": kind, **values}).encode()
        if len(data) > OBJECT_BYTES or len(blob) > BLOB_BYTES:
            raise WireError(f"a message of type {kind!r} is too large: {len(data)} and {len(blob)} bytes")
        with self._lock:
            try:
                self.socket.sendall(HEAD.pack(len(data), len(blob)) + data)
                for start in range(0, len(blob), PIECE_BYTES):  # the time limit is for a piece
                    self.socket.sendall(memoryview(blob)[start : start + PIECE_BYTES])
            except OSError as error:
                raise WireError(_words(error)) from error

    def receive(self, object_bytes: int = OBJECT_BYTES, blob_bytes: int = BLOB_BYTES) -> tuple[dict, bytes]:
        """Wait for one message.

        Raises:
          WireError: the connection ended, fell silent, or carried no message.
        """
        size, blob_size = HEAD.unpack(self._exactly(HEAD.size))
        if size > object_bytes or blob_size > blob_bytes:
            raise WireError(f"a message of {size} and {blob_size} bytes is larger than is allowed")
        try:
            message = json.loads(self._exactly(size))
        except ValueError as error:
            raise WireError(f"what came is no message: {error}") from error
        if not isinstance(message, dict) or not isinstance(message.get("type"), str):
            raise WireError("what came is no message")
        return message, self._exactly(blob_size)

    def _exactly(self, size: int) -> bytes:
        data = bytearray(size)
        view, done = memoryview(data), 0
        while done < size:
            try:
                count = self.socket.recv_into(view[done:])
            except OSError as error:
                raise WireError(_words(error)) from error
            if not count:
                raise WireError("the connection was closed")
            done += count
        return bytes(data)

    def keep_alive(self) -> None:
        """Say now and then that this end lives, and take the other for gone if it says nothing."""
        self.socket.settimeout(SILENT_SECONDS)

        def beat() -> None:
            with contextlib.suppress(WireError):
                while True:
                    self.send("beat")
                    time.sleep(BEAT_SECONDS)

        threading.Thread(target=beat, name="beat", daemon=True).start()

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)
        self.socket.close()


def _words(error: OSError) -> str:
    if isinstance(error, TimeoutError):
        return f"nothing was heard for {SILENT_SECONDS:g} s"
    return error.strerror or str(error)


def _proof(token: str, side: str, first: str, second: str) -> str:
    return hmac.new(token.encode(), f"{side} {first} {second}".encode(), hashlib.sha256).hexdigest()


def welcome(wire: Wire, token: str) -> dict:
    """Rank 0's side, as far as what the agent says of itself.

    Returns:
      What it says of itself, and under "answer" the proof to welcome it with.

    Raises:
      RefusedError: it does not know the token, or speaks another protocol; it has been told so.
      WireError: it does not speak this protocol at all.
    """
    nonce = secrets.token_hex(16)
    wire.send("challenge", protocol=PROTOCOL, nonce=nonce)
    hello, _ = wire.receive(GREETING_BYTES, 0)
    theirs = str(hello.get("nonce"))
    if hello["type"] != "hello" or not hmac.compare_digest(
        str(hello.get("proof")).encode(), _proof(token, "agent", nonce, theirs).encode()
    ):
        refuse(wire, "the tokens differ; PARITY_TOKEN must be the same on all ranks of a launch")
    if not isinstance(hello.get("about"), dict):
        raise WireError("what came is no message")
    return {**hello["about"], "answer": _proof(token, "rank 0", theirs, nonce)}


def refuse(wire: Wire, reason: str) -> None:
    """Tell the agent why it is not wanted, and raise that.

    Raises:
      RefusedError: always.
    """
    with contextlib.suppress(WireError):
        wire.send("refused", reason=reason)
    raise RefusedError(reason)


def greet(wire: Wire, token: str, values: Mapping[str, object]) -> dict:
    """The agent's side.

    Args:
      wire: a connection to rank 0.
      token: of the launch.
      values: what the agent says of itself.

    Returns:
      Rank 0's welcome.

    Raises:
      RefusedError: rank 0 does not want this agent, or is not rank 0 of this launch.
      WireError: the connection ended.
    """
    challenge, _ = wire.receive(GREETING_BYTES, 0)
    if challenge["type"] != "challenge" or challenge.get("protocol") != PROTOCOL:
        raise RefusedError(
            f"it speaks protocol {challenge.get('protocol')!r}, this parity {PROTOCOL}; all hosts need one version"
        )
    nonce, theirs = secrets.token_hex(16), str(challenge.get("nonce"))
    wire.send("hello", nonce=nonce, proof=_proof(token, "agent", theirs, nonce), about=values)
    answer, _ = wire.receive(GREETING_BYTES, 0)
    if answer["type"] == "refused":
        raise RefusedError(str(answer.get("reason")))
    proof = _proof(token, "rank 0", nonce, theirs)
    if answer["type"] != "welcome" or not hmac.compare_digest(str(answer.get("proof")).encode(), proof.encode()):
        raise RefusedError("it does not know the token of this launch (PARITY_TOKEN)")
    return answer


def versions() -> dict[str, str]:
    """What has to be the same on all hosts, by package; no framework is imported."""
    out = {"python": ".".join(platform.python_version_tuple()[:2]), "the sources of moe-parity": _sources()}
    for name in PACKAGES:
        try:
            out[name] = version(name)
        except PackageNotFoundError:
            out[name] = "not installed"
    return out


@functools.cache
def _sources() -> str:
    """A digest of every Python file of the three packages: clones of one version may differ."""
    root, found = Path(__file__).resolve().parents[2], hashlib.sha256()
    for package in ("jax_moe", "parity", "torch_moe"):
        for path in sorted((root / package).rglob("*.py")):
            found.update(str(path.relative_to(root)).encode() + path.read_bytes())
    return found.hexdigest()[:12]
