"""Messages with their lengths in front, and who may send any."""

import socket
import struct
import threading

import pytest

from parity.cluster import wire
from parity.cluster.wire import RefusedError, Wire, WireError, greet, welcome


@pytest.fixture
def ends():
    a, b = socket.socketpair()
    pair = Wire(a), Wire(b)
    for each in pair:
        each.socket.settimeout(5.0)
    yield pair
    for each in pair:
        each.close()


def meet(ends, theirs, ours):
    """What both sides of a greeting end with."""
    out = {}

    def head():
        try:
            hello = welcome(ends[0], ours)
            ends[0].send("welcome", proof=hello["answer"])
            out["head"] = hello
        except (RefusedError, WireError) as error:
            out["head"] = error

    thread = threading.Thread(target=head)
    thread.start()
    try:
        out["agent"] = greet(ends[1], theirs, {"rank": 1})
    except (RefusedError, WireError) as error:
        out["agent"] = error
    thread.join()
    return out["head"], out["agent"]


def test_objects_and_bytes_arrive_as_they_were_sent(ends):
    blob = bytes(range(256)) * 9
    ends[0].send("result", blob, rank=3)
    ends[0].send("bye")
    assert ends[1].receive() == ({"type": "result", "rank": 3}, blob)
    assert ends[1].receive() == ({"type": "bye"}, b"")


def test_ranks_that_know_the_token_meet_and_it_is_never_sent(ends, monkeypatch):
    sent = []
    original = Wire.send
    monkeypatch.setattr(Wire, "send", lambda self, *a, **k: sent.append((a, k)) or original(self, *a, **k))
    head, agent = meet(ends, "the token", "the token")
    assert head["rank"] == 1
    assert agent["type"] == "welcome"
    assert "the token" not in str(sent)


def test_an_agent_with_another_token_is_refused_and_told_why(ends):
    head, agent = meet(ends, "a token", "another")
    assert isinstance(head, RefusedError)
    assert "the tokens differ" in str(head)
    assert "the tokens differ; PARITY_TOKEN must be the same" in str(agent)


def test_a_program_that_only_plays_rank_zero_is_not_believed(ends):
    def play():
        ends[0].send("challenge", protocol=wire.PROTOCOL, nonce="00")
        ends[0].receive()
        ends[0].send("welcome", proof="11")

    threading.Thread(target=play).start()
    with pytest.raises(RefusedError, match="does not know the token"):
        greet(ends[1], "the token", {})


def test_another_protocol_is_refused(ends):
    ends[0].send("challenge", protocol=7, nonce="00")
    with pytest.raises(RefusedError, match="it speaks protocol 7, this parity 1"):
        greet(ends[1], "the token", {})


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (struct.pack(">IQ", 1 << 30, 0), "larger than is allowed"),
        (struct.pack(">IQ", 2, 1 << 40) + b"{}", "larger than is allowed"),
        (b"GET / HTTP/1.1\r\nHost: rank0\r\n\r\n", "larger than is allowed"),
        (struct.pack(">IQ", 3, 0) + b"xyz", "no message"),
        (struct.pack(">IQ", 2, 0) + b"[]", "no message"),
        (struct.pack(">IQ", 2, 0) + b"{}", "no message"),
        (b"\x00", "closed"),
    ],
)
def test_what_is_no_message_is_an_error_and_no_memory_is_taken_for_it(ends, data, message):
    ends[0].socket.sendall(data)
    ends[0].socket.shutdown(socket.SHUT_WR)
    with pytest.raises(WireError, match=message):
        ends[1].receive()


def test_an_end_that_falls_silent_is_gone(ends):
    ends[1].socket.settimeout(0.1)
    with pytest.raises(WireError, match="nothing was heard"):
        ends[1].receive()


def test_a_closed_end_is_an_error_to_the_one_that_sends(ends):
    ends[1].close()
    with pytest.raises(WireError):
        ends[0].send("result", bytes(1 << 24))


def test_sources_count_among_the_versions():
    assert {"python", "numpy", "jax", "torch", "the sources of moe-parity"} <= set(wire.versions())
