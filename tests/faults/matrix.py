"""Every row of the fault matrix that needs no GPU, against the real server and the embedded model.

    python -m tests.faults.matrix [F03 F12 …]

Prints row, expected and seen. Exit status 1 if a row was not as expected.
"""

from __future__ import annotations

import argparse
import sys
import time
import traceback

from tests.faults import engine_rows, file_rows, server_rows
from tests.faults.bench import Bench, Row, Unexpected

ROWS = sorted(
    [*engine_rows.ROWS, *server_rows.ROWS, *file_rows.ROWS], key=lambda row: int(row.id[1:])
)


def run(bench: Bench, row: Row) -> bool:
    started = time.monotonic()
    try:
        seen, good = row.run(bench), True
    except Unexpected as unexpected:
        seen, good = str(unexpected), False
    except Exception:
        seen, good = traceback.format_exc(), False
    print(f"{row.id}  {row.fault}", flush=True)
    print(f"     expected  {row.expected}", flush=True)
    print(f"     {'seen' if good else 'FAIL'}      {seen}", flush=True)
    print(f"     {time.monotonic() - started:.0f} s", flush=True)
    return good


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rows", nargs="*", metavar="ROW", help="such as F03; all unless named")
    wanted = {name.upper() for name in parser.parse_args().rows}
    unknown = wanted - {row.id for row in ROWS}
    if unknown:
        parser.error(f"no rows {', '.join(sorted(unknown))}; there are {[row.id for row in ROWS]}")
    bench = Bench()
    try:
        results = {row.id: run(bench, row) for row in ROWS if not wanted or row.id in wanted}
    finally:
        bench.close()
    failed = [name for name, good in results.items() if not good]
    print(f"{len(results)} rows, {len(results) - len(failed)} as expected; failed: {failed}")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
