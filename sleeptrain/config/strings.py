"""String settings are what was written, also where hydra or YAML would read a number, a boolean or nothing.

`run.name=2026_07_20` is a name and not 20260720, `data.shards.cache=1e3` is a folder. What is written is known only
where it is read, so before hydra reads an override or a file, such values get quotes. Values that have some, and `null`
where a setting may be empty, stay.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_origin, get_type_hints

import yaml
from antlr4 import CommonTokenStream, InputStream
from hydra._internal.core_plugins.file_config_source import FileConfigSource
from hydra._internal.sources_registry import SourcesRegistry
from hydra.core.override_parser.overrides_visitor import HydraErrorListener
from hydra.core.plugins import Plugins
from hydra.errors import HydraException
from hydra.grammar.gen.OverrideLexer import OverrideLexer
from hydra.grammar.gen.OverrideParser import OverrideParser
from hydra.plugins.config_source import ConfigResult
from omegaconf import OmegaConf

from sleeptrain.config.schema import Config
from sleeptrain.errors import ConfigError
from sleeptrain.small_files import YAML_BYTES, compose_yaml, read_bounded

# What hydra reads as something else than a string.
NOT_TEXT = (OverrideLexer.INT, OverrideLexer.FLOAT, OverrideLexer.BOOL, OverrideLexer.NULL)
# The functions of hydra's grammar whose arguments are values of the setting.
OF_VALUES = ("choice", "shuffle", "sort")
# A group of configurations takes the name of one of its files.
GROUPS = ("experiment", *(field.name for field in fields(Config)))
TEXT_TAG = "tag:yaml.org,2002:str"
NULL_TAG = "tag:yaml.org,2002:null"

Edits = dict[int, tuple[int, str]]  # by where it begins: (where it ends, what takes its place)


def quote_override(override: str) -> str:
    """An override as on the command line, with quotes around what its setting takes as text."""
    try:
        tree = _parse(override)
    except HydraException:  # hydra says why when it reads it
        return override
    key, value = tree.key(), tree.value()
    if value is None:
        return override
    name = key.getText()
    kind = str if name in GROUPS else _kind_at(name)
    elements = value.simpleChoiceSweep().element() if value.simpleChoiceSweep() else [value.element()]
    return _edited(override, {at: edit for element in elements for at, edit in _in_element(element, kind)})


def quote_yaml(text: str, package: str = "") -> str:
    """A file's text with quotes around what its settings take as text. package: where in the configuration it goes."""
    try:
        root = compose_yaml(text)
    except yaml.YAMLError:  # whoever loads it says why
        return text
    return _edited(text, dict(_in_node(root, _kind_at(package), text))) if root else text


class TextKeepingSource(FileConfigSource):
    """Hydra's source of configuration files, which reads string settings as they are written."""

    def load_config(self, config_path: str) -> ConfigResult:
        path = Path(self.path) / self._normalize_file_name(config_path)
        try:
            return self._load_checked(config_path, path)
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            raise ConfigError(f"{path} is not the YAML that it should be: {' '.join(str(error).split())}") from error

    def _load_checked(self, config_path: str, path: Path) -> ConfigResult:
        """Hydra's own reader follows aliases and brackets as far as they go, so the file is looked at first."""
        text = read_bounded(path, YAML_BYTES).decode() if path.exists() else ""
        compose_yaml(text)
        result = super().load_config(config_path)
        header, group = result.header["package"], config_path.replace("\\", "/").rpartition("/")[0]
        package = group.replace("/", ".") if header in (None, "_group_") else header.replace("_global_", "").strip(".")
        if (kept := quote_yaml(text, package)) == text:
            return result
        return replace(result, config=OmegaConf.load(io.StringIO(kept)))


def register_source() -> None:
    """Files are read by it from now on."""
    Plugins.instance()  # which registers hydra's own
    SourcesRegistry.instance().types[TextKeepingSource.scheme()] = TextKeepingSource


def _parse(override: str) -> Any:
    """The tree of hydra's grammar. Raises HydraException."""
    listener = HydraErrorListener()
    lexer = OverrideLexer(InputStream(override))
    parser = OverrideParser(CommonTokenStream(lexer))
    for reader in (lexer, parser):
        reader.removeErrorListeners()
        reader.addErrorListener(listener)
    return parser.override()


def _in_element(element: Any, kind: Any) -> Iterator[tuple[int, tuple[int, str]]]:
    if (primitive := element.primitive()) is not None:
        tokens = [child.symbol for child in primitive.getChildren() if child.symbol.type != OverrideLexer.WS]
        if len(tokens) == 1 and tokens[0].type in NOT_TEXT and _is_text(kind, tokens[0].type == OverrideLexer.NULL):
            yield tokens[0].start, (tokens[0].stop + 1, f"'{tokens[0].text}'")
    elif (items := element.listContainer()) is not None:
        for item in items.element():
            yield from _in_element(item, _inside(kind, "0"))
    elif (pairs := element.dictContainer()) is not None:
        for pair in pairs.dictKeyValuePair():
            yield from _in_element(pair.element(), _inside(kind, pair.dictKey().getText().strip()))
    elif (function := element.function()) is not None and function.ID().getText() in OF_VALUES:
        for argument in function.element():
            yield from _in_element(argument, kind)


def _in_node(node: yaml.Node, kind: Any, text: str) -> Iterator[tuple[int, tuple[int, str]]]:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            yield from _in_node(value, _inside(kind, str(key.value)), text)
    elif isinstance(node, yaml.SequenceNode):
        for value in node.value:
            yield from _in_node(value, _inside(kind, "0"), text)
    elif node.style is None and _is_text(kind) and not _stays_text(node):
        start, end = node.start_mark.index, node.end_mark.index
        if text[start] not in "&!":  # an anchor or a tag
            yield start, (end, "'" + node.value.replace("'", "''") + "'")


def _stays_text(node: yaml.ScalarNode) -> bool:
    """Whether a value without quotes is text, or null, also where it is loaded: omegaconf knows more floats."""
    try:
        float(node.value)
    except ValueError:
        return node.tag in (TEXT_TAG, NULL_TAG)
    return False


def _edited(text: str, edits: Edits) -> str:
    for start in sorted(edits, reverse=True):
        end, new = edits[start]
        text = text[:start] + new + text[end:]
    return text


def _kind_at(name: str) -> Any:
    """The type of a dotted setting, of all of them where there is no name; None where there is no such setting."""
    kind: Any = Config
    for part in name.split(".") if name else ():
        kind = _inside(kind, part)
    return kind


def _inside(kind: Any, name: str) -> Any:
    """The type of one field, item or entry of what has a type."""
    kind = _some(kind)
    if is_dataclass(kind):
        return get_type_hints(kind).get(name)
    return get_args(kind)[-1] if get_origin(kind) in (list, dict) else None


def _is_text(kind: Any, is_null: bool = False) -> bool:
    return _some(kind) is str and not (is_null and kind is not str)


def _some(kind: Any) -> Any:
    """Without None, where that is allowed."""
    others = [one for one in get_args(kind) if one is not NoneType]
    return others[0] if NoneType in get_args(kind) else kind
