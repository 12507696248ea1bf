import pytest
from basket import Basket


def test_an_empty_basket_costs_nothing() -> None:
    assert Basket().total() == 0


def test_three_apples_cost_three_times_as_much_as_one() -> None:
    basket = Basket()
    basket.add("apple", 30, count=3)
    assert basket.total() == 90


def test_the_receipt_ends_with_the_total() -> None:
    basket = Basket()
    basket.add("apple", 30, count=3)
    basket.add("pear", 45)
    assert basket.receipt() == "3 x apple: 0.90\n1 x pear: 0.45\ntotal: 1.35"


def test_nobody_pays_us_to_take_something() -> None:
    with pytest.raises(ValueError):
        Basket().add("apple", -30)
