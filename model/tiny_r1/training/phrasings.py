"""How a calculation is asked for. Every list exists twice: seen in training, and held out for evaluation only."""

from __future__ import annotations

import random

# A phrase list is keyed by "held out?". Held-out phrases reuse the words that carry the meaning ("plus", "take away")
# in sentences that training never shows.
Phrases = dict[bool, tuple[str, ...]]

# {e} is an expression such as "17 + 25" or "the sum of 17 and 25".
FRAMES: Phrases = {
    False: (
        "What do I get from {e}?", "What comes out of {e}?", "What result do you get from {e}?",
        "What is the number for {e}?", "The number from {e} is what?",

        "What number is the result of {e}?", "Could you find {e}?", "I can't do {e}.", "I don't know {e}.",
        "My question: {e}?", "What does {e} give?", "What will {e} be?", "Try to work out {e}.",
        "Please calculate {e} for me.", "Please work out {e}.", "Do you know what {e} makes?",
        "Can you find out what {e} is?", "Could you tell me how much {e} is?", "The answer for {e}?", "Solve this: {e}",
        "This one: {e}", "{e} gives what?", "Let me see what {e} is.", "Compute this for me: {e}",
        "Do you know the result of {e}?", "What number does {e} make?", "Would you tell me {e}?", "What is {e}?",
        "What is {e}?", "What is {e}?", "What's {e}?", "What's {e}?", "{e}", "{e}", "{e} = ?", "{e} =", "{e}=?", "{e}?",
        "Calculate {e}.", "Compute {e}.", "How much is {e}?", "Work out {e}.", "Find {e}.", "Solve {e}.",
        "Evaluate {e}.", "Tell me {e}.", "Tell me what {e} is.", "Can you calculate {e}?", "Can you tell me {e}?",
        "Can you work out {e} for me?", "Could you compute {e}?", "I need to know {e}.", "I want to know what {e} is.",
        "Do you know what {e} is?", "What does {e} equal?", "What is the result of {e}?", "What is the answer to {e}?",
        "Give me the answer to {e}.", "Give me {e}.", "What do you get for {e}?", "What do I get if I compute {e}?",
        "How much does {e} make?", "What is the value of {e}?", "{e} is what?", "{e} is how much?", "{e} equals what?",
        "I have to calculate {e}.", "Help me with {e}.", "Help me compute {e}.", "My homework says {e}. What is it?",
        "What would {e} be?", "Can you do {e}?", "Do {e}.", "Try {e}.", "And {e}?", "Now {e}.", "Next: {e}",
        "What about {e}?", "Question: {e}", "Q: {e}", "Show me {e}.", "Let's do {e}.", "I wonder what {e} is.",
        "so what is {e}", "Would you calculate {e}?", "Is it hard to compute {e}?", "How do you work out {e}?",
        "Explain how to get {e}.", "The problem is {e}.", "Here is a sum: {e}", "Math: {e}", "Find out what {e} is.",
        "Figure out {e}.", "What number is {e}?", "Answer this: {e}", "Quick, {e}!", "{e} please", "{e}, thanks",
    ),
    True: (
        "What will {e} give me?", "Could you figure out what {e} is?", "How much would {e} be?",
        "I'd like the value of {e}.", "Work this out: {e}", "Can you find the result of {e}?",
        "What number do you get from {e}?", "Then what is {e}?", "Do you know the answer to {e}?",
        "Here's one for you: {e}", "Solve this for me: {e}", "Try to calculate {e}.", "{e} makes what?",
        "Tell me how much {e} is.", "What's the answer for {e}?", "My question is {e}.", "Let me know what {e} is.",
        "I can't work out {e}.", "Would you tell me what {e} equals?", "Please find {e} for me.",
    ),
}  # fmt: skip

