"""The adapter to the lm-evaluation-harness scores as the training forward does. No test downloads anything."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("lm_eval")

import lm_eval
from benchmarks.live_bytes import LiveBytes
from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager

from sleeptrain.cli import main
from sleeptrain.data.tokenizer import train_tokenizer
from sleeptrain.errors import ConfigError
from sleeptrain.hf.harness import Sleeping
from sleeptrain.hf.model.configuration import SleepPretrainedConfig
from sleeptrain.hf.model.modeling import SleepForCausalLM
from tests.data.texts import default_sentencepiece, make_texts
from tests.models import tiny_config
from tests.sleep.trained import trained_logits

IDS = 320


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("harness")
    train_tokenizer(make_texts(20), IDS, folder / "tokenizer.model")
    model = asdict(tiny_config(["attention", "gated_deltanet"])) | {"vocab_size": IDS, "init_std": 0.5}
    SleepForCausalLM(SleepPretrainedConfig(model=model, sleep={"passes": 3, "window": 4})).save_pretrained(folder)
    return folder


def instances(kind: str, *requests: tuple) -> list[Instance]:
    return [Instance(kind, {}, arguments, i) for i, arguments in enumerate(requests)]


def expected_score(scorer: Sleeping, context: list[int], continuation: list[int], when: str) -> tuple[float, bool]:
    model = scorer.model
    ids = torch.tensor([*context, *continuation])
    settings = model.config.sleep_settings()
    logits = trained_logits(model.model, [ids[:-1]], settings, len(context) - 1, vocabulary=IDS)[0]
    own = logits[len(context) - 1 :].float().log_softmax(-1)
    targets = torch.tensor(continuation)
    return own.gather(1, targets[:, None]).sum().item(), bool((own.argmax(-1) == targets).all())


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("when", ["every", "unlabelled"])
def test_likelihoods_equal_those_of_training(folder, batch_size, when):
    scorer = Sleeping(str(folder), batch_size=batch_size, device="cpu")
    scorer.model.config.sleep["when"] = when
    scorer._unlabelled = when == "unlabelled"
    pairs = [
        ("one two three four five", " six"),
        ("", "alone"),
        ("a", " b c d e f g h i"),
        ("some more", " words here"),
    ]
    found = scorer.loglikelihood(instances("loglikelihood", *pairs))
    for (context, continuation), score in zip(pairs, found, strict=True):
        if context:
            own, full = scorer.tok_encode(context), scorer.tok_encode(context + continuation)
            expected = expected_score(scorer, own, full[len(own) :], when)
        else:
            expected = expected_score(
                scorer, [scorer.prefix_token_id], scorer.tok_encode(continuation, add_special_tokens=False), when
            )
        assert score == (pytest.approx(expected[0], abs=1e-4), expected[1])


def test_rolling_reads_the_whole_text(folder):
    scorer = Sleeping(str(folder), batch_size=2, device="cpu")
    texts = [" ".join(["word"] * 40), "short"]
    found = scorer.loglikelihood_rolling(instances("loglikelihood_rolling", *((text,) for text in texts)))
    for text, score in zip(texts, found, strict=True):
        ids = scorer.tok_encode(text, add_special_tokens=False)
        assert score == pytest.approx(expected_score(scorer, [scorer.prefix_token_id], ids, "every")[0], rel=1e-5)
    once = Sleeping(str(folder), passes=1, device="cpu").loglikelihood_rolling(
        instances("loglikelihood_rolling", (texts[0],))
    )
    assert once[0] != pytest.approx(found[0], abs=1e-3)


def test_generates_until(folder):
    scorer = Sleeping(str(folder), batch_size=3, device="cpu", max_gen_toks=12)
    free = [("one two three", {"until": []}), ("four", {"until": []}), ("five six", {"until": [], "max_gen_toks": 3})]
    texts = scorer.generate_until(instances("generate_until", *free))
    for (prompt, options), text in zip(free, texts, strict=True):
        ids = torch.tensor([scorer.tok_encode(prompt)])
        length = options.get("max_gen_toks", 12)
        out = scorer.model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=length, do_sample=False,
            eos_token_id=scorer.eot_token_id, pad_token_id=scorer.eot_token_id,
        )  # fmt: skip
        assert text == scorer._tokenizer.decode(out[0, ids.shape[1] :].tolist())
    end = texts[0][len(texts[0]) // 2]
    (cut,) = scorer.generate_until(instances("generate_until", (free[0][0], {"until": [end]})))
    assert cut == texts[0][: texts[0].index(end)]


@pytest.fixture
def cats(tmp_path):
    """A scorer that can only draw "cat". Its tokenizer drops a text's first space, and its model knows more ids."""
    tokenizer = default_sentencepiece(tmp_path / "tokenizer.model")
    model = asdict(tiny_config(["gated_deltanet"])) | {"vocab_size": tokenizer.vocab_size + 30}
    SleepForCausalLM(SleepPretrainedConfig(model=model, sleep={"passes": 2, "window": 4})).save_pretrained(tmp_path)
    scorer = Sleeping(str(tmp_path), batch_size=2, device="cpu", max_gen_toks=3)
    (cat,) = tokenizer.encode("cat")
    scorer.model.generation_config.suppress_tokens = [id for id in range(tokenizer.vocab_size) if id != cat]
    return scorer


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"temperature": 9.0}], ids=str)
def test_the_generated_text_keeps_its_first_space(cats, options):
    found = cats.generate_until(instances("generate_until", ("the", options), ("a dog and the", options)))
    assert found == [" cat cat cat"] * 2
    stops = options | {"until": [" cat"]}
    assert cats.generate_until(instances("generate_until", ("the", stops))) == [""]
    (text,) = cats.generate_until(instances("generate_until", ("the", options | {"until": ["t c"]})))
    assert text == " ca"


