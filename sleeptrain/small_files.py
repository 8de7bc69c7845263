"""Readers for small JSON and YAML files that need not be trusted: limits on size, depth and repeated aliases.

Python's readers recurse into brackets until the stack is full. They also return a small tree of YAML aliases that
expands to a huge one when code walks it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import yaml

from sleeptrain.errors import DataError
from sleeptrain.plain_files import require_plain
from sleeptrain.remote import Location

# The largest vocabularies take 35 MB; the index of a corpus 300 bytes a shard.
JSON_BYTES = 256 * 2**20
# A file that describes a model or a checkpoint. The longest list of tensors takes 10 MB.
SETTINGS_BYTES = 32 * 2**20
# A resolved configuration takes 10 kB. Reading takes a second for 50 kB.
YAML_BYTES = 2**18
DEPTH = 64
# Values in a YAML file; the values of an alias count each time it is used.
YAML_VALUES = 100_000


def parse_json(content: bytes | str) -> Any:
    """The value of a JSON text. Raises ValueError, with a readable message: not JSON, too large or too deep."""
    if len(content) > JSON_BYTES:
        raise ValueError(f"it has {len(content):,} bytes, more than the {JSON_BYTES:,} that are read")
    try:
        value = json.loads(content)
    except RecursionError as error:
        raise ValueError(_too_deep()) from error
    if _brackets(content) > DEPTH:
        _check_depth(value)
    return value


def read_bounded(path: Location, most: int) -> bytes:
    """The content of a file.

    Raises DataError if it is no plain file, ValueError, with a readable message and before reading, if it has more than
    `most` bytes, and OSError.
    """
    require_plain(path)
    size = path.stat().st_size
    if size > most:
        raise ValueError(f"it has {size:,} bytes, more than the {most:,} that are read")
    return path.read_bytes()


def read_json(path: Location, way_out: str) -> dict[str, Any]:
    """The JSON object in a file of settings. Raises DataError, which ends in `way_out`, if it cannot be read."""
    try:
        value = parse_json(read_bounded(path, SETTINGS_BYTES))
        if not isinstance(value, dict):
            raise ValueError("it is no object")
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}; {way_out}") from error
    except ValueError as error:
        raise DataError(f"{path} is not the JSON that it should be: {error}; {way_out}") from error
    return value


def parse_yaml(content: bytes | str, loader: Any = yaml.SafeLoader) -> Any:
    """The value of a YAML text. Raises YAMLError if it is not YAML, too large or too deep."""
    reader = loader(_check_size(content))
    try:
        node = compose_checked(reader)
        return None if node is None else reader.construct_document(node)
    except RecursionError as error:
        raise yaml.YAMLError(_too_deep()) from error
    finally:
        reader.dispose()


def compose_yaml(text: str) -> yaml.Node | None:
    """The node tree of a YAML text; the node of an alias appears in it several times. Raises as `parse_yaml`."""
    reader = yaml.SafeLoader(_check_size(text))
    try:
        return compose_checked(reader)
    finally:
        reader.dispose()


def compose_checked(reader: Any) -> yaml.Node | None:
    """The node tree that a YAML loader composes. Raises YAMLError if it is too large or too deep."""
    try:
        node = reader.get_single_node()
        if node is not None:
            _measure(node, {}, 0)
    except (RecursionError, ValueError) as error:
        raise yaml.YAMLError(_too_deep() if isinstance(error, RecursionError) else str(error)) from error
    return node


def _check_size(content: bytes | str) -> bytes | str:
    if len(content) > YAML_BYTES:
        raise yaml.YAMLError(f"it has {len(content):,} bytes, more than the {YAML_BYTES:,} that are read")
    return content


def _too_deep() -> str:
    return f"it is nested deeper than {DEPTH} levels"


def _brackets(content: bytes | str) -> int:
    """The number of opening brackets, an upper bound of the depth."""
    if isinstance(content, bytes):
        return content.count(b"[") + content.count(b"{")
    return content.count("[") + content.count("{")


def _check_depth(value: Any) -> None:
    """Raises ValueError if the value is too deep. Goes level by level, without recursion."""
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(DEPTH):
        level = [item for outer in level for item in _items(outer) if isinstance(item, dict | list)]
        if not level:
            return
    raise ValueError(_too_deep())


def _items(outer: dict[str, Any] | list[Any]) -> Any:
    return outer.values() if isinstance(outer, dict) else outer


def _measure(node: yaml.Node, known: dict[int, tuple[int, int] | None], depth: int) -> tuple[int, int]:
    """(number of values, number of levels) of a tree. Raises ValueError if it is too large or too deep.

    known: the results by node id; None for a node whose measurement is in progress. depth: levels above `node`.
    """
    if depth > DEPTH:
        raise ValueError(_too_deep())
    if id(node) not in known:
        known[id(node)] = None
        sizes = [_measure(child, known, depth + 1) for child in _children(node)]
        known[id(node)] = 1 + sum(n for n, _ in sizes), 1 + max((height for _, height in sizes), default=0)
    size = known[id(node)]
    if size is None:
        raise ValueError("an alias in it refers to a part of the file that contains it")
    if depth + size[1] - 1 > DEPTH:
        raise ValueError(_too_deep())
    if size[0] > YAML_VALUES:
        raise ValueError(f"its aliases expand it to more than {YAML_VALUES:,} values")
    return size


def _children(node: yaml.Node) -> Sequence[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        return [child for pair in node.value for child in pair]
    return node.value if isinstance(node, yaml.SequenceNode) else ()
