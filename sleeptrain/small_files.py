"""JSON and YAML in small files, which may be somebody else's: how large, how deep and how repetitive they may be.

Python's own readers follow brackets until the stack is full, and hand out a tree of YAML aliases that takes no room
until somebody walks it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from sleeptrain.errors import DataError
from sleeptrain.plain_files import require_plain

# The largest vocabularies take 35 MB; the index of a corpus 300 bytes a shard.
JSON_BYTES = 256 * 2**20
# Of what describes a model or a checkpoint: the longest list of tensors takes 10 MB.
SETTINGS_BYTES = 32 * 2**20
# A resolved configuration takes 10 kB. Reading takes a second for 50 kB.
YAML_BYTES = 2**18
DEPTH = 64
# The values in a file of YAML, those of an alias counted wherever it stands.
YAML_VALUES = 100_000


def parse_json(content: bytes | str) -> Any:
    """The value that JSON text tells. Raises ValueError, in words, for any other, a larger or a deeper one."""
    if len(content) > JSON_BYTES:
        raise ValueError(f"it has {len(content):,} bytes, more than the {JSON_BYTES:,} that are read")
    try:
        value = json.loads(content)
    except RecursionError as error:
        raise ValueError(_too_deep()) from error
    if _brackets(content) > DEPTH:
        _check_depth(value)
    return value


def read_bounded(path: Path, most: int) -> bytes:
    """The content of a file. Raises DataError for what is no plain file, ValueError, in words, for more bytes than
    `most`, of which none is read, and OSError."""
    require_plain(path)
    size = path.stat().st_size
    if size > most:
        raise ValueError(f"it has {size:,} bytes, more than the {most:,} that are read")
    return path.read_bytes()


def read_json(path: Path, way_out: str) -> dict[str, Any]:
    """The object in a file of settings. Raises DataError, which ends in `way_out`, where there is none."""
    try:
        found = parse_json(read_bounded(path, SETTINGS_BYTES))
        if not isinstance(found, dict):
            raise ValueError("it is no object")
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}; {way_out}") from error
    except ValueError as error:
        raise DataError(f"{path} is not the JSON that it should be: {error}; {way_out}") from error
    return found


def parse_yaml(content: bytes | str, loader: Any = yaml.SafeLoader) -> Any:
    """The value that a file of YAML tells. Raises YAMLError for any other, a larger or a deeper one."""
    reader = loader(_of_allowed_size(content))
    try:
        node = compose_checked(reader)
        return None if node is None else reader.construct_document(node)
    except RecursionError as error:
        raise yaml.YAMLError(_too_deep()) from error
    finally:
        reader.dispose()


def compose_yaml(text: str) -> yaml.Node | None:
    """The tree of a file of YAML, of which aliases are parts more than once. Raises as `parse_yaml`."""
    reader = yaml.SafeLoader(_of_allowed_size(text))
    try:
        return compose_checked(reader)
    finally:
        reader.dispose()


def compose_checked(reader: Any) -> yaml.Node | None:
    """The tree that a loader of YAML composes. Raises YAMLError where it is too large or too deep."""
    try:
        node = reader.get_single_node()
        if node is not None:
            _measure(node, {}, 0)
    except (RecursionError, ValueError) as error:
        raise yaml.YAMLError(_too_deep() if isinstance(error, RecursionError) else str(error)) from error
    return node


def _of_allowed_size(content: bytes | str) -> bytes | str:
    if len(content) > YAML_BYTES:
        raise yaml.YAMLError(f"it has {len(content):,} bytes, more than the {YAML_BYTES:,} that are read")
    return content


def _too_deep() -> str:
    return f"it is nested deeper than {DEPTH} levels"


def _brackets(content: bytes | str) -> int:
    """As many levels there are at most."""
    if isinstance(content, bytes):
        return content.count(b"[") + content.count(b"{")
    return content.count("[") + content.count("{")


def _check_depth(value: Any) -> None:
    """Level by level, without recursion."""
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(DEPTH):
        level = [item for outer in level for item in _items(outer) if isinstance(item, dict | list)]
        if not level:
            return
    raise ValueError(_too_deep())


def _items(outer: dict[str, Any] | list[Any]) -> Any:
    return outer.values() if isinstance(outer, dict) else outer


def _measure(node: yaml.Node, known: dict[int, tuple[int, int] | None], depth: int) -> tuple[int, int]:
    """The values in a tree, and its levels. known: of the nodes that were measured, None for those that are being
    measured. depth: the levels above."""
    if depth > DEPTH:
        raise ValueError(_too_deep())
    if id(node) not in known:
        known[id(node)] = None
        inside = [_measure(inner, known, depth + 1) for inner in _inside(node)]
        known[id(node)] = 1 + sum(n for n, _ in inside), 1 + max((height for _, height in inside), default=0)
    found = known[id(node)]
    if found is None:
        raise ValueError("an alias in it refers to what it is a part of")
    if depth + found[1] - 1 > DEPTH:
        raise ValueError(_too_deep())
    if found[0] > YAML_VALUES:
        raise ValueError(f"its aliases expand it to more than {YAML_VALUES:,} values")
    return found


def _inside(node: yaml.Node) -> Sequence[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        return [inner for pair in node.value for inner in pair]
    return node.value if isinstance(node, yaml.SequenceNode) else ()
