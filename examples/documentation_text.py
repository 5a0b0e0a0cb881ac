"""The English text that examples/train_tiny_moe.py learns from: the documentation inside CPython's standard library.

Two sources, both on every machine that runs Python and both under the PSF licence: the language reference topics that
`help()` shows (module pydoc_data.topics), and the docstrings of the standard library's Python files, which
are parsed and not imported. Nothing is downloaded. The order is fixed, so one Python version gives one text.

A fixed part of the topics is held out. The reference repeats itself (the topic "specialnames" contains the topic
"context-managers" whole), so a paragraph that has been seen once is dropped wherever it comes again, and the held-out
topics are read first: no paragraph of theirs remains in the training text.
"""

import ast
import hashlib
import re
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics

HELD_OUT_BUCKETS = (2, 5)  # of 10, by the hash of the topic's name
MAX_HELD_OUT_CHARS = 60_000
MIN_DOCSTRING_CHARS = 80
MIN_REPEATED_CHARS = 30  # shorter paragraphs ("For example:") may repeat

NOT_DOCUMENTATION = frozenset(
    ("site-packages", "dist-packages", "ensurepip", "distutils", "encodings", "pydoc_data", "test", "tests")
)
APPLICATIONS = frozenset(("idlelib", "lib2to3", "turtledemo"))


@dataclass(frozen=True)
class DocumentationText:
    """Documents for training, and the held-out documents; no paragraph is in both."""

    train: tuple[str, ...]
    held_out: tuple[str, ...]


def read_documentation() -> DocumentationText:
    """Reads, splits and de-duplicates the documentation of the running Python. Takes about 4 seconds."""
    seen: set[str] = set()
    names = sorted(topics)
    held_out_names = [name for name in names if is_held_out(name)]
    held_out = _cap([_drop_seen(topics[name], seen) for name in held_out_names], MAX_HELD_OUT_CHARS)
    train = [_drop_seen(topics[name], seen) for name in names if name not in held_out_names]
    train += [_drop_seen(text, seen) for text in _docstring_documents()]
    return DocumentationText(tuple(filter(None, train)), tuple(filter(None, held_out)))


def is_held_out(topic_name: str) -> bool:
    """Whether the topic belongs to the held-out part; depends on its name only."""
    digest = hashlib.sha256(topic_name.encode()).hexdigest()
    return int(digest, 16) % 10 in HELD_OUT_BUCKETS


def paragraph_key(paragraph: str) -> str:
    """The paragraph without regard to case and line breaks."""
    return " ".join(paragraph.lower().split())


def _drop_seen(text: str, seen: set[str]) -> str:
    """The text without the paragraphs in `seen`; adds its own paragraphs to `seen`."""
    kept = []
    for paragraph in re.split(r"\n[ \t]*\n", text.strip("\n")):
        key = paragraph_key(paragraph)
        if not key or (key in seen and len(key) >= MIN_REPEATED_CHARS):
            continue
        seen.add(key)
        kept.append(paragraph.rstrip())
    return "\n\n".join(kept)


def _cap(texts: list[str], max_chars: int) -> list[str]:
    """The longest prefix of `texts` whose lengths add up to at most `max_chars`."""
    kept, total = [], 0
    for text in texts:
        total += len(text)
        if total > max_chars:
            break
        kept.append(text)
    return kept


def _docstring_documents() -> Iterator[str]:
    """One document for each standard library file with docstrings: a title, then the docstrings, outermost first."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if (NOT_DOCUMENTATION | APPLICATIONS).intersection(parts) or parts[0].startswith("config-"):
            continue
        title = 'The "' + ".".join(parts).removesuffix(".py").removesuffix(".__init__") + '" module'
        docstrings = list(_docstrings(path))
        if docstrings:
            yield "\n\n".join([f"{title}\n{'*' * len(title)}", *docstrings])


def _docstrings(path: Path) -> Iterator[str]:
    """The docstrings of one file that are long enough to be prose. A file that this Python cannot parse has none."""
    try:
        tree = ast.parse(path.read_bytes())
    except SyntaxError:
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text and len(text) >= MIN_DOCSTRING_CHARS:
                yield text
