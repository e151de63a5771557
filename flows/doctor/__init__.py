"""What `mcore-flows doctor` looks at, an area a file; nothing of it is about a particular run.

Each area yields findings as it goes. Things are tried where that is cheap (a rename, a stack of a process, an
all-reduce), and not concluded from versions.
"""

from flows.doctor.finding import Finding as Finding
from flows.doctor.finding import State as State
