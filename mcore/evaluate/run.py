"""One model, one suite: ask, score, measure perplexity, and write it all down."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from configs.schema.data import DataConfig
from configs.schema.suite import HELD_OUT, Suite
from mcore.data.rows import Method
from mcore.data.template import Sample, load_tokenizer
from mcore.errors import ConfigError, InputError, Problem
from mcore.evaluate.choices import ChoiceQuestion, choose, encode_choices
from mcore.evaluate.compare import ANSWERS, SUMMARY
from mcore.evaluate.comparison import shortened
from mcore.evaluate.engine import Engine, EngineSettings, prepare_environment, start_engine
from mcore.evaluate.perplexity import Perplexity, held_out_samples, perplexity, text_samples
from mcore.evaluate.suites import Question, pass_rates, prompt_problems, read_questions, score
from mcore.folders import refuse_existing, whole_folder
from mcore.progress import say

METRICS = "metrics.json"


@dataclass(frozen=True, slots=True)
class EvaluationSettings:
    """What a model is asked.

    Attributes:
        engine: Model folder and how to serve it.
        suite: Suite file.
        perplexity: Files of held-out rows, `path` or `path#N`; none, no perplexity.
        method: Kind of those rows: `sft` (messages) or `pt` (text).
        max_tokens: Tokens: the longest answer.
        model_name: Fills `{{NAME}}` in suite and rows.
        model_author: Fills `{{AUTHOR}}` in suite and rows.
        system: System message where cases and rows bring none.
    """

    engine: EngineSettings
    suite: Path
    perplexity: tuple[str, ...] = ()
    method: Method = "sft"
    max_tokens: int = 64
    model_name: str = ""
    model_author: str = ""
    system: str | None = None


def evaluate(settings: EvaluationSettings, output: Path, *, overwrite: bool = False) -> dict[str, Any]:
    """Evaluate a model; `output` holds `answers.jsonl`, `summary.json` and `metrics.json` at the end.

    Returns:
        Figures, as in the folder's `metrics.json`.

    Raises:
        InputError: All that is wrong with model folder, suite, rows and options. Nothing was started.
        EvaluationError: vLLM failed.
    """
    start = time.monotonic()
    prepare_environment()
    asked = _check(settings, output, overwrite=overwrite)
    before_start = time.monotonic()
    with start_engine(settings.engine) as engine:
        started = time.monotonic()
        records = _answer(asked, engine, settings.max_tokens)
        answered = time.monotonic()
        found = _perplexities(asked.samples, engine)
        ended = time.monotonic()
    groups = pass_rates(records)
    held_out = found.get(HELD_OUT)
    num_passed = sum(group["num_passed"] for group in groups.values())
    num_answer_tokens = sum(record["num_tokens"] for record in records)
    summary = {
        "suite": asked.suite.name,
        "num_cases": len(records),
        "num_passed": num_passed,
        "pass_rate": num_passed / len(records),
        "groups": groups,
        "perplexity": held_out.value if held_out else None,
        "num_perplexity_tokens": held_out.num_tokens if held_out else 0,
        "num_perplexity_rows": held_out.num_rows if held_out else 0,
        "perplexity_sets": {
            name: {
                "perplexity": one.value,
                "num_tokens": one.num_tokens,
                "num_rows": one.num_rows,
                "row_losses": one.row_losses,
                "row_tokens": one.row_tokens,
                "forgetting": name in asked.forgetting_sets,
            }
            for name, one in found.items()
        },
        "num_answer_tokens": num_answer_tokens,
        "num_prompt_tokens": sum(record["num_prompt_tokens"] for record in records),
        "num_perplexity_set_tokens": sum(len(one.token_ids) for set_ in asked.samples.values() for one in set_),
        "first_token_s": _middle([record["first_token_s"] for record in records if record["first_token_s"]]),
        "max_tokens": settings.max_tokens,
        "max_model_len": settings.engine.max_model_len,
        "system": settings.system,
        "dtype": settings.engine.resolved_dtype,
        "device": engine.device,
        "tensor_parallel_size": settings.engine.tensor_parallel_size,
        "vllm_version": engine.vllm_version,
        "start_s": round(started - before_start, 2),
        "answer_s": round(answered - started, 2),
        "perplexity_s": round(ended - answered, 2),
        "seconds": round(time.monotonic() - start, 2),
    }
    metrics = _metrics(summary)
    with whole_folder(output, overwrite=overwrite) as folder:
        lines = (json.dumps(record, ensure_ascii=False) for record in records)
        (folder / ANSWERS).write_text("".join(f"{line}\n" for line in lines))
        (folder / SUMMARY).write_text(json.dumps(summary, indent=2, ensure_ascii=False))
        (folder / METRICS).write_text(json.dumps(metrics, indent=2))
    _tell(summary, records)
    return metrics


@dataclass(frozen=True, slots=True)
class _Asked:
    """All that a model is asked. `samples` are those of each perplexity set, by its name."""

    suite: Suite
    questions: list[Question]
    choices: list[ChoiceQuestion]
    samples: dict[str, list[Sample]]

    @property
    def forgetting_sets(self) -> set[str]:
        return {one.name for one in self.suite.perplexity if one.forgetting}


def _answer(asked: _Asked, engine: Engine, max_tokens: int) -> list[dict[str, Any]]:
    """A record a question, in the suite's order, whether it was answered in words or by choosing."""
    spoken = [question for question in asked.questions if not question.case.choices]
    records: dict[str, dict[str, Any]] = {}
    if spoken:
        answers = engine.chat([question.messages for question in spoken], max_tokens=max_tokens)
        records |= {question.name: record for question, record in zip(spoken, score(spoken, answers), strict=True)}
    if asked.choices:
        sequences = [tokens.token_ids for one in asked.choices for tokens in one.choices]
        logprobs = iter(engine.token_logprobs(sequences, "choices"))
        for one in asked.choices:
            answer, scores = choose(one, [next(logprobs) for _ in one.choices])
            (record,) = score([one.question], [answer])
            records[one.question.name] = record | {"choice_logprobs": scores, "num_tokens": 0}
    return [records[question.name] for question in asked.questions]


