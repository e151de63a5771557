"""From a `megatron pt` or `megatron sft` command of Megatron-SWIFT to a run file of ours.

`shell.py` takes text apart as a shell does, `command.py` finds the command and its arguments in it, `table.py` knows
what becomes of each argument (`configs/swift/arguments.yaml`), `translate.py` makes the run and tells what it did,
`rules/` holds what takes more than a row, `run_file.py` writes the file and `page.py` the documentation.
"""
