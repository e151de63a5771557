"""Which devices of this machine a stage may have, held so that no two stages have the same one.

`gpus.py` asks what GPUs there are, `request.py` says what a stage asks for, and `lease.py` holds it: one locked file a
device, in a folder that all runs of the machine share. The kernel drops the lock with the last process that has it, so
a kill -9 leaves nothing behind. On a machine without GPUs the same code counts slots (`launch.device_slots`).

Only the standard library is imported: the supervisor takes leases, and it starts in milliseconds.
"""

from mcore.devices.gpus import Gpu as Gpu
from mcore.devices.gpus import installed_gpus as installed_gpus
from mcore.devices.gpus import visible as visible
from mcore.devices.lease import DeviceLease as DeviceLease
from mcore.devices.lease import holders as holders
from mcore.devices.request import Device as Device
from mcore.devices.request import Request as Request
from mcore.devices.request import devices_for as devices_for
