"""Whether a run trains on what it is then asked: prompts of the suite and held-out rows among its training rows.

It is no part of the prepared data, as the suite would then be a part of what training depends on: it is noted in the
run's folder, beside its stages, and said in the log.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from prefect import get_run_logger

from configs.schema.placeholders import placeholder_values
from configs.schema.run import RunConfig
from configs.schema.suite import load_suite
from mcore.artifacts import ArtifactRef
from mcore.data.rows import Row
from mcore.data.sources.source import open_source, read
from mcore.folders import write_durably
from tasks.run_page.facts import DATA_OVERLAP
from tasks.stage import PlannedRun

EXAMPLES = 3


def note_overlap(planned: PlannedRun, data: ArtifactRef) -> None:
    """Write what of the evaluation is trained on into the run's folder; nothing of a run without evaluation."""
    if planned.run.evaluate is None:
        return
    found = overlap(planned.run, Path(data.path))
    write_durably(
        planned.store.run_dir(planned.run.name) / DATA_OVERLAP, json.dumps(found, ensure_ascii=False, indent=2)
    )
    if found["overlap_with_evaluation"]:
        get_run_logger().warning(
            "%d of %d prompts and held-out rows are in the training rows, such as %s",
            found["overlap_with_evaluation"], found["evaluation_prompts"], found["examples"][0],
        )  # fmt: skip


def overlap(run: RunConfig, data: Path) -> dict[str, Any]:
    """How much of the evaluation is in the training rows of a prepared folder: the same text but for case and space.

    Args:
        run: A run with an evaluation.
        data: What `prepare` made of it.
    """
    import numpy as np  # which a run that is all there need not load

    from mcore.data.prepare.digests import ASKED_FILE, among, digests_of

    prompts = list(dict.fromkeys(_prompts(run)))
    trained = among(digests_of(prompts), np.load(data / ASKED_FILE))
    told = [prompt for prompt, is_trained in zip(prompts, trained, strict=True) if is_trained]
    return {"evaluation_prompts": len(prompts), "overlap_with_evaluation": len(told), "examples": told[:EXAMPLES]}


def _prompts(run: RunConfig) -> Iterator[str]:
    """What is asked of the model, in the form in which it is compared."""
    from mcore.data.prepare.digests import asked_alike, turns_asked

    evaluate = run.evaluate
    assert evaluate is not None
    suite = load_suite(Path(evaluate.suite)).filled(placeholder_values(run.data.model_name, run.data.model_author))
    for group in suite.groups:
        for case in group.cases:
            asked = case.prompt if case.prompt is not None else case.messages[-1].content
            yield asked_alike(asked)
    for entry in evaluate.perplexity_dataset:
        for row in read(open_source(entry, run.data), run.train.method):
            if isinstance(row, Row):
                yield from turns_asked(row)
