"""``spectrim corpus``: counts the documents, bytes and tokens of a corpus."""

from typing import Any

from spectrim.lab.cli.flags import THEMES, configure, with_settings
from spectrim.lab.cli.shared_options import CacheDir, Json, show
from spectrim.lab.config import SharedConfig
from spectrim.lab.tables import TextTable

__all__ = ["corpus_command"]


@with_settings(SharedConfig, {"Text": THEMES["Text"]})
def corpus_command(given: dict[str, Any], cache_dir: CacheDir = None, as_json: Json = False) -> None:
    """Show documents, bytes and tokens of both sides of a corpus's split, and a sample."""
    from spectrim.lab.data.tokens import describe_tokens, prepare_tokens, resolve_data

    config = configure(SharedConfig, None, given)
    description = describe_tokens(prepare_tokens(resolve_data(config.data), cache_dir))
    show(description, as_json, corpus_table(description))


def corpus_table(description: dict[str, Any]) -> TextTable:
    """A row for each side of the split, also for every weighted source, and the sample."""
    rows = [["side", "documents", "bytes", "tokens", "bytes per token"]]
    parts = [
        ("", description),
        *((f"{part['source']}@{part['weight']:g}: ", part) for part in description.get("sources", [])),
    ]
    for name, part in parts:
        for side in ("train", "validation"):
            counts = part[side]
            cells = ["?" if counts[key] is None else f"{counts[key]:,}" for key in ("documents", "bytes", "tokens")]
            ratio = "?" if counts["bytes"] is None else f"{counts['bytes'] / counts['tokens']:.2f}"
            rows.append([name + side, *cells, ratio])
    note = f"vocabulary: {description['vocabulary_size']:,} tokens\n\n{description['sample']} ..."
    return TextTable(rows, note=note)
