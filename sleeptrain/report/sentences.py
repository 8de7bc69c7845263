"""What a section's runs are, how they ended and what sleep did, in sentences: the first screen of a page."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from sleeptrain.config.schema import Config
from sleeptrain.report.curves import Band, Quantity, band, curve, guessing, quantities, span
from sleeptrain.report.groups import Group, Section, seeds
from sleeptrain.report.runs import ReadRun
from sleeptrain.report.style import number
from sleeptrain.report.tables import value_of
from sleeptrain.train.status import State

WORDS = ["no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]
MIXERS = {"gated_deltanet": "Gated DeltaNet", "mamba2": "Mamba-2", "jet": "JetBlock"}
JUDGED = {"rule110": "held-out rows", "depo": "held-out answers", "gsm_infinite": "held-out problems"}
FEW_GROUPS = 4  # more groups are counted, and their values left to the table
ONE_SEED = "one seed, so its spread is not known"


def sentences(section: Section) -> list[str]:
    """Paragraphs: what was trained and how it ended; failures; what sleep did, one for each difficulty."""
    paragraphs = [trained(section), " ".join(troubles(section.runs)), *effects(section)]
    return [paragraph for paragraph in paragraphs if paragraph]


def trained(section: Section) -> str:
    """`116k parameters (attention, Gated DeltaNet) on Rule 110 with 8 updates; ...`."""
    configs = [run.config for run in section.runs]
    finished = sum(run.finished for run in section.runs)
    total = len(section.runs)
    state = f"{in_words(finished)} of {in_words(total)} finished"
    if finished == total:
        state = "finished" if total == 1 else "both finished" if total == 2 else "all finished"
    steps = [run.records.furthest[0] for run in section.runs]
    how_far = f"{span(steps)} step{'' if max(steps) == 1 else 's'}"
    return f"{_model(section.runs)} on {_task(section, configs)}; {_compared(section)}, {state}, {how_far}."


def troubles(runs: Sequence[ReadRun]) -> list[str]:
    """A sentence for each kind of failure, with the number of runs; none if all finished without one."""
    unknown = [run for run in runs if run.status is None]
    failed = [run for run in runs if run.status is not None and run.status["state"] == State.FAILED]
    open_ = len(runs) - len(unknown) - len(failed) - sum(run.finished for run in runs)
    skipped = [run.records.skipped for run in runs if run.records.skipped]
    rolled_back = sum(bool(run.records.rollbacks or run.records.rolled_back) for run in runs)
    texts = [
        f"{_runs(len(failed))} FAILED." if failed else "",
        f"{_runs(open_)} {_is(open_)} not finished." if open_ else "",
        f"The state of {_runs(len(unknown)).lower()} is not known." if unknown else "",
        f"{_runs(len(skipped))} skipped steps: {sum(skipped):,} in all." if skipped else "",
        f"{_runs(rolled_back)} rolled back to a checkpoint." if rolled_back else "",
    ]
    return [text for text in texts if text]


def effects(section: Section) -> list[str]:
    """What sleep did: accuracy against N and guessing; without an accuracy the loss with sleep and kept awake."""
    if not any(run.evaluations for run in section.runs):
        return ["No evaluation yet: what sleep does is not known."]
    first = quantities(section)[0]
    if len(section.groups) > FEW_GROUPS * len(section.facets):
        texts = [f"{len(section.groups)} sets of settings: their last values are in the table."]
    elif first.share:
        texts = [_accuracies(section, title, groups, first) for title, groups in section.facets]
    else:
        texts = [_loss(section, group, first) for group in section.groups]
    return [*texts, *_rules(section)]


def in_words(count: int) -> str:
    return WORDS[count] if 0 <= count < len(WORDS) else f"{count:,}"


def passes(count: int) -> str:
    """`one pass`, `four passes`."""
    return f"{in_words(count)} pass{'' if count == 1 else 'es'}"


def listed(texts: Iterable[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    *others, last = texts
    return f"{', '.join(others)} and {last}" if others else last


def in_points(many: Band, few: Band, step: int) -> str:
    """What sleep adds at a step, in points of accuracy: two groups, against the spread of their seeds.

    It is `no difference` where the ranges of the two groups touch.
    """
    a, b = many.steps.index(step), few.steps.index(step)
    points = 100 * (many.mean[a] - few.mean[b])
    single = many.seeds == 1 and few.seeds == 1
    touching = many.low[a] <= few.high[b] and few.low[b] <= many.high[a]
    if (touching and not single) or abs(points) < 0.05:
        return "no difference" + ("" if single else " beyond the spread of the seeds")
    change = f"sleep adds {points:.1f} points" if points > 0 else f"sleep takes {-points:.1f} points away"
    return f"{change} ({ONE_SEED})" if single else change


def in_nats(lower_by: Sequence[float], num_seeds: int) -> str:
    """What sleep does to a loss. lower_by: for each run the loss kept awake minus the loss with sleep.

    It is `no difference` where the runs disagree on the sign.
    """
    mean, low, high = sum(lower_by) / len(lower_by), min(lower_by), max(lower_by)
    spread = f"{low:+.4f} to {high:+.4f} over {in_words(num_seeds)} seeds" if num_seeds > 1 else ONE_SEED
    if abs(mean) < 0.00005 or (num_seeds > 1 and low <= 0 <= high):
        return f"no difference ({spread})"
    return f"sleep {'lowers' if mean > 0 else 'RAISES'} it by {abs(mean):.4f} ({spread})"


def _model(runs: Sequence[ReadRun]) -> str:
    known = {run.parameters for run in runs if run.parameters is not None}
    layers = [kind for run in runs for kind in run.config.model.layers]
    mixers = ", ".join(MIXERS.get(kind, kind) for kind in dict.fromkeys(layers))
    sizes = " to ".join(number(float(f"{size:.3g}")) for size in sorted({min(known), max(known)})) if known else ""
    return f"{sizes} parameters ({mixers})" if sizes else f"A model ({mixers})"


def _task(section: Section, configs: Sequence[Config]) -> str:
    if section.source == "shards":
        return "text"
    if section.source != "rule110":
        return section.title
    mixed = configs[0].data.rule110.mixed_steps
    updates = mixed or sorted({config.data.rule110.steps for config in configs})
    what = "update" if updates == [1] else "updates"
    return f"{section.title} with {listed(map(str, updates))} {what}{' mixed' if mixed else ''}"


def _compared(section: Section) -> str:
    """`three seeds of N=1 and N=4`."""
    numbers = [len({seeds(run) for run in group.runs}) for group in section.groups]
    count = " to ".join(in_words(n) for n in sorted({min(numbers), max(numbers)}))
    count += " seed" if max(numbers) == 1 else " seeds"
    labels = section.labels
    return f"{count} of {listed(labels) if len(labels) <= FEW_GROUPS else f'{len(labels)} sets of settings'}"


def _accuracies(section: Section, title: str, groups: Sequence[Group], quantity: Quantity) -> str:
    """The sentences of one difficulty: N against N where the groups differ in it alone, else each with kept awake."""
    known = [(group, b) for group in groups if (b := band(group, quantity)).steps]
    judged = JUDGED[section.source]
    by_passes = {_most(group.runs[0].config): (group, b) for group, b in known if _only_passes(group)}
    if not known:
        texts = ["No step that all seeds have evaluated."]
    elif len(known) > 1 and len(by_passes) == len(known):
        texts = [_between(by_passes[max(by_passes)], by_passes[min(by_passes)], judged)]
    else:
        texts = [_within(group, b, quantity, judged, len(known) > 1) for group, b in known]
    levels = [level for levels in guessing(groups, quantity).values() for level in levels]
    if levels:
        texts.append(f"Guessing reaches {100 * max(levels):.1f} %.")
    return f"{title}: {' '.join(texts)}" if title else " ".join(texts)


def _only_passes(group: Group) -> bool:
    config = group.runs[0].config
    return group.label == f"N={config.sleep.passes}" and not config.sleep.curriculum


def _between(many: tuple[Group, Band], few: tuple[Group, Band], judged: str) -> str:
    """Two groups that were trained with different N, at the last step that both have evaluated."""
    (group, b), (other, c) = many, few
    n, m = _most(group.runs[0].config), _most(other.runs[0].config)
    common = sorted(set(b.steps) & set(c.steps))
    if not common:
        return f"With {passes(n)} and with {passes(m)} no step was evaluated in both."
    step = common[-1]
    at = "" if step == max(b.steps[-1], c.steps[-1]) else f"At step {step:,}, the last of both: "
    with_ = f"{'with' if at else 'With'} {passes(n)} {_share(b, step)} of {judged} are right{_spread(b, step)}"
    return f"{at}{with_}, with {passes(m)} {_share(c, step)}{_spread(c, step)}: {in_points(b, c, step)}."


def _within(group: Group, b: Band, quantity: Quantity, judged: str, named: bool) -> str:
    """A group by itself, against the same models kept awake."""
    most, step = _most(group.runs[0].config), b.steps[-1]
    head = f"{group.label}: " if named else f"With {_passes_of(group.runs[0].config)} "
    text = f"{head}{_share(b, step)} of {judged} are right{_spread(b, step)}"
    awake = band(group, quantity, awake=True)
    if most == 1:
        return f"{text}; no pass of sleep was trained."
    if step not in awake.steps:
        return f"{text}; not evaluated kept awake."
    return f"{text}, kept awake (one pass) {_share(awake, step)}{_spread(awake, step)}: {in_points(b, awake, step)}."


def _loss(section: Section, group: Group, quantity: Quantity) -> str:
    """The loss of a group's runs with sleep and kept awake, each run at its last evaluation."""
    where = quantity.title[0].lower() + quantity.title[1:]
    head = f"{group.label}: the" if len(section.groups) > 1 else f"With {_passes_of(group.runs[0].config)} the"
    pairs = [(run, asleep, curve(run, quantity, awake=True)) for run in group.runs if (asleep := curve(run, quantity))]
    if not pairs:
        return f"{head} {where} is not evaluated yet."
    mean = sum(asleep[max(asleep)] for _, asleep, _ in pairs) / len(pairs)
    text = f"{head} {where} is {value_of(mean, share=False)} {quantity.unit}"
    both = [(run, a[max(a)], w[max(a)]) for run, a, w in pairs if max(a) in w]
    if all(len(run.evaluations[-1]["eval"]["loss"]) == 1 for run, _, _ in pairs):
        return f"{text}; no pass of sleep was evaluated."
    if not both:
        return f"{text}; not evaluated kept awake."
    awake = sum(w for _, _, w in both) / len(both)
    change = in_nats([w - a for _, a, w in both], len({seeds(run) for run, _, _ in both}))
    return f"{text}, kept awake (one pass) {value_of(awake, share=False)}: {change}."


