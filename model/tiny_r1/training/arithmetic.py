"""The scratchpads: one short line per digit, so that no line needs more than one fact of the tables."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

PLACES = ("Ones", "Tens", "Hundreds", "Thousands", "Ten-thousands")
TIMES = "*"


@dataclass
class Scratchpad:
    """Collects the lines of one thought. Its wording is drawn once per thought, so a thought reads as one voice."""

    rng: random.Random
    lines: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.carry = self.rng.choice(("carry", "carry", "keep"))
        self.result = self.rng.choice(("So", "So", "That gives", "Result:"))

    def say(self, line: str) -> None:
        """Add one line."""
        self.lines.append(line)

    def text(self) -> str:
        """The whole thought."""
        return "\n".join(self.lines)

    def _carried(self, carry: int) -> str:
        return f", {self.carry} {carry}" if carry else ""

    def add(self, a: int, b: int, conclude: bool = True) -> int:
        """Column addition of a, b >= 0, ones first; without `conclude` the caller writes the line with the sum."""
        width = max(len(str(a)), len(str(b)))
        top, bottom = str(a).zfill(width), str(b).zfill(width)
        self.say(self.rng.choice(("Add {} and {}.", "Add {} and {}.", "{} plus {}.")).format(top, bottom))
        carry = 0
        for place in range(width):
            x, y = int(top[-1 - place]), int(bottom[-1 - place])
            total = x + y + carry
            shown = f"{x}+{y}+{carry}" if carry else f"{x}+{y}"
            carry = total // 10
            self.say(f"{PLACES[place]}: {shown}={total}{self._carried(carry)}.")
        if conclude:
            self.say(f"{self.result} {a} + {b} = {a + b}.")
        return a + b

    def compare(self, a: int, b: int) -> int:
        """Compare from the first digit on; -1, 0 or 1 like the sign of a - b."""
        width = max(len(str(a)), len(str(b)))
        top, bottom = str(a).zfill(width), str(b).zfill(width)
        seen = []
        sign = 0
        for x, y in zip(top, bottom, strict=True):
            sign = (x > y) - (x < y)
            seen.append(f"{x}{'<=>'[sign + 1]}{y}")
            if sign:
                break
        verdict = ("smaller", "equal", "larger")[sign + 1]
        self.say(f"Compare {top} and {bottom}: {', '.join(seen)}, so {verdict}.")
        return sign

    def subtract(self, a: int, b: int) -> int:
        """Column subtraction a - b for a, b >= 0; a negative result is the other difference with a minus sign."""
        sign = self.compare(a, b)
        if sign == 0:
            self.say(f"{self.result} {a} - {b} = 0.")
            return 0
        big, small = (a, b) if sign > 0 else (b, a)
        width = len(str(big))
        top, bottom = str(big), str(small).zfill(width)
        if sign < 0:
            self.say("Swap them, minus sign at the end.")
        self.say(self.rng.choice(("Take {} from {}.", "Take {} from {}.", "Subtract {} from {}.")).format(bottom, top))
        borrow = 0
        digits = ""
        for place in range(width):
            x, y = int(top[-1 - place]), int(bottom[-1 - place])
            left = x - y - borrow
            again = left < 0
            shown = f"{x + 10 * again}-{y}{'-1' if borrow else ''}"
            left += 10 * again
            borrow = int(again)
            digits = str(left) + digits
            self.say(f"{PLACES[place]}: {shown}={left}{', borrow 1' if again else ''}.")
        self.say(f"Digits {digits}. {self.result} {a} - {b} = {a - b}.")
        return a - b

    def _times_digit(self, a: int, digit: int) -> int:
        carry = 0
        for place, x in enumerate(reversed(str(a))):
            product = int(x) * digit
            total = product + carry
            plus = f", +{carry}={total}" if carry else ""
            carry = total // 10
            self.say(f"{PLACES[place]}: {x}{TIMES}{digit}={product}{plus}{self._carried(carry)}.")
        return a * digit

    def multiply(self, a: int, b: int) -> int:
        """a * b where the shorter factor has at most two digits: one line per digit product, then one addition."""
        first, second = (a, b) if len(str(a)) >= len(str(b)) else (b, a)
        if second < 10:
            if first != a:
                self.say(f"{a} {TIMES} {b} is {first} {TIMES} {second}.")
            else:
                self.say(f"Multiply {first} by {second}.")
            self._times_digit(first, second)
            self.say(f"{self.result} {a} {TIMES} {b} = {a * b}.")
            return a * b
        tens, ones = divmod(second, 10)
        parts = []
        for digit, zero in ((ones, ""), (tens, "0")):
            self.say(f"{first} {TIMES} {digit}{zero}:")
            part = self._times_digit(first, digit)
            parts.append(int(f"{part}{zero}"))
            self.say(f"{self.result} {first} {TIMES} {digit}{zero} = {parts[-1]}.")
        self.add(parts[0], parts[1], conclude=False)
        self.say(f"{self.result} {a} {TIMES} {b} = {a * b}.")
        return a * b

    def signed_add(self, total: int, term: int) -> int:
        """total + term for any signs: each case turns into one addition or one subtraction of plain numbers."""
        if total >= 0:
            return self.add(total, term) if term >= 0 else self.subtract(total, -term)
        if term >= 0:
            self.say(f"{total} + {term} is {term} - {-total}.")
            return self.subtract(term, -total)
        self.say(f"{total} - {-term} is minus ({-total} + {-term}).")
        self.add(-total, -term)
        self.say(f"With the minus sign: {total + term}.")
        return total + term


def evaluate(numbers: tuple[int, ...], operators: str) -> int:
    """The independent answer to `numbers[0] operators[0] numbers[1] ...`, products first, by Python itself."""
    text = str(numbers[0]) + "".join(f"{op}{n}" for op, n in zip(operators, numbers[1:], strict=True))
    return int(eval(text, {"__builtins__": {}}))  # digits and + - * only, built above


def work_out(pad: Scratchpad, numbers: tuple[int, ...], operators: str) -> int:
    """Write the whole thought for two or three numbers: products first, then from left to right."""
    terms: list[int] = []
    signs: list[int] = []
    many = len(numbers) > 2
    index, sign = 0, 1
    while index < len(numbers):
        value = numbers[index]
        while index < len(operators) and operators[index] == "*":
            if many and set(operators) != {"*"}:
                pad.say(pad.rng.choice(("First the product.", "Product first.")))
            value = pad.multiply(value, numbers[index + 1])
            index += 1
        terms.append(value)
        signs.append(sign)
        if index < len(operators):
            sign = 1 if operators[index] == "+" else -1
        index += 1
    total = terms[0]
    for term, sign in zip(terms[1:], signs[1:], strict=True):
        total = pad.signed_add(total, sign * term)
    return total
