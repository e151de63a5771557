"""Serve the pipeline, as `flow.serve` does, until this process is ended: `python serve_pipeline.py NAME`."""

import sys

from flows.pipeline import pipeline

if __name__ == "__main__":
    pipeline.serve(name=sys.argv[1], print_starting_message=False)
