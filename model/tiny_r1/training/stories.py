"""Short word problems, put together from a start, one or two events and a question."""

from __future__ import annotations

import random
from dataclasses import dataclass

from .phrasings import Phrases
from .words import CONTAINERS_ALL, NAMES_BY, OBJECTS_BY, PLACES_ALL, made_up_word, plural


@dataclass(frozen=True)
class Story:
    """A word problem: its text, and the calculation it amounts to."""

    text: str
    numbers: tuple[int, ...]
    operators: str


# {n} a person, {m} another, {o} what is counted, {a}/{b}/{c} numbers, {p} a place. Verbs: "buy/buys/bought".
_STARTS: Phrases = {
    False: (
        "{n} at first had {a} {o}", "{n} began the day with {a} {o}",
        "In total {n} has {a} {o}", "{n} first had {a} {o}", "{n} had {a} {o} at first",
        "There are {a} {o} near the {p}", "At the {p} there are {a} {o}", "{n} has {a} {o}", "{n} had {a} {o}",
        "{n} has {a} {o}", "{n} owns {a} {o}", "{n} starts with {a} {o}", "There are {a} {o} in the {p}",
        "There were {a} {o} in a {p}", "{n} bought {a} {o}", "{n} found {a} {o}", "{n} has got {a} {o}",
        "{n} collected {a} {o}", "{n} made {a} {o}", "A {p} has {a} {o}", "The {p} had {a} {o}",
        "In the {p} there are {a} {o}", "{n} counted {a} {o}", "{n} picked {a} {o}", "{n} has {a} {o} in a {p}",
    ),
    True: (
        "{n} began with {a} {o}", "{n} has a total of {a} {o}", "There are {a} {o} at the {p}",
        "At first {n} had {a} {o}",
    ),
}  # fmt: skip
_SELF_STARTS: Phrases = {
    False: (
        "I started with {a} {o}",
        "I made {a} {o}",
        "I found {a} {o}",
        "I have {a} {o}",
        "I had {a} {o}",
        "I have got {a} {o}",
        "I bought {a} {o}",
        "We have {a} {o}",
        "You have {a} {o}",
    ),
    True: ("I own {a} {o}", "I've got {a} {o}", "We had {a} {o}"),
}
_GAINS: Phrases = {
    False: (
        "buy/buys/bought", "find/finds/found", "get/gets/got", "receive/receives/received",
        "collect/collects/collected", "pick up/picks up/picked up", "win/wins/won", "make/makes/made",
        "take/takes/took", "earn/earns/earned",
    ),
    True: ("add/adds/added", "gain/gains/gained", "bring/brings/brought"),
}  # fmt: skip
_GAIN_TAILS: Phrases = {
    False: (
        "{b} more of the {o}",
        "{b} {o} more",
        "an additional {b} {o}",
        "{b} more {o}",
        "{b} more",
        "{b} more",
        "{b} more {o}",
        "another {b}",
        "another {b} {o}",
        "{b} extra {o}",
        "{b} new {o}",
    ),
    True: ("{b} more of them", "an extra {b} {o}", "{b} more {o} later"),
}
_TELLING_GAINS = ("{b} more", "{b} more {o}", "another {b}", "{b} extra {o}", "an additional {b} {o}")
_TELLING_LOSSES = ("{b} of them", "{b} of the {o}", "{b} of these", "away {b} of them", "{b} of his {o}")
_GIFTS: Phrases = {
    False: (
        "{m} gives {b} more to {t}",
        "{m} gives {b} {o} to {t}",
        "{m} gave another {b} to {t}",
        "{m} brought {b} more {o} to {t}",
        "{m} gives {t} {b} more",
        "{m} gave {t} {b} more {o}",
        "{m} brings {t} another {b}",
        "{m} sends {t} {b} more",
    ),
    True: ("{m} gives another {b} {o} to {t}", "{m} brings {b} more {o} for {t}"),
}
_LOSSES: Phrases = {
    False: (
        "give away/gives away/gave away", "lose/loses/lost", "sell/sells/sold", "eat/eats/ate", "use/uses/used",
        "break/breaks/broke", "drop/drops/dropped", "throw away/throws away/threw away", "donate/donates/donated",
        "give/gives/gave", "spend/spends/spent", "remove/removes/removed",
    ),
    True: ("give up/gives up/gave up", "toss/tosses/tossed", "give out/gives out/gave out"),
}  # fmt: skip
_LOSS_TAILS: Phrases = {
    False: ("{b}", "{b}", "{b} of them", "{b} of the {o}", "{b} {o}"),
    True: ("{b} of those", "{b} of these {o}"),
}
# Events with a subject of their own: present tense / past tense.
_ARRIVALS: Phrases = {
    False: (
        "{b} more arrive/{b} more arrived", "{b} more come in/{b} more came in", "{b} more join/{b} more joined",
        "another {b} come/another {b} came", "{b} more are added/{b} more were added",
        "{b} more get on/{b} more got on", "{b} new {o} arrive/{b} new {o} arrived",
        "someone adds {b} more/someone added {b} more",
    ),
    True: ("{b} more {o} join/{b} more {o} joined", "another {b} {o} arrive/another {b} {o} arrived"),
}  # fmt: skip
_DEPARTURES: Phrases = {
    False: (
        "someone removes {b}/someone removed {b}", "{b} of the {o} leave/{b} of the {o} left", "{b} leave/{b} left",
        "{b} of them leave/{b} of them left", "{b} go away/{b} went away", "{b} get off/{b} got off",
        "{b} fly away/{b} flew away", "{b} are sold/{b} were sold", "{b} are taken away/{b} were taken away",
        "{b} get lost/{b} got lost", "{b} {o} are removed/{b} {o} were removed", "someone takes {b}/someone took {b}",
        "{b} break/{b} broke", "{b} go home/{b} went home",
    ),
    True: (
        "{b} {o} leave/{b} {o} left", "{b} of the {o} are taken away/{b} of the {o} were taken away",
        "someone takes away {b}/someone took away {b}",
    ),
}  # fmt: skip
_ADVERBIALS: Phrases = {
    False: (
        "for lunch", "at the shop", "yesterday", "today", "in the morning", "at school", "at the market", "on Monday",
        "at home", "in the evening", "with a friend", "by accident", "last week", "in the park", "after school",
        "for dinner", "on the way home",
    ),
    True: ("at the store", "on Tuesday", "in the afternoon"),
}  # fmt: skip
_PRESENTS: Phrases = {
    False: (
        "send/sends/sent {b} to {m}",
        "send/sends/sent {b} {o} to {m}",
        "give/gives/gave {b} to {m}",
        "give/gives/gave {m} {b} {o}",
        "give/gives/gave {m} {b}",
        "lend/lends/lent {b} to {m}",
        "sell/sells/sold {b} to {m}",
        "give/gives/gave {b} {o} to {m}",
        "give/gives/gave {m} {b} of them",
    ),
    True: ("hand/hands/handed {b} to {m}", "pass/passes/passed {b} {o} to {m}"),
}
_ASK_NOW: Phrases = {
    False: (
        "So how many {o} are there now?", "How many {does} {t} have now?", "Now how many {o} {does} {t} have?",
        "In the end, how many {o} are there?", "How many {o} {does} {t} have now?", "How many {o} are there now?",
        "How many {o} {does} {t} have?", "How many now?", "How many {does} {t} have in the end?",
        "What is the number of {o} now?", "How many {o} is that?", "How many {o} are there?",
    ),
    True: ("So how many {o} {does} {t} have?", "How many {o} in the end?", "Now how many {o} are there?"),
}  # fmt: skip
_ASK_TOTAL: Phrases = {
    False: (
        "What is the total of {o}?", "In all, how many {o} are there?", "How many {o} {does} {t} have in total?",
        "How many {o} are there in total?", "How many altogether?", "What is the total?", "How many {o} in all?",
        "How many {o} {does} {t} have altogether?", "How many {o} in total?",
    ),
    True: (
        "What is the total number of {o}?", "Altogether, how many {o} is that?", "In total, how many {o} are there?",
    ),
}  # fmt: skip
_ASK_LEFT: Phrases = {
    False: (
        "How many are still there?", "So how many {o} are left?", "Then how many {o} are left?", "How many are left?",
        "How many {o} are left?", "How many {o} {does} {t} have left?", "How many {does} {t} have left?",
        "How many remain?", "How many {o} remain?", "What is left?", "How many {o} {does} {t} still have?",
    ),
    True: ("How many {o} are still left?", "So how many are left?", "How many {o} are remaining?"),
}  # fmt: skip
# a groups of b; {g} one group, {gs} groups.
_PRODUCTS: Phrases = {
    False: (
        "A {g} has {b} {o} inside. How many {o} are in {a} {gs}?",

        "{n} bought {a} {gs} and every {g} has {b} {o}. How many {o} is that in total?",
        "In each {g} there are {b} {o}. How many {o} are in {a} {gs}?",
        "Every {g} contains {b} {o}. How many {o} do {a} {gs} contain?",
        "{n} puts {b} {o} into each of {a} {gs}. How many {o} is that?",
        "{n} bought {a} {gs} and there are {b} {o} in each. How many {o} is that?",
        "There are {a} {gs} of {o}, {b} in each. How many {o} are there?",
        "In {a} {gs} there are {b} {o} each. How many {o} in total?",
        "A {g} has {b} {o}. How many {o} do {a} {gs} have?",
        "I bought {a} {gs} with {b} {o} in each {g}. How many {o} is that?",
        "{n} has {a} {gs} with {b} {o} each. How many {o} {does} {t} have?",
        "{n} has {a} {gs} of {b} {o}. How many {o} is that?",
        "There are {a} {gs} with {b} {o} in each {g}. How many {o} are there?",
        "Each {g} has {b} {o}. How many {o} are in {a} {gs}?",
        "There are {b} {o} in each {g}. How many {o} are in {a} {gs}?",
        "{n} buys {a} {gs} with {b} {o} in each. How many {o} in total?",
        "If I have {a} {gs} with {b} {o} each, how many {o} do I have?",
        "How many {o} are there in {a} {gs} of {b} {o}?",
        "I have {a} {gs}. Each {g} has {b} {o}. How many {o} do I have?",
        "A {g} holds {b} {o}. How many {o} do {a} {gs} hold?",
        "If each {g} holds {b} {o}, how many {o} fit in {a} {gs}?",
        "{n} fills {a} {gs} with {b} {o} each. How many {o} altogether?",
        "If there are {a} {gs} and each {g} contains {b} {o}, how many {o} are there in total?",
        "{n} and {m} have {a} {gs}. Every {g} has {b} {o}. How many {o} are there?",
        "{a} {gs} contain {b} {o} each. How many {o} are there?", "You have {a} {gs} of {b} {o} each. How many {o}?",
        "{n} sells {b} {o} every day. How many {o} {does} {t} sell in {a} days?",
        "One {g} costs {b} dollars. How much do {a} {gs} cost?",
        "{a} {gs} cost {b} dollars each. What is the total cost?",
        "{n} makes {b} {o} a day. How many {o} {does} {t} make in {a} days?",
        "We have {a} {gs} and {b} {o} in each of them. How many {o} do we have?",
        "I bought {a} {gs} of {b} {o}. How many {o} did I buy?",
        "Tickets cost {b} dollars each. How much do {a} tickets cost?",
        "{n} reads {b} pages a day. How many pages in {a} days?",
        "There are {a} rows of {b} {o}. How many {o} are there?",
        "{n} plants {a} rows with {b} {o} in each row. How many {o} is that?",
        "If one {g} has {b} {o}, how many {o} do {a} {gs} have?",
        "Each of the {a} {gs} has {b} {o}. How many {o} in all?",
        "{n} has {a} {gs}. There are {b} {o} in every {g}. How many {o} {does} {t} have in total?",
        "If a {g} costs {b} dollars, how much do {a} {gs} cost?",
        "Each child gets {b} {o}. How many {o} do {a} children get?",
    ),
    True: (
        "{n} packs {b} {o} into each of {a} {gs}. How many {o} are there in total?",
        "In each of {a} {gs} there are {b} {o}. How many {o} is that?",
        "If every {g} contains {b} {o}, how many {o} do {a} {gs} contain?",
        "{n} bought {a} {gs} and each {g} has {b} {o}. How many {o} is that in all?",
        "I have {a} {gs} of {o}, {b} in each. How many {o} do I have in total?",
        "A {g} has {b} {o} in it. How many {o} are there in {a} {gs}?",
    ),
}  # fmt: skip
# Two people: together, and the difference (a >= b).
_TOGETHER: Phrases = {
    False: (
        "Altogether, how many {o} do {n} and {m} have if {n} has {a} and {m} has {b}?",
        "In total, how many {o} do {n} and {m} have? {n} has {a} and {m} has {b}.",
        "How many {o} do {n} and {m} have together if {n} has {a} and {m} has {b}?",
        "{n} collected {a} {o}, {m} collected {b}. How many is that in total?",
        "If {n} has {a} {o} and {m} has {b}, how many is that together?",
        "{n} has {a} {o} and {m} has {b}. How many {o} do they have together?",
        "{n} has {a} {o}. {m} has {b} {o}. How many in total?",
        "{n} has {a} {o} and {m} has {b} {o}. How many {o} do they have in total?",
        "I have {a} {o} and {m} has {b}. How many do we have together?",
        "There are {a} {o} in one {g} and {b} in another. How many {o} are there altogether?",
        "{n} made {a} {o} and {m} made {b}. How many {o} did they make together?",
        "If {n} has {a} {o} and {m} has {b} {o}, how many {o} do they have altogether?",
        "{a} {o} are in the {p} and {b} {o} are in the {g}. How many in all?",
        "One {g} has {a} {o}, another {g} has {b} {o}. What is the total?",
        "{n} read {a} pages on Monday and {b} pages on Tuesday. How many pages in total?",
        "{n} is {a} years old. {m} is {b} years older. How old is {m}?",
        "{n} has {a} {o}. {m} has {b} more. How many does {m} have?",
        "{n} has {a} {o}. {m} has {b} {o} more than {n}. How many does {m} have?",
        "{n} ran {a} km on Monday and {b} km on Tuesday. How many km in total?",
        "There are {a} {o} and {b} {o2}. How many are there in total?",
        "{n} has {a} {o} and {b} {o2}. How many things {does} {t} have altogether?",
        "A {g} has {a} {o} and {b} {o2}. How many are there together?",
        "I bought {a} {o} and {b} {o2}. How many things did I buy in total?",
    ),
    True: (
        "{n} found {a} {o} and {m} found {b}. How many {o} do the two have in total?",
        "Together, how many {o} do {n} and {m} have if {n} has {a} and {m} has {b}?",
        "{n} picked {a} {o}, {m} picked {b}. How many {o} is that altogether?",
        "In one {g} there are {a} {o}, in another there are {b}. How many {o} in total?",
    ),
}  # fmt: skip
_DIFFERENCE: Phrases = {
    False: (
        "How many more {o} has {n} than {m}? {n} has {a}, {m} has {b}.",
        "How many more does {n} have than {m} if {n} owns {a} {o} and {m} owns {b}?",
        "If {n} has {a} {o} and {m} has {b}, how many more has {n}?",

        "Of {a} {o}, {b} are blue. How many are not blue?",
        "{n} has {a} {o}, {m} only {b}. How many more does {n} have?",
        "How many more {o} has {n} than {m} if {n} has {a} and {m} {b}?",
        "{n} needs {a} {o} but has {b}. How many more does {n} need?",
        "{n} has {a} {o} and {m} has {b}. How many more {o} does {n} have?",
        "{n} has {a} {o}. {m} has {b} {o}. How many more does {n} have than {m}?",
        "{m} has {b} {o} fewer than {n}. {n} has {a} {o}. How many does {m} have?",
        "If {n} has {a} {o} and {m} has {b} {o}, how many more {o} does {n} have than {m}?",
        "There are {a} {o}. {b} of them are red. How many are not red?",
        "There are {a} {o} in the {p} and {b} of them are old. How many are not old?",
        "{n} is {a} years old. {m} is {b} years younger. How old is {m}?",
        "{n} is {a} years old and {m} is {b}. How many years older is {n}?",
        "{n} has {a} {o}. {m} has {b} fewer. How many does {m} have?",
        "{n} has {a} {o} and {m} has {b} {o} less. How many does {m} have?",
        "{n} needs {a} {o} and has {b}. How many more {o} {does} {t} need?",
        "{n} wants {a} {o}. {n} already has {b}. How many more are needed?",
        "A book has {a} pages. {n} has read {b} pages. How many pages are left?",
        "{n} has {a} dollars. A {g} costs {b} dollars. How much is left?",
    ),
    True: (
        "How many more {o} does {n} have than {m} if {n} has {a} and {m} has {b}?",
        "Out of {a} {o}, {b} are red. How many are not red?",
        "{n} has {a} {o}, but {m} has only {b}. How many more {o} does {n} have?",
        "{n} needs {a} {o} but has only {b} of them. How many more are needed?",
    ),
}  # fmt: skip


