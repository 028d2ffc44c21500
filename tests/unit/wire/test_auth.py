"""Authentication as pure functions: who agrees with whom, and that nothing changed is ever taken."""

from __future__ import annotations

import copy
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmesh.wire import peer
from kvmesh.wire.auth import (
    MAC_BYTES,
    AuthenticationError,
    ClusterKey,
    Kind,
    MacChain,
    PeerKey,
    Role,
    Session,
    hkdf_sha256,
)
from kvmesh.wire.curve import CurveKeys
from kvmesh.wire.peer import ChunkHeader, ChunkStatus, ChunkTrailer, MessageError, Verdict

KEY = ClusterKey("k" * 16)
hellos = st.binary(max_size=100)
keys = st.text(st.characters(codec="utf-8", categories=["L", "N"]), min_size=16, max_size=40)
kinds = st.sampled_from(Kind)
bodies = st.binary(max_size=64)
sent = st.lists(st.tuples(kinds, bodies), min_size=1, max_size=6)


def sessions(key: PeerKey, fetcher_hello: bytes, holder_hello: bytes) -> tuple[Session, Session]:
    """A finished handshake, as fetcher and holder see it."""
    fetcher = key.handshake(Role.FETCHER, fetcher_hello, holder_hello)
    holder = key.handshake(Role.HOLDER, fetcher_hello, holder_hello)
    assert holder.accepts(fetcher.proof())
    assert fetcher.accepts(holder.proof())
    return fetcher.session(), holder.session()


class TestKeys:
    @pytest.mark.parametrize(
        ("secret", "salt", "info", "length", "expected"),
        [
            (
                "0b" * 22,
                "000102030405060708090a0b0c",
                "f0f1f2f3f4f5f6f7f8f9",
                42,
                "3cb25f25faacd57a90434f64d0362f2a2d2d0a90cf1a5a4c5db02d56ecc4c5bf34007208d5b887185865",
            ),
            (
                "0b" * 22,
                "",
                "",
                42,
                "8da4e775a563c18f715f802a063c5a31b8a11f5c5ee1879ec3454e5f3c738d2d9d201395faa4b61a96c8",
            ),
        ],
    )
    def test_hkdf_is_the_one_of_rfc_5869(self, secret, salt, info, length, expected):
        """Test cases 1 and 3 of its appendix."""
        made = hkdf_sha256(bytes.fromhex(secret), bytes.fromhex(info), length, bytes.fromhex(salt))
        assert made.hex() == expected

    def test_each_purpose_has_a_key_of_its_own(self):
        purposes = ["peer connections", "curve controller", "curve node", "http token"]
        assert len({KEY.derive(purpose) for purpose in purposes}) == len(purposes)

    def test_whitespace_around_a_key_does_not_count(self):
        assert ClusterKey(" " + "k" * 16 + "\n").derive("x") == KEY.derive("x")

    @pytest.mark.parametrize("text", ["", "k" * 15, " " * 50, "hunter2"])
    def test_short_keys_are_refused_without_showing_them(self, text):
        with pytest.raises(ValueError) as caught:
            ClusterKey(text)
        assert "hunter2" not in str(caught.value)

    def test_keys_show_themselves_to_nobody(self):
        for made in (KEY, KEY.peer_key(), CurveKeys.derive(KEY)):
            assert "***" in repr(made)
            assert "kkkk" not in repr(made)
        with pytest.raises(TypeError):
            pickle.dumps(KEY)

    def test_curve_keys_follow_from_the_cluster_key(self):
        same, other = CurveKeys.derive(ClusterKey("k" * 16)), CurveKeys.derive(ClusterKey("K" * 16))
        assert same == CurveKeys.derive(KEY)
        assert not set(same) & set(other)
        assert {len(part) for part in same} == {40}


