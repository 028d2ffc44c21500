"""What a node that asks the directory remembers of the answers."""

from __future__ import annotations

from collections.abc import Sequence

from kvmesh.bench.stand_in import make_key
from kvmesh.core.keys import ChunkKey
from kvmesh.node.asker import Asker

KEYS = [make_key(f"asker-{number}") for number in range(4)]
LIFE = "00000000000000aa"


class Directory:
    """Answers with `holders`; None: cannot be asked."""

    def __init__(self) -> None:
        self.holders: dict[bytes, list[tuple[str, str]]] | None = {}

    async def ask(self, _keys: Sequence[bytes]) -> dict[bytes, list[tuple[str, str]]] | None:
        return self.holders


def make() -> tuple[Directory, Asker]:
    directory = Directory()
    return directory, Asker(lambda: directory, timeout_s=1.0, own_id="me")  # type: ignore[arg-type,return-value]


async def test_the_newest_answer_counts() -> None:
    """Also where it names nobody any more: not until the answer before has grown old."""
    directory, asker = make()
    directory.holders = {key: [("other", LIFE), ("me", LIFE)] for key in KEYS}
    assert await asker.ask(KEYS) == set(KEYS)
    assert asker.holders(KEYS[0]) == ("other",)
    directory.holders = {KEYS[1]: [("other", LIFE)]}
    assert await asker.ask(KEYS[:2]) == {KEYS[1]}
    assert asker.holders(KEYS[0]) == ()
    assert asker.holders(KEYS[2]) == ("other",), "was not asked about"


async def test_no_answer_changes_nothing() -> None:
    directory, asker = make()
    directory.holders = {KEYS[0]: [("other", LIFE)]}
    await asker.ask(KEYS)
    directory.holders = None
    assert await asker.ask(KEYS) is None
    assert asker.holders(KEYS[0]) == ("other",)
    assert asker.statistics().unanswered == 1


async def test_a_quarantined_holder_is_not_named() -> None:
    directory, asker = make()
    directory.holders = {KEYS[0]: [("other", LIFE), ("third", LIFE)]}
    await asker.ask(KEYS)
    asker.quarantine("other", LIFE, ChunkKey(KEYS[0]))
    assert asker.holders(KEYS[0]) == ("third",)
    assert await asker.ask(KEYS) == {KEYS[0]}
    assert asker.holders(KEYS[0]) == ("third",)


async def test_what_nobody_asked_about_is_not_remembered() -> None:
    directory, asker = make()
    directory.holders = {key: [("other", LIFE)] for key in KEYS}
    assert await asker.ask(KEYS[:1]) == {KEYS[0]}
    assert asker.holders(KEYS[1]) == ()