# Forms of an expression, by operator; {a} and {b} are operands in the order of the expression a op b.
FORMS: dict[str, Phrases] = {
    "+": {
        False: (
            "{b} more than {a}",

            "{a} + {b}", "{a} + {b}", "{a} + {b}", "{a}+{b}", "{a}+{b}", "{a} plus {b}", "{a} plus {b}",
            "the sum of {a} and {b}", "{a} added to {b}", "{a} and {b} together", "{a} and {b} added together",
            "the total of {a} and {b}", "{a} +{b}", "{a} increased by {b}", "{b} more than {a}", "adding {a} and {b}",
        ),
        True: ("the total when {a} is added to {b}", "adding {b} to {a}", "the sum {a} + {b}", "{a} plus {b} more"),
    },
    "-": {
        False: (
            "{a} minus {b}", "{a} with {b} off", "taking away {b} from {a}", "{a} - {b}", "{a} - {b}", "{a} - {b}",
            "{a}-{b}", "{a}-{b}", "{a} minus {b}", "{a} minus {b}", "the difference of {a} and {b}",
            "{a} take away {b}", "{b} subtracted from {a}", "{b} less than {a}", "{a} -{b}", "{a} – {b}",
            "{a} less {b}", "{a} decreased by {b}", "{b} taken from {a}", "subtracting {b} from {a}",
        ),
        True: (
            "{a} with {b} taken away", "taking {b} from {a}", "the difference {a} - {b}", "{a} with {b} subtracted",
        ),
    },
    "*": {
        False: (
            "{a}*{b}", "{a}x{b}", "the product of {a} times {b}", "{a} * {b}", "{a} * {b}", "{a}*{b}", "{a}*{b}",
            "{a} x {b}", "{a} x {b}", "{a}x{b}", "{a} × {b}", "{a}×{b}", "{a} times {b}", "{a} times {b}",
            "{a} times {b}", "{a} multiplied by {b}", "the product of {a} and {b}", "{a} X {b}",
            "{a} and {b} multiplied", "{a} lots of {b}", "multiplying {a} by {b}", "{a} · {b}",
        ),
        True: (
            "the product {a} x {b}", "{a} and {b} multiplied together", "{b} multiplied {a} times",
            "multiplying {a} and {b}",
        ),
    },
}  # fmt: skip

# Whole sentences by operator.
SENTENCES: dict[str, Phrases] = {
    "+": {
        False: (
            "How much do I get if I add {b} to {a}?", "What is it if I add {b} to {a}?",
            "How much will it be if I add {b} to {a}?", "Please sum {a} and {b}.", "Sum up {a} and {b}, please.",

            "Could you add {a} and {b}?", "How much is it when I add {a} and {b}?",
            "If {b} is added to {a}, what do you get?", "If you add {a} to {b}, how much is it?",
            "I add {a} and {b}. What is the total?", "Please add {a} and {b} up.", "You have {a}. Add {b}.",
            "Add {a} and {b}.", "Add {b} to {a}.", "Add {a} and {b} together.", "Sum {a} and {b}.",
            "Add up {a} and {b}.", "If I add {a} and {b}, what do I get?", "What do you get when you add {a} and {b}?",
            "Please add {a} to {b}.", "Start with {a} and add {b}.", "What is the sum of {a} and {b}?",
            "Take {a} and add {b}.", "I have {a} and I add {b}. What is the result?", "How much do {a} and {b} make?",
            "What do {a} and {b} make together?", "Put {a} and {b} together.", "Can you add {a} and {b}?",
            "add {a}, {b}", "sum of {a} and {b}", "Increase {a} by {b}.",
        ),
        True: (
            "Could you add {a} and {b} up?", "When {b} is added to {a}, what is the result?",
            "How much is it if you add {b} to {a}?", "I'm adding {a} and {b}, what is the total?",
            "You start with {a}. Now add {b}.", "What total do {a} and {b} make?", "Please sum up {a} and {b}.",
        ),
    },
    "-": {
        False: (
            "Could you take {b} away from {a}?", "If {b} is taken away from {a}, what is left?",
            "I subtract {b} from {a}. What is the result?", "How much of {a} is left if I take {b}?",
            "Could you subtract {b} from {a}?", "When you take {b} from {a}, what is left?",
            "You have {a}. Take away {b}.", "I take {b} off {a}. What is left?", "Take {b} off {a}.",
            "What is {a} with {b} off?", "{a} take {b} away", "Take away {b} from {a}.",
            "What remains of {a} without {b}?", "Subtract {b} from {a}.", "Take {b} away from {a}.",
            "Take {b} from {a}.", "Subtract {b} from {a}, please.", "If I take {b} from {a}, what is left?",
            "What is left if I take {b} away from {a}?", "What do you get when you subtract {b} from {a}?",
            "Start with {a} and subtract {b}.", "Start with {a} and take away {b}.",
            "What is the difference between {a} and {b}?", "How much is left when {b} is subtracted from {a}?",
            "Remove {b} from {a}.", "Can you subtract {b} from {a}?", "Decrease {a} by {b}.", "Reduce {a} by {b}.",
            "Deduct {b} from {a}.",
        ),
        True: (
            "Could you take {b} off {a}?", "When {b} is taken away from {a}, what do you get?",
            "I'm subtracting {b} from {a}, what is the result?", "You start with {a}. Now take away {b}.",
            "How much is left of {a} if I subtract {b}?", "What remains when you take {b} from {a}?",
        ),
    },
    "*": {
        False: (
            "Could you multiply {a} by {b}?", "Multiply {a} and {b} together.",
            "If {a} is multiplied by {b}, what is it?", "I multiply {a} by {b}. What is the result?",
            "You take {a} and multiply it by {b}.", "Can you multiply {a} and {b} together?",
            "What is the result when you multiply {a} by {b}?", "You have {a}. Multiply by {b}.",
            "Multiply {a} by {b}.", "Multiply {a} and {b}.", "Multiply {a} with {b}.", "Can you multiply {a} by {b}?",
            "What do you get when you multiply {a} by {b}?", "If I multiply {a} by {b}, what do I get?",
            "What is the product of {a} and {b}?", "Find the product of {a} and {b}.",
            "Take {a} and multiply it by {b}.", "How much is {a} multiplied by {b}?", "product of {a} and {b}",
            "Start with {a} and multiply by {b}.", "What do {a} and {b} make when multiplied?",
            "{a} by {b}, multiplied?", "multiply {a}, {b}",
        ),
        True: (
            "Could you multiply {a} and {b} together?", "When {a} is multiplied by {b}, what is the result?",
            "I'm multiplying {a} by {b}, what do I get?", "You start with {a}. Now multiply it by {b}.",
            "What is the result if you multiply {a} and {b}?", "Please find the product of {a} and {b} for me.",
        ),
    },
}  # fmt: skip