def _most(config: Config) -> int:
    """The largest N that was trained."""
    staged = [stage.passes for stage in config.sleep.curriculum if stage.passes is not None]
    return max(staged, default=config.sleep.passes)


def _passes_of(config: Config) -> str:
    if config.sleep.curriculum:
        return f"up to {passes(_most(config))}"
    return f"one to {passes(config.sleep.passes)}" if config.sleep.sample_passes else passes(config.sleep.passes)


def _rules(section: Section) -> list[str]:
    rules = {
        f"{run.config.sleep.stop}, threshold {run.config.sleep.stop_threshold:g}"
        for run in section.runs
        if run.config.sleep.stop != "fixed"
    }
    if not rules:
        return []
    taken = [n for run in section.runs for r in run.evaluations[-1:] for n in r["eval"].get("passes", {}).values()]
    mean = f": in the last evaluation after {sum(taken) / len(taken):.2f} passes in the mean" if taken else ""
    return [f"A stop rule ({'; '.join(sorted(rules))}) may end a row's sleep before N passes{mean}."]


def _share(b: Band, step: int) -> str:
    return f"{value_of(b.mean[b.steps.index(step)], share=True)} %"


def _spread(b: Band, step: int) -> str:
    at = b.steps.index(step)
    low, high = (value_of(series[at], share=True) for series in (b.low, b.high))
    return f" ({low} to {high})" if b.runs > 1 else ""


def _runs(count: int) -> str:
    text = f"{in_words(count)} run{'' if count == 1 else 's'}"
    return text[0].upper() + text[1:]


def _is(count: int) -> str:
    return "is" if count == 1 else "are"
