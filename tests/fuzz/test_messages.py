"""Every decoder, given anything: a message that can be encoded again, or the one error that its readers expect."""

from __future__ import annotations

import contextlib
from typing import get_args

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fuzz.effort import fuzz
from fuzz.inputs import hostile, tagged_maps
from kvmesh.bench.stand_in import make_key, stand_in_format
from kvmesh.core.gate import Verdict
from kvmesh.core.reasons import MissReason
from kvmesh.wire import control, directory, explain, follow, link, operations, peer
from kvmesh.wire.causes import make_cause
from kvmesh.wire.framing import FrameBuffer, FrameError, pack_frame
from unit.controller.makers import make_keys, make_member

WHO = ("a", "0" * 16)
FORMAT = stand_in_format(4096)
HELLO = peer.Hello.of(*WHO, FORMAT)
DIRECTORY = [
    directory.encode(message)
    for message in (
        directory.Register(make_member("a")),
        directory.Heartbeat(*WHO, 3, directory.NodeStatistics(misses={"evicted": 4}), 1, 2),
        directory.SnapshotRequest(*WHO),
        directory.Leave(*WHO),
        directory.Query(*WHO, 7, make_keys(3)),
        directory.Holders(7, [WHO], [[0], [], [0]]),
        directory.FetchReport(
            instance_id="a",
            incarnation="0" * 16,
            request_id="r",
            holders=("b",),
            transport="tcp",
            chunks_asked=4,
            chunks_fetched=3,
            fetched_bytes=12,
            seconds=0.5,
            misses={"evicted": 1},
            corrupt={"b": 1},
        ),
        directory.UseReport(
            instance_id="a",
            incarnation="0" * 16,
            requests=1,
            chunks=4,
            device_chunks=0,
            own_chunks=1,
            peer_chunks=1,
            new_alone=2.0,
            threshold=2**63 - 1,
            hashes=b"h" * 16,
        ),
        directory.Changes(*WHO, 4, make_keys(3), make_keys(2)),
        directory.Snapshot(*WHO, 4, make_keys(3), first=True, last=False),
        directory.Registered("0" * 16, 1.0, 3.0, [make_member("b")], 1),
        directory.Refused("duplicate_instance", "taken"),
        directory.HeartbeatAck("0" * 16, known=True),
        directory.MemberUp(make_member("b")),
        directory.MembersUp([make_member("b"), make_member("c")]),
        directory.MemberDown(*WHO, "left"),
        directory.Resync(*WHO),
        directory.Ask(*WHO, "1" * 16, control.encode_question(control.Ping()), 5.0),
        directory.Answer(*WHO, "1" * 16, control.encode_reply(control.Pong(version="1"))),
        directory.Answer(*WHO, "1" * 16, b"", directory.AskError("busy", "later")),
    )
]
COMMANDS = [
    operations.ClearChunks(keys=[make_key("a")]),
    operations.PinChunks(keys=[make_key("a")], seconds=5.0),
    operations.UnpinChunks(),
    operations.WarmChunks(keys=[make_key("a"), make_key("b")]),
    operations.ListHot(limit=5),
]
REPORT = operations.Report(
    state=operations.RunState.PARTLY, chunks_done=1, chunks_total=2, outcomes={"fetched": 1}, keys=[make_key("a")]
)
QUESTIONS: list[control.Question] = [
    control.Ping(),
    *(control.StartOperation(operation_id="0" * 16, command=command, timeout_s=5.0) for command in COMMANDS),
    control.TellOperation(operation_id="0" * 16, wait_s=1.0),
    control.ChangeSharing(sharing=operations.Sharing.DRAINING),
    control.MakeKeys(tokens=[1, 2, 3], cache_salt="salt"),
    control.MakeKeys(text="Hello"),
    control.Inspect(keys=[make_key("a")]),
]
REPLIES: list[control.Reply] = [
    control.Pong(version="1"),
    control.Told(report=REPORT),
    control.SharingIs(sharing=operations.Sharing.LEFT, published_chunks=3),
    control.KeysAre(keys=[make_key("a")], tokens=300),
    control.Inspected(chunks=[None, control.InspectedChunk(slot=1, generation=3, checksum=b"c" * 16)]),
]
FOUND = explain.Found(peer=3, nowhere=1)
CAUSE = make_cause(MissReason.GATE_REFUSED, 1, 3, "b", {"fetch_s": 2.0, "prefill_s": 0.5})
EXPLANATION = explain.Explanation(
    request_id="cmpl-r-0",
    instance_id="a",
    incarnation="0" * 16,
    age_s=1.0,
    wait_s=0.1,
    prompt_tokens=1030,
    chunk_tokens=256,
    chunks=4,
    tail_tokens=6,
    found=FOUND,
    summary="s",
    spans=[explain.Span(first_chunk=0, chunks=3, where="peer", instance_id="b")],
    causes=[CAUSE],
    fetches=[
        explain.FetchPart(
            holders=["b"], transport="tcp", chunks_asked=3, chunks_fetched=3, fetched_bytes=9, seconds=0.1
        )
    ],
    peers=[explain.PeerSide(instance_id="b", breaker="closed")],
)
PROBE = control.Probe(tokens_hash=b"t" * 16, first_key=make_key("a"), missed_key=make_key("b"))
CONTROL = [
    *map(control.encode_question, QUESTIONS),
    *map(control.encode_reply, REPLIES),
    *(
        control.encode_question(question)
        for question in (
            control.Ping(),
            control.ListRequests(limit=3),
            control.ExplainRequest(request="r"),
            control.WhyMissed(hours=1.0),
            control.HaveSeen(probe=PROBE),
        )
    ),
    *(
        control.encode_reply(reply)
        for reply in (
            control.Pong(version="1"),
            control.RequestList(
                requests=[
                    explain.RecentRequest(
                        request_id="r",
                        instance_id="a",
                        age_s=1.0,
                        prompt_tokens=9,
                        chunks=0,
                        found=FOUND,
                        reason=MissReason.BELOW_ONE_CHUNK,
                        summary="s",
                    )
                ]
            ),
            control.Explained(found=[control.ExplainedRequest(explanation=EXPLANATION, probe=PROBE)]),
            control.Missed(
                summary=explain.MissSummary(
                    instance_id="a",
                    seconds=9.0,
                    requests=1,
                    chunks=4,
                    found=FOUND,
                    misses=[explain.MissShare(reason=MissReason.STALE, chunks=1, requests=1)],
                )
            ),
            control.Seen(salted=False, asked_s=0.5),
        )
    ),
]
LINK = [
    link.encode(message)
    for message in (
        link.Start(b"{}", FORMAT, 3, (link.Segment(4, 0, 4096),), 1),
        link.Publish([1, 2], fetched=True),
        link.Retract([3]),
        link.Ask(make_keys(2)),
        link.Answered(make_keys(1), make_keys(2)),
        link.Fetch(1, "r", [make_key("a")], [0], 5.0),
        link.Fetch(1, "r", [make_key("a")], [0], 5.0, link.SavedPrefill(0.1, 0.2, 0.0)),
        link.GiveUp(),
        link.RequestRecord(
            request_id="r",
            prompt_tokens=600,
            keys=[make_key("a"), make_key("b")],
            loaded_tokens=256,
            misses=[link.Miss(make_key("b"), MissReason.GATE_REFUSED, {"fetch_s": 2.0, "why": "slow"})],
            separated_by=["cache_salt"],
            tokens_hash=b"t" * 16,
        ),
        link.Ready("a", "0" * 16, "127.0.0.1", 1, 2),
        link.Failed("no"),
        link.FetchDone(1, [None, MissReason.STALE], 4096, 0.1, ["b"]),
        link.Visible([make_key("a")], [make_key("b")], reset=True),
        link.FetchDone(1, [None], 4096, 0.1, ["b"], link.GateReport(Verdict.PAYS, 1, 1, 0.1, 0.2)),
        link.Rates([link.PeerRate("b", 0.001, 1e-9, 2)], 1),
        link.Directory(connected=True, ever_connected=True, peers=3),
        *(link.Operate("0" * 16, command, 5.0) for command in COMMANDS),
        link.Operated("0" * 16, REPORT),
        link.MakeKeys(1, [1, 2, 3], "salt"),
        link.KeysMade(1, [make_key("a")], ""),
    )
]
PEER = [
    peer.encode(message)
    for message in (
        HELLO.wanting("b", "1" * 16),
        peer.Get(1, [make_key("a")]),
        peer.Lookup([make_key("a"), make_key("b")]),
        peer.Ping(1),
        peer.NixlAttach(),
        peer.Resolve([make_key("a")]),
        peer.Validate([peer.SlotGeneration(1, 3)]),
        peer.ShmAttach(),
        peer.ShmAttached([peer.ShmSegment(0, 4096)]),
        peer.Refused("full", "many"),
        peer.Held(b"\x03"),
        peer.Pong(1),
        peer.NixlMetadata(b"m", 1, 4096, 64),
        peer.Resolved(1, [peer.Place(4096, 4096, 3, 1), None]),
        peer.Validated([b"c" * 16, b""]),
    )
]
RAW = {
    "directory.request": (directory.request_decoder, directory.Request, DIRECTORY),
    "directory.event": (directory.event_decoder, directory.Event, DIRECTORY),
    "directory.notice": (directory.notice_decoder, directory.Notice, DIRECTORY),
    "follow.told": (follow.told_decoder, follow.Told, DIRECTORY),
    "link.to_node": (link.to_node_decoder, link.ToNode, LINK),
    "link.to_engine": (link.to_engine_decoder, link.ToEngine, LINK),
}


