"""From a prompt's text to its tokens, with the engine's own tokenizer, in a process of its own.

Loading a tokenizer takes up to a second without letting go of the interpreter, which neither an engine nor its node can
spare; and it happens only when a person looks a text up. The library is Hugging Face's `tokenizers`, which vLLM brings.

    python -m kvmesh.node.tokens PATH < text > tokens as JSON
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
from pathlib import Path

import msgspec

from kvmesh.wire.control import ControlError

TIMEOUT_S = 30.0
FILE = "tokenizer.json"
_tokens = msgspec.json.Decoder(list[int])


async def tokenize(path: str, text: str) -> list[int]:
    """The tokens of a prompt, special tokens of its beginning included. Raises ControlError.

    Args:
        path: the folder of the model's tokenizer, with a `tokenizer.json`; empty when the engine named none.
        text: the prompt as the engine gets it, chat template and all.
    """
    if not path:
        raise ControlError("no_tokenizer", f"this instance has no {FILE} on its host: look up tokens or keys instead")
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "kvmesh.node.tokens", path),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        out, err = await asyncio.wait_for(process.communicate(text.encode()), TIMEOUT_S)
    except asyncio.TimeoutError:
        raise ControlError("tokenizer_failed", f"the tokenizer took longer than {TIMEOUT_S:g} s") from None
    finally:
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
    if process.returncode:
        last = err.decode(errors="replace").strip().splitlines()[-1:] or ["no reason given"]
        raise ControlError("tokenizer_failed", last[0][:500])
    return _tokens.decode(out)


def main(path: str) -> None:
    """Tokens of standard input to standard output."""
    from tokenizers import Tokenizer  # noqa: PLC0415 - comes with vLLM, not with kvmesh

    tokenizer = Tokenizer.from_file(str(Path(path) / FILE))
    sys.stdout.write(json.dumps(tokenizer.encode(sys.stdin.read()).ids))


if __name__ == "__main__":
    main(sys.argv[1])
