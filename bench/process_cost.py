"""Run a command, and print what it cost as JSON: seconds, CPU seconds, peak memory and exit code.

    python bench/process_cost.py 60 python pipeline.py ...     asks it to stop after 60 seconds; inf: lets it end

Imports nothing large: Linux counts the memory of the process that starts another as that one's own.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time


def main() -> None:
    """Run and print."""
    limit, command = float(sys.argv[1]), sys.argv[2:]
    began, asked = time.perf_counter(), False
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    while not (found := os.wait4(process.pid, os.WNOHANG))[0]:
        if not asked and time.perf_counter() - began > limit:
            process.send_signal(signal.SIGTERM)
            asked = True
        time.sleep(0.02)
    _pid, status, usage = found
    process.returncode = os.waitstatus_to_exitcode(status)
    cost = {
        "seconds": time.perf_counter() - began,
        "cpu_seconds": usage.ru_utime + usage.ru_stime,
        "megabytes": usage.ru_maxrss / 1024,
    }
    print(json.dumps({"code": process.returncode, "asked": asked, "cost": cost}))


if __name__ == "__main__":
    main()