def _verb(text: str, person: int) -> str:
    """Pick a form of every "give away/gives away/gave away" in the text. person: 0 base, 1 third, 2 past."""
    head, slash, tail = text.partition("{")
    return head.split("/")[person].strip() + (" " if "/" in head else "") + slash + tail if "/" in head else text


def _event(rng: random.Random, sign: int, held_out: bool, person: int, told: str) -> tuple[str, bool]:
    """One event that adds (sign 1) or takes away (sign -1) {b} things, and whether it brings its own subject.

    told: the person of the story as an object ("me", "{n}").
    """
    kind = rng.random()
    if kind < 0.15:
        return rng.choice((_ARRIVALS if sign > 0 else _DEPARTURES)[held_out]).split("/")[person // 2], True
    if sign > 0 and kind < 0.32:
        return rng.choice(_GIFTS[held_out]).replace("{t}", told), True
    if sign < 0 and kind < 0.5:
        return _verb(rng.choice(_PRESENTS[held_out]), person), False
    if not held_out and rng.random() < 0.35:
        # A verb nobody has seen: "more" or "of them" has to say which way it goes.
        verb = made_up_word(rng) + ("", "s", "ed")[person]
        return f"{verb} {rng.choice(_TELLING_GAINS if sign > 0 else _TELLING_LOSSES)}", False
    verbs, tails = (_GAINS, _GAIN_TAILS) if sign > 0 else (_LOSSES, _LOSS_TAILS)
    event = rng.choice(verbs[held_out]).split("/")[person] + " " + rng.choice(tails[held_out])
    if rng.random() < 0.25:
        event += " " + rng.choice(_ADVERBIALS[held_out])
    return event, False


def _sequence(rng: random.Random, operators: str, held_out: bool) -> tuple[str, str]:
    """A start, one event per operator and a question; returns the template and its subject, "{n}" or a pronoun."""
    self_told = rng.random() < 0.3
    text = rng.choice((_SELF_STARTS if self_told else _STARTS)[held_out])
    subject = text.split()[0].replace("I've", "I") if self_told else "{n}"
    person = 2 if " had " in text or rng.random() < 0.3 else (0 if self_told else 1)
    gender = rng.choice(("he", "she"))
    told = {"I": "me", "We": "us", "You": "you"}.get(subject, subject)
    for index, op in enumerate(operators):
        event, own_subject = _event(rng, 1 if op == "+" else -1, held_out, person, told)
        event = event.replace("{b}", "{" + "bc"[index] + "}")
        pronoun = subject if self_told or rng.random() < 0.6 else gender
        if not own_subject:
            event = f"{pronoun} {event}"
        joins = (". ", ". Then ", ". Later ", " and then ", ", then ", " and ", ", and ")
        join = rng.choice(joins if index == 0 else joins[:3])
        if join == " and " and not own_subject and rng.random() < 0.6:
            event = event.removeprefix(f"{pronoun} ")  # "Tom has 5 pens and buys 3 more"
        if join == ". ":
            event = event[:1].upper() + event[1:]
        elif not event.startswith("I "):
            event = event[:1].lower() + event[1:]
        text += join + event
    asks = [_ASK_NOW] + [_ASK_LEFT] * (2 * (operators[-1] == "-")) + [_ASK_TOTAL] * ("-" not in operators)
    ask = rng.choice(rng.choice(asks)[held_out])
    if rng.random() < 0.2 and ". " not in text:
        text = "If " + (text if text.startswith(("I ", "{n}", "I'")) else text[:1].lower() + text[1:])
        text += ", " + ask[:1].lower() + ask[1:]
    else:
        text += ". " + ask
    if not self_told and rng.random() < 0.5:
        text = text.replace("{t}", gender)
    return text, subject


def write_story(rng: random.Random, numbers: tuple[int, ...], operators: str, held_out: bool) -> Story:
    """A word problem for a + b, a - b (a >= b), a * b, or two events in a row."""
    name, other = rng.sample(NAMES_BY[held_out], 2)
    things, more_things = rng.sample(OBJECTS_BY[held_out], 2)
    group = rng.choice(CONTAINERS_ALL)
    subject = "{n}"
    if operators == "*":
        template = rng.choice(_PRODUCTS[held_out])
        if rng.random() < 0.3:
            template = template.replace("{n}", "I").replace("I has", "I have").replace("I buys", "I buy")
            template = template.replace("I fills", "I fill").replace("I sells", "I sell").replace("I makes", "I make")
            template = template.replace("I reads", "I read").replace("I plants", "I plant").replace("I packs", "I pack")
            subject = "I"
    elif operators == "+" and rng.random() < 0.35:
        template = rng.choice(_TOGETHER[held_out])
    elif operators == "-" and rng.random() < 0.3:
        template = rng.choice(_DIFFERENCE[held_out])
    else:
        template, subject = _sequence(rng, operators, held_out)
    asked = {"I": "I", "We": "we", "You": "you", "{n}": name}[subject]
    does = "do" if subject != "{n}" else "does"
    values = {
        "n": name, "m": other, "o": things, "o2": more_things, "g": group, "gs": plural(group),
        "p": rng.choice(PLACES_ALL), "t": asked, "does": does, "a": numbers[0], "b": numbers[1], "c": numbers[-1],
    }  # fmt: skip
    text = template.format(**values)
    return Story(text[:1].upper() + text[1:], numbers, operators)
