"""Run by vLLM's interpreter: three engines after each other in one process. Usage: engine_script.py DAMAGED DATED NAN.

Prints what it found as one JSON object, then fails with the third model and must leave as a stage does.
"""

import json
import sys
from pathlib import Path

from mcore.child import run_as_child
from mcore.errors import EvaluationError
from mcore.evaluate.engine import EngineSettings, prepare_environment, start_engine

QUESTION = [[{"role": "user", "content": "Hi"}]]


def main() -> None:
    damaged, dated, nan = map(Path, sys.argv[1:])
    prepare_environment()
    found = {}
    try:
        with start_engine(EngineSettings(damaged, max_model_len=64)):
            pass
    except EvaluationError as error:
        found["damaged"] = str(error)
    with start_engine(EngineSettings(dated, max_model_len=64)) as engine:
        found["prompt_token_ids"] = engine.chat(QUESTION, max_tokens=1)[0].prompt_token_ids
    sys.stdout.write(json.dumps(found))
    with start_engine(EngineSettings(nan, max_model_len=64)) as engine:
        engine.chat(QUESTION, max_tokens=1)


if __name__ == "__main__":
    run_as_child(main)
