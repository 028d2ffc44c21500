"""Naming chunks on a command line: by keys, by tokens, or by the text of a prompt."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Annotated

import typer

MAX_FILE_BYTES = 64 << 20

KeysOption = Annotated[
    str | None, typer.Option("--keys", metavar="HEX,HEX", help="Chunk keys in hexadecimal, in prefix order.")
]
KeysFileOption = Annotated[
    Path | None, typer.Option(metavar="FILE", help="The same from a file, one a line; - is standard input.")
]
TokensFileOption = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Token ids of a prompt, as a JSON list or separated by blanks.")
]
TextOption = Annotated[
    str | None, typer.Option("--text", help="A prompt, tokenised as the engine does; no chat template is applied.")
]
TextFileOption = Annotated[Path | None, typer.Option(metavar="FILE", help="The same from a file; - is standard input.")]
SaltOption = Annotated[
    str | None, typer.Option("--cache-salt", help="The requests' cache_salt, for tokens and text of a tenant.")
]


def chosen_chunks(
    keys: str | None,
    keys_file: Path | None,
    tokens_file: Path | None,
    text: str | None,
    text_file: Path | None,
    cache_salt: str | None,
) -> dict[str, object]:
    """The fields with which the API names chunks: keys, tokens or text; empty when nothing was given.

    Raises typer.BadParameter when there is more than one, or one that cannot be read.
    """
    given = {
        "--keys": keys,
        "--keys-file": keys_file,
        "--tokens-file": tokens_file,
        "--text": text,
        "--text-file": text_file,
    }
    named = [name for name, value in given.items() if value is not None]
    if len(named) > 1:
        raise typer.BadParameter(f"{' and '.join(named)} name chunks in two ways: give one of them")
    if cache_salt is not None and not {*named} & {"--tokens-file", "--text", "--text-file"}:
        raise typer.BadParameter("--cache-salt goes with --tokens-file, --text or --text-file; keys contain theirs")
    salt = {} if cache_salt is None else {"cache_salt": cache_salt}
    if keys is not None:
        return {"keys": _keys(keys.replace(",", " ").split(), "--keys")}
    if keys_file is not None:
        return {"keys": _keys(_read(keys_file, "--keys-file").replace(",", " ").split(), "--keys-file")}
    if tokens_file is not None:
        return {"tokens": _tokens(_read(tokens_file, "--tokens-file")), **salt}
    if text_file is not None:
        return {"text": _read(text_file, "--text-file"), **salt}
    return {} if text is None else {"text": text, **salt}


def _keys(words: list[str], option: str) -> list[str]:
    if not words:
        raise typer.BadParameter("no key in it", param_hint=option)
    wrong = next((word for word in words if not re.fullmatch(r"([0-9A-Fa-f]{2})+", word)), None)
    if wrong is not None:
        raise typer.BadParameter(f"{wrong[:80]!r} is no key in hexadecimal", param_hint=option)
    return words


def _tokens(text: str) -> list[int]:
    expected = "expected token ids, as a JSON list or separated by blanks"
    try:
        found = json.loads(text) if text.lstrip().startswith("[") else [int(word) for word in text.split()]
    except (ValueError, RecursionError) as error:
        raise typer.BadParameter(f"{expected}: {error}", param_hint="--tokens-file") from None
    if not isinstance(found, list) or not found or not all(type(one) is int and one >= 0 for one in found):
        raise typer.BadParameter(expected, param_hint="--tokens-file")
    return found


def _read(path: Path, option: str) -> str:
    try:
        if str(path) == "-":
            data = sys.stdin.buffer.read(MAX_FILE_BYTES + 1)
        else:
            with path.open("rb") as file:
                data = file.read(MAX_FILE_BYTES + 1)
        text = data.decode()
    except OSError as error:
        raise typer.BadParameter(f"{path}: {error.strerror or error}", param_hint=option) from None
    except UnicodeDecodeError:
        raise typer.BadParameter(f"{path} is no text in UTF-8", param_hint=option) from None
    if len(data) > MAX_FILE_BYTES:
        raise typer.BadParameter(f"{path} has more than {MAX_FILE_BYTES} bytes", param_hint=option)
    return text