def test_an_eos_of_the_folder_ends_a_text(cats):
    (cat,) = cats.tok_encode("cat", add_special_tokens=False)
    cats.model.generation_config.eos_token_id = [cat, cats.eot_token_id]
    assert cats.generate_until(instances("generate_until", ("the", {}), ("a dog", {}))) == ["", ""]


@pytest.mark.parametrize("when", ["every", "unlabelled"])
@pytest.mark.parametrize("passes", [1, 3])
def test_rolling_scores_window_by_window_are_those_of_the_whole_text(folder, when, passes):
    """Rows of other lengths are in the same batch, in fp64."""
    scorer = Sleeping(str(folder), passes=passes, batch_size=3, device="cpu")
    scorer.model.double()
    scorer.model.config.sleep["when"] = when
    scorer._unlabelled = when == "unlabelled"
    texts = [" ".join(make_texts(3)[i].split()[:words]) for i, words in enumerate((3, 30, 17))]
    found = scorer.loglikelihood_rolling(instances("loglikelihood_rolling", *((text,) for text in texts)))
    sleep = replace(scorer.model.config.sleep_settings(passes=passes), when=when)
    for text, score in zip(texts, found, strict=True):
        ids = [scorer.prefix_token_id, *scorer.tok_encode(text, add_special_tokens=False)]
        assert len(ids) > 4 and len(ids) % 4
        logits = trained_logits(scorer.model.model, [torch.tensor(ids[:-1])], sleep, vocabulary=IDS)[0]
        own = logits.log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None])
        assert score == pytest.approx(own.sum().item(), rel=1e-12)


@torch.no_grad()
def test_a_continuation_is_greedy_where_all_of_it_is(folder):
    """The continuation has two windows. The last column, alone in the second, is greedy; the first is or is not."""
    scorer = Sleeping(str(folder), device="cpu")
    context, greedy = [1, 20, 30, 40], list[int]()
    for _ in range(2):
        ids = torch.tensor([context + greedy])
        greedy.append(scorer.model(ids, use_cache=False).logits[0, -1].argmax().item())
    assert [is_greedy for _, is_greedy in scorer._scores([(context, greedy)])] == [True]
    other = [greedy[0] + 1]
    after = scorer.model(torch.tensor([context + other]), use_cache=False).logits[0, -1].argmax().item()
    assert [is_greedy for _, is_greedy in scorer._scores([(context, [*other, after])])] == [False]