# Three numbers, for sums only; everything else with three numbers is written with operators.
SUMS_OF_THREE: Phrases = {
    False: (
        "Could you add {a}, {b} and {c}?", "Please add up {a}, {b} and {c} for me.",
        "If I add up {a}, {b} and {c}, what do I get?", "Work out the sum of {a}, {b} and {c}.",
        "How much is {a}, {b} and {c} added up?", "Add {a}, {b} and {c}.", "What is the sum of {a}, {b} and {c}?",
        "Sum up {a}, {b} and {c}.", "What do {a}, {b} and {c} make together?", "Add up {a}, {b}, {c}.",
        "the sum of {a}, {b}, and {c}", "What is the total of {a}, {b} and {c}?",
        "How much are {a}, {b} and {c} together?", "Add {a} and {b} and {c}.", "Can you add {a}, {b} and {c}?",
        "Find the sum of {a}, {b}, and {c}.", "total of {a}, {b} and {c}",
    ),
    True: (
        "Could you add up {a}, {b} and {c} for me?", "If I add {a}, {b} and {c}, what is the total?",
        "How much do {a}, {b} and {c} make?", "Please sum {a}, {b} and {c}.",
        "Work out the total of {a}, {b}, and {c}.",
    ),
}  # fmt: skip

# {x} and {y} are the numbers in the order they are mentioned.
COMPARE_LARGER: Phrases = {
    False: (
        "Tell me which number is bigger, {x} or {y}.", "Given {x} and {y}, which is larger?",
        "Between {x} and {y}, which is greater?", "Can you say which is bigger: {x} or {y}?",
        "Can you tell me which is larger, {x} or {y}?", "I have {x} and {y}. Which is greater?",
        "The numbers are {x} and {y}. Which one is bigger?", "Which is bigger, {x} or {y}?",
        "Which is larger: {x} or {y}?", "Which number is greater, {x} or {y}?", "What is bigger, {x} or {y}?",
        "Which one is larger, {x} or {y}?", "{x} or {y}, which is bigger?", "Is {x} or {y} bigger?",
        "Tell me which is larger, {x} or {y}.", "Compare {x} and {y}. Which is larger?",
        "Which of {x} and {y} is greater?", "What is the larger of {x} and {y}?", "Is {x} or {y} the larger number?",
        "what's more, {x} or {y}", "Which is more, {x} or {y}?", "Find the bigger number: {x}, {y}",
        "What is the maximum of {x} and {y}?",
    ),
    True: (
        "Of {x} and {y}, which is larger?", "Can you tell me which number is bigger, {x} or {y}?",
        "What number is greater: {x} or {y}?", "Here are {x} and {y}. Which is bigger?",
        "Is it {x} or {y} that is larger?",
    ),
}  # fmt: skip
COMPARE_SMALLER: Phrases = {
    False: (
        "Tell me which number is smaller, {x} or {y}.", "Given {x} and {y}, which is less?",
        "Between {x} and {y}, which is smaller?", "Can you say which is smaller: {x} or {y}?",
        "Can you tell me which is less, {x} or {y}?", "I have {x} and {y}. Which is smaller?",
        "The numbers are {x} and {y}. Which one is smaller?", "Which is smaller, {x} or {y}?",
        "Which is less: {x} or {y}?", "Which number is smaller, {x} or {y}?", "What is smaller, {x} or {y}?",
        "Which one is smaller, {x} or {y}?", "{x} or {y}, which is smaller?", "Is {x} or {y} smaller?",
        "Tell me which is smaller, {x} or {y}.", "Compare {x} and {y}. Which is smaller?",
        "Which of {x} and {y} is less?", "What is the smaller of {x} and {y}?", "Find the smaller number: {x}, {y}",
        "Which is lower, {x} or {y}?", "What is the minimum of {x} and {y}?",
    ),
    True: (
        "Of {x} and {y}, which is smaller?", "Can you tell me which number is less, {x} or {y}?",
        "What number is smaller: {x} or {y}?", "Here are {x} and {y}. Which is smaller?",
    ),
}  # fmt: skip
COMPARE_YES_NO_LARGER: Phrases = {
    False: (
        "Tell me if {x} is bigger than {y}.", "Tell me whether {x} is larger than {y}.",
        "Can you say if {x} is greater than {y}?", "I think {x} is bigger than {y}. Is that right?",
        "Do you believe {x} is larger than {y}?", "Can you check if {x} is greater than {y}?",
        "I want to know if {x} is larger than {y}.", "Is {x} bigger than {y}?", "Is {x} greater than {y}?",
        "Is {x} larger than {y}?", "Is {x} more than {y}?", "Is {x} > {y}?", "{x} > {y}?",
        "Is it true that {x} is larger than {y}?", "True or false: {x} > {y}", "Is the number {x} greater than {y}?",
        "Would you say {x} is bigger than {y}?",
    ),
    True: (
        "Do you think {x} is larger than {y}?", "Can you tell me if {x} is greater than {y}?",
        "Is {x} a bigger number than {y}?",
    ),
}  # fmt: skip
COMPARE_YES_NO_SMALLER: Phrases = {
    False: (
        "Tell me if {x} is smaller than {y}.", "Tell me whether {x} is less than {y}.",
        "Can you say if {x} is smaller than {y}?", "I think {x} is smaller than {y}. Is that right?",
        "Do you believe {x} is less than {y}?", "Can you check if {x} is smaller than {y}?",
        "I want to know if {x} is less than {y}.", "Is {x} smaller than {y}?", "Is {x} less than {y}?", "Is {x} < {y}?",
        "{x} < {y}?", "Is {x} lower than {y}?", "Is it true that {x} is smaller than {y}?", "True or false: {x} < {y}",
        "Is the number {x} less than {y}?",
    ),
    True: (
        "Do you think {x} is smaller than {y}?", "Can you tell me if {x} is less than {y}?",
        "Is {x} a smaller number than {y}?",
    ),
}  # fmt: skip

