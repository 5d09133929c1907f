"""Times that were taken elsewhere, given to pytest-benchmark: where variants run in turn, or a run has many parts."""

import itertools


class RecordedTime:
    """A timer for pytest-benchmark that `replay` moves on."""

    now = 0.0

    def __call__(self) -> float:
        return self.now

    def replay(self, seconds: float) -> None:
        self.now += seconds


recorded = RecordedTime()  # in the module: pytestmark = pytest.mark.benchmark(timer=recorded)


def report(benchmark, case, variant, seconds, **facts):
    benchmark.group = case
    benchmark.extra_info.update(case=case, variant=variant, **facts)
    times = itertools.cycle(seconds)
    benchmark.pedantic(lambda: recorded.replay(next(times)), rounds=len(seconds))
