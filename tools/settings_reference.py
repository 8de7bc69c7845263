"""Update the tables of docs/configuration.md from the declarations of the settings."""

from __future__ import annotations

from pathlib import Path

from sleeptrain.config.reference import with_tables

PAGE = Path(__file__).resolve().parents[1] / "docs" / "configuration.md"


def main() -> None:
    PAGE.write_text(with_tables(PAGE.read_text()))


if __name__ == "__main__":
    main()
