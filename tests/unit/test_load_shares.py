"""Shares of a budget: bands, floors that yield, weighted max-min, water-filling over keys; as properties."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from exporter.load.decision import Key, Settings
from exporter.load.forecast import KeyForecasts
from exporter.load.rules import Share, dominant_kind, fill
from exporter.load.shares import BANDS, Claim, claims, fit_floors, level_ratio, max_min

NO_PRESSURE = {"cpu": 0, "memory": 0, "network": 0, "disk": 0}
RATES = st.fixed_dictionaries({name: st.floats(0, 1e7) for name in Settings().classes})
DEMANDS = st.lists(st.floats(0.1, 1e6), min_size=1, max_size=40).map(lambda found: sorted(found, reverse=True))


def _claims(rates: dict[str, float]) -> list[Claim]:
    return claims(rates, "high", NO_PRESSURE, Settings())


def _keys(demands: list[float]) -> list[tuple[Key, float]]:
    return [(("container", f"c{n}"), demand) for n, demand in enumerate(demands)]


@given(RATES, st.floats(1, 1e7))
def test_the_budget_is_used_and_no_more_if_the_floors_fit(rates: dict[str, float], budget: float) -> None:
    """The sum is the budget, or all ceilings where these fit, or all floors where even these do not."""
    found = _claims(rates)
    floors = fit_floors(found, budget)
    shares = max_min(found, floors, budget)
    wanted = min(max(budget, sum(floors.values())), sum(claim.ceiling * claim.rate for claim in found))
    assert sum(shares.values()) == pytest.approx(wanted, rel=1e-3, abs=1e-3)
    for claim in found:
        assert floors[claim.class_] * 0.999 <= shares[claim.class_] <= claim.ceiling * claim.rate * 1.001


@given(RATES, st.floats(1, 1e7))
def test_floors_yield_from_the_lowest_priority_on(rates: dict[str, float], budget: float) -> None:
    """A class yields only when all of lower priority are down to the least, or to their part of the tenth for all."""
    found = _claims(rates)
    floors = fit_floors(found, budget)
    order = list(BANDS)
    for claim in found:
        if floors[claim.class_] < claim.floor * claim.rate * 0.999:
            for lower in found:
                if order.index(lower.priority) > order.index(claim.priority):
                    assert floors[lower.class_] <= max(lower.least * lower.rate, 0.1 * budget) * 1.001


@given(RATES, st.floats(1, 1e7))
def test_floors_are_over_the_budget_only_where_even_the_least_is(rates: dict[str, float], budget: float) -> None:
    """By no more than the tenth that all part."""
    found = _claims(rates)
    least = sum(claim.least * claim.rate for claim in found)
    assert sum(fit_floors(found, budget).values()) <= max(budget, least + 0.1 * budget) * 1.001


@pytest.mark.parametrize("flood", [1e4, 1e6])
def test_what_is_nearly_idle_is_not_cut_for_a_flood(flood: float) -> None:
    """Two events per second each beside a flood that takes all of 200: kept up to their ceilings, debug ones too."""
    rates = dict.fromkeys(Settings().classes, 2.0) | {"connection": flood}
    found = _claims(rates)
    shares = max_min(found, fit_floors(found, 200.0), 200.0)
    idle = [claim for claim in found if claim.class_ != "connection"]
    assert {claim.class_: shares[claim.class_] for claim in idle} == pytest.approx(
        {claim.class_: claim.ceiling * 2.0 for claim in idle}
    )
    assert shares["connection"] == pytest.approx(max(200.0 - sum(shares[claim.class_] for claim in idle), 0.01 * flood))


def test_shares_above_the_floors_are_by_weight() -> None:
    """Two classes that want more than there is, error to debug as 8 to 1; what one does not need goes to the others."""
    found = [
        Claim("a", "error", 10_000.0, 0.0, 0.0, 1.0, 8.0),
        Claim("b", "debug", 10_000.0, 0.0, 0.0, 1.0, 1.0),
        Claim("c", "info", 10.0, 0.0, 0.0, 1.0, 2.0),
    ]
    assert max_min(found, {"a": 0.0, "b": 0.0, "c": 0.0}, 910.0) == pytest.approx({"a": 800.0, "b": 100.0, "c": 10.0})


def test_the_ratio_of_the_critical_level_falls_from_a_fifth_to_the_minimum() -> None:
    """20 % at 50,000 events per second, 1 % from 100,000 on, evenly by logarithms between."""
    ratios = [level_ratio("critical", load, Settings()) for load in (50_000, 70_711, 100_000, 10**9)]
    assert ratios == pytest.approx([0.2, 0.0447, 0.01, 0.01], rel=0.01)


# Keys


@given(DEMANDS, st.floats(0, 1e6), st.floats(0.01, 1.0))
def test_water_filling_keeps_no_more_than_the_share(demands: list[float], others: float, part: float) -> None:
    """What ratio and rules let through is the share, give or take the thresholds of entering; rules are never above."""
    rate = sum(demands) + others
    share = Share(rate, part * rate, 1.0, 1e-4, 16)
    cut = fill(share, _keys(demands), {})
    through = sum(demand * cut.rules.get(key, cut.ratio) for key, demand in _keys(demands)) + others * cut.ratio
    assert through <= share.amount * 1.01 + rate * 1e-4
    assert len(cut.rules) <= 16
    assert all(1e-4 <= ratio <= cut.ratio + 1e-12 for ratio in cut.rules.values())


def test_equal_keys_get_no_rules() -> None:
    """A hundred containers that send the same are thinned alike."""
    cut = fill(Share(10_000.0, 2_000.0, 1.0, 0.01, 16), _keys([100.0] * 17), {})
    assert (cut.ratio, cut.rules, cut.urgent) == (pytest.approx(0.2), {}, False)


@pytest.mark.parametrize("hogs", [1, 3, 10])
def test_hogs_are_capped_alike_and_the_others_are_whole(hogs: int) -> None:
    """One or several that send a hundred times as much: only they are cut, to what the others leave."""
    demands = [10_000.0] * hogs + [100.0] * (17 - hogs)
    rate = hogs * 10_000.0 + 5_000.0
    cut = fill(Share(rate, 8_000.0, 1.0, 0.001, 16), _keys(demands), {})
    assert cut.ratio == 1.0
    assert list(cut.rules.values()) == pytest.approx([3_000.0 / hogs / 10_000.0] * hogs)
    assert cut.urgent


def test_a_rule_is_entered_late_and_left_late() -> None:
    """A key at 1.1 times the cap keeps the rule that it has, and gets none if it has none."""
    demands, key = [110.0] + [100.0] * 16, ("container", "c0")
    share = Share(10_010.0, 5_000.0, 1.0, 0.01, 16)
    assert fill(share, _keys(demands), {}).rules == {}
    assert list(fill(share, _keys(demands), {key: 0.5}).rules) == [key]


def test_keys_are_cut_by_the_kind_that_has_rules_already() -> None:
    """Else by the one with the heaviest key; by nothing where no key is heavy."""
    keys = KeyForecasts()
    assert dominant_kind(keys, ("container", "comm"), {}) == ""
    keys.update({("container", "a"): 100.0, ("comm", "x"): 200.0}, 1.0)
    assert dominant_kind(keys, ("container", "comm"), {}) == "comm"
    assert dominant_kind(keys, ("container", "comm"), {("container", "b"): 0.1}) == "container"