@pytest.mark.parametrize("name", RAW)
@given(data=st.data())
@fuzz(60)
def test_directory_and_link_messages(name: str, data: st.DataObject) -> None:
    """ValueError or RecursionError: what all receivers catch. What passes keeps its limits when it is sent on."""
    decoder, union, originals = RAW[name]
    payload = data.draw(hostile(get_args(union), originals))
    try:
        message = decoder.decode(payload)
    except (ValueError, RecursionError):
        return
    assert decoder.decode(msgspec.msgpack.encode(message)) == message


@pytest.mark.parametrize("decode", [peer.decode_hello, peer.decode_greeting, peer.decode_request, peer.decode_answer])
@given(data=st.data())
@fuzz(60)
def test_peer_messages(decode: object, data: st.DataObject) -> None:
    kinds = (peer.Hello, *get_args(peer.Request), *get_args(peer.Answer))
    payload = data.draw(hostile(kinds, PEER))
    try:
        message = decode(payload)  # type: ignore[operator]
    except peer.MessageError:
        return
    assert decode(peer.encode(message)) == message  # type: ignore[operator]


@given(data=st.data())
@fuzz(100)
def test_questions_and_replies(data: st.DataObject) -> None:
    """ControlError and nothing else; what passes stays what it is."""
    kinds = (*get_args(control.AnyQuestion), *get_args(control.AnyReply))
    payload = data.draw(hostile(kinds, CONTROL) | tagged_maps(*kinds))
    with contextlib.suppress(control.ControlError):
        ask = directory.Ask(*WHO, "1" * 16, payload, 5.0)
        question = control.decode_question(ask.question, version="1")
        ask = msgspec.structs.replace(ask, question=control.encode_question(question))
        assert control.decode_question(ask.question, version="1") == question
    with contextlib.suppress(control.ControlError):
        reply = control.decode_reply(payload)
        assert control.decode_reply(control.encode_reply(reply)) == reply