class TestHandshake:
    @given(keys, hellos, hellos)
    def test_the_same_key_agrees(self, text, fetcher_hello, holder_hello):
        sessions(ClusterKey(text).peer_key(), fetcher_hello, holder_hello)

    @given(keys, keys, hellos, hellos)
    def test_different_keys_never_agree(self, ours, theirs, fetcher_hello, holder_hello):
        if ours == theirs:
            return
        fetcher = ClusterKey(ours).peer_key().handshake(Role.FETCHER, fetcher_hello, holder_hello)
        holder = ClusterKey(theirs).peer_key().handshake(Role.HOLDER, fetcher_hello, holder_hello)
        assert not holder.accepts(fetcher.proof())
        assert not fetcher.accepts(holder.proof())

    @given(hellos, hellos, hellos, hellos)
    def test_a_proof_says_nothing_about_other_hellos(self, fetcher_a, holder_a, fetcher_b, holder_b):
        """Each challenge and each identity is under the proof: it cannot be used again, nor towards another peer."""
        if (fetcher_a, holder_a) == (fetcher_b, holder_b):
            return
        key = KEY.peer_key()
        first = key.handshake(Role.FETCHER, fetcher_a, holder_a)
        assert not key.handshake(Role.HOLDER, fetcher_b, holder_b).accepts(first.proof())

    @given(hellos, hellos)
    def test_a_proof_sent_back_is_refused(self, fetcher_hello, holder_hello):
        """Neither reflected to its sender nor, with swapped roles, shown to another."""
        key = KEY.peer_key()
        for role in Role:
            ours = key.handshake(role, fetcher_hello, holder_hello)
            assert not ours.accepts(ours.proof())
            assert not key.handshake(role, holder_hello, fetcher_hello).accepts(ours.proof())

    @given(st.data())
    def test_a_proof_with_another_bit_or_length_is_refused(self, data):
        fetcher = KEY.peer_key().handshake(Role.FETCHER, b"f", b"h")
        proof = bytearray(KEY.peer_key().handshake(Role.HOLDER, b"f", b"h").proof())
        proof[data.draw(st.integers(0, len(proof) - 1))] ^= data.draw(st.integers(1, 255))
        assert not fetcher.accepts(bytes(proof))
        assert not fetcher.accepts(bytes(proof[:-1]))
        assert not fetcher.accepts(b"")


class TestMacs:
    @given(sent)
    def test_what_was_sent_is_taken(self, sent):
        fetcher, holder = sessions(KEY.peer_key(), b"f", b"h")
        for kind, body in sent:
            holder.receiving.check(kind, body, fetcher.sending.mac(kind, body))
            fetcher.receiving.check(kind, body, holder.sending.mac(kind, body))

    @given(sent, st.data())
    def test_any_changed_bit_is_refused(self, sent, data):
        fetcher, holder = sessions(KEY.peer_key(), b"f", b"h")
        *before, (kind, body) = sent
        for earlier in before:
            holder.receiving.check(*earlier, fetcher.sending.mac(*earlier))
        whole = bytearray(body + fetcher.sending.mac(kind, body))
        whole[data.draw(st.integers(0, len(whole) - 1))] ^= 1 << data.draw(st.integers(0, 7))
        with pytest.raises(AuthenticationError):
            holder.receiving.check(kind, whole[:-MAC_BYTES], whole[-MAC_BYTES:])

    @given(sent, st.permutations(range(6)))
    def test_repeated_left_out_or_swapped_is_refused(self, sent, order):
        """Whatever order the pieces come in, only the next one is taken."""
        fetcher, holder = sessions(KEY.peer_key(), b"f", b"h")
        pieces = [(kind, body, fetcher.sending.mac(kind, body)) for kind, body in sent]
        number = order[0] % len(pieces)
        if number == 0:
            holder.receiving.check(*pieces[0])
        with pytest.raises(AuthenticationError):  # a later one, or the first one again
            holder.receiving.check(*pieces[number])

    @given(kinds, bodies, st.integers(0, MAC_BYTES - 1))
    def test_truncated_is_refused(self, kind, body, length):
        fetcher, holder = sessions(KEY.peer_key(), b"f", b"h")
        mac = fetcher.sending.mac(kind, body)
        with pytest.raises(AuthenticationError):
            copy.copy(holder.receiving).check(kind, body, mac[:length])
        if body:
            with pytest.raises(AuthenticationError):
                holder.receiving.check(kind, body[:-1], mac)

    @given(kinds, bodies)
    def test_sent_back_is_refused(self, kind, body):
        """What one side has sent is not taken from the other side: each direction has its own key."""
        fetcher, holder = sessions(KEY.peer_key(), b"f", b"h")
        with pytest.raises(AuthenticationError):
            fetcher.receiving.check(kind, body, fetcher.sending.mac(kind, body))
        with pytest.raises(AuthenticationError):
            holder.receiving.check(kind, body, holder.sending.mac(kind, body))

    @given(bodies, kinds, kinds)
    def test_one_kind_is_not_taken_for_another(self, body, kind, other):
        if kind is other:
            return
        fetcher, holder = sessions(KEY.peer_key(), b"f", b"h")
        with pytest.raises(AuthenticationError):
            holder.receiving.check(other, body, fetcher.sending.mac(kind, body))

    @given(kinds, bodies, hellos)
    def test_another_connection_is_refused(self, kind, body, challenge):
        if challenge == b"f":
            return
        first, _ = sessions(KEY.peer_key(), b"f", b"h")
        _, second = sessions(KEY.peer_key(), challenge, b"h")
        with pytest.raises(AuthenticationError):
            second.receiving.check(kind, body, first.sending.mac(kind, body))


