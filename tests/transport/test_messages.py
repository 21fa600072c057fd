"""Frames: what is sent is what is read, and nothing else is ever read."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynamo_connectors.transport import messages as m

CODEC = m.Codec(b"secret")
REQUESTS = [
    m.Hello(1, b"n", 65536),
    m.Ask(b"r", 2, b"e", b"l" * 16, (b"k" * 32, b"j"), 1.5),
    m.Check(b"r", 2, b"e", b"l" * 16, (0, 5), (1, 9)),
    m.Done(b"r", 2, b"l" * 16),
    m.Renew(b"l" * 16),
    m.End(b"reader", b"l" * 16, 2),
]
REPLIES = [
    m.Welcome(1, b"n", b"e", b"meta", 4096, 10, 65536),
    m.Welcome(1, b"n", b"e", b"meta", 4096, 10, 65536, m.WindowPlace(64, 2, 0), m.WordsPlace(8, 16, (1 << 63) - 1)),
    m.Refuse(1, "other_model", "why"),
    m.Grant(b"r", 2, b"e", "granted", (0, -1), (1, 0), 1 << 62),
    m.Verdict(b"r", 2, b"e", False, "lease_ended"),
]


def reason(frame: bytes) -> str:
    with pytest.raises(m.MessageError) as refused:
        CODEC.request(frame)
    return refused.value.reason


@pytest.mark.parametrize("message", REQUESTS)
def test_requests_come_back(message: m.Request) -> None:
    assert CODEC.request(CODEC.encode(message)) == message


@pytest.mark.parametrize("message", REPLIES)
def test_replies_come_back(message: m.Reply) -> None:
    assert CODEC.reply(CODEC.encode(message)) == message


def test_the_largest_question_fits() -> None:
    asked = m.Ask(b"r", 2, b"e", b"l" * 16, (b"k" * 96,) * m.MOST_BLOCKS, 1.5)
    assert CODEC.request(CODEC.encode(asked)) == asked


def test_each_refusal_has_its_reason() -> None:
    frame = CODEC.encode(REQUESTS[0])
    assert reason(b"") == "not_ours"
    assert reason(b"GET / HTTP/1.1\r\n" * 10) == "not_ours"
    assert reason(frame[:4] + b"\x09" + frame[5:]) == "version"
    assert reason(m.Codec(b"other").encode(REQUESTS[0])) == "wrong_secret"
    assert reason(frame + b"x" * m.MOST_FRAME_BYTES) == "too_large"
    assert reason(CODEC.encode(REPLIES[0])) == "garbled", "a reply is no request"
    assert reason(CODEC.encode(m.Renew(b"short"))) == "garbled"
    assert reason(CODEC.encode(m.Ask(b"r", 2, b"e", b"l" * 16, (b"k",) * (m.MOST_BLOCKS + 1), 1.0))) == "garbled"
    assert reason(CODEC.encode(m.Ask(b"r", 2, b"e", b"l" * 16, (), float("nan")))) == "garbled"


@given(st.binary(max_size=300))
def test_noise_is_refused(noise: bytes) -> None:
    assert reason(noise)
    assert reason(m.MAGIC + bytes([m.VERSION]) + noise)


@given(st.integers(0, 4), st.data())
def test_a_frame_with_any_byte_changed_or_missing_is_refused(which: int, data: st.DataObject) -> None:
    frame = CODEC.encode(REQUESTS[which])
    at = data.draw(st.integers(0, len(frame) - 1))
    assert reason(frame[:at] + bytes([frame[at] ^ data.draw(st.integers(1, 255))]) + frame[at + 1 :])
    assert reason(frame[:at])


@given(st.recursive(st.none() | st.integers(-(2**63), 2**63) | st.binary(max_size=20) | st.text(max_size=20),
                    lambda inner: st.lists(inner, max_size=8)))  # fmt: skip
def test_a_signed_frame_of_anything_else_is_refused(content: object) -> None:
    """Even who has the secret cannot make the reader trip."""
    import hmac

    import msgspec

    body = bytes([m.VERSION]) + msgspec.msgpack.encode(content)
    frame = m.MAGIC + body[:1] + hmac.digest(b"secret", body, "sha256") + body[1:]
    assert reason(frame) == "garbled"
