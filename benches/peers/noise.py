"""How much of the machine others take while something is measured. Linux only."""

import os
import resource
import time

CORES = os.cpu_count() or 1
TICKS = os.sysconf("SC_CLK_TCK")


def machine_seconds() -> tuple[float, float]:
    """Processor time of everybody on this machine so far, and what its host gave to other machines."""
    with open("/proc/stat", encoding="ascii") as file:
        user, nice, system, _idle, _wait, irq, soft, stolen, *_ = map(int, file.readline().split()[1:])
    return (user + nice + system + irq + soft) / TICKS, stolen / TICKS


def own_seconds(server: int | None) -> float:
    """Processor time of this process, of its children that have ended, and of a server that still runs."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    seconds = sum(u.ru_utime + u.ru_stime for u in used)
    if server is not None:
        with open(f"/proc/{server}/stat", encoding="utf-8") as file:
            fields = file.read().rsplit(")", 1)[1].split()
        seconds += (int(fields[11]) + int(fields[12])) / TICKS
    return seconds


class Noise:
    """Around a measurement; afterwards `others` is the share of all cores that others took, the host's included."""

    def __init__(self, server: int | None = None):
        self.server = server
        self.others = 0.0

    def __enter__(self):
        self.began, self.before, self.own = time.monotonic(), machine_seconds(), own_seconds(self.server)
        return self

    def __exit__(self, *_):
        all_cores = (time.monotonic() - self.began) * CORES
        busy, stolen = (after - before for after, before in zip(machine_seconds(), self.before))
        own = own_seconds(self.server) - self.own
        self.others = max(0.0, busy - own + stolen) / all_cores


def wait_until_quiet(longest: float, share: float = 0.08) -> None:
    """Waits until half a second passes in which the machine is idle but for this share, or gives up."""
    began = time.monotonic()
    while time.monotonic() - began < longest:
        before = sum(machine_seconds())
        time.sleep(0.5)
        if (sum(machine_seconds()) - before) / 0.5 / CORES < share:
            return