PREFIXES: Phrases = {
    False: (
        "Hi, a question: ", "Another one: ", "OK, next: ", "Thanks! Next question: ", "Sorry, one question: ",
        "Good evening. ", "Hello, please ", "Hi, please ", "Alright. ", "Well, one more question: ", "Please ",
        "please, ", "Hey, ", "Hi, ", "Hi! ", "Hello, ", "Hello! ", "OK, ", "Ok ", "Okay, ", "So, ", "Well, ", "Now, ",
        "Hey! ", "Excuse me, ", "Sorry, ", "Hi there, ", "Good morning, ", "Thanks! ", "Great, ", "Quick question: ",
        "I have a question: ", "One more: ", "Next one: ", "Um, ", "Next, ", "Good. ", "A question: ", "Hey there! ",
        "And ", "Thank you. ", "Right, ", "Easy one: ", "Here is my question. ", "can you tell me: ", "Tell me, ",
        "just ",
    ),
    True: (
        "Hello there, ", "Hey, please ", "OK, next question: ", "Thanks, and now: ", "Hi, quick question. ",
        "Alright, ", "Another question: ", "Well then, ", "Good evening, ", "Sorry to ask, ",
    ),
}  # fmt: skip
SUFFIXES: Phrases = {
    False: (
        " Please.", " Thanks!", " Thank you.", " Thanks", " please", " :)", " Tell me.", " Show your work.",
        " I need it now.", " Can you help me?", " Explain.", " Step by step.", " Think carefully.", " Just the number.",
        " Be quick!", " ...",
    ),
    True: (" Thanks a lot!", " Please help.", " Show me the steps.", " Please explain.", " Thank you so much!"),
}  # fmt: skip


