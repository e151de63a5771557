"""A small process around one command, so that the command's whole process tree ends when it must.

    python -I mcore/supervise --parent PID --grace-s 20 --record FILE [--lease FOLDER --token N] [limits] -- COMMAND …

torchrun and vLLM give their workers sessions of their own, so killing a process group is not enough: workers outlive it
and hold memory, devices and half-written files. The supervisor is a subreaper: whatever its command starts, and however
often that forks, becomes its descendant and stays so.

`supervisor.py` ends the tree, `limits.py` says when it takes too long, `duty.py` when there is nobody left to work for,
`stacks.py` writes down where it stands still, `record.py` is the file that tells everybody else, `claims.py` are those
of the lease that it works under. Only the standard library is imported, so that a start costs a few
milliseconds.
"""

from mcore.supervise.processes import PR_SET_PDEATHSIG as PR_SET_PDEATHSIG
from mcore.supervise.processes import descendants as descendants
from mcore.supervise.supervisor import KILL_WAIT_S as KILL_WAIT_S
from mcore.supervise.supervisor import LEFTOVER_GRACE_S as LEFTOVER_GRACE_S
