"""What a plan says of single phases: refused, in the host's memory, done alike."""

import pytest
from planned_runs import ONE, made, tiny

from ddrl_jax.chips import CHIPS
from ddrl_jax.flops import Count
from ddrl_jax.plan.hlo import Collective
from ddrl_jax.plan.links import lay
from ddrl_jax.plan.lowered import describe
from ddrl_jax.plan.sheet import sheet

GATHER = Collective("all-gather", ("fsdp",), 2, 3e9, True, "")


@pytest.mark.parametrize("refusal", ["", "RESOURCE_EXHAUSTED: Used 99.0G of 15.7G hbm"])
def test_a_refused_phase_has_a_time_without_communication_and_says_so(refusal):
    run = describe(tiny(fsdp=4))
    sends = [] if refusal else [GATHER]
    found = [
        made(phase.name, flops=10**12, collectives=sends)._replace(
            phase=phase, refusal=refusal if phase.name == "update" else ""
        )
        for phase in run.phases
    ]
    links = lay(CHIPS["v5e"], ONE | {"fsdp": 4})
    rollout, update = sheet(run, found, links, 0.4).split("\nupdate: ")
    assert "not known" not in rollout
    assert ("sent: not known of what the compiler refused" in update) == bool(refusal)
    assert ("nor what a refused phase sends" in update) == bool(refusal)
    assert ("sent along fsdp" in update) == (not refusal)


@pytest.mark.parametrize("size", [0, 3 * 2**30])
def test_what_is_kept_in_the_host_is_a_row_and_no_part_of_the_peak(size):
    run = describe(tiny(fsdp=4))
    rollout, update = (made(p.name)._replace(phase=p) for p in run.phases)
    links = lay(CHIPS["v5e"], ONE | {"fsdp": 4})
    text = sheet(run, [rollout, update._replace(host=size)], links, 0.4)
    rows = [line.split() for line in text.splitlines() if "in the host" in line]
    assert rows == ([["beside", "it", "in", "the", "host", "3.000"]] if size else [])
    assert "fits, with" in text


@pytest.mark.parametrize("repeated", [0, 20])
def test_what_devices_do_alike_is_said(repeated):
    run = describe(tiny(context=2))
    work = Count(100, 20, 0, 0, repeated)
    found = [made(p.name)._replace(phase=p, count=work) for p in run.phases]
    text = sheet(run, found, lay(CHIPS["v5e"], ONE | {"context": 2}), 0.4)
    assert text.count("of the rest 25% because context") == (2 if repeated else 0)