def test_the_original_questions_and_replies_are_valid() -> None:
    for question in QUESTIONS:
        ask = directory.Ask(*WHO, "1" * 16, control.encode_question(question), 5.0)
        assert control.decode_question(ask.question, version="1") == question
    for reply in REPLIES:
        assert control.decode_reply(control.encode_reply(reply)) == reply


@pytest.mark.parametrize("payload", [*DIRECTORY, *LINK, *PEER])
def test_the_originals_are_valid(payload: bytes) -> None:
    """Otherwise what is made from them tries nothing."""
    decoders = [decoder.decode for decoder, _, _ in RAW.values()]
    decoders += [peer.decode_hello, peer.decode_request, peer.decode_answer]
    accepted = 0
    for decode in decoders:
        try:
            decode(payload)
        except (ValueError, RecursionError):  # of another direction
            continue
        accepted += 1
    assert accepted


@pytest.mark.parametrize("field", ["incarnation", "format_id"])
def test_identities_have_no_line_break_at_their_end(field: str) -> None:
    """`$` in a pattern would let one pass."""
    bad = msgspec.structs.replace(HELLO, **{field: getattr(HELLO, field) + "\n"})
    with pytest.raises(peer.MessageError):
        peer.decode_hello(peer.encode(bad))


@given(pieces=st.lists(st.binary(max_size=40), max_size=20), limit=st.integers(1, 64))
@fuzz(200)
def test_frames(pieces: list[bytes], limit: int) -> None:
    """A buffer gives payloads within the limit or FrameError, and keeps no more than one frame and what just came."""
    buffer = FrameBuffer(limit)
    for piece in pieces:
        try:
            payloads = buffer.feed(piece)
        except FrameError:
            return
        assert all(0 < len(payload) <= limit for payload in payloads)
        assert len(buffer._data) < limit + 4


@given(
    payloads=st.lists(st.binary(min_size=1, max_size=40), max_size=8), sizes=st.lists(st.integers(1, 50), max_size=99)
)
@fuzz(100)
def test_frames_come_out_as_they_went_in_however_they_are_cut(payloads: list[bytes], sizes: list[int]) -> None:
    stream, found, buffer = b"".join(map(pack_frame, payloads)), [], FrameBuffer(40)
    for size in [*sizes, len(stream)]:
        found += buffer.feed(stream[:size])
        stream = stream[size:]
    assert found == payloads


@given(buffer=st.binary(min_size=peer.HEADER_BYTES, max_size=peer.HEADER_BYTES + 8))
@fuzz(200)
def test_chunk_headers_and_trailers(buffer: bytes) -> None:
    """Whatever stands there: a header or trailer within its limits, or MessageError."""
    for magic in (b"", b"kvmC\x01", b"kvmT\x01"):
        data = (magic + buffer)[: max(peer.HEADER_BYTES, peer.TRAILER_BYTES)].ljust(peer.TRAILER_BYTES, b"\0")
        with contextlib.suppress(peer.MessageError):
            assert peer.parse_header(data).length <= peer.MAX_CHUNK_BYTES
        with contextlib.suppress(peer.MessageError):
            assert len(peer.parse_trailer(data).checksum) == 16


@given(bitmap=st.binary(max_size=20), count=st.integers(0, 200))
@fuzz(200)
def test_bitmaps(bitmap: bytes, count: int) -> None:
    try:
        bits = peer.unpack_bits(bitmap, count)
    except peer.MessageError:
        assert len(bitmap) != (count + 7) // 8
        return
    assert len(bits) == count
    assert peer.unpack_bits(peer.pack_bits(bits), count) == bits
