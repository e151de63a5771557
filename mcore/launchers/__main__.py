"""Command line of a job's two kinds of process; what they do is told in the package."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from mcore.child import run_as_child
from mcore.launchers.orders import read_orders

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

OrdersFile = Annotated[Path, typer.Argument(metavar="ORDERS.json", help="What the flow wrote into the store.")]


@app.command()
def follow(orders: OrdersFile) -> int:
    """Start the job or attach to it, and watch it until it ends."""
    from mcore.launchers.follow import follow as follow_job
    from mcore.train.stop import stop_on_signals

    with stop_on_signals() as stop:
        return follow_job(read_orders(orders), stop)


@app.command()
def node(
    orders: OrdersFile,
    node_rank: Annotated[int | None, typer.Option(help="Which machine this is, where no launcher tells.")] = None,
    start: Annotated[str | None, typer.Option(help="Which start of the job, where no launcher tells.")] = None,
) -> int:
    """Run this machine's share of the job."""
    from mcore.launchers.node import place_of, work

    read = read_orders(orders)
    return work(read, place_of(read, os.environ, rank=node_rank, start=start))


if __name__ == "__main__":
    run_as_child(lambda: app(standalone_mode=False))