def _perplexities(samples: dict[str, list[Sample]], engine: Engine) -> dict[str, Perplexity]:
    everything = [sample.token_ids for one in samples.values() for sample in one]
    logprobs = iter(engine.token_logprobs(everything) if everything else ())
    return {name: perplexity(one, [next(logprobs) for _ in one]) for name, one in samples.items()}


def _middle(values: list[float]) -> float | None:
    return round(median(values), 3) if values else None


def _check(settings: EvaluationSettings, output: Path, *, overwrite: bool) -> _Asked:
    """Everything that can be known before vLLM starts, and every problem of it at once."""
    data = DataConfig(
        dataset=(), model_name=settings.model_name, model_author=settings.model_author, system=settings.system
    )
    problems: list[Problem] = settings.engine.problems()
    suite: Suite | None = None
    questions: list[Question] = []
    choices: list[ChoiceQuestion] = []
    samples: dict[str, list[Sample]] = {}
    try:
        refuse_existing(output, overwrite=overwrite)
    except InputError as error:
        problems += error.problems
    try:
        suite, questions = read_questions(
            settings.suite,
            model_name=settings.model_name,
            model_author=settings.model_author,
            system=settings.system,
        )
    except InputError as error:
        problems += error.problems
    try:
        tokenizer = load_tokenizer(settings.engine.model)
        problems += prompt_problems(
            questions, tokenizer, max_model_len=settings.engine.max_model_len, max_tokens=settings.max_tokens
        )
        if tokenizer.chat_template:
            choices, more = encode_choices(
                [question for question in questions if question.case.choices],
                tokenizer,
                max_model_len=settings.engine.max_model_len,
            )
            problems += more
        for one in suite.perplexity if suite else ():
            samples[one.name], more = text_samples(
                one.name, one.texts, tokenizer, max_model_len=settings.engine.max_model_len
            )
            problems += more
        if settings.perplexity:
            samples[HELD_OUT] = held_out_samples(
                settings.perplexity,
                data,
                tokenizer,
                method=settings.method,
                max_model_len=settings.engine.max_model_len,
            )
    except InputError as error:
        problems += error.problems
    if problems or suite is None:
        raise ConfigError("the evaluation can't start", problems)
    return _Asked(suite, questions, choices, samples)


def _metrics(summary: dict[str, Any]) -> dict[str, Any]:
    """The figures worth showing, flat."""
    rates = {f"pass_rate_{group}": figures["pass_rate"] for group, figures in summary["groups"].items()}
    names = ("num_cases", "perplexity", "num_perplexity_tokens", "start_s", "answer_s", "perplexity_s", "seconds")
    sets = {f"perplexity_{name}": one["perplexity"] for name, one in summary["perplexity_sets"].items()}
    sets.pop(f"perplexity_{HELD_OUT}", None)  # which is `perplexity`
    answer_s, perplexity_s = max(summary["answer_s"], 0.01), max(summary["perplexity_s"], 0.01)
    speed = {
        "answer_tokens_per_s": round(summary["num_answer_tokens"] / answer_s, 1),
        "perplexity_tokens_per_s": round(summary["num_perplexity_set_tokens"] / perplexity_s, 1),
        "first_token_s": summary["first_token_s"],
    }
    return {"pass_rate": summary["pass_rate"], **rates, **{name: summary[name] for name in names}, **sets, **speed}


def _tell(summary: dict[str, Any], records: list[dict[str, Any]]) -> None:
    for record in records:
        if not record["passed"]:
            answer = shortened(record["answer"], 80)
            say(f"failed: {record['group']} {record['case']}, {record['prompt']!r}: {answer!r} {record['failures'][0]}")
    for group, figures in summary["groups"].items():
        say(f"{group}: {figures['num_passed']} of {figures['num_cases']} passed")
    for name, one in summary["perplexity_sets"].items():
        say(f"perplexity, {name}: {one['perplexity']:.4f} over {one['num_tokens']} tokens")
