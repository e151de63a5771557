"""Run by vLLM's interpreter: hold several folders against one reference each. served_script.py CASES.json FOUND.json

CASES is a list of {name, reference, model, adapter, torch_dtype, output}; FOUND gets the verdicts.
"""

import json
import sys
from pathlib import Path

from mcore.errors import PrecisionError
from mcore.evaluate.engine import prepare_environment
from mcore.evaluate.served.__main__ import check


def main() -> None:
    prepare_environment()
    found = {}
    for case in json.loads(Path(sys.argv[1]).read_text()):
        adapter = None if case["adapter"] is None else Path(case["adapter"])
        try:
            check(
                Path(case["reference"]), Path(case["model"]), Path(case["output"]), adapter,
                torch_dtype=case["torch_dtype"], max_model_len=128, tensor_parallel_size=1,
            )  # fmt: skip
            found[case["name"]] = []
        except PrecisionError as error:
            found[case["name"]] = [problem.subject for problem in error.problems]
    Path(sys.argv[2]).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
