"""Questions from the controller to one node, and their replies. This docstring is the protocol's specification.

They travel in two envelopes of `kvmesh.wire.directory`, over the sockets that are there anyway:

    controller                              node
     |-- Ask(ask_id, question) --------------->|  to one instance and one incarnation of it
     |<------------- Answer(ask_id, reply) ----|  exactly one, or one with an error; none from a node that is gone

`question` and `reply` are msgpack maps of the structs below, tagged by class name, inside bytes of their own: a node
that meets a question it does not know can still say so (`unknown_question`), and fields that are added later do no
harm.

The node answers the same questions over its peer port (Ask and Answered of `kvmesh.wire.peer`): a controller that shows
a directory in Redis has no other connection to it. A node that has no cluster key and listens beyond loopback answers
only OPEN_QUESTIONS there (`unauthorized` otherwise), and without the Probe, which helps to tell what a prompt was.

Limits. A question is at most MAX_QUESTION_BYTES, a reply at most MAX_REPLY_BYTES (`reply_too_large` otherwise). A node
answers MAX_RUNNING questions at a time and refuses the others (`busy`). A question has a deadline, `timeout_s`, after
which the node may drop it and the controller no longer waits. An ask_id is 16 random hexadecimal digits that nobody but
the node asked has seen; an answer counts only with it and with the incarnation that was asked.

Asks are not counted as notices (`Heartbeat.received_bytes`): one that is lost costs its deadline and nothing else.

To add a question: a subclass of `Question` and one of `Reply` here, both in the unions at the end, and a handler at the
node (`kvmesh.node.control`).
"""

from __future__ import annotations

from typing import Annotated, TypeVar, get_args

import msgspec
from msgspec import Meta

from kvmesh.wire import explain
from kvmesh.wire.directory import MAX_REQUEST_BYTES, AskError, Count, Key, Name, Seconds
from kvmesh.wire.operations import MAX_HOT, AnyCommand, OperationId, Report, Sharing

MAX_QUESTION_BYTES = 1024 * 1024
MAX_REPLY_BYTES = MAX_REQUEST_BYTES - 8 * 1024
"""Leaves room for the envelope: a longer frame would close the connection."""
MAX_RUNNING = 16
"""Questions that a node works on at a time."""
MAX_TIMEOUT_S = 600.0

Text = Annotated[str, Meta(max_length=4096)]


