"""`kvmesh lookup`: who holds which chunks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from kvmesh.cli.chunks import (
    KeysFileOption,
    KeysOption,
    SaltOption,
    TextFileOption,
    TextOption,
    TokensFileOption,
    chosen_chunks,
)
from kvmesh.cli.shared import (
    DEFAULT_CONTROLLER,
    EXIT_NO,
    CaOption,
    ControllerOption,
    JsonFlag,
    make_console,
    make_table,
    open_api,
    print_raw_json,
)

if TYPE_CHECKING:
    from rich.console import Console

    from kvmesh.client.answers import LookupFormat

SHOWN_CHUNKS = 40
PATH = "/api/v1/lookup"


def lookup(
    key: Annotated[list[str] | None, typer.Argument(metavar="[KEY]...", help="Chunk keys in hexadecimal.")] = None,
    keys: KeysOption = None,
    keys_file: KeysFileOption = None,
    tokens_file: TokensFileOption = None,
    text: TextOption = None,
    text_file: TextFileOption = None,
    cache_salt: SaltOption = None,
    format_id: Annotated[str | None, typer.Option(help="Only members of this format.")] = None,
    controller: ControllerOption = DEFAULT_CONTROLLER,
    ca: CaOption = None,
    as_json: JsonFlag = False,
) -> None:
    """Say who holds the chunks of a prompt, and how long the prefix is that could be fetched.

    For example:

    ```text
    kvmesh lookup --text-file prompt.txt
    kvmesh lookup --tokens-file tokens.json --cache-salt tenant-a
    kvmesh lookup 5f3a...00000000 9c41...00000000
    kvmesh lookup --keys-file keys.txt --json
    ```

    The exit status is 1 when nobody holds the first chunk, so that nothing could be fetched.
    """
    listed = ",".join(key) if key else None
    if listed and keys:
        raise typer.BadParameter("give keys as arguments or with --keys, not both")
    body = chosen_chunks(listed or keys, keys_file, tokens_file, text, text_file, cache_salt)
    if not body:
        raise typer.BadParameter("say which chunks: KEY..., --keys-file, --tokens-file, --text or --text-file")
    with open_api(controller, ca) as api:
        from kvmesh.client import Lookup

        raw = api.post_raw(PATH, {**body, "format_id": format_id})
        found = api.decode(raw, Lookup)
    if as_json:
        print_raw_json(raw)
    else:
        console = make_console()
        if not found.formats:
            console.print("no member, so nobody holds anything")
        for one in found.formats:
            _print_format(console, one)
    raise typer.Exit(0 if any(one.longest_prefix.chunks for one in found.formats) else EXIT_NO)


def _print_format(console: Console, found: LookupFormat) -> None:
    from rich.text import Text

    prefix = found.longest_prefix
    looked_up = f"{len(found.chunks)} chunks of {found.chunk_tokens} tokens"
    if found.tokens is not None:
        looked_up += f" ({found.tokens} tokens in all)"
    line = Text(f"{found.model_name} ", style="bold")
    line.append(f"format {found.format_id[:8]}: {looked_up}; ", style="not bold")
    line.append(
        f"longest prefix {prefix.chunks} chunks, {prefix.tokens} tokens",
        style="green not bold" if prefix.chunks else "yellow not bold",
    )
    console.print(line)
    for name, chunks in sorted(prefix.by_instance.items(), key=lambda item: -item[1]):
        console.print(f"  {name} alone holds the first {chunks}")
    if not any(chunk.holders for chunk in found.chunks):
        return
    table = make_table("chunk", "key", "holders", right=("chunk",))
    for number, chunk in enumerate(found.chunks[:SHOWN_CHUNKS]):
        table.add_row(
            str(number),
            chunk.key if len(found.chunks) == 1 else f"{chunk.key[:16]}...{chunk.key[-8:]}",
            Text(", ".join(chunk.holders)) if chunk.holders else Text("nobody", style="dim"),
        )
    console.print(table)
    if len(found.chunks) > SHOWN_CHUNKS:
        console.print(f"and {len(found.chunks) - SHOWN_CHUNKS} more: --json has all of them")
