"""String settings keep the text that the user wrote, even if hydra or YAML would read a number, a boolean or null.

`run.name=2026_07_20` is a name and not 20260720; `data.shards.cache=1e3` is a folder. The parsers lose the text, so
such values get quotes before hydra reads an override or a file. Values with quotes stay as they are, and so does `null`
if a setting may be empty.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import fields, is_dataclass, replace
from functools import lru_cache
from pathlib import Path
from types import NoneType
from typing import Any, ClassVar, cast, get_args, get_origin, get_type_hints

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

# Tokens that hydra does not read as a string.
NOT_TEXT = (OverrideLexer.INT, OverrideLexer.FLOAT, OverrideLexer.BOOL, OverrideLexer.NULL)
# The functions of hydra's grammar whose arguments are values of the setting.
OF_VALUES = ("choice", "shuffle", "sort")
# A group of configurations takes the name of one of its files.
GROUPS = ("experiment", *(field.name for field in fields(Config)))
TEXT_TAG = "tag:yaml.org,2002:str"
NULL_TAG = "tag:yaml.org,2002:null"

Edits = dict[int, tuple[int, str]]  # start index: (end index, replacement)


def quote_override(override: str) -> str:
    """An override as on the command line, with quotes around the values of string settings."""
    try:
        tree = _parse(override)
    except HydraException:  # hydra raises the same error when it reads the override
        return override
    key, value = tree.key(), tree.value()
    if value is None:
        return override
    name = key.getText()
    kind = str if name in GROUPS else _setting_type(name)
    elements = value.simpleChoiceSweep().element() if value.simpleChoiceSweep() else [value.element()]
    edits = {start: edit for element in elements for start, edit in _element_edits(element, kind)}
    return _apply_edits(override, edits)


def quote_yaml(text: str, package: str = "") -> str:
    """The text of a YAML file with quotes around the values of string settings. package: the section it belongs to."""
    try:
        root = compose_yaml(text)
    except yaml.YAMLError:  # the loader raises the same error
        return text
    return _apply_edits(text, dict(_node_edits(root, _setting_type(package), text))) if root else text


class TextKeepingSource(FileConfigSource):
    """Hydra's source of configuration files, changed to keep the text of string settings.

    loaded: what each text of a file holds; a command, and even more a sweep, composes the same files again.
    """

    loaded: ClassVar[dict[tuple[str, Path, str], ConfigResult]] = {}

    def load_config(self, config_path: str) -> ConfigResult:
        path = Path(self.path) / self._normalize_file_name(config_path)
        try:
            return self._load_checked(config_path, path)
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            raise ConfigError(f"{path} is not the YAML that it should be: {' '.join(str(error).split())}") from error

    def _load_checked(self, config_path: str, path: Path) -> ConfigResult:
        """Check the size and depth of the file, because hydra's reader has no limits, then load it."""
        text = read_bounded(path, YAML_BYTES).decode() if path.exists() else ""
        if (config_path, path, text) not in self.loaded:
            compose_yaml(text)
            self.loaded[config_path, path, text] = self._load_quoted(config_path, text)
        result = self.loaded[config_path, path, text]
        return replace(result, config=deepcopy(result.config), header=dict(result.header))

    def _load_quoted(self, config_path: str, text: str) -> ConfigResult:
        result = super().load_config(config_path)
        header, group = result.header["package"], config_path.replace("\\", "/").rpartition("/")[0]
        package = group.replace("/", ".") if header in (None, "_group_") else header.replace("_global_", "").strip(".")
        if (quoted := quote_yaml(text, package)) == text:
            return result
        return replace(result, config=OmegaConf.load(io.StringIO(quoted)))


def register_source() -> None:
    """Let hydra read files by `TextKeepingSource` from now on."""
    Plugins.instance()  # registers hydra's default source, which the next line replaces
    SourcesRegistry.instance().types[TextKeepingSource.scheme()] = TextKeepingSource


def _parse(override: str) -> Any:
    """The parse tree of an override in hydra's grammar. Raises HydraException."""
    listener = HydraErrorListener()
    lexer = OverrideLexer(InputStream(override))
    parser = OverrideParser(CommonTokenStream(lexer))
    for reader in (lexer, parser):
        reader.removeErrorListeners()
        reader.addErrorListener(listener)
    return parser.override()


def _element_edits(element: Any, kind: Any) -> Iterator[tuple[int, tuple[int, str]]]:
    if (primitive := element.primitive()) is not None:
        tokens = [child.symbol for child in primitive.getChildren() if child.symbol.type != OverrideLexer.WS]
        if len(tokens) == 1 and tokens[0].type in NOT_TEXT and _is_text(kind, tokens[0].type == OverrideLexer.NULL):
            yield tokens[0].start, (tokens[0].stop + 1, f"'{tokens[0].text}'")
    elif (items := element.listContainer()) is not None:
        for item in items.element():
            yield from _element_edits(item, _member_type(kind, "0"))
    elif (pairs := element.dictContainer()) is not None:
        for pair in pairs.dictKeyValuePair():
            yield from _element_edits(pair.element(), _member_type(kind, pair.dictKey().getText().strip()))
    elif (function := element.function()) is not None and function.ID().getText() in OF_VALUES:
        for argument in function.element():
            yield from _element_edits(argument, kind)


def _node_edits(node: yaml.Node, kind: Any, text: str) -> Iterator[tuple[int, tuple[int, str]]]:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            yield from _node_edits(value, _member_type(kind, str(key.value)), text)
    elif isinstance(node, yaml.SequenceNode):
        for value in node.value:
            yield from _node_edits(value, _member_type(kind, "0"), text)
    elif node.style is None and _is_text(kind) and not _stays_text(node):
        start, end = node.start_mark.index, node.end_mark.index
        if text[start] not in "&!":  # an anchor or a tag
            yield start, (end, "'" + node.value.replace("'", "''") + "'")


def _stays_text(node: yaml.ScalarNode) -> bool:
    """True if a value without quotes is loaded as text or null. OmegaConf reads more texts as floats than YAML does."""
    try:
        float(node.value)
    except ValueError:
        return node.tag in (TEXT_TAG, NULL_TAG)
    return False


def _apply_edits(text: str, edits: Edits) -> str:
    for start in sorted(edits, reverse=True):
        end, new = edits[start]
        text = text[:start] + new + text[end:]
    return text


def _setting_type(name: str) -> Any:
    """The type of a dotted setting; `Config` for an empty name, None for an unknown setting."""
    kind: Any = Config
    for part in name.split(".") if name else ():
        kind = _member_type(kind, part)
    return kind


def _member_type(kind: Any, name: str) -> Any:
    """The type of a field of a dataclass, an item of a list or a value of a dict; None if there is none."""
    kind = _without_none(kind)
    if is_dataclass(kind):
        return _hints(cast(Any, kind)).get(name)
    return get_args(kind)[-1] if get_origin(kind) in (list, dict) else None


@lru_cache
def _hints(kind: type) -> dict[str, Any]:
    """The types of a dataclass's fields."""
    return get_type_hints(kind)


def _is_text(kind: Any, is_null: bool = False) -> bool:
    return _without_none(kind) is str and not (is_null and kind is not str)


def _without_none(kind: Any) -> Any:
    """The type T of `T | None`; any other type unchanged."""
    others = [member for member in get_args(kind) if member is not NoneType]
    return others[0] if NoneType in get_args(kind) else kind
