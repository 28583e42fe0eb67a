"""A revector process that kills itself with SIGKILL at a named step; started by test_kill.py."""

from __future__ import annotations

import os
import signal
import sys

from revector import Migration, Request, Settings
from revector.phases import backfill, verify
from revector.plan import Consents
from revector.work import Effect, Observation, Recorded

TABLE = "kb"
#: A writer keeps rows pending all the time: the second look comes soon, so that the tests do.
verify.LOOK_AGAIN = 0.5
#: Several windows in a small table, so that the first one's end is in the middle of the backfill.
backfill._WINDOW_BLOCKS, backfill._WINDOW_ROWS = (2, 512), 20


def command(migration: Migration, name: str) -> None:
    if name == "run":
        migration.run(
            Request(from_="hash:16", to="hash:32", backup=True, batch_size=7, consents=Consents(include_null=True))
        )
    elif name == "finalize":
        migration.finalize(drop_backup=True)
    elif name == "finalize_keeping":
        migration.finalize()
    elif name == "finalize_at_once":
        migration.finalize(drop_backup=True, quiet_for=0)
    elif name == "restore":
        migration.restore(refresh=True)
    elif name == "cutover":
        migration.cutover(without_follower=True, refresh_old=True)
    elif name in ("abort", "unexpose"):
        getattr(migration, name)()
    else:
        getattr(migration, name)(without_follower=True)


def main() -> None:
    dsn, name, step, moment = sys.argv[1:5]
    kind = Effect if moment == "effect" else Recorded

    def observe(seen: Observation) -> None:
        if isinstance(seen, kind) and seen.step == step:
            os.kill(os.getpid(), signal.SIGKILL)

    with Migration.open(Settings(database_url=dsn), table=TABLE, observe=observe) as migration:
        command(migration, name)


if __name__ == "__main__":
    main()
