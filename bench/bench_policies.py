"""What each policy's decision costs in a step (all but the attention), beside dense attention over the same context.

Steps are real ones, one token after the other, so that what happens now and then (a page that is opened, a compaction)
has its share: a round is the mean of many steps. Dense attention and a plain append are timed in the same round. Of a
policy with a fused step the operators apart are timed: on the CPU the fused one is these in a row.
"""

import statistics
import time

import pytest
from policy_case import BUDGET, CONTEXTS, NAMES, DenseCase, PolicyCase
from recorded import recorded, report

ROUNDS, STEPS, SECONDS = 5, 128, 0.5  # of a round, at most

pytestmark = pytest.mark.benchmark(timer=recorded)


@pytest.fixture(scope="module", params=CONTEXTS)
def dense(request):
    """``(context, DenseCase)``: its buffers serve all policies."""
    return request.param, DenseCase(1, request.param)


@pytest.mark.parametrize("name", NAMES)
def test_decision(benchmark, dense, name):
    context, baseline = dense
    case = PolicyCase(name, 1, context, spare=(ROUNDS + 1) * STEPS)
    for _ in range(BUDGET if case.bounded else 16):  # heads are full, and evict
        case.begin_step()
        case.decide()
    rounds = [one_round(case, baseline) for _ in range(ROUNDS)]
    decision, attention, append = zip(*rounds, strict=True)
    facts = {"dense_us": attention, "append_us": append}
    facts = {key: round(statistics.median(seconds) * 1e6, 2) for key, seconds in facts.items()}
    case = f"decision of a policy, context {context}, batch 1"
    report(benchmark, case, name, decision, table="decisions", context=context, **facts)


def one_round(case, baseline):
    """Seconds of one layer: the decision, dense attention, a plain append."""
    timed(baseline.append)
    append = statistics.median(timed(baseline.append) for _ in range(20))
    attention, decisions = timed(baseline.attend), []
    while len(decisions) < STEPS and sum(decisions) < SECONDS:
        case.begin_step()
        decisions.append(timed(case.decide))
    return statistics.mean(decisions) / len(case.layers), attention, append


def timed(function):
    started = time.perf_counter()
    function()
    return time.perf_counter() - started
