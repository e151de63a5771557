"""Training on several machines, and on machines that somebody else hands out.

    python -m mcore.launchers follow ORDERS.json                     where the flow is: start or attach, watch, end
    python -m mcore.launchers node ORDERS.json [--node-rank N]       on each machine: torchrun under a supervisor

The flow writes the orders (`orders.py`) into a folder of the store, which all machines share, and runs `follow` in
place of torchrun, under the same supervisor as every stage. `follow` knows one small protocol (`protocol.py`) that
each launcher fills: `local.py` (the other machines run `member.py`), `slurm.py` and `kubernetes.py`. What a machine
does is the same with all of them (`node.py`): its processes find each other by torchrun's c10d rendezvous, and are
ended as trees by a supervisor of their own.

A job of Slurm's or Kubernetes' outlives the flow: the flow that is started again finds it by its key and goes on
watching. A cancel ends it. No shell reads any of its parameters.
"""
