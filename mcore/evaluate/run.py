"""One model, one suite: ask, score, measure perplexity, and write it all down."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configs.schema.data import DataConfig
from mcore.data.rows import Method
from mcore.data.template import Sample, load_tokenizer
from mcore.errors import ConfigError, InputError, Problem
from mcore.evaluate.compare import ANSWERS, SUMMARY, shortened
from mcore.evaluate.engine import EngineSettings, prepare_environment, start_engine
from mcore.evaluate.perplexity import held_out_samples, perplexity
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
    suite, questions, samples = _check(settings, output, overwrite=overwrite)
    held_out = None
    before_start = time.monotonic()
    with start_engine(settings.engine) as engine:
        started = time.monotonic()
        answers = engine.chat([question.messages for question in questions], max_tokens=settings.max_tokens)
        answered = time.monotonic()
        if samples:
            held_out = perplexity(samples, engine.token_logprobs([sample.token_ids for sample in samples]))
        ended = time.monotonic()
    records = score(questions, answers)
    groups = pass_rates(records)
    num_passed = sum(group["num_passed"] for group in groups.values())
    num_answer_tokens = sum(record["num_tokens"] for record in records)
    summary = {
        "suite": suite,
        "num_cases": len(records),
        "num_passed": num_passed,
        "pass_rate": num_passed / len(records),
        "groups": groups,
        "perplexity": held_out.value if held_out else None,
        "num_perplexity_tokens": held_out.num_tokens if held_out else 0,
        "num_perplexity_rows": held_out.num_rows if held_out else 0,
        "num_answer_tokens": num_answer_tokens,
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


def _check(settings: EvaluationSettings, output: Path, *, overwrite: bool) -> tuple[str, list[Question], list[Sample]]:
    """Everything that can be known before vLLM starts, and every problem of it at once."""
    data = DataConfig(
        dataset=(), model_name=settings.model_name, model_author=settings.model_author, system=settings.system
    )
    problems: list[Problem] = settings.engine.problems()
    suite = ""
    questions: list[Question] = []
    samples: list[Sample] = []
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
        samples = held_out_samples(
            settings.perplexity,
            data,
            tokenizer,
            method=settings.method,
            max_model_len=settings.engine.max_model_len,
        )
    except InputError as error:
        problems += error.problems
    if problems:
        raise ConfigError("the evaluation can't start", problems)
    return suite, questions, samples


def _metrics(summary: dict[str, Any]) -> dict[str, Any]:
    """The figures worth showing, flat."""
    rates = {f"pass_rate_{group}": figures["pass_rate"] for group, figures in summary["groups"].items()}
    names = ("num_cases", "perplexity", "num_perplexity_tokens", "start_s", "answer_s", "perplexity_s", "seconds")
    speed = {"answer_tokens_per_s": round(summary["num_answer_tokens"] / max(summary["answer_s"], 0.01), 1)}
    return {"pass_rate": summary["pass_rate"], **rates, **{name: summary[name] for name in names}, **speed}


def _tell(summary: dict[str, Any], records: list[dict[str, Any]]) -> None:
    for record in records:
        if not record["passed"]:
            answer = shortened(record["answer"], 80)
            say(f"failed: {record['group']} {record['case']}, {record['prompt']!r}: {answer!r} {record['failures'][0]}")
    for group, figures in summary["groups"].items():
        say(f"{group}: {figures['num_passed']} of {figures['num_cases']} passed")
    if summary["perplexity"] is not None:
        say(f"perplexity: {summary['perplexity']:.4f} over {summary['num_perplexity_tokens']} tokens")
