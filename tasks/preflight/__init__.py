"""All that is wrong with a run, found at once before anything is started, and without writing anything.

`groups.py` checks each group by itself; `data.py`, `model.py` and `training.py` what groups say to each other and to
the files that they name. `machine.py` looks at where it is to run, for stages that will really run: `devices.py`,
`store.py`, `versions.py`, `vllm.py`, and `loopback.py`, which starts processes and so comes last, in the flow alone.
`check.py` puts it all together. No torch here: the checks take a second or two.
"""

from tasks.preflight.check import CheckedRun as CheckedRun
from tasks.preflight.check import check_run as check_run
from tasks.preflight.check import check_run_file as check_run_file
from tasks.preflight.check import check_training_file as check_training_file
