"""The tokenizer of an export: which one, and that it gives the ids that training saw."""

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
    """exported: the one to write, which is at `place`. trained: the one whose ids training saw, as far as is known."""

    place: Path
    exported: Tokenizer
    trained: Tokenizer

    @property
    def ids(self) -> dict[str, int | None]:
        """For `config.json` and `generation_config.json`."""
        return {"bos_token_id": self.trained.bos_id, "eos_token_id": self.trained.eos_id}


def find_tokenizers(config: Config, path: Path | None, trained: str | None) -> Tokenizers | None:
    """None for a task, unless another tokenizer is named.

    path: of another one than the run's. trained: the sha256 of the one that training used, where it is known. Raises
    DataError where there is none to be found, or where its ids cannot be compared with those of training.
    """
    own = config.data.shards.tokenizer if config.data.source == "shards" else ""
    if path is None and not own:
        return None
    place = path or Path(own)
    try:
        exported = load_tokenizer(place)
    except DataError as error:
        raise DataError(f"{error}; name it with --tokenizer, or use --no-tokenizer") from error
    if trained == exported.hash:
        return Tokenizers(place, exported, exported)
    reference = exported if path is None else _readable(own)
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


def write_tokenizer(folder: Path, found: Tokenizers, config: Config) -> int:
    """Writes the tokenizer beside the export's other files; the number of documents on which its ids were compared.

    Raises DataError where they differ.
    """
    for name, content in fast_files(found.exported).items():
        (folder / name).write_bytes(content)
    documents = sampled_documents(config.data.shards, found.trained) if config.data.source == "shards" else []
    check_tokenizer(folder, found.trained, documents)
    return len(documents)