class TestChunks:
    header = ChunkHeader(ChunkStatus.HELD, 7, 3, 4096)
    trailer = ChunkTrailer(Verdict.VALID, 7, 3, b"c" * 16)

    def packed(self, macs: MacChain | None) -> tuple[bytearray, bytearray]:
        return bytearray(peer.pack_header(self.header, macs)), bytearray(peer.pack_trailer(self.trailer, macs))

    def chains(self) -> tuple[MacChain, MacChain]:
        fetcher, holder = sessions(KEY.peer_key(), b"f", b"h")
        return holder.sending, fetcher.receiving

    def test_headers_and_trailers_survive_the_wire(self):
        sending, receiving = self.chains()
        for _ in range(3):
            header, trailer = self.packed(sending)
            assert (len(header), len(trailer)) == (peer.HEADER_BYTES, peer.TRAILER_BYTES)
            assert peer.parse_header(header, receiving) == self.header
            assert peer.parse_trailer(trailer, receiving) == self.trailer

    @given(st.data())
    def test_any_changed_bit_is_refused(self, data):
        sending, receiving = self.chains()
        header, trailer = self.packed(sending)
        in_header = data.draw(st.booleans())
        changed = header if in_header else trailer
        changed[data.draw(st.integers(0, len(changed) - 1))] ^= 1 << data.draw(st.integers(0, 7))
        if not in_header:
            peer.parse_header(header, receiving)
        with pytest.raises(AuthenticationError):
            peer.parse_header(header, receiving) if in_header else peer.parse_trailer(trailer, receiving)

    def test_a_trailer_belongs_to_the_header_before_it(self):
        """An earlier chunk's verdict and checksum are not taken for a later one's, though all else is equal."""
        sending, receiving = self.chains()
        first, second = self.packed(sending), self.packed(sending)
        peer.parse_header(first[0], receiving)
        with pytest.raises(AuthenticationError):
            peer.parse_trailer(second[1], receiving)

    def test_no_mac_where_one_is_due_and_the_reverse(self):
        sending, receiving = self.chains()
        with pytest.raises(AuthenticationError):
            peer.parse_header(self.packed(None)[0], receiving)
        with pytest.raises(MessageError):
            peer.parse_header(self.packed(sending)[0])