class Question(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Base of everything that is asked."""


class Reply(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Base of everything that is answered."""


R = TypeVar("R", bound=Reply)


class ControlError(Exception):
    """Why a question was not answered. `code` is for programs, `text` for people.

    From the node: `unknown_question`, `bad_question`, `busy`, `reply_too_large`, `unsupported`, `unauthorized`,
    `failed`; handlers add their own. From the controller: `unknown_instance`, `question_too_large`,
    `too_many_questions`, `unreachable`, `lost`, `deadline`, `bad_reply`, `stopping`.
    """

    def __init__(self, code: str, text: str) -> None:
        super().__init__(f"{code}: {text}")
        self.code = code
        self.text = text


class Ping(Question, frozen=True):
    """Is the node there, and does it answer?"""


class Pong(Reply, frozen=True):
    version: Name
    """Of kvmesh, at the node."""


class StartOperation(Question, frozen=True):
    """Have the engine carry out a command. Asked again with the same id, it only tells how far it is. Told."""

    operation_id: OperationId
    command: AnyCommand
    timeout_s: Seconds
    """For the command, not for the answer, which comes at once."""


class TellOperation(Question, frozen=True):
    """How far is a command? Answered when it has ended or after `wait_s`, whichever comes first. Told."""

    operation_id: OperationId
    wait_s: Annotated[float, Meta(ge=0, le=60)] = 0.0


class Told(Reply, frozen=True):
    report: Report


class ChangeSharing(Question, frozen=True):
    """Drain step by step, or take part again. SharingIs."""

    sharing: Sharing


class SharingIs(Reply, frozen=True):
    sharing: Sharing
    published_chunks: Count


class MakeKeys(Question, frozen=True):
    """Under which keys would the chunks of this prompt be published? Either text, tokenised as the engine does, or
    tokens. KeysAre.
    """

    text: Annotated[str, Meta(max_length=MAX_QUESTION_BYTES)] | None = None
    tokens: Annotated[list[Annotated[int, Meta(ge=0, lt=1 << 32)]], Meta(max_length=250_000)] | None = None
    cache_salt: Annotated[str, Meta(max_length=4096)] | None = None


class KeysAre(Reply, frozen=True):
    keys: Annotated[list[Key], Meta(max_length=MAX_HOT)]
    """In prefix order, of KV cache group after KV cache group."""
    tokens: Count
    """Of the whole prompt; the last chunk may not be full."""


class Inspect(Question, frozen=True):
    """What does the node know of these chunks of its own? Inspected."""

    keys: Annotated[list[Key], Meta(max_length=256)]


class InspectedChunk(msgspec.Struct, frozen=True, kw_only=True):
    """A chunk that is published now."""

    slot: Count
    generation: Count
    checksum: Annotated[bytes, Meta(max_length=16)]


class Inspected(Reply, frozen=True):
    chunks: Annotated[list[InspectedChunk | None], Meta(max_length=256)]
    """One per key; None: not here."""


class ListRequests(Question, frozen=True):
    """Which requests has the engine had lately?"""

    limit: Annotated[int, Meta(ge=1, le=explain.MAX_RECENT)] = 50


class RequestList(Reply, frozen=True):
    requests: Annotated[list[explain.RecentRequest], Meta(max_length=explain.MAX_RECENT)]
    """The newest first."""


class ExplainRequest(Question, frozen=True):
    """What became of this request? See `kvmesh.wire.explain.matches` for the ways to name one."""

    request: Annotated[str, Meta(min_length=1, max_length=explain.MAX_ID)]


class Probe(msgspec.Struct, frozen=True, kw_only=True):
    """What others need to say whether they know something of a request's missing chunks. Never shown to anybody."""

    tokens_hash: Annotated[bytes, Meta(max_length=16)] = b""
    """Of the first chunk's tokens alone."""
    first_key: Annotated[bytes, Meta(max_length=40)] = b""
    missed_key: Annotated[bytes, Meta(max_length=40)] = b""
    separated_by: Annotated[list[explain.Id], Meta(max_length=8)] = []


class ExplainedRequest(msgspec.Struct, frozen=True, kw_only=True):
    explanation: explain.Explanation
    probe: Probe


class Explained(Reply, frozen=True):
    found: Annotated[list[ExplainedRequest], Meta(max_length=explain.MAX_MATCHES)]
    """The best match first; empty when the node does not remember such a request."""


class WhyMissed(Question, frozen=True):
    """For which reasons did the instance miss?"""

    hours: Annotated[float, Meta(gt=0, le=explain.MAX_HOURS)] = 1.0


class Missed(Reply, frozen=True):
    summary: explain.MissSummary


class HaveSeen(Question, frozen=True):
    """Has the instance met the tokens of another one's request, or been asked for its missing chunk?"""

    probe: Probe


class Seen(Reply, frozen=True):
    salted: bool
    """The same tokens came under another cache_salt."""
    asked_s: explain.Seconds | None = None
    """So long ago the instance was asked for the missing chunk in vain."""


AnyQuestion = (
    Ping
    | StartOperation
    | TellOperation
    | ChangeSharing
    | MakeKeys
    | Inspect
    | ListRequests
    | ExplainRequest
    | WhyMissed
    | HaveSeen
)
OPEN_QUESTIONS = (Ping, Inspect, ListRequests, ExplainRequest, WhyMissed)
"""What anybody may ask who reaches a node without a cluster key: nothing is done for them, by the engine least."""
AnyReply = Pong | Told | SharingIs | KeysAre | Inspected | RequestList | Explained | Missed | Seen


class _Tag(msgspec.Struct, frozen=True):
    type: Name


_encoder = msgspec.msgpack.Encoder()
_tag_decoder = msgspec.msgpack.Decoder(_Tag)
question_decoder: msgspec.msgpack.Decoder[AnyQuestion] = msgspec.msgpack.Decoder(AnyQuestion)
reply_decoder: msgspec.msgpack.Decoder[AnyReply] = msgspec.msgpack.Decoder(AnyReply)
_QUESTIONS = frozenset(kind.__name__ for kind in get_args(AnyQuestion) or (AnyQuestion,))


def encode_question(question: Question) -> bytes:
    """The bytes of one question. Raises ControlError when there are too many of them."""
    encoded = _encoder.encode(question)
    if len(encoded) > MAX_QUESTION_BYTES:
        text = f"a {type(question).__name__} of {len(encoded)} bytes; at most {MAX_QUESTION_BYTES} are allowed"
        raise ControlError("question_too_large", text)
    return encoded


def decode_question(encoded: bytes, *, version: str) -> AnyQuestion:
    """What is asked. Raises ControlError for what this version of kvmesh does not know or take."""
    try:
        name = _tag_decoder.decode(encoded).type
        if name not in _QUESTIONS:
            text = f"this node (kvmesh {version}) does not know the question {name!r}: run the controller's version"
            raise ControlError("unknown_question", text)
        question: AnyQuestion = question_decoder.decode(encoded)
    except (ValueError, RecursionError) as error:  # msgspec's errors are ValueErrors
        raise ControlError("bad_question", str(error)[:500]) from None
    return question


def encode_reply(reply: Reply) -> bytes:
    """The bytes of one reply. Raises ControlError when there are too many of them."""
    encoded = _encoder.encode(reply)
    if len(encoded) > MAX_REPLY_BYTES:
        text = f"a {type(reply).__name__} of {len(encoded)} bytes; at most {MAX_REPLY_BYTES} are allowed"
        raise ControlError("reply_too_large", text)
    return encoded


def decode_reply(encoded: bytes) -> AnyReply:
    """What a node has answered. Raises ControlError (`bad_reply`) for what is no reply."""
    try:
        reply: AnyReply = reply_decoder.decode(encoded)
    except (ValueError, RecursionError) as error:
        raise ControlError("bad_reply", f"the node's reply cannot be read: {str(error)[:500]}") from None
    return reply


def make_error(error: ControlError) -> AskError:
    """The error as it travels."""
    return AskError(error.code[:256] or "failed", error.text[:4096])
