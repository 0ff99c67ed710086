from __future__ import annotations

from ringlm.engine.pace import Pace


def paced(pace: Pace, decode_s: float, token_s: float, steps: int = 60) -> list[int]:
    """What the pace allows step by step, on a machine where that is what things take."""
    allowed = []
    for _ in range(steps):
        allowed.append(pace.prompt_tokens())
        pace.observe(decode_s + allowed[-1] * token_s, allowed[-1])
    return allowed


def test_a_step_with_prompts_takes_about_three_times_one_without() -> None:
    pace = Pace()
    pace.observe(0.010, 0)
    assert set(paced(pace, 0.010, 0.0001)[1:]) == {192, 0}  # 200, in whole pieces
    assert paced(Pace(), 0.010, 0.01)[-1] == 32


def test_it_follows_what_decoding_takes() -> None:
    """A long run of prompts does not hide that more sequences decode by now."""
    pace = Pace()
    pace.observe(0.010, 0)
    paced(pace, 0.010, 0.0001)
    assert max(paced(pace, 0.040, 0.0001, 400)[-20:]) > 700
    assert max(paced(pace, 0.010, 0.0001, 400)[-20:]) == 192


def test_it_learns_though_prompts_have_never_ended() -> None:
    allowed = paced(Pace(), 0.010, 0.0001)
    assert allowed[:17] == [32] * 16 + [0]
    assert max(allowed) == 192


def test_one_slow_step_changes_nothing() -> None:
    pace = Pace()
    for _ in range(9):
        pace.observe(0.010, 0)
        pace.observe(0.010 + 0.0064, 64)
    pace.observe(5.0, 0)
    pace.observe(5.0, 64)
    assert pace.prompt_tokens() == 192
