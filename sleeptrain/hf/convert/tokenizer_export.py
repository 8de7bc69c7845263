"""Find, write and check the tokenizer of an export."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sleeptrain.config.schema import Config
from sleeptrain.data.tokenizer import Tokenizer, load_tokenizer
from sleeptrain.errors import DataError
from sleeptrain.hf.convert.corpus import sampled_documents
from sleeptrain.hf.convert.fast_tokenizer import fast_files
from sleeptrain.hf.convert.tokenizer_check import check_tokenizer


@dataclass(frozen=True)
class Tokenizers:
    """The tokenizers of an export.

    place: path of `exported`.
    exported: the tokenizer to write.
    trained: the tokenizer of training; `exported` if it is unknown.
    """

    place: Path
    exported: Tokenizer
    trained: Tokenizer

    @property
    def ids(self) -> dict[str, int | None]:
        """Ids of BOS and EOS for `config.json` and `generation_config.json`."""
        return {"bos_token_id": self.trained.bos_id, "eos_token_id": self.trained.eos_id}


def find_tokenizers(config: Config, path: Path | None, trained: str | None) -> Tokenizers | None:
    """The tokenizers of an export; None for a task without `path`.

    path: tokenizer that replaces the run's. trained: sha256 of the tokenizer of training, None if it is unknown. Raises
    DataError: there is no tokenizer, or the one of training is not there to compare the ids.
    """
    run_path = config.data.shards.tokenizer if config.data.source == "shards" else ""
    if path is None and not run_path:
        return None
    place = path or Path(run_path)
    try:
        exported = load_tokenizer(place)
    except DataError as error:
        raise DataError(f"{error}; name it with --tokenizer, or use --no-tokenizer") from error
    if trained == exported.hash:
        return Tokenizers(place, exported, exported)
    reference = exported if path is None else _readable(run_path)
    if trained is None:
        return Tokenizers(place, exported, reference or exported)
    if reference is None or reference.hash != trained:
        raise DataError(
            f"tokenizer {place} (sha256 {exported.hash}) is not that of the training ({trained}), and that one is not "
            "there to compare its ids; name it with --tokenizer, or use --no-tokenizer"
        )
    return Tokenizers(place, exported, reference)


def _readable(path: str) -> Tokenizer | None:
    try:
        return load_tokenizer(Path(path)) if path else None
    except DataError:
        return None


def write_tokenizer(folder: Path, tokenizers: Tokenizers, config: Config) -> int:
    """Write the tokenizer into the folder of the export. Returns the number of documents whose ids were compared.

    Raises DataError: the ids differ.
    """
    for name, content in fast_files(tokenizers.exported).items():
        (folder / name).write_bytes(content)
    documents = sampled_documents(config.data.shards, tokenizers.trained) if config.data.source == "shards" else []
    check_tokenizer(folder, tokenizers.trained, documents)
    return len(documents)
