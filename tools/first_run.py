"""The whole way of a small model, from text to a page: `make train` runs `python tools/first_run.py`.

    python tools/first_run.py [--root runs/first] [--data data/stdlib] [--brief]

It prepares token shards of Python's standard library, trains a model that sleeps on them as two pipeline processes,
kills them and goes on from the checkpoint. It trains two models on Rule 110, with four passes and with one, to show
what sleep is for. It exports the text model, generates with it, and writes one page about all three runs. A call that
was interrupted goes on where it was; a stage that is complete is not repeated. --brief: a few steps of each run.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from sleeptrain.checkpoint.folder import MANIFEST
from sleeptrain.config.overrides import override, shell_command
from sleeptrain.errors import UserError
from sleeptrain.terminal import say
from sleeptrain.train.logging.metrics import read_metrics
from sleeptrain.train.status import is_finished

ROOT = Path(__file__).resolve().parents[1]
STAGES = 7
PROMPT = "def main("
BRIEF_TEXT = [
    "train.tokens=65_536", "sleep.curriculum=[{tokens: 32_768, passes: 2}]", "train.eval_every=4",
    "train.eval_batches=1", "checkpoint.every=2", "train.log_every=1",
]  # fmt: skip
BRIEF_TASK = ["train.tokens=10_752", "train.eval_every=2", "data.rule110.validation_samples=64"]


@dataclass(frozen=True)
class FirstRun:
    """The places of the files, and whether runs take a few steps only."""

    root: Path
    data: Path
    brief: bool

    @property
    def text(self) -> Path:
        return self.root / "text"

    @property
    def exported(self) -> Path:
        return self.root / "exported"

    @property
    def page(self) -> Path:
        return self.root / "report" / "index.html"

    def task(self, passes: int) -> Path:
        return self.root / f"rule110_n{passes}"

    def run(self) -> None:
        """Run all stages. Raises UserError if one fails."""
        self.root.mkdir(parents=True, exist_ok=True)
        _announce(1, f"corpus, tokenizer and token shards: Python's standard library in {self.data}")
        _call([sys.executable, str(ROOT / "tools" / "prepare.py"), "--stdlib", "--out", str(self.data)])
        _announce(2, "train on this text as two pipeline processes; one pass over each window, then two, then four")
        if not is_finished(self.text):
            if not self._checkpoints():
                self._train_and_kill()
            _announce(3, "the same command goes on from the newest checkpoint")
            _call(self._text_command())
        _announce(4, "a task where sleep helps: Rule 110 with four passes and with one, a run on each core")
        self._train_tasks()
        _announce(5, f"export the text model to {self.exported} in Hugging Face's format, and compare the logits")
        if not self.exported.exists():
            _call(_sleeptrain("convert", "export", self.text, self.exported))
        _announce(6, f"generate with the exported model, which sleeps after each window: {PROMPT}")
        _call(_sleeptrain("generate", self.exported, "--prompt", PROMPT, "--max-new-tokens", "160", "--passes", "4"))
        _announce(7, "a page about the three runs")
        runs = [self.task(4), self.task(1), self.text]
        out = [f"--out={self.page.parent}", "--title=First run"]
        _call(_sleeptrain("report", *runs, *out))

    def _text_command(self) -> list[str]:
        shards = {side: str(self.data / side) for side in ("train", "validation")}
        words = [
            override("run.root", str(self.root)), "run.name=text",
            override("data.shards.tokenizer", str(self.data / "tokenizer.model")),
            override("data.shards.sources", [shards]),
        ]  # fmt: skip
        return _sleeptrain("train", "experiment=first_text", *words, *(BRIEF_TEXT if self.brief else []))

    def _train_and_kill(self) -> None:
        """Train until there is a checkpoint and a step after it, and kill the run without a warning."""
        command = self._text_command()
        say(f"$ {shell_command(*command)}", flush=True)
        with subprocess.Popen(command, cwd=ROOT) as process:
            while not self._checkpoints():
                if process.poll() is not None:
                    raise UserError(f"the training of {self.text} ended with code {process.returncode}")
                time.sleep(0.2)
            process.kill()
        say(f"killed on purpose, with SIGKILL, after it had saved {self._checkpoints()[-1].name}", flush=True)

    def _checkpoints(self) -> list[Path]:
        """The whole checkpoints of the text model after its first step, oldest first."""
        found = sorted(manifest.parent for manifest in self.text.glob(f"checkpoints/step-*/{MANIFEST}"))
        return [folder for folder in found if not folder.name.endswith("-00000000")]

    def _train_tasks(self) -> None:
        todo = [passes for passes in (4, 1) if not is_finished(self.task(passes))]
        with ThreadPoolExecutor() as pool:
            list(pool.map(self._train_task, todo))
        for passes in (4, 1):
            accuracy = [r["eval"]["accuracy"] for r in read_metrics(self.task(passes) / "metrics.jsonl") if "eval" in r]
            shown = ", ".join(f"{100 * value:.1f} % with N={n}" for n, value in accuracy[-1].items())
            say(f"trained with N={passes}: {shown} of held-out answers are right", flush=True)

    def _train_task(self, passes: int) -> None:
        folder, log = self.task(passes), self.task(passes).with_suffix(".log")
        words = [override("run.root", str(self.root)), f"run.name={folder.name}", f"sleep.passes={passes}"]
        more = ["train.threads=1", *(BRIEF_TASK if self.brief else [])]
        _call(_sleeptrain("train", "experiment=first_rule110", *words, *more), log)


def _announce(stage: int, text: str) -> None:
    say(f"\n[{stage}/{STAGES}] {text}", flush=True)


def _sleeptrain(*words: str | Path) -> list[str]:
    return [sys.executable, "-m", "sleeptrain", *map(str, words)]


def _call(command: Sequence[str], log: Path | None = None) -> None:
    """Run a command; its output goes to the terminal or to a log. Raises UserError with its code if it fails."""
    say(f"$ {shell_command(*command)}{f' > {shell_command(log)}' if log else ''}\n", end="", flush=True)
    if log is None:
        code = subprocess.run(command, cwd=ROOT, check=False).returncode
    else:
        with open(log, "a") as file:
            code = subprocess.run(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, check=False).returncode
    if code:
        see = f"; see {log}" if log else ""
        raise UserError(f"this command ended with code {code}{see}: {shell_command(*command)}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=Path("runs/first"), help="the folder of runs, export and page")
    parser.add_argument("--data", type=Path, default=Path("data/stdlib"), help="the folder of the token shards")
    parser.add_argument("--brief", action="store_true", help="a few steps of each run, to see the stages")
    arguments = parser.parse_args()
    start, first = time.monotonic(), FirstRun(arguments.root.absolute(), arguments.data.absolute(), arguments.brief)
    try:
        first.run()
    except UserError as error:
        say(f"first_run: {error}", sys.stderr)
        return 2
    except KeyboardInterrupt:
        say("first_run: interrupted; the same call goes on", sys.stderr)
        return 130
    minutes = (time.monotonic() - start) / 60
    say(f"\n{minutes:.1f} minutes. The page: {first.page}; runs and the exported model: {first.root}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
