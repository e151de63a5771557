"""Run the pipeline in a process of its own and print what it came to as JSON: `python run_pipeline.py RUN.json`."""

import json
import sys
from dataclasses import asdict
from pathlib import Path

from flows.pipeline import pipeline

if __name__ == "__main__":
    result = pipeline(json.loads(Path(sys.argv[1]).read_text()))
    sys.stdout.write(json.dumps(asdict(result) | {"torch": "torch" in sys.modules}))
