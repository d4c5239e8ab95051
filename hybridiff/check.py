"""Whether a schedule can be performed at all; every strategy's schedules are held to it by the tests."""

from collections import deque

from hybridiff.schedule import Name, Receive, ScheduleError, Send, Step, StepPlan, interleave


def check(plan: StepPlan) -> None:
    """Raise ScheduleError unless each send meets its receive in order, nobody waits for ever and every rank steps once."""
    mail: dict[tuple[int, int], deque[Name]] = {}  # (sender, receiver) -> results in flight

    def arrived(receive: Receive, rank: int) -> bool:
        return bool(mail.get((receive.source, rank)))

    for rank, operation in interleave(list(enumerate(plan.operations)), arrived):
        if isinstance(operation, Send):
            if not 0 <= operation.to < len(plan.operations) or operation.to == rank:
                raise ScheduleError(f"rank {rank}: '{operation}' goes to no other rank")
            mail.setdefault((rank, operation.to), deque()).append(operation.name)
        elif isinstance(operation, Receive):
            name = mail[operation.source, rank].popleft()
            if name != operation.name:
                raise ScheduleError(f"rank {rank}: '{operation}' meets {name}")
    left = [f"{name} from rank {a} to rank {b}" for (a, b), names in mail.items() for name in names]
    if left:
        raise ScheduleError(f"sent but never received: {', '.join(left)}")
    for rank, operations in enumerate(plan.operations):
        if sum(isinstance(operation, Step) for operation in operations) != 1:
            raise ScheduleError(f"rank {rank} does not step exactly once")
