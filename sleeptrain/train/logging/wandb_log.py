"""Weights & Biases: the run's records on a dashboard, or offline in the run folder until `wandb sync` uploads them.

wandb is only a view of the metrics file. If it fails, one warning is logged, wandb is off, and the run goes on.
"""

from __future__ import annotations

import netrc
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from sleeptrain.config.schema import WandbConfig
from sleeptrain.errors import ConfigError
from sleeptrain.terminal import log_printable

logger = log_printable(__name__)

MODES = ("auto", "online", "offline", "disabled")

# Seconds to wait for the server at the start, and for the last upload at the end. A timeout loses nothing: the files
# stay in the run folder.
INIT_TIMEOUT = 30.0
FINISH_TIMEOUT = 60.0


class WandbLogger:
    """One wandb run. Files go to `<run_dir>/wandb`.

    config_dict: the run's settings, for the dashboard.
    run_id: the id of the run to resume, from its checkpoint, so a requeued job stays one run; None starts a new run.
    Mode `auto` is WANDB_MODE if set, else online if a key is configured (WANDB_API_KEY, netrc or wandb's settings),
    else offline. Online falls back to offline, and offline to disabled, with a warning. Raises ConfigError for an
    unknown mode.
    """

    def __init__(
        self, config: WandbConfig, run_dir: Path | str, run_name: str, config_dict: dict[str, Any], run_id: str | None
    ):
        if config.mode not in MODES:
            raise ConfigError(f"wandb.mode is {config.mode!r}; it is one of {', '.join(MODES)}")
        self._run: Any = None
        self._run_id = run_id
        if config.mode == "disabled" or (config.mode == "auto" and os.environ.get("WANDB_MODE") == "disabled"):
            return
        # Not left to wandb: an offline run that replaces a failed online one must have the same id.
        new_id = run_id or secrets.token_hex(6)
        arguments = {
            "project": config.project,
            "entity": config.entity,
            "name": run_name,
            "id": new_id,
            "resume": "allow",
            "dir": str(run_dir),
            "config": config_dict,
        }
        self._run = _start(config.mode, arguments)
        if self._run is not None:
            self._run_id = new_id
            self._define_axis()

    @property
    def run_id(self) -> str | None:
        """The id to store for the next start; None if wandb never ran."""
        return self._run_id

    def log(self, record: dict[str, Any], made: int) -> None:
        """Add a record.

        made: the steps so far, including steps undone by rollbacks, since wandb refuses a step that falls. Records with
        the same `made` become one row of the history. The x axis of charts is the record's `step`.
        """
        if self._run is None:
            return
        values = dict(flatten(record))
        try:
            self._run.log(values, step=made)
        except Exception as error:
            self._give_up(error)

    def _define_axis(self) -> None:
        try:
            self._run.define_metric("*", step_metric="step")
        except Exception as error:
            self._give_up(error)

    def finish(self) -> None:
        """Complete the files and, if online, the upload. May be called twice."""
        if self._run is None:
            return
        run, self._run = self._run, None
        try:
            run.finish()
        except Exception as error:
            logger.warning("wandb did not finish cleanly (%s); its files are in the run folder", _reason(error))

    def _give_up(self, error: Exception) -> None:
        logger.warning("wandb failed and is off from here on (%s); the metrics file goes on", _reason(error))
        self._run = None


def flatten(record: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the scalars of a record under path names: eval.loss["4"][1] becomes eval/loss/N4/window2.

    wandb plots no lists. Values that are None (a window without targets, an unknown MFU) are skipped.
    """
    for key, value in record.items():
        name = f"{prefix}N{key}" if key.isdigit() else f"{prefix}{key}"
        if isinstance(value, dict):
            yield from flatten(value, f"{name}/")
        elif isinstance(value, list):
            yield from flatten({f"window{index}": item for index, item in enumerate(value, start=1)}, f"{name}/")
        elif value is not None:
            yield name, value


def _start(mode: str, arguments: dict[str, Any]) -> Any:
    """Start a wandb run in this mode or, if that fails, a mode that it falls back to; None if wandb cannot start."""
    try:
        import wandb  # not at the top: it takes half a second

        credentials = _credentials(wandb)
        if mode == "auto":
            requested = os.environ.get("WANDB_MODE")
            mode = requested if requested in MODES else "offline" if credentials is None else "online"
        if mode == "online" and (run := _try_online(wandb, credentials, arguments)) is not None:
            return run
        return wandb.init(mode="offline", settings=_settings(wandb), **arguments)
    except Exception as error:
        logger.warning("wandb cannot start and is off (%s); the metrics file is kept all the same", _reason(error))
        return None


def _try_online(wandb: Any, credentials: dict[str, str] | None, arguments: dict[str, Any]) -> Any:
    if credentials is None:  # wandb would prompt for a key on a terminal, and wait
        logger.warning("wandb should be online but no key is configured (`wandb login`); logging offline")
        return None
    try:
        return wandb.init(mode="online", settings=_settings(wandb, **credentials), **arguments)
    except Exception as error:
        logger.warning("wandb is not reachable (%s); logging offline, `wandb sync` uploads it later", _reason(error))
        wandb.teardown()  # wandb's service still has the failed run
        return None


def _settings(wandb: Any, **credentials: str) -> Any:
    # Silent: wandb's output would break the progress line. Console off: that line is no log to upload.
    return wandb.Settings(
        init_timeout=INIT_TIMEOUT, finish_timeout=FINISH_TIMEOUT, silent=True, console="off", **credentials
    )


def _credentials(wandb: Any) -> dict[str, str] | None:
    """The settings with which wandb logs in without a prompt: empty if it finds a key itself, else the netrc's key.

    None if no key is configured.
    """
    settings = wandb.setup().settings
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE") or settings.api_key:
        return {}
    hosts = [urlsplit(settings.base_url).netloc]
    if settings.base_url == type(settings).model_fields["base_url"].default:
        hosts.append("api.wandb.ai")  # the public server's name in netrc files, even if its address has changed
    key = _netrc_key(hosts)
    return None if key is None else {"api_key": key}


def _netrc_key(hosts: list[str]) -> str | None:
    candidates = [os.environ["NETRC"]] if os.environ.get("NETRC") else ["~/.netrc", "~/_netrc"]
    path = next((path for name in candidates if (path := Path(name).expanduser()).exists()), None)
    if path is None:
        return None
    try:
        entries = netrc.netrc(path)
    except (netrc.NetrcParseError, OSError) as error:
        logger.warning("%s cannot be read for a wandb key (%s)", path, _reason(error))
        return None
    logins = (entries.authenticators(host) for host in hosts)
    return next((login[2] for login in logins if login and login[2]), None)


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