@pytest.mark.slow
def test_rolling_holds_the_logits_of_one_window(folder):
    """Memory grows with the text by no more than its ids."""
    scorer = Sleeping(str(folder), device="cpu")
    text = " ".join(make_texts(1)[0].split())
    ids = scorer.tok_encode(text, add_special_tokens=False)
    peaks = []
    for length in (40, 400):
        scorer._tokenizer = SimpleNamespace(encode=lambda _, n=length: (ids * 400)[:n], bos_id=1, eos_id=2)
        with LiveBytes() as used:
            scorer.loglikelihood_rolling(instances("loglikelihood_rolling", (text,)))
        peaks.append(used.peak)
    assert peaks[1] - peaks[0] < 360 * 8 * 10 < 360 * IDS * 4 / 10, peaks


@pytest.mark.parametrize(
    "options", [{"num_beams": 3, "until": None}, {"repetition_penalty": 0.1}, {"do_sample": True, "top_k": 5}]
)
def test_generation_follows_the_options_of_a_request(folder, options):
    scorer = Sleeping(str(folder), batch_size=1, device="cpu", max_gen_toks=9)
    own = {name: value for name, value in options.items() if value is not None}
    ids = torch.tensor([scorer.tok_encode("one two three")])
    texts = []
    for more in (own, {}):
        torch.manual_seed(0)
        out = scorer.model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=9, eos_token_id=scorer.eot_token_id,
            pad_token_id=scorer.eot_token_id, **({"do_sample": False} | more),
        )  # fmt: skip
        texts.append(scorer._tokenizer.decode(out[0, ids.shape[1] :].tolist()))
    torch.manual_seed(0)
    assert scorer.generate_until(instances("generate_until", ("one two three", options))) == texts[:1]
    assert texts[0] != texts[1], "the setting makes a difference"


@pytest.fixture
def task(tmp_path):
    """The folder of a task named tiny, and its questions."""
    data = tmp_path / "data.jsonl"
    lines = [{"q": f"{a} and {a + 1} and", "choices": [f" {a + 2}", " stop"], "gold": 0} for a in range(3)]
    data.write_text("\n".join(map(json.dumps, lines)))
    (tmp_path / "tiny.yaml").write_text(
        f"""
task: tiny
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{q}}}}"
doc_to_choice: choices
doc_to_target: gold
metric_list:
  - metric: acc
"""
    )
    return tmp_path, lines


def right_share(folder, lines) -> float:
    scorer = Sleeping(str(folder), passes=2, device="cpu")
    pairs = [(line["q"], choice) for line in lines for choice in line["choices"]]
    scores = [score for score, _ in scorer.loglikelihood(instances("loglikelihood", *pairs))]
    right = [scores[i] > scores[i + 1] for i in range(0, len(scores), 2)]
    return sum(right) / len(right)


def test_a_task_from_files(folder, task):
    place, lines = task
    result = lm_eval.simple_evaluate(
        model="sleeptrain", model_args=f"pretrained={folder},passes=2", tasks=["tiny"], batch_size=2, device="cpu",
        task_manager=TaskManager(include_path=str(place), include_defaults=False), bootstrap_iters=0,
    )  # fmt: skip
    assert result["results"]["tiny"]["acc,none"] == pytest.approx(right_share(folder, lines))


@pytest.mark.slow
def test_the_command_line(folder, task):
    place, lines = task
    words = ["--model", "sleeptrain", "--model_args", f"pretrained={folder},passes=2", "--tasks", "tiny"]
    out = place / "out"
    assert main(["lm_eval", *words, "--include_path", str(place), "--output_path", str(out)]) == 0
    (found,) = out.rglob("results_*.json")
    assert json.loads(found.read_text())["results"]["tiny"]["acc,none"] == pytest.approx(right_share(folder, lines))


def test_a_device_that_is_not_there_is_refused(folder, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="device=cuda:1: torch sees no GPU"):
        Sleeping(str(folder), device="cuda:1")


def test_a_batch_size_that_is_no_number_is_refused(folder):
    with pytest.raises(ConfigError, match="batch_size=auto"):
        Sleeping(str(folder), batch_size="auto")