def _typo(rng: random.Random, text: str) -> str:
    """One slip of the finger between two letters: dropped, doubled or swapped."""
    spots = [i for i in range(1, len(text) - 1) if text[i].isalpha() and text[i + 1].isalpha()]
    if len(spots) < 6:
        return text
    i = rng.choice(spots)
    kind = rng.randrange(3)
    if kind == 0:
        return text[:i] + text[i + 1 :]
    if kind == 1:
        return text[:i] + text[i] + text[i:]
    return text[:i] + text[i + 1] + text[i] + text[i + 2 :]


def decorate(rng: random.Random, text: str, held_out: bool) -> str:
    """What people do to a sentence: greet first, thank last, forget capitals and the final mark, mistype a letter."""
    if rng.random() < 0.25:
        prefix = rng.choice(PREFIXES[held_out])
        lower = text[:1].lower() + text[1:] if text[:2] not in ("I ", "I'") and text[1:2].islower() else text
        text = prefix + (lower if not prefix.endswith(("! ", ". ", ": ")) else text)
    if rng.random() < 0.10:
        text = text + ("" if text[-1:] in ".?!" else rng.choice((".", ",", ""))) + rng.choice(SUFFIXES[held_out])
    if rng.random() < 0.25:
        text = text.lower()
    elif rng.random() < 0.02:
        text = text.upper()
    if rng.random() < 0.25:
        text = text.rstrip(".?! ")
    if rng.random() < 0.08:
        text = _typo(rng, text)
    if rng.random() < 0.03:
        text = rng.choice((text + " ", text.replace(" ", "  ", 1), text + "??", text + "!"))
    return text


def ask_expression(rng: random.Random, numbers: tuple[int, ...], operators: str, held_out: bool) -> str:
    """A question for a calculation. Held out: the sentence, and at times the form of the expression, are unseen."""
    if len(operators) == 1:
        values = {"a": numbers[0], "b": numbers[1]}
        if rng.random() < 0.35:
            return decorate(rng, rng.choice(SENTENCES[operators][held_out]).format(**values), held_out)
        form = rng.choice(FORMS[operators][held_out and rng.random() < 0.3]).format(**values)
    else:
        if operators == "++" and rng.random() < 0.4:
            text = rng.choice(SUMS_OF_THREE[held_out]).format(**dict(zip("abc", numbers, strict=True)))
            return decorate(rng, text, held_out)
        form = write_expression(rng, numbers, operators)
    return decorate(rng, rng.choice(FRAMES[held_out]).format(e=form), held_out)


def write_expression(rng: random.Random, numbers: tuple[int, ...], operators: str) -> str:
    """`12 + 5 * 3`, `12+5x3` or `12 plus 5 times 3`."""
    style = rng.randrange(8)
    times = rng.choice((" * ", " * ", " x ", " × ", " times "))
    words = {"+": " + ", "-": " - ", "*": times}
    if style == 0:
        words = {"+": " plus ", "-": " minus ", "*": " times "}
    elif style in (1, 2, 3):
        words = {op: word if word == " times " else word.strip() for op, word in words.items()}
    text = str(numbers[0])
    for op, number in zip(operators, numbers[1:], strict=True):
        text += f"{words[op]}{number}"
    return text
