"""A shopping basket. Prices are whole cents, so that sums are exact."""


class Basket:
    def __init__(self) -> None:
        self._lines: list[tuple[str, int, int]] = []

    def add(self, name: str, cents: int, count: int = 1) -> None:
        if cents < 0 or count < 1:
            raise ValueError("a price is never negative, and nobody buys less than one")
        self._lines.append((name, cents, count))

    def total(self) -> int:
        """The price of everything, in cents."""
        return sum(cents for _, cents, _ in self._lines)

    def receipt(self) -> str:
        """One line for each article, then the total."""
        lines = [f"{count} x {name}: {cents * count / 100:.2f}" for name, cents, count in self._lines]
        return "\n".join([*lines, f"total: {self.total() / 100:.2f}"])
